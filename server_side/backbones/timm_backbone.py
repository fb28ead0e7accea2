"""Any convolutional or hierarchical `timm` model as a backbone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgead.runtime.errors import BackboneError, missing_dependency
from edgead.server_side.backbones.base import Backbone, read_state, weights_mismatch

DEFAULT_STRIDES = (8, 16)
"""The strides tapped when no layers are named: PatchCore's layer2 and layer3 of a ResNet."""

_HUB = "huggingface.co"


class TimmBackbone(Backbone):
    """Feature maps of a `timm` model, with the model's own mean and standard deviation.

    Args:
        name: the name to report.
        model: made with `features_only`; only the wanted levels are returned.
        picks: positions, among the maps that `model` returns, of those to give.
        strides: of the picked maps.
        channels: of the picked maps.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        name: str,
        model: nn.Module,
        picks: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        mean: Sequence[float],
        deviation: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.strides = tuple(strides)
        self.channels = tuple(channels)
        self.model = model
        self._picks = tuple(picks)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """As `Backbone.forward`."""
        maps = self.model((image - self.mean) / self.deviation)
        return [maps[index] for index in self._picks]


def timm_models() -> list[str]:
    """Names of the models that the installed `timm` knows; empty without `timm`."""
    try:
        import timm
    except ImportError:
        return []
    return [str(name) for name in timm.list_models()]


def is_timm_model(name: str) -> bool:
    """Whether the installed `timm` knows `name` (with or without a pretrained tag)."""
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name))


def load_timm(
    name: str,
    *,
    weights: Path | None = None,
    layers: Sequence[str | int] | None = None,
    random_seed: int | None = None,
) -> TimmBackbone:
    """Make a `timm` model into a backbone.

    Args:
        name: a `timm` model name.
        weights: a local file of the model's weights; nothing is downloaded then.
        layers: module names ("layer2") or level numbers; by default the levels of strides 8 and 16, or the
            last two where a model has none of these.
        random_seed: random weights from this seed instead of pretrained ones.

    Returns:
        the frozen backbone in evaluation mode.

    Raises:
        MissingDependencyError: `timm` is not installed.
        BackboneError: no feature maps in this model, unknown layers, weights that do not fit, or pretrained
            weights that are neither cached nor reachable.
    """
    try:
        import timm
    except ImportError as error:
        raise missing_dependency("timm", "server", f"the backbone '{name}'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed or 0)
        model = _create(timm, name, pretrained=False)
    config = model.pretrained_cfg
    if random_seed is None:
        file = weights or _cached(config)
        if file is not None:
            _fit(name, model, file)
        else:
            _require_network(name, config)
            model = _create(timm, name, pretrained=True)
    info = model.feature_info
    picks = _levels(name, info, layers)
    backbone = TimmBackbone(
        name,
        model,
        picks,
        [info.reduction()[i] for i in picks],
        [info.channels()[i] for i in picks],
        config["mean"],
        config["std"],
    )
    return backbone.eval().requires_grad_(False)


def _create(timm: Any, name: str, *, pretrained: bool) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True)
    except Exception as error:  # timm forwards whatever a model or the hub's client raises
        if pretrained:
            raise _unreachable(name, str(error).splitlines()[0]) from error
        raise BackboneError(
            wanted=f"feature maps of the timm model '{name}'",
            got=f"timm's refusal: {(str(error).splitlines() or [type(error).__name__])[0]}",
            next_step="Choose a model with feature maps, such as resnet18.",
        ) from error


def _levels(name: str, info: Any, layers: Sequence[str | int] | None) -> list[int]:
    modules: list[str] = list(info.module_name())
    strides: list[int] = list(info.reduction())
    if layers is None:
        usual = [strides.index(stride) for stride in DEFAULT_STRIDES if stride in strides]
        return usual if len(usual) == len(DEFAULT_STRIDES) else list(range(len(strides)))[-2:]
    picks = []
    for layer in layers:
        if isinstance(layer, str) and layer in modules:
            picks.append(modules.index(layer))
        elif str(layer).isdecimal() and int(layer) < len(modules):
            picks.append(int(layer))
        else:
            raise BackboneError(
                wanted=f"layers of '{name}' among {', '.join(modules)} (or 0 to {len(modules) - 1})",
                got=f"{layer!r}",
                next_step="Name some of these layers.",
            )
    return sorted(set(picks))


def _fit(name: str, model: nn.Module, path: Path) -> None:
    """Load whole-model weights into a features-only model, whose module names may be flattened."""
    found = read_state(path)
    state = {}
    for key, own in model.state_dict().items():
        flat = re.sub(r"^([A-Za-z]\w*?)_(\d+)\.", r"\1.\2.", key)
        source = next((k for k in (key, flat, key.removeprefix("model.")) if k in found), None)
        if source is None:
            if key.endswith("num_batches_tracked"):
                state[key] = own
                continue
            raise weights_mismatch(name, path, f"no tensor '{key}'")
        if found[source].shape != own.shape:
            shapes = f"{tuple(found[source].shape)} in place of {tuple(own.shape)}"
            raise weights_mismatch(name, path, f"'{source}' is {shapes}")
        state[key] = found[source]
    model.load_state_dict(state)


def _cached(config: dict[str, Any]) -> Path | None:
    """The pretrained weights in the hub's local cache, so that no network is asked for them."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    if not config.get("hf_hub_id"):
        return None
    found = try_to_load_from_cache(config["hf_hub_id"], "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _require_network(name: str, config: dict[str, Any]) -> None:
    """Fail in a moment where the hub's client would retry for a minute.

    Raises:
        BackboneError: the hub's name does not resolve and no proxy or mirror is set.
    """
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_ENDPOINT"))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _unreachable(name, "HF_HUB_OFFLINE is set", config)
    if not proxied:
        try:
            socket.getaddrinfo(_HUB, 443)
        except OSError as error:
            raise _unreachable(name, f"{_HUB} is not reachable from here", config) from error


def _unreachable(name: str, reason: str, config: dict[str, Any] | None = None) -> BackboneError:
    repository = (config or {}).get("hf_hub_id") or name
    return BackboneError(
        wanted=f"pretrained weights of the timm model '{name}' ({repository}: model.safetensors)",
        got=f"neither a copy in the local Hugging Face cache nor the network ({reason})",
        next_step=f"Pass --backbone-weights FILE, use the embedded backbone, or '{name}:random' for a trial.",
    )
