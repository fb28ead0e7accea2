"""Decisions of a device about updates: what to take, which way, when to confirm. No clock, files or network here."""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgead.runtime.errors import StaleError, UntrustedError
from edgead.runtime.rollout import Rollout, wanted, withdrawn

CLOCK_SLACK_S = 3600
"""How far a device's clock may be behind signed times: clocks drift."""
LEAST_FRAMES = 10
"""Frames before a share of failures among them says anything."""
_MOST_STEPS = 16
"""Deltas in a row; more is slower than the whole pack."""

Action = Literal["stay", "install", "go back"]


@dataclass(frozen=True)
class Decision:
    """What to do about releases.

    Attributes:
        action: what.
        counter: of the release to install.
        reason: for people.
    """

    action: Action
    counter: int | None = None
    reason: str = ""


def decide(
    record: Rollout | None, *, device_id: str, groups: Iterable[str], active: int | None, highest: int
) -> Decision:
    """What a roll-out record means for a device.

    Args:
        record: of the device's product; None if there is none.
        device_id, groups: of the device.
        active: counter of its active release.
        highest: counter of all releases that it ever staged; -1 for none.
    """
    if record is None:
        return Decision("stay", reason="nothing is rolled out")
    if withdrawn(record, active):
        return Decision("go back", reason=f"release {record.release} was stopped by its publisher")
    counter = wanted(record, device_id, groups)
    if counter is None:
        return Decision("stay", reason=f"release {record.release} has not reached this device")
    if active is not None and counter <= active:
        return Decision("stay", reason="it has what it should have")
    if counter < highest:
        return Decision("stay", reason=f"release {counter} is older than {highest}, which was here")
    return Decision("install", counter, f"release {counter}")


def check_clock(now: float, last_seen: int) -> None:
    """Check this device's clock against what it has seen.

    Raises:
        StaleError: the clock is behind the latest signed time, so that nobody can say what has expired.
    """
    if now < last_seen - CLOCK_SLACK_S:
        raise _clock(f"one at {int(now)}, where signed metadata was made at {last_seen}")


def check_made(made: int, last_seen: int, now: float) -> None:
    """Check when signed metadata was made. All in seconds since 1970.

    Raises:
        UntrustedError: before what was seen already: old metadata, offered again.
        StaleError: after the present.
    """
    if made < last_seen:
        raise UntrustedError(
            wanted=f"metadata from {last_seen}, the last time seen, or later",
            got=f"metadata from {made}",
            next_step="A mirror is behind, or somebody offers old metadata; nothing of it was taken.",
        )
    if made > now + CLOCK_SLACK_S:
        raise _clock(f"one at {int(now)}, where metadata was made at {made}")


def cheapest(
    have: Collection[str], deltas: Mapping[tuple[str, str], int], wanted_pack: str, whole: int
) -> tuple[tuple[str, str], ...]:
    """The chain of deltas with the fewest bytes; empty if there is none that beats the whole pack.

    Args:
        have: digests of packs that are here.
        deltas: bytes by (base, result).
        wanted_pack: digest of the pack to come to.
        whole: bytes of that pack.

    Returns:
        (base, result) of each delta, in the order of their application.
    """
    after: dict[str, list[tuple[str, int]]] = {}
    for (base, result), size in deltas.items():
        after.setdefault(base, []).append((result, size))
    queue: list[tuple[int, str, tuple[tuple[str, str], ...]]] = [(0, base, ()) for base in sorted(have)]
    heapq.heapify(queue)
    done: set[str] = set()
    while queue:
        cost, pack, steps = heapq.heappop(queue)
        if cost >= whole:
            return ()
        if pack == wanted_pack:
            return steps
        if pack in done or len(steps) == _MOST_STEPS:
            continue
        done.add(pack)
        for result, size in after.get(pack, ()):
            heapq.heappush(queue, (cost + size, result, (*steps, (pack, result))))
    return ()


def judge_watch(
    frames: int, failures: int, elapsed: float, window: float, threshold: float
) -> Literal["wait", "confirm", "go back"]:
    """What becomes of a release on probation.

    Args:
        frames: asked for since it is active.
        failures: that were not inspected among them.
        elapsed, window: seconds that it is active, and that it is watched.
        threshold: share of failures above which it goes.
    """
    if frames >= LEAST_FRAMES and failures > threshold * frames:
        return "go back"
    # Without frames nothing is proved, however long it takes.
    return "confirm" if elapsed >= window and frames else "wait"


def first_poll(interval: float, jitter: float, rng: random.Random) -> float:
    """Seconds from the start of a device to its first poll, so that devices that start together do not come together.

    Args:
        interval: between polls, in seconds.
        jitter: share of it over which the first polls are spread.
        rng: differs from device to device.
    """
    return interval * jitter * rng.random()


def next_poll(interval: float, jitter: float, failures: int, asked: float | None, rng: random.Random) -> float:
    """Seconds until the next poll.

    Args:
        interval: between polls, in seconds.
        jitter: share of it by which a pause may be shorter or longer.
        failures: polls in a row that failed; each doubles the pause, up to sixteen times.
        asked: seconds that the server asked to wait.
        rng: differs from device to device.
    """
    pause = interval * 2.0 ** min(failures, 4) * (1.0 + jitter * rng.uniform(-1.0, 1.0))
    return max(pause, (asked or 0.0) * (1.0 + jitter * rng.random()))


def _clock(got: str) -> StaleError:
    return StaleError(
        wanted="a clock that goes with signed times",
        got=got,
        next_step="Set this device's clock; until then it inspects with what it has and takes no update.",
    )


__all__ = [
    "CLOCK_SLACK_S",
    "Decision",
    "cheapest",
    "check_clock",
    "check_made",
    "decide",
    "first_poll",
    "judge_watch",
    "next_poll",
]
