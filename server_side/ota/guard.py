"""A roll-out that stops by itself: what the devices report, counted against what its record allows.

The guard signs with the rollout key and the online keys of snapshot and timestamp, and opens no other: it can stop and
widen what is signed, and can make nothing. Whom it believes:

- a status counts if the publisher registered the device's key. Devices of an unknown key, and those that enrolled
  themselves by their first status, do not: anybody can make a thousand of them.
- a device counts once. With the default `Caution` one stolen key alone stops nothing, unless the roll-out has reached
  one device only.

Two guards at once are safe: the decision is made on the record as it is while the repository is locked, and a roll-out
that was changed by another one is looked at anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import Struct

from edgead.runtime.errors import InputError
from edgead.runtime.rollout import Rollout, breached
from edgead.server_side.ota.adoption import SILENT_SECONDS, Counts, counted, state_of
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.releases import release_path
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.rollouts import roll_out, rollout_of, stop
from edgead.server_side.ota.statuses import Found, Seen

ENROLLED = "enrolled by its first status"
"""Note of a device that nobody registered by hand."""
LOG_BYTES = 2**20
"""The log of decisions keeps its newest lines up to this size."""

Action = Literal["none", "wait", "widen", "stop"]


@dataclass(frozen=True)
class Caution:
    """When reports mean something.

    Attributes:
        minimum: reports before a share is one; fewer if the roll-out has reached fewer devices. Of less than five the
            share of one failure is above any usual threshold.
        failures: failed devices that stop a roll-out at the least; fewer if it has reached fewer. One is a broken
            camera, or a stolen key.
        heard: share of the reached devices that has to have confirmed before a roll-out is widened: those that are
            switched off over night must not hold it for ever, and a few quick ones do not speak for the others.
        steps: percentages to widen to, rising; none to only watch.
        after: seconds for which a roll-out has to be healthy before it is widened.
        silent_after: seconds without a status after which a device is silent.
    """

    minimum: int = 5
    failures: int = 2
    heard: float = 0.5
    steps: tuple[float, ...] = ()
    after: float = 3600.0
    silent_after: float = SILENT_SECONDS

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        good = self.minimum >= 1 and self.failures >= 1 and self.after >= 0 and self.silent_after > 0
        if not good or not 0 <= self.heard <= 1:
            raise InputError(
                wanted="counts from 1, a share from 0 to 1 and times from 0",
                got=f"{self.minimum}, {self.failures}, {self.heard}, {self.after} and {self.silent_after}",
                next_step="See: edgead ota guard --help",
            )
        if not rising or any(not 0 < step <= 100 for step in self.steps):
            raise InputError(
                wanted="rising percentages from above 0 to 100",
                got=", ".join(f"{step:g}" for step in self.steps),
                next_step="For example: --widen 10,50,100",
            )


class Decision(Struct, frozen=True, forbid_unknown_fields=True):
    """What the guard did about a product, and why: one line of its log.

    Attributes:
        time: when, seconds since 1970.
        product: whose roll-out.
        action: `none` where nothing goes on.
        reason: for people.
        sequence, release: of the record that was looked at; 0 without one.
        percent: share of the devices that it goes to after the decision.
        reached, reported, failed, confirmed, lost: devices, see `Counts`.
        ignored: statuses of the product that do not count: of devices that nobody registered.
        healthy_since: from when on this record was seen healthy; None while it is not.
    """

    time: float
    product: str
    action: Action
    reason: str
    sequence: int = 0
    release: int = 0
    percent: float = 0.0
    reached: int = 0
    reported: int = 0
    failed: int = 0
    confirmed: int = 0
    lost: int = 0
    ignored: int = 0
    healthy_since: float | None = None

    def same(self, other: Decision | None) -> bool:
        """Whether another one differs in its time only."""
        return other is not None and msgspec.structs.replace(self, time=other.time) == other


@dataclass(frozen=True)
class Witnesses:
    """Statuses that count, and how many by product do not."""

    seen: Sequence[Seen]
    ignored: Mapping[str, int] = field(default_factory=dict)


def witnesses(found: Found) -> Witnesses:
    """Whose word counts: devices that somebody registered with the key that signed, each once."""
    enrolled = {record.device for record in found.devices or () if record.note == ENROLLED}
    known = {record.device: record.key for record in found.devices or ()}
    kept: dict[str, Seen] = {}
    ignored: dict[str, int] = {}
    for seen in found.latest:
        device = seen.status.device
        if not seen.verified or device in enrolled or known.get(device) != seen.key:
            ignored[seen.status.product] = ignored.get(seen.status.product, 0) + 1
        elif device not in kept or seen.status.sequence > kept[device].status.sequence:
            kept[device] = seen
    return Witnesses(list(kept.values()), ignored)


def must_stop(record: Rollout, counts: Counts, caution: Caution) -> bool:
    """Whether the failures are more than the record allows, and the reports enough to say so."""
    enough = counts.reported >= min(caution.minimum, counts.reached)
    several = counts.failed >= max(1, min(caution.failures, counts.reached))
    return enough and several and breached(record, counts.failed, counts.reported)


def hindrance(record: Rollout, counts: Counts, caution: Caution) -> str:
    """Why a roll-out is not healthy enough to be widened; empty if it is."""
    if not counts.reached:
        return "no registered device is reached yet"
    # A release that hangs a camera so that it never reports again is a failure that nobody reports.
    if breached(record, counts.failed + counts.lost, counts.reported + counts.lost):
        return f"{counts.failed} failed and {counts.lost} lost of {counts.reported + counts.lost}"
    needed = max(min(caution.minimum, counts.reached), caution.heard * counts.reached)
    if counts.confirmed < needed:
        return f"{counts.confirmed} of {counts.reached} confirmed, {-int(-needed // 1)} needed"
    return ""


def decide(
    product: str,
    record: Rollout | None,
    counts: Counts,
    caution: Caution,
    now: float,
    last: Decision | None = None,
    ignored: int = 0,
) -> Decision:
    """What is to be done about a product.

    Args:
        product: its name.
        record: its roll-out; None if there is none.
        counts: devices that it has reached.
        caution: when reports mean something.
        now: seconds since 1970.
        last: the decision before, of any record.
        ignored: statuses that do not count.
    """
    if record is None:
        return Decision(now, product, "none", "nothing is rolled out", ignored=ignored)

    def decision(action: Action, reason: str, *, percent: float | None = None, since: float | None = None) -> Decision:
        return Decision(
            time=now,
            product=product,
            action=action,
            reason=reason,
            sequence=record.sequence,
            release=record.release,
            percent=record.percent if percent is None else percent,
            reached=counts.reached,
            reported=counts.reported,
            failed=counts.failed,
            confirmed=counts.confirmed,
            lost=counts.lost,
            ignored=ignored,
            healthy_since=since,
        )

    if record.stopped:
        return decision("none", f"release {record.release} is stopped")
    if must_stop(record, counts, caution):
        share = counts.failed / counts.reported
        return decision(
            "stop",
            f"{counts.failed} of {counts.reported} devices failed: {share:.1%}, where {record.error_threshold:.1%} "
            "are allowed",
        )
    reason = hindrance(record, counts, caution)
    if reason:
        return decision("wait", reason)
    known = last is not None and (last.sequence, last.release) == (record.sequence, record.release)
    since = last.healthy_since if last is not None and known and last.healthy_since is not None else now
    # A clock that was set back must not make a roll-out wait for the time that it went back by, nor count it.
    since = min(since, now)
    following = next((step for step in caution.steps if step > record.percent), None)
    if record.paused:
        return decision("wait", "healthy, and paused", since=since)
    if following is None:
        return decision("none", f"healthy at {record.percent:g} %", since=since)
    left = caution.after - (now - since)
    if left > 0:
        return decision("wait", f"healthy; {following:g} % follow if it stays so", since=since)
    return decision("widen", f"healthy for {caution.after:g} s: {following:g} % of the others", percent=following)


def watch(
    repository: Repository,
    keyring: Keyring | None,
    found: Found,
    caution: Caution,
    past: Mapping[str, Decision],
    *,
    now: float,
    products: Iterable[str] | None = None,
) -> list[Decision]:
    """Look at every roll-out of an opened repository once, and stop or widen what is to be.

    Args:
        repository: locked and verified, see `edgead.server_side.ota.repository.opened`.
        keyring: has the rollout key; None to only say what would be done.
        found: statuses of devices, and the registry.
        caution: when reports mean something.
        past: the last decision of each product.
        now: seconds since 1970.
        products: which ones; all by default.

    Raises:
        InputError: a key is missing, or something in the repository was tampered with; nothing was changed.
        StorageError: the disk refused; nothing was changed.
    """
    those = witnesses(found)
    decisions = []
    for product in repository.settings.products if products is None else products:
        record = rollout_of(repository, product)
        counts = Counts()
        if record is not None:
            digest = _digest(repository, record)
            states = (
                state_of(record, seen, now, digest=digest, silent_after=caution.silent_after) for seen in those.seen
            )
            counts = counted(states)
        ignored = those.ignored.get(product, 0)
        decided = decide(product, record, counts, caution, now, past.get(product), ignored)
        decisions.append(decided)
        if keyring is None:
            continue
        if decided.action == "stop":
            stop(repository, product)
        elif decided.action == "widen":
            roll_out(repository, product, percent=decided.percent)
    if keyring is not None and any(decided.action in ("stop", "widen") for decided in decisions):
        repository.commit(keyring)
    return decisions


def read_log(data: bytes) -> list[Decision]:
    """Decisions of a log, oldest first. Lines that are none, such as a torn one, are left out."""
    found = []
    for line in data.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=Decision))
        except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
            continue
    return found


def log_of(decisions: Sequence[Decision]) -> bytes:
    """A log of the newest decisions, of at most `LOG_BYTES`."""
    lines: list[bytes] = []
    size = 0
    for decided in reversed(decisions):
        line = msgspec.json.encode(decided) + b"\n"
        size += len(line)
        if size > LOG_BYTES:
            break
        lines.append(line)
    return b"".join(reversed(lines))


def _digest(repository: Repository, record: Rollout) -> str:
    entry = repository.find(release_path(record.product, record.release))
    return "" if entry is None else str(entry.hashes["sha256"])


__all__ = [
    "ENROLLED",
    "Action",
    "Caution",
    "Decision",
    "Witnesses",
    "decide",
    "hindrance",
    "log_of",
    "must_stop",
    "read_log",
    "watch",
    "witnesses",
]
