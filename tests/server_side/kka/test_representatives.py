"""Equation (1) against a float64 reference, and the choice of representatives."""

from __future__ import annotations

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.server_side.kka.representatives import choose, mahalanobis


def reference(rows: np.ndarray, shrinkage: float, floor: float) -> np.ndarray:
    """S(x) = (f - mu)^T Sigma^-1 (f - mu), written out."""
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    sigma = (1 - shrinkage) * centred.T @ centred / len(rows) + shrinkage * floor * np.eye(rows.shape[1])
    inverse = np.linalg.inv(sigma)
    return np.array([row @ inverse @ row for row in centred])


@pytest.mark.parametrize(("count", "dimensions"), [(3, 12), (40, 12), (1, 5), (12, 12)])
@pytest.mark.parametrize("shrinkage", [0.02, 0.1, 1.0])
def test_the_score_is_the_mahalanobis_distance_of_equation_1(count: int, dimensions: int, shrinkage: float) -> None:
    rng = np.random.default_rng(count)
    rows = (rng.normal(size=(count, dimensions)) * rng.uniform(0.1, 3, dimensions)).astype(np.float32)
    found = mahalanobis(rows, shrinkage=shrinkage, floor=0.7)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, reference(rows, shrinkage, 0.7), rtol=1e-9, atol=1e-9)


def test_each_cluster_gives_the_normal_that_lies_most_inside_it() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(centre, 0.1, size=(20, 6)) for centre in (0.0, 5.0, -5.0)])
    rows[7] = rows[:20].mean(0)
    chosen = choose(rows, 3, shrinkage=0.1, seed=1)
    assert [found.size for found in chosen] == [20, 20, 20]
    assert chosen[0].row == 7
    for found in chosen:
        members = rows[found.row // 20 * 20 : found.row // 20 * 20 + 20]
        residuals = np.concatenate([rows[at : at + 20] - rows[at : at + 20].mean(0) for at in (0, 20, 40)])
        scores = reference(members, 0.1, float((residuals**2).mean()))
        assert found.row % 20 == int(scores.argmin())
        assert found.score == pytest.approx(scores.min(), abs=1e-9)


def test_the_same_seed_chooses_the_same_and_clusters_are_numbered_by_their_first_normal() -> None:
    rows = np.random.default_rng(3).normal(size=(60, 9))
    first, again = choose(rows, 5, seed=4), choose(rows, 5, seed=4)
    assert first == again
    assert [found.cluster for found in first] == list(range(len(first)))


def test_fewer_different_normals_than_clusters_give_fewer_representatives() -> None:
    rows = np.repeat(np.eye(3), 4, axis=0)
    chosen = choose(rows, 8)
    assert [(found.row, found.size) for found in chosen] == [(0, 4), (4, 4), (8, 4)]
    assert all(found.score == 0 for found in chosen)


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), np.full((4, 3), np.nan), np.zeros(5)])
def test_what_cannot_be_clustered_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="finite features"):
        choose(rows, 2)
