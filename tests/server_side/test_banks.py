"""The coreset: greedy as in the paper, repeatable, and good enough when memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.server_side.banks import BankBuilder, covering_radius, greedy_coreset


@pytest.fixture
def rows() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16)) * 4
    return (centres[rng.integers(0, 20, 3000)] + rng.normal(size=(3000, 16))).astype(np.float32)


def test_each_row_taken_is_the_farthest_from_those_before(rows: NDArray[np.float32]) -> None:
    taken = greedy_coreset(rows, 30, projected=None)
    wide = rows.astype(np.float64)
    for step in range(1, 30):
        nearest = np.sqrt(((wide[:, None] - wide[taken[:step]]) ** 2).sum(-1)).min(1)
        assert nearest[taken[step]] == pytest.approx(nearest.max(), rel=1e-4)


def test_the_same_seed_gives_the_same_rows_and_none_twice(rows: NDArray[np.float32]) -> None:
    taken = greedy_coreset(rows, 200, seed=3)
    np.testing.assert_array_equal(taken, greedy_coreset(rows, 200, seed=3))
    assert len(set(taken.tolist())) == 200


def test_a_coreset_covers_better_than_a_random_sample(rows: NDArray[np.float32]) -> None:
    sample = np.random.default_rng(1).choice(len(rows), 100, replace=False)
    assert covering_radius(rows, rows[greedy_coreset(rows, 100)]) < 0.8 * covering_radius(rows, rows[sample])


def test_duplicates_are_not_taken_twice_before_other_rows() -> None:
    rows = np.concatenate([np.zeros((50, 4)), np.eye(4)]).astype(np.float32)
    taken = greedy_coreset(rows, 5, projected=None)
    assert len(np.unique(rows[taken], axis=0)) == 5


def test_a_stream_in_chunks_covers_nearly_as_well_as_all_at_once(rows: NDArray[np.float32]) -> None:
    def built(chunk_rows: int) -> float:
        builder = BankBuilder(100, len(rows), chunk_rows=chunk_rows)
        for image in range(30):
            builder.add(rows[image * 100 : image * 100 + 100], image)
        bank, sources = builder.build()
        assert len(bank) == len(sources) == 100
        assert all(any((row == rows[s * 100 : s * 100 + 100]).all(1)) for row, s in zip(bank, sources, strict=True))
        return covering_radius(rows, bank)

    assert built(500) < 1.15 * built(10**9)


def test_asking_for_more_rows_than_there_are_gives_all() -> None:
    np.testing.assert_array_equal(greedy_coreset(np.eye(3, dtype=np.float32), 10), np.arange(3))


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError):
        greedy_coreset(np.zeros((0, 4), np.float32), 3)
    with pytest.raises(InputError):
        BankBuilder(10, 10).build()
