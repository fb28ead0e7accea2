"""The maps of a frozen backbone side by side: what small trained networks see."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.server_side.backbones import Backbone
from edgead.server_side.devices import CPU, placed

_BATCH_EMBEDDED = 16


def joined_maps(backbone: Backbone, image: Tensor) -> Tensor:
    """All maps of a backbone at the grid of the coarsest, side by side.

    Args:
        backbone: frozen.
        image: uint8 RGB [B, H, W, 3].

    Returns:
        float32 [B, C, h, w].
    """
    maps = backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
    strides = backbone.strides
    coarsest = max(strides)
    return torch.cat(
        [each if s == coarsest else F.avg_pool2d(each, coarsest // s) for each, s in zip(maps, strides, strict=True)], 1
    )


def maps_of(backbone: Backbone, frames: NDArray[np.uint8], device: torch.device = CPU) -> Tensor:
    """`joined_maps` of many frames uint8 [N, H, W, 3], in batches, without gradients: computed on a device, kept on the
    CPU.
    """
    channels = sum(backbone.channels)
    height, width = (side // max(backbone.strides) for side in frames.shape[1:3])
    found = torch.empty(len(frames), channels, height, width)
    with placed(backbone, device), torch.inference_mode():
        for at in range(0, len(frames), _BATCH_EMBEDDED):
            part = torch.from_numpy(np.ascontiguousarray(frames[at : at + _BATCH_EMBEDDED]))
            found[at : at + len(part)] = joined_maps(backbone, part.to(device))
    return found


__all__ = ["joined_maps", "maps_of"]
