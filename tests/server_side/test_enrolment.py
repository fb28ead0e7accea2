"""Teaching a bank: few rows, the old ones untouched, thresholds made with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.spec import Calibration
from edgead.server_side.enrolment import BANK, Change, add_normal_rows


def a_pack() -> Pack:
    rows = np.random.default_rng(0).normal(0, 1, (50, 8)).astype(np.float32)
    calibration = Calibration(threshold=4.0, typical=3.0, false_alarm_rate=0.01)
    arrays = {BANK: rows, "bank.anomalous": rows[:2] + 100}
    return new_pack(product="part", fingerprint="0" * 64, calibration=calibration, arrays=arrays)


def scores(_: Pack) -> tuple[NDArray[np.float32], None]:
    return np.linspace(2, 3.5, 20, dtype=np.float32), None


def test_rows_that_the_bank_lacks_come_in_and_every_patch_is_then_within_novelty() -> None:
    pack = a_pack()
    rng = np.random.default_rng(1)
    patches = np.concatenate([rng.normal(20, 1, (200, 8)), pack.arrays[BANK][:30]]).astype(np.float32)
    done = add_normal_rows(pack, patches, scores, novelty=3.0)
    bank = done.pack.arrays[BANK]
    assert done.offered == 200
    assert 0 < done.added < 200
    assert len(bank) == 50 + done.added
    nearest = np.linalg.norm(patches[:, None] - bank[None], axis=2).min(1)
    assert nearest.max() <= 3.0


def test_old_rows_keep_their_bytes_and_ids_and_new_ids_follow_all_banks() -> None:
    pack = a_pack()
    done = add_normal_rows(pack, np.full((3, 8), 30, np.float32), scores)
    assert np.array_equal(done.pack.arrays[BANK][:50], pack.arrays[BANK])
    assert np.array_equal(done.pack.ids(BANK)[:50], pack.ids(BANK))
    assert done.pack.ids(BANK)[50] > max(pack.ids(BANK)[-1], pack.ids("bank.anomalous")[-1])
    assert len(pack.arrays[BANK]) == 50


def test_the_threshold_comes_from_the_held_out_normals_under_the_new_bank() -> None:
    seen: list[int] = []

    def held_out(pack: Pack) -> tuple[NDArray[np.float32], None]:
        seen.append(len(pack.arrays[BANK]))
        return np.linspace(5, 6, 20, dtype=np.float32), None

    done = add_normal_rows(a_pack(), np.full((3, 8), 30, np.float32), held_out)
    assert seen == [50, 51]
    assert done.pack.calibration.threshold >= 6
    assert done.pack.calibration.held_out == 20


def distances(points: NDArray[np.float32]) -> Callable[[Pack], NDArray[np.float32]]:
    """Scores of pictures of one patch each: the distance to the nearest row."""

    def score(pack: Pack) -> NDArray[np.float32]:
        return np.asarray(np.linalg.norm(points[:, None] - pack.arrays[BANK][None], axis=2).min(1), np.float32)

    return score


def test_false_alarms_and_misses_are_told_before_and_after() -> None:
    pack, rng = a_pack(), np.random.default_rng(2)
    new = (rng.normal(0, 1, (60, 8)) + 15).astype(np.float32)
    normals = distances(np.concatenate([np.asarray(pack.arrays[BANK][:30]) + 0.1, new[40:]]))
    far = rng.normal(-40, 1, (5, 8)).astype(np.float32)
    beside_the_new = (rng.normal(0, 1, (3, 8)) + 15.2).astype(np.float32)
    done = add_normal_rows(
        pack,
        new[:40],
        lambda pack: (normals(pack), None),
        known_defects=distances(np.concatenate([far, beside_the_new])),
    )
    assert done.false_alarms == Change(pictures=50, before=20, after=0)
    # What looks like the new pattern passes with it: that is the price, and it is said.
    assert done.misses == Change(pictures=8, before=0, after=3)
    assert done.summary() == (
        f"{done.added} rows added; false alarms 20 -> 0 of 50 held-out normals, misses 0 -> 3 of 8 known defects"
    )


def test_without_known_defects_the_misses_are_unknown_and_not_nought() -> None:
    done = add_normal_rows(a_pack(), np.full((3, 8), 30, np.float32), scores)
    assert done.misses is None
    assert "misses unknown" in done.summary()


def test_scores_of_other_pictures_than_before_are_refused() -> None:
    counts = iter((4, 5))
    with pytest.raises(InputError, match="known defects"):
        add_normal_rows(
            a_pack(),
            np.full((3, 8), 30, np.float32),
            scores,
            known_defects=lambda pack: np.ones(next(counts), np.float32),
        )


def test_at_most_the_wanted_number_of_rows_is_added() -> None:
    patches = np.random.default_rng(1).normal(50, 9, (300, 8)).astype(np.float32)
    assert add_normal_rows(a_pack(), patches, scores, novelty=0.5, most=7).added == 7


def test_nothing_new_adds_no_row() -> None:
    pack = a_pack()
    assert add_normal_rows(pack, np.array(pack.arrays[BANK][:5]), scores).added == 0


def test_patches_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="embed"):
        add_normal_rows(a_pack(), np.zeros((3, 9), np.float32), scores)
    with pytest.raises(InputError):
        add_normal_rows(a_pack(), np.zeros((0, 8), np.float32), scores)
