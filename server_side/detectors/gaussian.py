"""Gaussian statistics of normal features, and the factor by which a Mahalanobis distance is a plain length.

With a covariance Sigma = L L^T (Cholesky) and W = L^-1 the squared Mahalanobis distance of x is

    (x - mu)^T Sigma^-1 (x - mu) = |W (x - mu)|^2

which no rounding makes negative, and which needs no inverse in the graph: mu and W are knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Moments:
    """Mean and covariance of P features at once, added up batch by batch in float64 (Chan et al. 1979).

    Args:
        positions: P.
        dimensions: d. P * d * d * 8 bytes are held.
    """

    def __init__(self, positions: int, dimensions: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros((positions, dimensions))
        self._scatter: Floats = np.zeros((positions, dimensions, dimensions))

    def add(self, features: NDArray[np.float32]) -> None:
        """Add features float [N, P, d], N >= 1."""
        rows = np.asarray(features, np.float64).transpose(1, 0, 2)
        mean = rows.mean(1)
        residuals = rows - mean[:, None]
        away = mean - self.mean
        total = self.count + rows.shape[1]
        self._scatter += np.matmul(residuals.transpose(0, 2, 1), residuals)
        self._scatter += away[:, :, None] * away[:, None, :] * (self.count * rows.shape[1] / total)
        self.mean = self.mean + away * (rows.shape[1] / total)
        self.count = total

    def covariance(self) -> Floats:
        """Unbiased, float64 [P, d, d]; zeros of fewer than 2."""
        return self._scatter / max(self.count - 1, 1)


def whitening(covariance: Floats) -> Floats:
    """W with W^T W = Sigma^-1, lower triangular, for each of some covariances.

    Args:
        covariance: float64 [..., d, d], positive definite.

    Returns:
        float64 [..., d, d].
    """
    factor = np.linalg.cholesky(covariance)
    found: Floats = np.tril(np.linalg.inv(factor))
    return found


def shrunk(covariance: Floats, share: float, floor: float) -> Floats:
    """(1 - share) Sigma + share * floor * I: what few samples cannot tell is taken from `floor`, a variance."""
    found: Floats = (1.0 - share) * covariance + share * floor * np.eye(covariance.shape[-1])
    return found


def gaussian_quantile(dimensions: int, deviations: float = 6.0) -> float:
    """A Mahalanobis distance that normals of a known Gaussian hardly reach: its mean and some deviations more."""
    return math.sqrt(dimensions) + deviations / math.sqrt(2.0)


__all__: Sequence[str] = ("Moments", "gaussian_quantile", "shrunk", "whitening")
