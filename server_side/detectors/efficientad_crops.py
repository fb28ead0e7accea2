"""Crops of frames on the cells of a patch description network (PDN), which has no padding: a crop's cells are the
frame's own."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.server_side.detectors.efficientad_networks import CELL, FIELD, MEAN, STD, cells

CROP = 128
"""Side of the crop of a frame that a step looks at, in pixels: most of its cost is then in cells that count."""
_REACH = 16
"""Side in pixels of the middle of a cell's field where a mask makes the cell anomalous."""

Place = tuple[int, int, int, int]
"""Top, left, height and width of a crop in pixels."""


def normalised(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], standardised as the networks want it."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255.0
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def crop_place(frame: tuple[int, ...], drawn: torch.Generator, side: int = CROP) -> Place:
    """A random crop on the PDN's cells, at most `side` on a side, of a frame of height and width `frame`."""
    height, width = (min(side, extent) for extent in frame)
    top = int(torch.randint((frame[0] - height) // CELL + 1, (1,), generator=drawn)) * CELL
    left = int(torch.randint((frame[1] - width) // CELL + 1, (1,), generator=drawn)) * CELL
    return top, left, height, width


def place_around(marked: Tensor, frame: tuple[int, ...], drawn: torch.Generator, side: int = CROP) -> Place:
    """A crop with one marked cell, chosen at random, as near to its middle as the frame allows.

    Args:
        marked: bool [h, w], one at least.
        frame: its height and width in pixels.
        drawn: chooses.
        side: of the crop in pixels, at most.
    """
    chosen = torch.nonzero(marked)
    row, column = chosen[int(torch.randint(len(chosen), (1,), generator=drawn))].tolist()
    height, width = (min(side, extent) for extent in frame)
    top = min(max(row - cells(height) // 2, 0), (frame[0] - height) // CELL) * CELL
    left = min(max(column - cells(width) // 2, 0), (frame[1] - width) // CELL) * CELL
    return top, left, height, width


def cropped(frames: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """The pixels of a crop of frames [B, H, W, 3]."""
    top, left, height, width = place
    return frames[:, top : top + height, left : left + width]


def of_crop(maps: Tensor, place: Place, border: int = 0) -> Tensor:
    """The cells of maps [..., h, w] that a crop gives; `border` is 4 for maps of the whole H / 4 x W / 4 grid."""
    top, left = place[0] // CELL + border, place[1] // CELL + border
    return maps[..., top : top + cells(place[2]), left : left + cells(place[3])]


def reached(masks: NDArray[np.bool_]) -> Tensor:
    """Cells in the middle of whose field a mask lies: bool [M, h, w] from bool [M, H, W]."""
    inset = (FIELD - _REACH) // 2
    covered = torch.from_numpy(masks[:, inset:, inset:].astype(np.float32))
    pooled = F.max_pool2d(covered[:, None], _REACH, CELL)[:, 0] > 0
    return pooled[:, : cells(masks.shape[1]), : cells(masks.shape[2])]


__all__ = ["CROP", "Place", "crop_place", "cropped", "normalised", "of_crop", "place_around", "reached"]
