"""Few rows that stand for many, without torch: greedy k-centre selection (Sener and Savarese 2018) in numpy.

`edgead.server_side.banks` does the same for the patches of a whole fit; this one serves the tools that change a bank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.progress import Progress

Rows = NDArray[np.float32]

PROJECTED = 64
"""Dimensions in which a coreset's distances are compared, as the authors of PatchCore do; fewer stay as they are."""


def nearest_distance(patches: Rows, bank: Rows, chunk: int = 4096) -> Rows:
    """Euclidean distance of each patch [n, D] to its nearest row [N, D], float32 [n]; infinite if there is none."""
    if not len(bank):
        return np.full(len(patches), np.inf, np.float32)
    half = (bank * bank).sum(1) / 2
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(patches), chunk):
        part = patches[start : start + chunk]
        # The expansion only chooses the row; the distance is computed from the difference.
        nearest = (half - part @ bank.T).argmin(1)
        found.append(np.sqrt(np.square(part - bank[nearest]).sum(1)))
    return np.concatenate(found)


def farthest_first(
    rows: Rows, most: int, *, distance: Rows | None = None, within: float = 0.0, progress: Progress | None = None
) -> NDArray[np.int64]:
    """Always the row that is farthest from all that is known, until every row lies within a distance of something.

    Args:
        rows: float32 [n, D].
        most: at most so many are taken.
        distance: float32 [n], of each row to what is known before; the row farthest from the mean begins if None.
        within: Euclidean distance at which a row counts as known.
        progress: advanced by one for each row taken.

    Returns:
        int64 [k], indices in the order in which they were taken.
    """
    if not len(rows) or most < 1:
        return np.zeros(0, np.int64)
    norms = np.square(rows).sum(1)
    if distance is None:
        away = np.square(rows - rows.mean(0)).sum(1)
        left = np.full(len(rows), np.inf, np.float32)
        place = int(away.argmax())
    else:
        left = np.square(distance).astype(np.float32)
        place = int(left.argmax())
    taken: list[int] = []
    level = np.float32(within) ** 2
    while len(taken) < min(most, len(rows)) and left[place] > level:
        taken.append(place)
        np.minimum(left, (norms - 2 * (rows @ rows[place]) + norms[place]).clip(0), out=left)
        left[place] = -1.0  # taken; rounding must not offer it again
        place = int(left.argmax())
        if progress is not None:
            progress.advance()
    return np.array(taken, np.int64)


def coreset_order(rows: Rows, size: int, *, seed: int = 0, progress: Progress | None = None) -> NDArray[np.int64]:
    """Indices of the greedy coreset in the order in which they are taken: its first k are the coreset of k rows.

    Distances are compared after a Gaussian random projection to `PROJECTED` dimensions; the rows stay as they are.

    Args:
        rows: float32 [n, D].
        size: how many to take.
        seed: of the projection.
        progress: advanced by one for each row taken.

    Returns:
        int64 [min(size, n)].
    """
    points = np.asarray(rows, np.float32)
    if points.shape[1] > PROJECTED:
        matrix = np.random.default_rng(seed).standard_normal((points.shape[1], PROJECTED), np.float32)
        points = points @ (matrix / np.float32(PROJECTED**0.5))
    taken = farthest_first(points, size, progress=progress)
    if len(taken) < size:  # rows that are alike fill what is left, so that the size is the one that was asked for
        rest = np.setdiff1d(np.arange(len(rows)), taken)
        taken = np.concatenate([taken, rest[: size - len(taken)]])
    return taken
