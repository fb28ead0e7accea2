"""What the heads of text-guided detectors share: class embeddings, masked comparisons, maps from windows.

Everything is float32 and of operators that every engine has. Padded rows (those from a bank's or a table's count
on) change no reduction, and an empty bank is defined: it is as unlike everything as can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort
from edgead.server_side.detectors.memory_bank import smoothing_matrix

TABLE, STATE, TABLE_ROWS = "text.table", "text.state", "text.table.rows"
"""The prompts' embeddings [T, E], which of them speak of defects [T], how many rows are valid [1]."""
NORMAL, ANOMALOUS = 0, 1
"""Values of `text.state`, and places in `class_embeddings`."""
LEAST_LIKE = -1.0
"""The least cosine there is: what a padded row, or a bank without rows, is to everything."""
FLOOR = 1e-9
"""Scores below this count as this in a harmonic mean: it would otherwise be 0 or NaN where one of them is 0."""


def text_ports(dimensions: int) -> tuple[KnowledgePort, KnowledgePort]:
    """`text.table` and `text.state` of a joint space of `dimensions`, in the order of `class_embeddings`."""
    return (
        KnowledgePort(TABLE, "float32", ("T", dimensions), rows=TABLE_ROWS, min_rows=2),
        KnowledgePort(STATE, "float32", ("T",)),
    )


def valid_rows(array: Tensor, rows: Tensor) -> Tensor:
    """Which rows of [N, ...] are not padding, bool [N], by the count `rows` int32 [1]."""
    return torch.arange(array.shape[0], device=array.device, dtype=torch.int32) < rows


def unit(vectors: Tensor) -> Tensor:
    """[..., D] at length 1; a zero vector stays zero."""
    return vectors / vectors.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()


def class_embeddings(table: Tensor, rows: Tensor, state: Tensor) -> Tensor:
    """The mean of each class's prompts, at length 1 (the prompt ensemble of CLIP, https://arxiv.org/abs/2103.00020).

    Args:
        table: float32 [T, E].
        rows: int32 [1], how many rows of table and state are valid.
        state: float32 [T], 0 for a prompt of a normal part, 1 for one of a defect.

    Returns:
        float32 [2, E]: normal, anomalous. A class without a prompt is the zero vector.
    """
    valid = valid_rows(table, rows)
    counts, anomalous = valid.to(table.dtype), (state > 0.5).to(table.dtype)
    member = torch.stack([counts * (1.0 - anomalous), counts * anomalous])  # [2, T]
    # Padding may hold anything finite; it must not enter even with weight 0.
    kept = torch.where(valid.unsqueeze(1), table, 0.0)
    return unit(member @ kept / member.sum(1, keepdim=True).clamp_min(1.0))


def anomalous_share(features: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """softmax(cos(f, class) / temperature) at the anomalous class, [...], equation 1 of WinCLIP.

    Args:
        features: float32 [..., E], of any length.
        classes: float32 [2, E] of `class_embeddings`.
        temperature: of the softmax.
    """
    cosine = torch.matmul(unit(features), classes.T)
    # Of two classes the softmax is the logistic function of their difference.
    return torch.sigmoid((cosine[..., ANOMALOUS] - cosine[..., NORMAL]) / temperature)


def most_like(features: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the most similar valid row and its index, both [B, P].

    Args:
        features: float32 [B, P, D], of any length.
        bank: float32 [N, D], rows of any length; the first `rows` (int32 [1]) are valid, possibly none: the cosine
            is then `LEAST_LIKE` and the index 0.
    """
    cosine = torch.matmul(unit(features), unit(bank).T)
    best, index = torch.where(valid_rows(bank, rows), cosine, LEAST_LIKE).topk(1, dim=-1)
    return best.squeeze(-1), index.squeeze(-1)


def association(features: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """min over the bank of (1 - cos) / 2, in 0..1, and the row it is of, both [B, P] (equation 4 of WinCLIP).

    Args:
        features, bank, rows: as `most_like`; without a valid row the association is 1.
    """
    cosine, index = most_like(features, bank, rows)
    return ((1.0 - cosine) * 0.5).clamp(0.0, 1.0), index


def present(rows: Tensor) -> Tensor:
    """1.0 if a bank has a valid row, else 0.0: float32 [1]."""
    return (rows > 0).to(torch.float32)


def prompt_likeness(image: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Cosine of image embeddings [B, E] with every prompt [T, E], as evidence: [B, T], padding `LEAST_LIKE`."""
    return torch.where(valid_rows(table, rows), torch.matmul(unit(image), unit(table).T), LEAST_LIKE)


def mean_of_present(maps: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the maps whose bank has a row, and whether there is any.

    Args:
        maps: each [B, ...], all of one shape.
        rows: int32 [1] for each, the count of its bank.

    Returns:
        the mean [B, ...], 0 where no bank has a row, and float32 [1], 1.0 or 0.0.
    """
    weights = [present(count) for count in rows]
    total = torch.stack(weights).sum(0)
    mean = torch.stack([weight * each for weight, each in zip(weights, maps, strict=True)]).sum(0)
    return mean / total.clamp_min(1.0), total.clamp_max(1.0)


class HarmonicWindows(nn.Module):
    """Scores of k x k windows at stride 1 -> a score for each patch: the harmonic mean over the windows that hold it.

    WinCLIP, section 4.2. Which windows hold a patch is separable, so the sum of reciprocals is two small products
    with constant matrices of 0 and 1.

    Args:
        grid: rows and columns of patches.
        scale: patches along a window's side, at most the smaller side of the grid.
    """

    rows: Tensor
    columns: Tensor
    count: Tensor

    def __init__(self, grid: tuple[int, int], scale: int) -> None:
        super().__init__()
        self.windows = (grid[0] - scale + 1, grid[1] - scale + 1)
        rows, columns = cover(grid[0], scale), cover(grid[1], scale)
        self.register_buffer("rows", torch.from_numpy(rows))
        self.register_buffer("columns", torch.from_numpy(columns.T.copy()))
        self.register_buffer("count", torch.from_numpy(np.outer(rows.sum(1), columns.sum(1))))

    def forward(self, scores: Tensor) -> Tensor:
        """[B, W] window scores in 0..1, row by row -> [B, rows, columns]."""
        reciprocal = 1.0 / scores.clamp_min(FLOOR).reshape(-1, *self.windows)
        return self.count / (self.rows @ reciprocal @ self.columns)


def cover(patches: int, scale: int) -> NDArray[np.float32]:
    """Which of the windows along one side hold which patch: 0 or 1, float32 [patches, patches - scale + 1]."""
    place, start = np.arange(patches)[:, None], np.arange(patches - scale + 1)
    return ((start <= place) & (place < start + scale)).astype(np.float32)


class Upsample(nn.Module):
    """Patch values -> pixels of the engine's frame: bilinear, corners as `align_corners=False`, then a blur.

    Args:
        grid: rows and columns of patches.
        size: height and width of the frame in pixels.
        sigma: standard deviation of the blur in pixels; 0 leaves it out.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], sigma: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(smoothing_matrix(grid[0], size[0], sigma)))
        self.register_buffer("columns", torch.from_numpy(smoothing_matrix(grid[1], size[1], sigma).T.copy()))

    def forward(self, grid: Tensor) -> Tensor:
        """[B, rows, columns] -> [B, H, W]."""
        return self.rows @ grid @ self.columns


__all__: Sequence[str] = (
    "ANOMALOUS",
    "FLOOR",
    "LEAST_LIKE",
    "NORMAL",
    "STATE",
    "TABLE",
    "TABLE_ROWS",
    "HarmonicWindows",
    "Upsample",
    "anomalous_share",
    "association",
    "class_embeddings",
    "cover",
    "mean_of_present",
    "most_like",
    "present",
    "prompt_likeness",
    "text_ports",
    "unit",
    "valid_rows",
)
