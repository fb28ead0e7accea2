"""Row 36: ten thousand devices that wake together, by the rules of the loop that polls; no socket, no waiting."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable

import pytest

from edgead.runtime.update_rules import first_poll, next_poll

DEVICES = 10_000
INTERVAL, JITTER = 60.0, 0.2
"""Defaults of the loop."""
SPREAD = INTERVAL * JITTER
HOUR = 3600.0
LUCK = 6.0
"""Standard deviations by which chance may exceed the mean of a second: about one in 10^9 seconds does."""

Answer = Callable[[float], tuple[bool, float | None]]
"""Whether a poll at that second fails, and the seconds that the server asks to wait."""


def quiet(when: float) -> tuple[bool, float | None]:
    return False, None


def polls(answer: Answer, jitter: float = JITTER, until: float = HOUR, devices: int = DEVICES) -> list[float]:
    """When devices that start at 0 poll, in seconds, sorted."""
    found = []
    for number in range(devices):
        rng = random.Random(number)
        failures, due = 0, first_poll(INTERVAL, jitter, rng)
        while due < until:
            found.append(due)
            failed, asked = answer(due)
            failures = failures + 1 if failed else 0
            due += next_poll(INTERVAL, jitter, failures, asked, rng)
    return sorted(found)


def peak(times: list[float], window: float = 1.0) -> int:
    """Most polls in any window of so many seconds."""
    return max(bisect_right(times, start + window) - place for place, start in enumerate(times))


def most(mean: float) -> float:
    """What chance does not exceed where so many polls are expected in a window."""
    return mean + LUCK * math.sqrt(mean)


def test_row_36_a_fleet_that_wakes_together_never_exceeds_what_its_jitter_allows() -> None:
    times = polls(quiet)
    assert peak(times) <= most(DEVICES / SPREAD)
    # Each later round is spread over at least twice that, since every pause adds its own jitter.
    assert peak([when for when in times if when > 2 * SPREAD]) <= most(DEVICES / (2 * SPREAD))
    # After an hour the fleet is nearly as even as if it had never slept.
    assert peak([when for when in times if when > HOUR - 5 * INTERVAL]) <= most(1.25 * DEVICES / INTERVAL)


def test_row_36_without_jitter_all_of_them_would_come_in_one_second() -> None:
    times = polls(quiet, jitter=0.0, until=3 * INTERVAL)
    assert peak(times) == DEVICES
    assert peak(times, 0.0) == DEVICES


@pytest.mark.parametrize("asked", [None, 120.0])
def test_row_36_a_server_that_is_down_when_they_wake_is_not_run_over_when_it_is_back(asked: float | None) -> None:
    back = 600.0
    times = polls(lambda when: (when < back, asked if when < back else None))
    assert peak(times) <= most(DEVICES / SPREAD)
    assert peak([when for when in times if when >= back]) <= most(DEVICES / (2 * SPREAD))
    # It is also asked less often while it is down.
    down = [when for when in times if 60.0 < when < back]
    assert len(down) < 0.6 * DEVICES * (back - 60.0) / INTERVAL


def test_row_36_each_start_of_a_device_falls_elsewhere() -> None:
    rng = random.Random(1)
    starts = [first_poll(INTERVAL, JITTER, rng) for _ in range(2000)]
    assert all(0.0 <= start < SPREAD for start in starts)
    assert peak(sorted(starts)) <= most(len(starts) / SPREAD)
