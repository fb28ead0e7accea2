"""open_clip models by name or own config, with weights that were named: never fetched unasked, never pickled code."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgead.detector_file import weights_digest
from edgead.runtime.errors import BackboneError, missing_dependency
from edgead.server_side.backbones.base import read_state
from edgead.server_side.vision_language.pretrained import Weights, find_weights, near, require_network

_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
_CONFIG_FILE = "open_clip_config.json"
_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True, eq=False)
class VisionLanguageModel:
    """A frozen two-tower model.

    Attributes:
        name: open_clip's name, or the stem of the own config file.
        weights: the tag, the file's name or 'random:SEED', for cards.
        weights_sha256: hex digest over the state dict, see `edgead.detector_file.weights_digest`.
        module: open_clip's model in evaluation mode, float32.
        tokenizer: sentences -> int64 [T, context] tokens; a tokenizer that lives on a hub is fetched on first use.
        size: height and width of its image input, in pixels.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        logit_scale: the learned factor of cosine similarities (1 / temperature).
    """

    name: str
    weights: str
    weights_sha256: str
    module: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    logit_scale: float


def load_model(name: str, weights: str | Path | None) -> VisionLanguageModel:
    """Load a vision-language model.

    Args:
        name: an open_clip model name ("ViT-B-16-plus-240", "MobileCLIP-S1"), or the path of an own open_clip config
            (JSON, plain or as in `open_clip_config.json` with `model_cfg` and `preprocess_cfg`).
        weights: a pretrained tag of that model (fetched from open_clip's hub unless cached), a local checkpoint
            (.safetensors, .pt of plain tensors), 'TAG=FILE' for a local copy of a tag, or 'random:SEED'.

    Raises:
        MissingDependencyError: open_clip is not installed.
        BackboneError: an unknown model or tag, a config that makes no model, no weights named, weights of another
            architecture, damaged or not finite, or a tag that is neither cached nor reachable.
    """
    try:
        import open_clip
    except ImportError as error:
        raise missing_dependency("open_clip", "server", f"the vision-language model '{name}'") from error
    config, preprocessing, stem = _config(name, open_clip.list_models())
    source = find_weights(stem if config is not None else name.replace("/", "-"), weights)
    module = _build(open_clip, stem, config, preprocessing, source)
    if source.file is not None:
        _fit(open_clip, stem, module, source.file)
    visual: Any = module.visual
    settings = {**(visual.preprocess_cfg or {}), **({} if preprocessing else _pixels(source.settings))}
    height, width = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    scale: Any = module.logit_scale
    return VisionLanguageModel(
        name=stem,
        weights=source.name,
        weights_sha256=weights_digest(module).hex(),
        module=module.eval().requires_grad_(False),
        tokenizer=_Tokenizer(stem, config),
        size=(int(height), int(width)),
        mean=tuple(float(value) for value in settings["mean"]),
        std=tuple(float(value) for value in settings["std"]),
        logit_scale=float(scale.detach().exp().reshape(())),
    )


def _pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("mean", "std") if key in settings}


def _config(name: str, known: list[str]) -> tuple[dict[str, Any] | None, dict[str, Any], str]:
    """Own config (None for a built-in name), its preprocessing, and the model's name.

    Raises:
        BackboneError: neither a built-in name nor a config.
    """
    built_in = name.replace("/", "-")
    if built_in in known:
        return None, {}, built_in
    path = Path(name) / _CONFIG_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        kind = "no such file" if path.suffix == ".json" else f"'{name}'{near(built_in, known)}"
        raise BackboneError(
            wanted=f"an open_clip model or a config file ({name})" if path.suffix == ".json" else "an open_clip model",
            got=kind,
            next_step="Name one of open_clip.list_models(), such as ViT-B-16-plus-240, or the path of a JSON config.",
        )
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content.get("model_cfg", content)
        if not all(key in config for key in _CONFIG_KEYS):
            raise ValueError(f"the keys {', '.join(_CONFIG_KEYS)} are not all there")
        preprocessing = content.get("preprocess_cfg", {}) if "model_cfg" in content else {}
        return config, dict(preprocessing), path.parent.name if path.name == _CONFIG_FILE else path.stem
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BackboneError(
            wanted=f"an open_clip model config in {path}",
            got=f"something else ({_line(error)})",
            next_step=f"Write a JSON object with {', '.join(_CONFIG_KEYS)}, as open_clip's own model_configs.",
        ) from error


def _build(
    open_clip: Any, name: str, config: dict[str, Any] | None, preprocessing: dict[str, Any], source: Weights
) -> nn.Module:
    """The architecture with random weights from the seed (0 where a file replaces them)."""
    options: dict[str, Any] = {"load_weights": False, "pretrained_text": False, "pretrained_image": False}
    # A tag trained with the quick GELU means another network under the same name.
    if config is None and source.settings.get("quick_gelu"):
        options["force_quick_gelu"] = True
    text = config["text_cfg"] if config is not None else open_clip.get_model_config(name)["text_cfg"]
    if isinstance(text, dict) and text.get("hf_model_name"):
        place = str(text["hf_model_name"])
        require_network(
            "huggingface.co", f"the text tower '{place}' of '{name}'", "Choose a model with its own text tower."
        )
    with torch.random.fork_rng(devices=[]), _quiet(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(source.seed or 0)
        try:
            if config is None:
                module: nn.Module = open_clip.create_model(name, **options)
            else:
                # A folder of its own: open_clip's registry of names stays as it is.
                content = {"model_cfg": config, "preprocess_cfg": preprocessing}
                (Path(folder) / _CONFIG_FILE).write_text(json.dumps(content), encoding="utf-8")
                module = open_clip.create_model(f"local-dir:{folder}", **options)
        except Exception as error:  # open_clip forwards whatever a constructor raises
            raise BackboneError(
                wanted=f"the vision-language model '{name}'",
                got=f"open_clip's refusal: {_line(error)}",
                next_step="Check the model's config against those of open_clip's own models.",
            ) from error
    return module


def _fit(open_clip: Any, name: str, module: nn.Module, path: Path) -> None:
    """Load a checkpoint file into `module`.

    Raises:
        BackboneError: the file does not load, is not finite, or belongs to another architecture.
    """
    read_state(path)  # says clearly what is no file of plain tensors
    try:
        with _quiet():
            open_clip.load_checkpoint(module, str(path), strict=True, weights_only=True)
    except Exception as error:  # load_state_dict and open_clip's conversions raise several classes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        raise BackboneError(
            wanted=f"weights of '{name}' in {path}",
            got=f"those of another architecture: {reason[:240]}",
            next_step="Name the model that these weights belong to as --model, or other weights.",
        ) from error
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(
                wanted=f"finite weights in {path}",
                got=f"'{key}' with NaN or infinity",
                next_step="Fetch or save the weights again.",
            )


class _Tokenizer:
    """A model's tokenizer, made on first use: an image tower alone needs none."""

    def __init__(self, name: str, config: dict[str, Any] | None) -> None:
        self._name = name
        self._config = config
        self._made: Any = None

    def __call__(self, texts: list[str]) -> Tensor:
        """Sentences -> int64 [T, context].

        Raises:
            BackboneError: the tokenizer lives on a hub that is not reachable.
        """
        if self._made is None:
            self._made = self._make()
        tokens: Tensor = self._made(texts)
        return tokens

    def _make(self) -> Any:
        import open_clip

        config = self._config if self._config is not None else open_clip.get_model_config(self._name)
        text = config["text_cfg"]
        place = text.get("hf_tokenizer_name") or text.get("hf_model_name")
        wanted = f"the tokenizer '{place}' of the model '{self._name}'"
        advice = "Fetch it into the local Hugging Face cache, or choose a model with open_clip's own tokenizer."
        if place and not _has_tokenizer(place):
            require_network("huggingface.co", wanted, advice)
        try:
            with _quiet():
                if self._config is None or place:
                    return self._named(open_clip, text, place)
                return open_clip.SimpleTokenizer(
                    context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
                )
        except Exception as error:  # transformers and the hub's client raise what their layers raise
            raise BackboneError(wanted=wanted, got=f"a failure: {_line(error)}", next_step=advice) from error

    def _named(self, open_clip: Any, text: dict[str, Any], place: str | None) -> Any:
        if self._config is None:
            return open_clip.get_tokenizer(self._name)
        return open_clip.tokenizer.HFTokenizer(
            place, context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
        )


def _has_tokenizer(place: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if Path(place).is_dir():
        return True
    return isinstance(try_to_load_from_cache(place, "tokenizer_config.json"), str)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's log and warnings, which go to the root logger, away from edgead's users."""
    root = logging.getLogger()
    disabled = root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
