"""A fleet as its statuses tell it, from a seed: most devices are well, and some are everything else."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgead.runtime.device_status import Attempt, DeviceStatus, Failure, Poll, ScoreStatistics
from edgead.runtime.rollout import Rollout, new_rollout, selected
from edgead.server_side.ota.statuses import Seen

NOW = 1_800_000_000.0
KEY = "ab" * 32
LINES = ("press-shop", "paint", "assembly", "packing", "gate")


def seen(
    device: str = "cam-1", *, received: float = NOW - 30, verified: bool = True, key: str = KEY, **fields: Any
) -> Seen:
    """A device with release 1, confirmed, and whatever is said otherwise."""
    facts = {"product": "part", "time": int(received), "version": "1.4.0", "sequence": 7, "release": 1, "counter": 1}
    status = DeviceStatus(device=device, **({**facts, "confirmed": True} | fields))
    return Seen(status, received, key, verified)


def rollout(**fields: Any) -> Rollout:
    """Release 2 of 'part' for all devices."""
    return new_rollout("part", 2, 5, **({"percent": 100.0, "previous": 1} | fields))


def tried(device: str, outcome: str | None, *, reason: str = "", received: float = NOW - 30, **fields: Any) -> Seen:
    """A device on which release 2 came to this; None if it has not tried it."""
    if outcome in ("confirmed", "probation"):
        fields = {"release": 2, "counter": 2, "confirmed": outcome == "confirmed"} | fields
    attempts = () if outcome is None else (Attempt(2, outcome, reason),)  # type: ignore[arg-type]
    return seen(device, received=received, **({"attempts": attempts} | fields))


REASONS = (
    "4 of the last 12 frames were not inspected: the engine answered no number",
    "golden image 3 scored 41.27, where 38.9 +- 0.5 was signed",
    "golden image 3 scored 43.02, where 38.9 +- 0.5 was signed",
    "3 starts without a confirmation",
)
ERRORS = (
    ("FetchTimeoutError", "Wanted timestamp.json from http://updates.plant.lan, got nothing within 30 s"),
    ("StorageError", "Wanted to write packs/3f2a99c1d0e4aa01.safetensors, got: no space left on device"),
    ("EngineError", "Wanted a score, got NaN on frame 182734"),
)


def fleet(count: int, seed: int = 7, record: Rollout | None = None) -> list[Seen]:
    """`count` devices of up to five groups and two products in the middle of a roll-out of release 12."""
    rng = np.random.default_rng(seed)
    record = record or new_rollout("bottle", 12, 31, groups=("pilot",), percent=35.0, previous=11)
    found = []
    for number in range(count):
        product = "bottle" if rng.random() < 0.85 else "cap"
        groups: tuple[str, ...] = (LINES[int(rng.integers(min(5, 1 + count // 8)))],)
        if rng.random() < 0.06 or number == 0:
            groups = (*groups, "pilot")
            product = "bottle"
        name = f"{groups[0]}-cam-{number:05d}"
        reached = product == "bottle" and selected(record, name, groups)
        luck = rng.random()
        quiet = float(rng.exponential(60.0))
        if rng.random() < 0.015:
            quiet = float(rng.uniform(1_000, 400_000))
        release, confirmed, attempts, alarm = 11 if product == "bottle" else 4, True, [Attempt(10, "confirmed")], ""
        if rng.random() < 0.04:
            release -= int(rng.integers(1, 5))
        if reached and luck < 0.75:
            release, attempts = 12, [*attempts, Attempt(12, "confirmed")]
        elif reached and luck < 0.86:
            release, confirmed, attempts = 12, False, [*attempts, Attempt(12, "probation")]
        elif reached and luck < 0.9:
            why = REASONS[int(rng.integers(len(REASONS)))]
            how = "rejected" if "golden" in why else "rolled back"
            attempts, alarm = [*attempts, Attempt(12, how, why)], f"release 12 was {how}: {why}"  # type: ignore[arg-type]
        frames = int(rng.integers(2_000, 90_000))
        share, middle = float(rng.beta(2, 300)), float(np.exp(rng.normal(np.log(0.42), 0.05)))
        if rng.random() < 0.006:
            share, middle = 0.09, 0.71
        ng = int(frames * share)
        ratios = tuple(float(value) for value in middle * np.array([0.7, 1.0, 1.5, 2.1, 3.0]))
        error = None
        if rng.random() < 0.03:
            kind, message = ERRORS[int(rng.integers(len(ERRORS)))]
            error = Failure(kind, message, int(NOW - 500), int(rng.integers(1, 40)))
        received = NOW - quiet
        skew = int(rng.choice([700, 86_400 * 3])) if rng.random() < 0.004 else 0
        status = DeviceStatus(
            device=name,
            product=product,
            groups=groups,
            sequence=int(rng.integers(1, 5_000)),
            time=int(received) + skew,
            version="1.4.0" if rng.random() < 0.93 else "1.3.2",
            release=release,
            confirmed=confirmed,
            counter=12 if attempts[-1].release == 12 else release,
            alarm=alarm,
            attempts=tuple(attempts),
            poll=Poll("current", "", int(received), 0),
            scores=(ScoreStatistics(product, frames, frames - ng, ng, 0, int(NOW) - 90_000, ratios),),
            error=error,
            dropped=int(rng.integers(1, 900)) if rng.random() < 0.01 else 0,
        )
        found.append(Seen(status, received, KEY, rng.random() > 0.002))
    return found


__all__ = ["ERRORS", "KEY", "NOW", "REASONS", "fleet", "rollout", "seen", "tried"]
