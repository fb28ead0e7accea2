"""What a device remembers about its releases, and every decision about them. Bytes in, a state or an error out.

The state lies in two copies, which are written in turn, so that the last one but one is always whole. A copy is

    {"checksum":"<SHA-256 of the canonical JSON of the state, 64 hex digits>","state":{...}}

as canonical JSON, at most 64 KiB. Which copy holds is said by `sequence`, which grows with each write; a copy that is
zeroed, torn or edited does not match its checksum and does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from edgead.runtime.errors import ReleaseError, RollbackError, StoreDamagedError
from edgead.runtime.release import Counter, Release
from edgead.runtime.spec import Digest, canonical_json

STATE_SCHEMA = 1
STATE_BYTES = 64 * 2**10
"""Largest copy of the state."""
MOST_QUARANTINED = 32
"""Refused releases that are remembered by name; older ones are refused by their counter alone."""
UNREACHED_S = 86_400.0
"""Seconds for which polls may fail before that is an alarm: a seventh of what a timestamp lives by default."""
_FROZEN = 160
_LAST_YEAR = 253_402_300_799.0


class State(Struct, frozen=True, forbid_unknown_fields=True):
    """What a device remembers. Releases stand here by the SHA-256 of their record.

    Attributes:
        sequence: number of this state; 0 is that of a store in which nothing ever happened.
        active: what the device inspects with.
        previous: what it goes back to: the last release before the active one that was confirmed.
        candidate: what is whole on disk and could become active.
        confirmed: whether the active release has proved itself.
        starts: how often the device started with it and did not confirm it.
        counter: highest counter of all releases ever staged; only goes up.
        newest: the release that has it.
        last_seen: latest time that signed metadata ever named, seconds since 1970 in UTC; only goes up.
        quarantined: releases that failed here, oldest first; they are not staged again.
        alarm: what somebody should know, for people; empty if all is well.
        frozen: since when and why no update can be taken, for people: signed metadata has expired, or the clock is
            wrong. Not there while updates can be taken, so that such a state lies on disk as it always did.
        failing: since when polls fail, seconds since 1970 by the device's clock; not there after a good one.
        unreached: since when and why, for people, once that is too long.
    """

    schema: int = STATE_SCHEMA
    sequence: Counter = 0
    active: Digest | None = None
    previous: Digest | None = None
    candidate: Digest | None = None
    confirmed: bool = False
    starts: Counter = 0
    counter: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    newest: Digest | None = None
    last_seen: Counter = 0
    quarantined: tuple[Digest, ...] = ()
    alarm: Annotated[str, Meta(max_length=1000)] = ""
    frozen: Annotated[str, Meta(max_length=_FROZEN)] | UnsetType = UNSET
    failing: Counter | UnsetType = UNSET
    unreached: Annotated[str, Meta(max_length=_FROZEN)] | UnsetType = UNSET

    @property
    def warning(self) -> str:
        """All that somebody should know, at most 1000 characters; empty if all is well."""
        return "; ".join(text for text in (self.frozen or "", self.unreached or "", self.alarm) if text)[:1000]

    @property
    def named(self) -> frozenset[str]:
        """The releases whose files must stay."""
        return frozenset(digest for digest in (self.active, self.previous, self.candidate) if digest is not None)


class _Copy(Struct, frozen=True, forbid_unknown_fields=True):
    checksum: Digest
    state: State


_COPY = msgspec.json.Decoder(_Copy)


@dataclass(frozen=True)
class Found:
    """A release in a store whose state is lost.

    Attributes:
        digest: of its record.
        counter: of the release.
        whole: whether all of its files are sound.
        good: whether the device once confirmed it and did not quarantine it since.
    """

    digest: str
    counter: int
    whole: bool = False
    good: bool = False


def encode_state(state: State) -> bytes:
    """A copy of the state as it lies on disk."""
    checksum = hashlib.sha256(canonical_json(state)).hexdigest()
    return canonical_json(_Copy(checksum, state))


def decode_state(data: bytes) -> State:
    """The state from one copy.

    Raises:
        StoreDamagedError: empty, zeroed, torn, edited, too large, or of a newer schema.
    """
    try:
        if len(data) > STATE_BYTES:
            raise ValueError(f"{len(data)} bytes")
        copy = _COPY.decode(data)
        if encode_state(copy.state) != data or copy.state.schema != STATE_SCHEMA:
            raise ValueError("a checksum or schema that does not match")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreDamagedError(
            wanted=f"a state of schema {STATE_SCHEMA} with its checksum",
            got=f"something else ({error})",
            next_step="The other copy, or the releases on disk, say what holds.",
        ) from error
    return copy.state


def newest_of(copies: Iterable[State]) -> State | None:
    """The copy that holds; None if there is none."""
    return max(copies, key=lambda state: state.sequence, default=None)


def recovered(found: Sequence[Found]) -> State | None:
    """A state from the releases on disk, when both copies of the state are lost; None if there is none.

    Of the releases that are whole, the newest that was confirmed becomes active; without any, the newest one, and is on
    probation. Every counter that is on disk counts as seen.
    """
    best = sorted(found, key=lambda release: (release.whole, release.good, release.counter), reverse=True)
    if not best:
        return None
    others = [release.digest for release in best[1:] if release.whole and release.good]
    newest = max(found, key=lambda release: release.counter)
    return State(
        sequence=1,
        active=best[0].digest,
        previous=others[0] if others else None,
        confirmed=best[0].good,
        counter=newest.counter,
        newest=newest.digest,
        alarm="the state was lost and made again from the releases on disk",
    )


def lifted(state: State, found: Sequence[Found]) -> State:
    """The state with a counter at least as high as that of every release on disk; for when a copy of it is lost."""
    best = max(found, key=lambda release: release.counter, default=None)
    if best is None or best.counter <= state.counter:
        return state
    return replace(state, counter=best.counter, newest=best.digest)


def staged(state: State, digest: str, release: Release) -> State:
    """A release that is whole on disk becomes the candidate.

    Staging the candidate, or the active release, again changes nothing.

    Raises:
        ReleaseError: it is quarantined here, or its counter is not higher than every one before.
    """
    if digest in state.quarantined:
        raise ReleaseError(
            wanted="a release that did not fail on this device",
            got=f"{release.name} ({digest[:12]}), which is quarantined here",
            next_step="Publish a better one under a new counter.",
        )
    if digest in (state.active, state.candidate):
        return state
    if release.counter <= state.counter and digest != state.newest:
        raise ReleaseError(
            wanted=f"a release with a counter above {state.counter}, the highest that this device has seen",
            got=f"{release.name} with {release.counter}",
            next_step="To return to an old state of things, publish it as a new release.",
        )
    return replace(state, candidate=digest, counter=release.counter, newest=digest)


def activated(state: State) -> State:
    """The candidate becomes active, on probation. A release that never proved itself is nothing to go back to.

    Raises:
        ReleaseError: there is no candidate.
    """
    if state.candidate is None:
        raise ReleaseError(wanted="a staged release", got="none", next_step="Stage one first.")
    previous = state.active if state.confirmed else state.previous
    return replace(
        state, active=state.candidate, previous=previous, candidate=None, confirmed=False, starts=0, alarm=""
    )


def confirmed(state: State, digest: str) -> State:
    """The active release has proved itself.

    Raises:
        ReleaseError: another release is active by now.
    """
    if digest != state.active:
        raise ReleaseError(
            wanted=f"to confirm the active release {_short(state.active)}",
            got=_short(digest),
            next_step="Confirm only the release that the device ran.",
        )
    return state if state.confirmed else replace(state, confirmed=True, starts=0, alarm="")


def rolled_back(state: State, reason: str) -> State:
    """The previous release is active again, and the active one quarantined.

    Raises:
        RollbackError: there is no previous one.
    """
    if state.active is None or state.previous is None:
        raise RollbackError(
            wanted="a previous release to go back to",
            got="none",
            next_step="Publish a better release under a new counter; the active one stays until then.",
        )
    return replace(
        _quarantine(state, state.active),
        active=state.previous,
        previous=None,
        confirmed=True,
        starts=0,
        alarm=_text(f"rolled back from {state.active[:12]}: {reason}"),
    )


def rejected(state: State, reason: str) -> State:
    """The candidate is given up and quarantined; without one nothing changes."""
    if state.candidate is None:
        return state
    alarm = _text(f"rejected {state.candidate[:12]}: {reason}")
    return replace(_quarantine(state, state.candidate), candidate=None, alarm=alarm)


def started(state: State) -> State:
    """One more start; counted only while the active release is on probation."""
    return state if state.confirmed or state.active is None else replace(state, starts=state.starts + 1)


def in_crash_loop(state: State, most_starts: int) -> bool:
    """Whether the active release had all the starts it gets and was not confirmed."""
    return state.active is not None and not state.confirmed and state.starts >= most_starts


def seen(state: State, when: int) -> State:
    """Signed metadata of that time was seen; an older time changes nothing."""
    return state if when <= state.last_seen else replace(state, last_seen=when)


def alarmed(state: State, reason: str) -> State:
    """Somebody should know this."""
    return replace(state, alarm=_text(reason))


def frozen(state: State, now: float, reason: str) -> State:
    """No update can be taken: metadata is stale or the clock is wrong. A state that says so already stays as it is.

    Args:
        state: before.
        now: seconds since 1970 by the device's clock.
        reason: for people.
    """
    if state.frozen:
        return state
    text = f"updates are frozen since {_moment(now)} by this device's clock: {reason}"
    return replace(state, frozen=_text(text)[:_FROZEN])


def failed(state: State, since: float, now: float, reason: str, *, answered: bool = False) -> State:
    """A poll failed; an alarm once polls have for longer than `UNREACHED_S`. A state with that alarm stays as it is.

    Args:
        state: before.
        since: when the last good poll was, or this one if nobody knows; it counts for the first that fails.
        now: seconds since 1970 by the device's clock.
        reason: for people.
        answered: whether a server answered, with something that is of no use.
    """
    if state.unreached:
        return state
    begin = int(min(max(0.0, since), _LAST_YEAR)) if state.failing is UNSET else state.failing
    # Signed metadata of that time was had at that time or later: a clock that was set meanwhile alarms nobody.
    begin = max(begin, state.last_seen)
    if now - begin < UNREACHED_S:
        return state if state.failing is not UNSET else replace(state, failing=begin)
    what = "no poll has been good" if answered else "no server has been reached"
    text = f"{what} since {_moment(begin)} by this device's clock: {reason}"
    return replace(state, failing=begin, unreached=_text(text)[:_FROZEN])


def thawed(state: State) -> State:
    """Updates can be taken again; whatever else there is to know stays."""
    well = state.frozen is UNSET and state.failing is UNSET and state.unreached is UNSET
    return state if well else replace(state, frozen=UNSET, failing=UNSET, unreached=UNSET)


def _quarantine(state: State, digest: str) -> State:
    others = tuple(old for old in state.quarantined if old != digest)
    return replace(state, quarantined=(*others, digest)[-MOST_QUARANTINED:])


def _moment(seconds: float) -> str:
    when = datetime.fromtimestamp(min(max(0.0, seconds), _LAST_YEAR), timezone.utc)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _text(reason: str) -> str:
    """Bounded, and encodable whatever it came from."""
    return reason.encode(errors="replace").decode()[:1000]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


__all__ = [
    "MOST_QUARANTINED",
    "STATE_BYTES",
    "STATE_SCHEMA",
    "UNREACHED_S",
    "Found",
    "State",
    "activated",
    "alarmed",
    "confirmed",
    "decode_state",
    "encode_state",
    "failed",
    "frozen",
    "in_crash_loop",
    "lifted",
    "newest_of",
    "recovered",
    "rejected",
    "rolled_back",
    "seen",
    "staged",
    "started",
    "thawed",
]
