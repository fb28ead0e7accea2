"""How far a release has got, counted from what devices say. Pure: records and statuses in, numbers out.

Every device that a roll-out record has reached is in exactly one state:

    confirmed      it took the release and kept it
    probation      it took it and watches it
    lost           it took it, watches it, and was not heard of since the watching should have ended
    rolled back    it took it and went back
    rejected       its own test refused it
    behind         heard of lately, and it does not have the release
    not heard      not heard of lately, and it does not have the release as far as anybody knows

A device counts once, by its newest status, and by what became of the release last. So whoever holds the key of one
device can move one count by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from edgead.runtime.device_status import DeviceStatus, Outcome
from edgead.runtime.rollout import Rollout, selected
from edgead.server_side.ota.statuses import Seen

State = Literal["confirmed", "probation", "lost", "rolled back", "rejected", "behind", "not heard"]
STATES: tuple[State, ...] = get_args(State)
SILENT_SECONDS = 900.0
"""Without a status for so long a device is silent: it sends one with each poll, and polls every few minutes."""


@dataclass(frozen=True)
class Counts:
    """Devices that a roll-out has reached, by state."""

    confirmed: int = 0
    probation: int = 0
    lost: int = 0
    rolled_back: int = 0
    rejected: int = 0
    behind: int = 0
    not_heard: int = 0

    @property
    def failed(self) -> int:
        """Devices on which the release failed."""
        return self.rolled_back + self.rejected

    @property
    def reported(self) -> int:
        """Devices that took the release or refused it, and were heard of since.

        Those on probation are among them: failures of a release come at once and confirmations only after the window,
        so that a share of the decided ones alone would be 100 % in the first minute of every roll-out.
        """
        return self.confirmed + self.probation + self.failed

    @property
    def reached(self) -> int:
        """Devices that the record has reached."""
        return self.reported + self.lost + self.behind + self.not_heard

    def of(self, state: State) -> int:
        """Devices in a state."""
        found: int = getattr(self, state.replace(" ", "_"))
        return found


def outcome_of(status: DeviceStatus, release: int, digest: str = "") -> Outcome | None:
    """What became of a release on a device; None if it never tried it.

    Args:
        status: of the device.
        release: counter of the release.
        digest: of the release's record, to find it among those that are quarantined; empty if not known.
    """
    if status.release == release:
        return "confirmed" if status.confirmed else "probation"
    if digest and digest in status.quarantined:
        return "rolled back"
    for attempt in reversed(status.attempts):
        if attempt.release == release:
            # A device that was reset while it watched a release has an older one, and never wrote why.
            return "rolled back" if attempt.outcome == "probation" else attempt.outcome
    return None


def state_of(
    record: Rollout, seen: Seen, now: float, *, digest: str = "", silent_after: float = SILENT_SECONDS
) -> State | None:
    """The state of a device in a roll-out; None if the record has not reached it.

    Args:
        record: as signed.
        seen: the device's newest status.
        now: seconds since 1970.
        digest: of the record's release; empty if not known.
        silent_after: seconds without a status after which a device is silent.
    """
    status = seen.status
    if status.product != record.product or not selected(record, status.device, status.groups):
        return None
    outcome = outcome_of(status, record.release, digest)
    quiet = now - seen.received
    if outcome is None:
        return "not heard" if quiet > silent_after else "behind"
    if outcome == "probation" and quiet > record.window + silent_after:
        return "lost"
    return outcome


def counted(states: Iterable[State | None]) -> Counts:
    """Devices by state; None is not counted."""
    numbers = dict.fromkeys(STATES, 0)
    for state in states:
        if state is not None:
            numbers[state] += 1
    return Counts(**{state.replace(" ", "_"): number for state, number in numbers.items()})


__all__ = ["SILENT_SECONDS", "STATES", "Counts", "State", "counted", "outcome_of", "state_of"]
