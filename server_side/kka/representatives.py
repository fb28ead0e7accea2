"""Representative normals: one for each cluster, the one that lies most inside it.

KKA (Chen et al. 2025, arXiv 2502.14880), equation (1): a normal x of cluster k with feature f(x) has the Mahalanobis
score

    S(x) = (f(x) - mu_k)^T Sigma_k^-1 (f(x) - mu_k)

and the lowest score of each cluster is its representative. A cluster of n normals has a covariance of rank n - 1 at
most, which for most features has no inverse. Ours: Sigma_k is mixed with a share of the mean variance of all
within-cluster residuals times the identity (as Ledoit and Wolf do with one cluster), and S is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError, missing_dependency


@dataclass(frozen=True)
class Chosen:
    """A representative.

    Attributes:
        row: which normal.
        cluster: which cluster; clusters are numbered by their first normal.
        size: normals in it.
        score: S(x) of equation (1).
    """

    row: int
    cluster: int
    size: int
    score: float


def mahalanobis(features: NDArray[Any], *, shrinkage: float, floor: float) -> NDArray[np.float64]:
    """S(x) of equation (1) for the normals of one cluster.

    Args:
        features: [N, D] of one cluster, N >= 1.
        shrinkage: share a of `floor` that is mixed in, 0 < a <= 1: Sigma = (1 - a) cov + a floor I.
        floor: mean variance per dimension of all residuals, > 0.

    Returns:
        float64 [N], not negative. A cluster of one has a score of 0.
    """
    rows = np.asarray(features, np.float64)
    residuals = rows - rows.mean(axis=0)
    # Sigma = a floor I + B^T B with B = sqrt((1 - a) / N) residuals: the identity of Woodbury needs the inverse of an
    # N x N matrix alone, and stays accurate where D is far above N.
    ridge = shrinkage * floor
    basis = residuals * np.sqrt((1.0 - shrinkage) / len(rows))
    inner = ridge * np.eye(len(rows)) + basis @ basis.T
    projected = basis @ residuals.T
    explained = np.einsum("nm,nm->m", projected, np.linalg.solve(inner, projected))
    scores = (np.einsum("nd,nd->n", residuals, residuals) - explained) / ridge
    found: NDArray[np.float64] = np.maximum(scores, 0.0)
    return found


def choose(features: NDArray[Any], clusters: int, *, shrinkage: float = 0.1, seed: int = 0) -> list[Chosen]:
    """One representative for each cluster of normals.

    Args:
        features: float [N, D], finite.
        clusters: how many are wanted; there are fewer where fewer normals differ.
        shrinkage: see `mahalanobis`; 0 is taken as the smallest share that keeps the inverse exact enough (1e-6).
        seed: of k-means.

    Raises:
        InputError: no normals, or features that are not finite.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
        raise InputError(
            wanted="finite features [N, D] of at least one normal",
            got=f"an array {rows.shape}",
            next_step="Check the photographs of normal parts.",
        )
    labels = _clusters(rows, min(clusters, len(np.unique(rows, axis=0))), seed)
    members: Sequence[NDArray[np.intp]] = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    members = sorted(members, key=lambda found: int(found[0]))
    residuals = np.concatenate([rows[found] - rows[found].mean(axis=0) for found in members])
    floor = float((residuals**2).mean()) or 1.0
    chosen = []
    for number, found in enumerate(members):
        scores = mahalanobis(rows[found], shrinkage=max(shrinkage, 1e-6), floor=floor)
        # Scores that differ by rounding alone are equal, and the first normal wins.
        best = int(np.flatnonzero(scores <= scores.min() * (1 + 1e-9) + 1e-12)[0])
        chosen.append(Chosen(int(found[best]), number, len(found), float(scores[best])))
    return chosen


def _clusters(rows: NDArray[np.float64], count: int, seed: int) -> NDArray[np.intp]:
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "scikit-learn", "export", "clusters of normals") from error
    found: NDArray[np.intp] = KMeans(count, n_init=10, random_state=seed).fit(rows).labels_
    return found


__all__ = ["Chosen", "choose", "mahalanobis"]
