"""Feature networks: the embedded one that ships inside the package, and any other by name.

    from edgead.server_side.backbones import load_backbone
    backbone = load_backbone()                     # embedded, no download
    maps = backbone(image)                         # [B, 3, H, W] in 0..1 -> maps at strides 8 and 16

| name | what it is |
|---|---|
| `embedded` | compact, distilled, its weights in the package |
| `random` | the same network untrained, from a seed |
| `resnet18`, `timm:resnet18` | any `timm` model with feature maps; pretrained weights need the network once |
| `resnet18:random` | the same with random weights, from a seed |
| `mobilenet_v2_tflite` | the embedded one's teacher, from a TensorFlow Lite file given as weights |
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from edgead.runtime.errors import BackboneError, missing_dependency
from edgead.server_side.backbones.base import Backbone
from edgead.server_side.backbones.embedded import (
    EMBEDDED_WEIGHTS,
    EmbeddedBackbone,
    embedded_card,
    load_embedded,
    multiply_adds,
    random_embedded,
)

__all__ = [
    "Backbone",
    "EmbeddedBackbone",
    "embedded_card",
    "list_backbones",
    "load_backbone",
    "multiply_adds",
]

_TEACHER = "mobilenet_v2_tflite"
_PREFIX = "timm:"
_RANDOM = ":random"

_NAMES = {
    "embedded": "compact, distilled, its weights in the package; the default",
    "random": "the embedded network untrained, from a seed",
    "timm:NAME": "any timm model with feature maps, pretrained; also plain NAME",
    "timm:NAME:random": "the same with random weights, from a seed",
    _TEACHER: "MobileNetV2 from a TensorFlow Lite file given as weights",
}


def list_backbones() -> dict[str, str]:
    """Name or pattern of a name -> what it is."""
    return dict(_NAMES)


def load_backbone(
    name: str = "embedded",
    weights: Path | None = None,
    layers: Sequence[str | int] | None = None,
    seed: int = 0,
) -> Backbone:
    """Load a backbone by name.

    Args:
        name: one of `list_backbones`.
        weights: a local file of weights (safetensors; `.pth` of plain tensors; the TensorFlow Lite file for
            `mobilenet_v2_tflite`) instead of those that the name stands for.
        layers: which maps to return: strides 8 and 16 for the embedded network, block numbers for
            `mobilenet_v2_tflite`, module names or level numbers for `timm`. By default those at strides 8
            and 16.
        seed: of random weights.

    Returns:
        the frozen backbone, float32 on the CPU, in evaluation mode.

    Raises:
        BackboneError: an unknown name or layer, or weights that are missing, unreachable or do not fit.
        MissingDependencyError: the name needs a package that is not installed.
    """
    if name in ("embedded", "random"):
        if name == "embedded":
            model = load_embedded(weights or EMBEDDED_WEIGHTS)
        else:
            model = random_embedded(seed).eval().requires_grad_(False)
            model.name = name
        return model if layers is None else model.only(_numbers(name, layers))
    if name == _TEACHER:
        from edgead.server_side.backbones.mobilenet_v2 import DEFAULT_TAPS, load_mobilenet_v2

        if weights is None:
            raise BackboneError(
                wanted=f"the TensorFlow Lite file of '{_TEACHER}'",
                got="no weights",
                next_step="Pass --backbone-weights mobilenet_v2_1.0_224_quant.tflite.",
            )
        return load_mobilenet_v2(weights, DEFAULT_TAPS if layers is None else _numbers(name, layers))
    return _from_timm(name, weights, layers, seed)


def _from_timm(name: str, weights: Path | None, layers: Sequence[str | int] | None, seed: int) -> Backbone:
    from edgead.server_side.backbones.timm_backbone import is_timm_model, load_timm, timm_models

    random = name.endswith(_RANDOM)
    plain = name.removeprefix(_PREFIX).removesuffix(_RANDOM)
    if not is_timm_model(plain):
        known = timm_models()
        if name.startswith(_PREFIX) and not known:
            raise missing_dependency("timm", "server", f"the backbone '{name}'")
        near = difflib.get_close_matches(plain, ["embedded", "random", _TEACHER, *known], n=3)
        without = "" if known else " (timm, which knows more, is not installed)"
        raise BackboneError(
            wanted=f"a backbone: {', '.join(_NAMES)}",
            got=f"'{name}'{without}",
            next_step=f"Did you mean {' or '.join(near)}?" if near else "Use one of these names.",
        )
    backbone = load_timm(plain, weights=weights, layers=layers, random_seed=seed if random else None)
    backbone.name = name
    return backbone


def _numbers(name: str, layers: Sequence[str | int]) -> list[int]:
    try:
        return [int(layer) for layer in layers]
    except ValueError as error:
        raise BackboneError(
            wanted=f"numbers as layers of '{name}'",
            got=", ".join(map(str, layers)),
            next_step="Leave the layers out for the usual ones.",
        ) from error
