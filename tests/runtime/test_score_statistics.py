"""Statistics of scores: quantiles to one percent in constant memory, and none that a status cannot hold."""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import pytest

from edgead.runtime.device_status import MOST_NAMES, QUANTILES, DeviceStatus, decode_status, encode_status
from edgead.runtime.inspection import Inspection, Verdict, not_inspected
from edgead.runtime.score_statistics import HIGHEST, LOWEST, ScoreCounter


def result(score: float, threshold: float = 2.0, product: str = "carpet") -> Inspection:
    verdict = Verdict.NG if score > threshold else Verdict.OK
    return Inspection(verdict, score, 0.5, threshold, None, (), (), product, "v1")


def sound(counter: ScoreCounter) -> None:
    """That a status takes what was counted."""
    status = DeviceStatus("cam", "carpet", 1, 1, "1", scores=counter.statistics())
    decode_status(encode_status(status, bytes(32)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_quantiles_are_within_one_percent(seed: int, spread: float) -> None:
    ratios = np.random.default_rng(seed).lognormal(0.0, spread, 5000)
    counter = ScoreCounter()
    for ratio in ratios:
        counter.add(result(2.0 * ratio))
    (found,) = counter.statistics()
    wanted = np.quantile(ratios, QUANTILES, method="inverted_cdf")
    assert np.abs(np.array(found.ratios) / wanted - 1.0).max() < 0.0101
    assert found.ratios[-1] == ratios.max()
    assert (found.frames, found.ok, found.ng) == (5000, int((ratios <= 1).sum()), int((ratios > 1).sum()))
    sound(counter)


def test_one_frame_has_all_quantiles() -> None:
    counter = ScoreCounter(lambda: 1_800_000_000.9)
    counter.add(result(1.0))
    (found,) = counter.statistics()
    assert found.ratios == (0.5,) * 5
    assert found.since == 1_800_000_000


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.0, -3.0, 0.0, 5e-324, 1e-5, 1e300, 1.7e308])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 2.0, 5e-324, math.nan, math.inf])
def test_any_score_gives_a_status_that_can_be_sent(score: float, threshold: float) -> None:
    counter = ScoreCounter()
    counter.add(result(1.0))
    counter.add(result(score, threshold))
    (found,) = counter.statistics()
    assert found.frames == 2
    assert all(ratio == 0.0 or LOWEST * 0.99 <= ratio <= HIGHEST for ratio in found.ratios)
    sound(counter)


def test_frames_without_an_answer_are_counted_and_have_no_ratio() -> None:
    counter = ScoreCounter()
    assert counter.statistics() == ()
    counter.add(not_inspected("late", product="carpet", knowledge="v1", threshold=1.0))
    (found,) = counter.statistics()
    assert (found.frames, found.not_inspected, found.ratios) == (1, 1, ())
    counter.reset()
    assert counter.statistics() == ()
    sound(counter)


def test_products_are_apart_and_bounded() -> None:
    counter = ScoreCounter()
    for number in range(2 * MOST_NAMES):
        counter.add(result(float(number), product=f"part-{number:02d}"))
    found = counter.statistics()
    assert [item.product for item in found] == [f"part-{number:02d}" for number in range(MOST_NAMES)]
    sound(counter)


def test_memory_does_not_grow_with_frames() -> None:
    counter = ScoreCounter()
    sizes = []
    for count in (10, 1000):
        for score in np.geomspace(1e-6, 1e6, count):
            counter.add(result(float(score)))
        counts = counter._products["carpet"]
        sizes.append(sys.getsizeof(counts.bins))
    assert sizes[0] == sizes[1] < 10_000


def test_threads_lose_no_frame() -> None:
    counter = ScoreCounter()

    def count() -> None:
        for number in range(2000):
            counter.add(result(number % 4))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (found,) = counter.statistics()
    assert (found.frames, found.ok, found.ng) == (8000, 6000, 2000)
