"""Which cells of a feature map show an anomaly, from the mask of its picture, for detectors that train cell by cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.server_side.detectors.trained import Anomalies

NORMAL, ANOMALOUS, UNKNOWN = 0, 1, -1
_COVERED = 0.25


def cell_labels(anomalies: Anomalies, grid: tuple[int, int]) -> Tensor:
    """Labels of the cells of every picture.

    A cell is anomalous if a quarter of it is masked, or, where the mask is thinner than that, half of what its most
    masked cell has: every mask has an anomalous cell. It is normal if neither it nor one of its eight neighbours
    holds a masked pixel, as features reach beyond their cell. All others, and all cells of a picture without a
    mask, are unknown.

    Args:
        anomalies: pictures with their masks.
        grid: rows and columns of the map; the pictures' sides are multiples of them.

    Returns:
        int8 [M, rows, columns] of `NORMAL`, `ANOMALOUS` and `UNKNOWN`.
    """
    found = torch.full((len(anomalies), *grid), UNKNOWN, dtype=torch.int8)
    if not len(anomalies):
        return found
    masks = torch.from_numpy(anomalies.masks).float()[:, None]
    kernel = (masks.shape[2] // grid[0], masks.shape[3] // grid[1])
    covered = F.avg_pool2d(masks, kernel)
    enough = (covered.amax((1, 2, 3), keepdim=True) / 2).clamp_max(_COVERED)
    near = F.max_pool2d(covered, 3, stride=1, padding=1)
    known = torch.from_numpy(anomalies.known)[:, None, None]
    found[known & (near[:, 0] == 0)] = NORMAL
    found[known & (covered > 0)[:, 0] & (covered >= enough)[:, 0]] = ANOMALOUS
    return found


__all__: Sequence[str] = ("ANOMALOUS", "NORMAL", "UNKNOWN", "cell_labels")
