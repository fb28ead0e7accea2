"""The losses of ReContrast (see `recontrast`): global cosine distance, mining of hard cells, and ours for anomalies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.server_side.detectors.masked_cells import ANOMALOUS
from edgead.server_side.detectors.recontrast_network import Maps

ALPHA = (-3.0, 1.0)
"""Where the mining of hard cells begins and ends."""
MARGIN = 0.5
"""Cosine distance that cells of anomalies are pushed to."""


def cell_distance(encoded: Tensor, decoded: Tensor) -> Tensor:
    """M: cosine distance per cell, of [B, C, h, w] each: [B, h, w] in 0..2."""
    return 1.0 - F.cosine_similarity(encoded, decoded, dim=1)


def global_cosine(
    encoded: Maps, decoded: Maps, *, alpha: float | None = None, counted: Sequence[Tensor] | None = None
) -> Tensor:
    """The global cosine distance, with hard cells mined or not; see the module.

    Args:
        encoded: targets [B, C, h, w], which get no gradient.
        decoded: what was rebuilt, of the same shapes.
        alpha: cells whose distance is below mean + alpha * (unbiased) standard deviation over the batch get no
            gradient; None for all.
        counted: per map bool [B, h, w], cells that are compared; all if None. The others are 0 in both vectors.

    Returns:
        sum over the maps of the mean over the batch, a scalar.
    """
    total = decoded[0].new_zeros(())
    for place, (target, made) in enumerate(zip(encoded, decoded, strict=True)):
        target = target.detach()
        if alpha is not None:
            distance = cell_distance(target, made).detach()
            seen = distance if counted is None else distance[counted[place]]
            easy = distance < seen.mean() + alpha * seen.std()
            made = torch.where(easy[:, None], made.detach(), made)
        if counted is not None:
            cells = counted[place][:, None].to(made.dtype)
            target, made = target * cells, made * cells
        total = total + (1.0 - F.cosine_similarity(target.flatten(1), made.flatten(1))).mean()
    return total


def push(encoded: Maps, decoded: Maps, labels: Sequence[Tensor], known: Tensor, margin: float = MARGIN) -> Tensor:
    """Ours, see the module: what cells of anomalies lack to the margin, mean over cells, sum over maps.

    Args:
        encoded: targets [M, C, h, w], which get no gradient.
        decoded: what was rebuilt, of the same shapes.
        labels: per map int8 [M, h, w] of `masked_cells`.
        known: bool [M], images with a mask.
        margin: distance from which on a cell is far enough.
    """
    total = decoded[0].new_zeros(())
    for target, made, label in zip(encoded, decoded, labels, strict=True):
        distance = cell_distance(target.detach(), made)
        chosen = torch.cat([distance[label == ANOMALOUS], distance[~known].flatten(1).amax(1)])
        total = total + (margin - chosen).clamp_min(0).sum() / max(chosen.numel(), 1)
    return total


def alpha_at(step: int, steps: int) -> float:
    """alpha of the mining: -3 to 1 over the first tenth of the steps, 1 from there on."""
    first, last = ALPHA
    return min(first + (last - first) * step / (0.1 * steps), last)


__all__: Sequence[str] = ("ALPHA", "MARGIN", "alpha_at", "cell_distance", "global_cosine", "push")
