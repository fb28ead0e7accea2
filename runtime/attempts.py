"""What became of the last releases on a device, so that its publisher can count failures of each.

A device's state says which release is active and which are quarantined, and not what their counters were or why: so
they are noted, by digest, when they are first seen, and looked at again whenever the state changed, whoever changed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from edgead.runtime.device_status import MOST_ATTEMPTS, Attempt, Outcome, plain_text
from edgead.runtime.release import Counter
from edgead.runtime.slots_state import State
from edgead.runtime.spec import Digest, canonical_json

_ENDED = ("rolled back", "rejected")


class Noted(Struct, frozen=True, forbid_unknown_fields=True):
    """An attempt, by the digest of its release."""

    digest: Digest
    release: Counter
    outcome: Outcome
    reason: str = ""

    @property
    def attempt(self) -> Attempt:
        """As a status has it."""
        return Attempt(self.release, self.outcome, plain_text(self.reason))


def updated(noted: Sequence[Noted], state: State, counter_of: Callable[[str], int | None]) -> tuple[Noted, ...]:
    """The attempts as they are now, in the order of their counters, which only grow; the last `MOST_ATTEMPTS`.

    Args:
        noted: as they were.
        state: of the device's store.
        counter_of: digest of a release -> its counter; None if its record is gone.
    """
    found = {item.digest: item for item in noted}
    for digest in state.quarantined:
        old = found.get(digest)
        if old is not None and old.outcome in _ENDED:
            continue
        counter = counter_of(digest) if old is None else old.release
        if counter is not None:
            found[digest] = Noted(digest, counter, *_ending(digest, state.alarm, was_active=old is not None))
    if state.active is not None:
        old = found.get(state.active)
        counter = counter_of(state.active) if old is None else old.release
        if counter is not None:
            found[state.active] = Noted(state.active, counter, "confirmed" if state.confirmed else "probation")
    return tuple(sorted(found.values(), key=lambda item: item.release)[-MOST_ATTEMPTS:])


def encode_attempts(noted: Sequence[Noted]) -> bytes:
    """Attempts as they lie on disk: canonical JSON."""
    return canonical_json(list(noted))


def decode_attempts(data: bytes) -> tuple[Noted, ...]:
    """Attempts from their bytes; none if they are damaged: those of the state come again."""
    try:
        return msgspec.json.decode(data, type=tuple[Noted, ...])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return ()


def _ending(digest: str, alarm: str, *, was_active: bool) -> tuple[Outcome, str]:
    """How it ended: the state's alarm is of the last one; of one before it only this much is known."""
    endings: tuple[tuple[str, Outcome], ...] = (("rejected ", "rejected"), ("rolled back from ", "rolled back"))
    for begin, outcome in endings:
        if alarm.startswith(f"{begin}{digest[:12]}: "):
            return outcome, plain_text(alarm[len(begin) + 14 :])
    return ("rolled back" if was_active else "rejected"), ""
