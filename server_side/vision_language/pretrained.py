"""Where the weights of a named open_clip model are: a file, a pretrained tag, or a seed."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgead.runtime.errors import BackboneError

_HUB = "huggingface.co"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_RANDOM = "random:"


@dataclass(frozen=True)
class Weights:
    """Where weights come from.

    Attributes:
        name: how cards name them: the tag, the file's name, or 'random:SEED'.
        file: a local file, or None.
        seed: of random weights, or None.
        settings: what open_clip knows of the tag (mean, std, quick_gelu ...), or nothing.
    """

    name: str
    file: Path | None
    seed: int | None
    settings: Mapping[str, Any]


def tags_of(model: str) -> dict[str, Mapping[str, Any]]:
    """The pretrained tags of a built-in model and what open_clip knows of each."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    return {str(tag): get_pretrained_cfg(model, tag) for tag in list_pretrained_tags_by_model(model)}


def find_weights(model: str, weights: str | Path | None) -> Weights:
    """Where the weights of `model` are; fetches those of a tag unless they are in the local cache.

    Args:
        model: the built-in name, or the stem of an own config.
        weights: a tag, a file, 'TAG=FILE' (a local copy of a tag, with the tag's mean and standard deviation)
            or 'random:SEED'.

    Raises:
        BackboneError: nothing said, no such tag or file, or no network for a tag that is not cached.
    """
    tags = tags_of(model)
    if weights is None or str(weights) == "":
        raise BackboneError(
            wanted=f"weights of the vision-language model '{model}'",
            got="none named; edgead downloads nothing that is not asked for",
            next_step=_advice(tags),
        )
    text = str(weights)
    if isinstance(weights, str):
        if text.startswith(_RANDOM):
            return Weights(text, None, _seed(text), _common(tags))
        tag, equals, path = text.partition("=")
        if equals and tag in tags:
            return Weights(tag, _file(model, Path(path)), None, tags[tag])
        if text in tags:
            return Weights(text, _cached(tags[text]) or _download(model, text, tags[text]), None, tags[text])
        if not Path(text).exists() and Path(text).name == text and Path(text).suffix not in _SUFFIXES:
            raise BackboneError(
                wanted=f"a pretrained tag of '{model}'" + (f": {', '.join(tags)}" if tags else " (there is none)"),
                got=f"'{text}'{_near(text, list(tags))}",
                next_step=_advice(tags),
            )
    file = _file(model, Path(text))
    return Weights(file.name, file, None, _common(tags))


def require_network(host: str, wanted: str, next_step: str) -> None:
    """Fail in a moment where a client would retry for a minute.

    Raises:
        BackboneError: offline mode is set, or `host` does not resolve and no proxy or mirror is set.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        reason = "HF_HUB_OFFLINE is set"
    elif any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_ENDPOINT")):
        return
    else:
        try:
            socket.getaddrinfo(host, 443)
            return
        except OSError:
            reason = f"{host} is not reachable from here"
    raise BackboneError(wanted=wanted, got=f"no copy in the local cache, and {reason}", next_step=next_step)


def near(name: str, names: list[str]) -> str:
    """' (did you mean ...?)' if some of `names` resemble `name`, or nothing."""
    return _near(name, names)


def _near(name: str, names: list[str]) -> str:
    lowered = {known.lower(): known for known in names}
    found = [lowered[match] for match in difflib.get_close_matches(name.lower(), list(lowered), n=4, cutoff=0.5)]
    return f" (did you mean {', '.join(found)}?)" if found else ""


def _advice(tags: Mapping[str, Any]) -> str:
    local = "--model-weights FILE (a local open_clip checkpoint) or --model-weights random:0 for a trial"
    return f"Pass --model-weights TAG ({', '.join(tags)}), {local}." if tags else f"Pass {local}."


def _seed(text: str) -> int:
    digits = text.removeprefix(_RANDOM)
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 16):
        raise BackboneError(
            wanted="random weights as random:SEED with a whole number",
            got=f"'{text}'",
            next_step="Write for example --model-weights random:0.",
        )
    return int(digits)


def _common(tags: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Mean and standard deviation that all tags of a model share.

    MobileCLIP takes plain pixels and SigLIP its own constants, whichever file the weights lie in. Where tags differ
    (only ViT-L-14's do) OpenAI's constants apply, as in open_clip itself; TAG=FILE says otherwise.
    """
    found = {(tuple(settings["mean"]), tuple(settings["std"])) for settings in tags.values()}
    if len(found) != 1:
        return {}
    mean, std = found.pop()
    return {"mean": mean, "std": std}


def _file(model: str, path: Path) -> Path:
    if not path.is_file():
        raise BackboneError(
            wanted=f"weights of '{model}' at {path}",
            got="a folder" if path.is_dir() else "no such file",
            next_step="Check the path given as --model-weights.",
        )
    if path.suffix not in _SUFFIXES:
        raise BackboneError(
            wanted=f"weights as {', '.join(_SUFFIXES)}",
            got=f"{path}",
            next_step="Save open_clip's state dict as safetensors, or with torch.save as .pt.",
        )
    return path


def _places(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Repository and file name on the hub, most wanted first."""
    repository, _, file = str(settings.get("hf_hub", "")).rpartition("/")
    if repository:
        for name in (file,) if file else _HUB_FILES:
            yield repository, name


def _cached(settings: Mapping[str, Any]) -> Path | None:
    """The weights in a local cache, so that no network is asked for them."""
    from huggingface_hub import try_to_load_from_cache

    for repository, name in _places(settings):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(model: str, tag: str, settings: Mapping[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    place = str(settings.get("hf_hub") or settings.get("url"))
    wanted = f"pretrained weights '{tag}' of '{model}' ({place.rstrip('/')})"
    advice = f"Fetch them elsewhere and pass --model-weights {tag}=FILE, or --model-weights random:0 for a trial."
    require_network(_HUB if settings.get("hf_hub") else str(urlsplit(place).hostname), wanted, advice)
    try:
        return Path(download_pretrained(dict(settings)))
    except Exception as error:  # the hub's client raises what its layers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(wanted=wanted, got=f"a failed download: {reason}", next_step=advice) from error
