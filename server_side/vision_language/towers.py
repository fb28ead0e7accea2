"""From a model to its tower."""

from __future__ import annotations

from typing import Any

import torch

from edgead.runtime.errors import BackboneError
from edgead.server_side.vision_language.conv_tower import ConvTower, is_pyramid
from edgead.server_side.vision_language.models import VisionLanguageModel
from edgead.server_side.vision_language.tower import VisionTower
from edgead.server_side.vision_language.vit_tower import open_clip_vit

_SUPPORTED = (
    "open_clip's own vision transformers with class-token or mean pooling (ViT-B-16-plus-240 ...), and convolutional "
    "towers with mean pooling (MobileCLIP-S1 ...)"
)
_TOLERANCE = 1e-3
"""Of the joint embedding, relative to its largest entry: a tower that computes something else is far beyond it."""


def tower_of(model: VisionLanguageModel) -> VisionTower:
    """The image tower of `model` in plain operators, sharing its weights where nothing had to be fused.

    Raises:
        BackboneError: a tower that is not supported; the message says which are.
    """
    tower = _tower(model).eval().requires_grad_(False)
    _check(model, tower)
    return tower


def _tower(model: VisionLanguageModel) -> VisionTower:
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    visual: Any = model.module.visual
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None:
            raise _unsupported(model, "one with an attentional pool")
        if not all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks):
            raise _unsupported(model, "one with custom attention blocks")
        if visual.pool_type not in ("tok", "avg"):
            raise _unsupported(model, f"one with the pooling '{visual.pool_type}'")
        return open_clip_vit(visual, model.size, model.mean, model.std)
    if is_pyramid(visual):
        return ConvTower(visual, model.size, model.mean, model.std)
    raise _unsupported(model, type(visual).__name__)


def _check(model: VisionLanguageModel, tower: VisionTower) -> None:
    """Compare with open_clip's own forward on one noise image: a mistake here would spoil every detector."""
    module: Any = model.module
    noise = torch.randn(1, 3, *model.size, generator=torch.Generator().manual_seed(0))
    device = next(module.parameters()).device
    with torch.inference_mode():
        wanted = module.encode_image(noise.to(device))
        got = tower.to(device).encode(noise.to(device), (), (), False).pooled
    error = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        raise _unsupported(model, f"one whose embedding differs from open_clip's by {error:.2g}")


def _unsupported(model: VisionLanguageModel, got: str) -> BackboneError:
    return BackboneError(
        wanted=f"an image tower that edgead can take apart: {_SUPPORTED}",
        got=f"{got} in '{model.name}'",
        next_step="Choose another model.",
    )
