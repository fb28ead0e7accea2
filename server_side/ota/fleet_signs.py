"""What is odd about single devices, and failures of many that are one. Pure; see `edgead.server_side.ota.fleet`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from edgead.runtime.rollout import Rollout
from edgead.server_side.ota.adoption import State, outcome_of
from edgead.server_side.ota.statuses import Seen

Kind = Literal["failed", "alarm", "silent", "unverified", "scores", "clock", "error", "polls", "old", "dropped"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can be odd about a device, the worst first."""
SKEW_SECONDS = 300.0
"""A clock that is ahead by more is wrong. One that is behind is told only from a day on: a status may have waited."""
LATE_SECONDS = 86_400.0
FAILED_POLLS = 3
"""Polls that failed in a row, from which on a device is named."""
_EXAMPLES = 3
_REASONS = 60
_NUMBERS = re.compile(r"\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Sign:
    """What is odd about a device."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Odd:
    """A device and what is odd about it, the worst first; nothing may be."""

    device: str
    product: str
    groups: tuple[str, ...]
    release: int | None
    confirmed: bool
    received: float
    verified: bool
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Reason:
    """Devices on which a release failed for one reason; numbers in the reason may differ.

    Attributes:
        product, release: which.
        outcome: `rolled back` or `rejected`.
        text: of one of them.
        devices: how many.
        examples: some of them.
    """

    product: str
    release: int
    outcome: str
    text: str
    devices: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """Devices whose last error is of one kind; numbers in the message may differ.

    Attributes:
        kind: class of the error.
        text: message of one of them.
        devices: how many.
        count: errors since their processes started, all together.
        newest: when the last came, by a device's clock.
        examples: some of the devices.
    """

    kind: str
    text: str
    devices: int
    count: int
    newest: int
    examples: tuple[str, ...]


def signs_of(
    seen: Seen,
    now: float,
    silent_after: float,
    state: State | None,
    record: Rollout | None,
    strange: Mapping[str, str],
    *,
    registry: bool = True,
) -> tuple[Sign, ...]:
    """What is odd about a device, the worst first.

    Args:
        seen: its newest status.
        now: seconds since 1970.
        silent_after: seconds without a status after which it is silent.
        state: in the roll-out of its product; None if that has not reached it.
        record: that roll-out; None if there is none.
        strange: what is said about devices whose scores stand out.
        registry: whether there is a list of devices that it could be missing from.
    """
    status = seen.status
    signs: list[Sign] = []
    why = ""
    if record is not None and state in ("rolled back", "rejected"):
        why = next((one.reason for one in reversed(status.attempts) if one.release == record.release), "")
        signs.append(Sign("failed", f"release {record.release} {state}{f': {why}' if why else ''}"))
    elif record is not None and state == "lost":
        signs.append(Sign("failed", f"not heard of since it began to watch release {record.release}"))
    # The alarm of a device that went back says why it did, once more.
    if status.alarm and not (why and why in status.alarm):
        signs.append(Sign("alarm", status.alarm))
    quiet = now - seen.received
    if quiet > silent_after:
        signs.append(Sign("silent", f"no status for {span(quiet)}"))
    if registry and not seen.verified:
        signs.append(Sign("unverified", "anybody can have sent this status: its key is not registered"))
    if status.device in strange:
        signs.append(Sign("scores", strange[status.device]))
    ahead = status.time - seen.received
    if ahead > SKEW_SECONDS:
        signs.append(Sign("clock", f"clock {span(ahead)} ahead"))
    elif -ahead > LATE_SECONDS:
        signs.append(Sign("clock", f"clock {span(-ahead)} behind, or the status came that late"))
    # Errors are counted since a process began, and one may run for years.
    if status.error is not None and status.time - status.error.time < LATE_SECONDS:
        signs.append(Sign("error", f"{status.error.kind}: {status.error.message}"))
    if status.poll is not None and status.poll.failures >= FAILED_POLLS:
        signs.append(Sign("polls", f"{status.poll.failures} polls failed in a row: {status.poll.reason}"))
    # One that refused the release before has to wait for another one.
    refused = {one.release for one in status.attempts if one.outcome in ("rolled back", "rejected")}
    before = None if record is None or record.previous in refused else record.previous
    if before is not None and (status.release or 0) < before:
        has = "no release" if status.release is None else f"release {status.release}"
        signs.append(Sign("old", f"has {has}, and {before} is out for all"))
    if status.dropped:
        signs.append(Sign("dropped", f"{status.dropped} statuses dropped before they could be sent"))
    return tuple(signs)


def failures(
    statuses: Iterable[Seen], records: Mapping[str, Rollout], digests: Mapping[str, str]
) -> tuple[Reason, ...]:
    """Why releases failed: newest release first, then most devices."""
    found: dict[tuple[str, int, str, str], list[tuple[str, str]]] = {}
    for seen in statuses:
        status = seen.status
        told = set()
        for attempt in reversed(status.attempts):
            if attempt.release not in told and attempt.outcome in ("rolled back", "rejected"):
                key = (status.product, attempt.release, attempt.outcome, _shape(attempt.reason))
                found.setdefault(key, []).append((status.device, attempt.reason))
            told.add(attempt.release)
        record = records.get(status.product)
        if record is not None and record.release not in told:
            outcome = outcome_of(status, record.release, digests.get(status.product, ""))
            if outcome in ("rolled back", "rejected"):
                found.setdefault((status.product, record.release, outcome, ""), []).append((status.device, ""))
    reasons = [
        Reason(product, release, outcome, some[0][1], len(some), tuple(device for device, _ in some[:_EXAMPLES]))
        for (product, release, outcome, _), some in found.items()
    ]
    return tuple(sorted(reasons, key=lambda one: (-one.release, -one.devices, one.text))[:_REASONS])


def faults_of(statuses: Iterable[Seen]) -> tuple[Fault, ...]:
    """Last errors, most devices first."""
    found: dict[tuple[str, str], list[Seen]] = {}
    for seen in statuses:
        error = seen.status.error
        if error is not None:
            found.setdefault((error.kind, _shape(error.message)), []).append(seen)
    faults = []
    for (kind, _), some in found.items():
        errors = [seen.status.error for seen in some if seen.status.error is not None]
        faults.append(
            Fault(
                kind=kind,
                text=errors[0].message,
                devices=len(some),
                count=sum(error.count for error in errors),
                newest=max(error.time for error in errors),
                examples=tuple(seen.status.device for seen in some[:_EXAMPLES]),
            )
        )
    return tuple(sorted(faults, key=lambda one: (-one.devices, one.kind, one.text))[:_REASONS])


def _shape(text: str) -> str:
    """A message without its numbers and digests, so that the same one of many devices is one."""
    return _NUMBERS.sub("#", text)


def span(seconds: float) -> str:
    """A duration for people: '45 s', '12 min', '7 h', '3 d'."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


__all__ = [
    "FAILED_POLLS",
    "KINDS",
    "LATE_SECONDS",
    "SKEW_SECONDS",
    "Fault",
    "Kind",
    "Odd",
    "Reason",
    "Sign",
    "failures",
    "faults_of",
    "signs_of",
    "span",
]
