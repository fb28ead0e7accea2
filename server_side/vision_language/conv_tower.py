"""Convolutional towers (MobileCLIP's FastViT and timm's other pyramids) with mean pooling.

Such a tower pools the mean of its last feature map and sends it through its head. A cell, or the mean over a window
of cells, goes through the same head; where the head is linear, the embedding of the image is exactly the mean of
the embeddings of its cells.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgead.server_side.vision_language.tower import TowerOutput, VisionTower


class ConvTower(VisionTower):
    """A pyramid of convolutions.

    Patches and values are the cells of the last feature map through the head (so `width` is `embed_dim`); windows
    are means over k x k cells through the head; layers are the pyramid's stages, each with its own grid.

    Args:
        visual: open_clip's `TimmModel`. It is copied: branches that training needed are fused into one convolution,
            and attention is set to plain operators.
        size, mean, deviation: as `VisionTower`.
    """

    def __init__(self, visual: Any, size: tuple[int, int], mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__(size, mean, deviation)
        from timm.models import reparameterize_model

        self.trunk: Any = reparameterize_model(copy.deepcopy(visual.trunk).eval(), inplace=True)
        self.head: nn.Module = copy.deepcopy(visual.head).eval()
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                # timm reads the flag in `forward`; this copy is nobody else's.
                module.fused_attn = False  # type: ignore[assignment]
        with torch.inference_mode():
            last, stages = self._features(torch.zeros(1, 3, *size, device=self.mean.device))
            self.embed_dim = self._joint(last.mean(dim=(2, 3))).shape[1]
        self.grid = (last.shape[2], last.shape[3])
        self.width = self.embed_dim
        self.depth = len(stages)
        self.layer_grids = tuple((stage.shape[2], stage.shape[3]) for stage in stages)
        self.layer_widths = tuple(stage.shape[1] for stage in stages)

    def encode(self, pixels: Tensor, windows: Sequence[int], taps: Sequence[int], values: bool) -> TowerOutput:
        """As `VisionTower.encode`."""
        last, stages = self._features(pixels)
        patches = self._cells(last)
        return TowerOutput(
            pooled=self._joint(last.mean(dim=(2, 3))),
            patches=patches,
            windows=tuple(self._cells(F.avg_pool2d(last, scale, stride=1)) for scale in windows),
            layers=tuple(stages[layer - 1].flatten(2).transpose(1, 2) for layer in taps),
            values=patches if values else None,
        )

    def _features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, stages = self.trunk.forward_intermediates(pixels)
        return last, list(stages)

    def _cells(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, h * w, E]."""
        count = maps.shape[2] * maps.shape[3]
        return self._joint(maps.flatten(2).transpose(1, 2).flatten(0, 1)).reshape(-1, count, self.embed_dim)

    def _joint(self, cells: Tensor) -> Tensor:
        """[N, C] -> [N, E] through the head of timm and that of open_clip, as a map of one cell."""
        return torch.as_tensor(self.head(self.trunk.forward_head(cells[:, :, None, None])))


def is_pyramid(visual: Any) -> bool:
    """Whether open_clip's `TimmModel` has a pyramid of feature maps and pools their mean."""
    trunk = getattr(visual, "trunk", None)
    pool = getattr(getattr(trunk, "head", None), "global_pool", None)
    return (
        hasattr(trunk, "forward_intermediates")
        and hasattr(trunk, "forward_head")
        and getattr(pool, "pool_type", None) == "avg"
        and len(getattr(trunk, "feature_info", ())) > 1
        and "pool" not in dict(visual.head.named_children())
    )
