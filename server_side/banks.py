"""Memory banks: a few rows that stand for many (PatchCore's coreset), in bounded memory.

Greedy k-centre selection (Roth et al. 2022, algorithm 1; Sener and Savarese 2018): take the row that is
farthest from all rows taken so far, again and again. Distances are measured after a Gaussian random
projection (Johnson and Lindenstrauss), as the paper's authors do; the rows themselves are kept as they are.

A stream of any length is reduced in two stages. Each full chunk of rows is replaced by its own coreset, and the
final coreset is taken of what the chunks left: the union of coresets covers what the chunks covered, with the
radii adding up (composable coresets, Indyk et al. 2014).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgead.runtime.errors import InputError
from edgead.runtime.progress import Progress

CHUNK_ROWS = 16_384
"""Rows that are reduced at once; with the pool this bounds memory, whatever the number of images."""
KEEP = 4
"""A chunk leaves this many times its share of the final bank, so the second stage still has a choice."""
PROJECTED = 64
"""Dimensions in which distances are compared; fewer than that and rows keep their own."""


def greedy_coreset(
    rows: NDArray[np.float32],
    size: int,
    *,
    seed: int = 0,
    projected: int | None = PROJECTED,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Indices of a greedy k-centre coreset, in the order in which they were taken.

    Args:
        rows: float32 [n, D].
        size: how many to take; all of them if `size >= n`.
        seed: of the projection and of the first row.
        projected: dimensions of the random projection; None measures in all D.
        progress: advanced by one for each row taken.

    Returns:
        int64 [min(size, n)].

    Raises:
        InputError: no rows, or `size` below 1.
    """
    if not len(rows) or size < 1:
        raise InputError(wanted="at least one row to choose from and one to take", got=f"{len(rows)}, {size}")
    if size >= len(rows):
        return np.arange(len(rows))
    generator = torch.Generator().manual_seed(seed)
    points = torch.from_numpy(np.ascontiguousarray(rows))
    if projected is not None and rows.shape[1] > projected:
        matrix = torch.randn(rows.shape[1], projected, generator=generator) / projected**0.5
        points = points @ matrix
    norms = points.square().sum(1)
    taken = np.empty(size, np.int64)
    place = int(torch.randint(len(rows), (1,), generator=generator))
    distance = torch.full((len(rows),), torch.inf)
    for step in range(size):
        taken[step] = place
        torch.minimum(distance, _squared(points, norms, place), out=distance)
        distance[place] = -1.0  # taken; rounding must not offer it again
        place = int(distance.argmax())
        if progress is not None:
            progress.advance()
    return taken


def _squared(points: Tensor, norms: Tensor, place: int) -> Tensor:
    """Squared distances of all points to one of them, [n]."""
    return torch.addmv(norms, points, points[place], beta=1.0, alpha=-2.0).add_(norms[place]).clamp_min_(0.0)


class BankBuilder:
    """Collects rows from a stream of images and gives their coreset at the end.

    Memory: one chunk of `chunk_rows` rows and the pool of at most `KEEP * size` rows more, times D float32.

    Args:
        size: rows of the final bank.
        expected: rows that will come in all; decides how much a chunk may keep.
        seed: makes the selection repeatable.
        chunk_rows: rows that are reduced at once.
    """

    def __init__(self, size: int, expected: int, *, seed: int = 0, chunk_rows: int = CHUNK_ROWS) -> None:
        self.size = size
        self.expected = max(expected, 1)
        self.seed = seed
        self.chunk_rows = chunk_rows
        self._chunk: list[NDArray[np.float32]] = []
        self._chunk_sources: list[NDArray[np.int64]] = []
        self._chunk_length = 0
        self._pool: list[NDArray[np.float32]] = []
        self._pool_sources: list[NDArray[np.int64]] = []
        self._chunks = 0

    def add(self, rows: NDArray[np.float32], source: int | NDArray[np.int64]) -> None:
        """Take the rows [P, D] of one image; `source` numbers the image, or each row of it [P]."""
        self._chunk.append(np.asarray(rows, np.float32))
        self._chunk_sources.append(np.broadcast_to(np.asarray(source, np.int64), len(rows)))
        self._chunk_length += len(rows)
        if self._chunk_length >= self.chunk_rows:
            self._reduce()

    def build(self, label: str = "coreset") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The bank: rows float32 [N, D], and for each the number that it came with, int64 [N].

        Raises:
            InputError: no rows were added.
        """
        if self._pool:
            self._reduce()
        else:
            self._pool, self._pool_sources = self._chunk, self._chunk_sources
        if not self._pool:
            raise InputError(wanted="rows for a memory bank", got="none", next_step="Add images first.")
        rows, sources = np.concatenate(self._pool), np.concatenate(self._pool_sources)
        with Progress(label, min(self.size, len(rows))) as progress:
            chosen = greedy_coreset(rows, self.size, seed=self.seed, progress=progress)
        return rows[chosen], sources[chosen]

    def _reduce(self) -> None:
        if not self._chunk:
            return
        rows, sources = np.concatenate(self._chunk), np.concatenate(self._chunk_sources)
        share = max(1, round(KEEP * self.size * len(rows) / max(self.expected, len(rows))))
        chosen = greedy_coreset(rows, share, seed=self.seed + 1 + self._chunks)
        self._pool.append(rows[chosen])
        self._pool_sources.append(sources[chosen])
        self._chunk, self._chunk_sources, self._chunk_length = [], [], 0
        self._chunks += 1


def covering_radius(rows: NDArray[np.float32], bank: NDArray[np.float32]) -> float:
    """Largest distance of a row [n, D] to its nearest bank row [N, D]: what a coreset keeps small."""
    nearest = [
        torch.cdist(torch.from_numpy(part), torch.from_numpy(bank)).amin(1).max()
        for part in np.array_split(rows, max(1, len(rows) // 4096))
    ]
    return float(torch.stack(nearest).max())
