"""Writes a device's statuses: after each poll, whenever its state changed, and now and then in between.

Nothing here raises. A device that cannot say how it does goes on inspecting and updating all the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgead import __version__
from edgead.runtime.attempts import Noted, decode_attempts, encode_attempts, updated
from edgead.runtime.device_folder import last_outcome
from edgead.runtime.device_key import ensure_key
from edgead.runtime.device_status import (
    MESSAGE,
    MOST_NAMES,
    MOST_QUARANTINED,
    STATUS_BYTES,
    DeviceStatus,
    Failure,
    Poll,
    encode_status,
    plain_text,
)
from edgead.runtime.disk import Disk, RealDisk, put_file
from edgead.runtime.errors import EdgeadError, StatusError
from edgead.runtime.release import RELEASE_BYTES, Release, decode_release, digest_of
from edgead.runtime.slots_files import RELEASES
from edgead.runtime.slots_load import StoreView
from edgead.runtime.slots_state import State
from edgead.runtime.status_sender import StatusSender
from edgead.runtime.status_spool import StatusSpool
from edgead.runtime.status_targets import Sent

if TYPE_CHECKING:
    from edgead.runtime.live import LiveInspector
    from edgead.runtime.mqtt import MqttLink
    from edgead.runtime.update_outcome import Device, Outcome

STATUS_EVERY_S = 300.0
"""Seconds between two statuses of a device with nothing new to say."""
ATTEMPTS = "attempts.json"
"""What became of the last releases, in the spool's folder."""
_SIZES = ((300, 32), (100, 8), (40, 4), (0, 1))
"""Characters of texts and number of digests: how a status that is too large is made smaller."""


class StatusReporter:
    """Writes the statuses of one device into its spool. Methods may be called from any thread.

    Args:
        store: of the device.
        device: who it is.
        key: its private key, 32 bytes.
        inspector: whose scores are told; None where another process inspects.
        sender: empties the spool; None where nobody does.
        every_s: seconds after which `look` writes one although nothing changed.
        clock: seconds since 1970 in UTC.
        disk: that of the store.

    Attributes:
        spool: where the statuses wait.
        trouble: why the last status was not written; empty if it was.
    """

    def __init__(
        self,
        store: StoreView,
        device: Device,
        key: bytes,
        *,
        inspector: LiveInspector | None = None,
        sender: StatusSender | None = None,
        spool: StatusSpool | None = None,
        every_s: float = STATUS_EVERY_S,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> None:
        self._disk = disk or RealDisk()
        self.spool = spool or StatusSpool(store.spool, disk=self._disk, clock=clock)
        self.trouble = ""
        self._store = store
        self._device = device
        self._key = key
        self._inspector = inspector
        self._sender = sender
        self._every = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._told: object = None
        self._due = float("-inf")
        self._poll = _last_poll(store.folder)
        self._failure: Failure | None = None

    def note(self, outcome: Outcome | None = None, failures: int = 0, *, polled: bool = True) -> int | None:
        """Write a status.

        Args:
            outcome: of a poll or of a look at a release on probation; None for something else.
            failures: polls in a row that failed.
            polled: whether the outcome is that of a poll.

        Returns:
            its number; None if it could not be written.
        """
        with self._lock:
            try:
                if outcome is not None:
                    self._take(outcome, failures if polled else None)
                state = self._store.state()
                number = self.spool.add(lambda number, dropped: self._encoded(state, number, dropped))
                self._told, self._due = _salient(state), time.monotonic() + self._every
                self.trouble = self.spool.fault
            except Exception as error:  # whatever it is, a status is not worth a device
                self.trouble = f"{type(error).__name__}: {error}"[:300]
                self._due = time.monotonic() + self._every
                return None
        if self._sender is not None:
            self._sender.wake()
        return number

    def look(self) -> None:
        """Write a status if somebody changed the state of the device, or if it is time for one."""
        try:
            changed = _salient(self._store.state()) != self._told
        except EdgeadError:
            changed = False
        if time.monotonic() >= self._due or (changed and not self.trouble):
            self.note()

    def fault(self, kind: str, message: str) -> None:
        """Something went wrong that the next status should tell.

        Args:
            kind: class of the error.
            message: for people.
        """
        count = 1 if self._failure is None else self._failure.count + 1
        self._failure = Failure(kind[:128], plain_text(message, MESSAGE), max(0, int(self._clock())), count)

    def send(self) -> Sent | None:
        """Send what waits, now, if it is time for that; None without anybody to send it to."""
        if self._sender is None:
            return None
        sent = self._sender.send()
        self._refused(sent)
        return sent

    def start(self, stop: threading.Event) -> None:
        """Send on a thread of its own until `stop` is set."""
        if self._sender is not None:
            self._sender.start(stop, self._refused)

    def _refused(self, sent: Sent) -> None:
        for reason in sent.refusals:
            self.fault("StatusRefused", reason)

    def _take(self, outcome: Outcome, failures: int | None) -> None:
        if failures is not None:
            reason = plain_text(outcome.reason)
            self._poll = Poll(outcome.status, reason, max(0, int(self._clock())), failures)
        # A release that was refused is told among the attempts; it is no trouble of this device.
        if outcome.error is not None and outcome.status != "rejected":
            self.fault(type(outcome.error).__name__, str(outcome.error))

    def _encoded(self, state: State, number: int, dropped: int) -> bytes:
        status = self._status(state, number, dropped)
        for most, digests in _SIZES:
            with contextlib.suppress(StatusError):
                return encode_status(_smaller(status, most, digests), self._key)
        raise StatusError(wanted=f"a status of at most {STATUS_BYTES} bytes", got="one of more")

    def _status(self, state: State, number: int, dropped: int) -> DeviceStatus:
        device = self._device
        active = None if state.active is None else self._release(state.active)
        packs = {} if active is None else active.product_packs
        return DeviceStatus(
            device=device.device_id,
            product=device.product,
            sequence=number,
            time=max(0, int(self._clock())),
            version=__version__,
            groups=tuple(device.groups[:MOST_NAMES]),
            release=None if active is None else active.counter,
            digest=state.active or "",
            engine="" if active is None else active.engine,
            # A pack's version is the beginning of its digest.
            packs={product: packs[product][:12] for product in sorted(packs)[:MOST_NAMES]},
            confirmed=state.confirmed,
            starts=state.starts,
            counter=state.counter,
            quarantined=state.quarantined[-MOST_QUARANTINED:],
            alarm=plain_text(state.warning),
            attempts=tuple(item.attempt for item in self._attempts(state)),
            poll=self._poll,
            scores=() if self._inspector is None else self._inspector.statistics(),
            error=self._failure,
            dropped=dropped,
        )

    def _attempts(self, state: State) -> tuple[Noted, ...]:
        path = self.spool.folder / ATTEMPTS
        try:
            before = decode_attempts(self._disk.read(path, STATUS_BYTES))
        except OSError:
            before = ()
        now = updated(before, state, self._counter_of)
        if now != before:
            with contextlib.suppress(EdgeadError):
                put_file(self._disk, path, [encode_attempts(now)])
        return now

    def _counter_of(self, digest: str) -> int | None:
        release = self._release(digest)
        return None if release is None else release.counter

    def _release(self, digest: str) -> Release | None:
        try:
            data = self._disk.read(self._store.folder / RELEASES / f"{digest}.json", RELEASE_BYTES + 1)
            return decode_release(data) if digest_of(data) == digest else None
        except (OSError, EdgeadError):
            return None


def reporter_of(
    folder: Path,
    store: StoreView,
    device: Device,
    *,
    inspector: LiveInspector | None = None,
    link: MqttLink | None = None,
    every_s: float = STATUS_EVERY_S,
    sending: bool = True,
) -> StatusReporter:
    """The reporter of a device that has a folder, with its key, and a sender if it has an address for statuses.

    Args:
        folder: of the device.
        store, device, inspector, every_s: see `StatusReporter`.
        link: a line to the broker that `device.statuses` names, if there is one already.
        sending: False for one that only writes.

    Raises:
        InputError: an address that is none.
        MissingDependencyError: the package for MQTT is not installed.
        StorageError: the device has no key, and its disk takes none.
    """
    key, _ = ensure_key(folder)
    spool = StatusSpool(store.spool)
    sender = None
    if device.statuses and sending:
        sender = StatusSender(device.statuses, spool, device_id=device.device_id, product=device.product, link=link)
    return StatusReporter(store, device, key, inspector=inspector, sender=sender, spool=spool, every_s=every_s)


def _salient(state: State) -> object:
    """What of a state a publisher wants to know at once; times of metadata are not among it."""
    return state.active, state.confirmed, state.starts, state.counter, state.quarantined, state.warning


def _smaller(status: DeviceStatus, most: int, digests: int) -> DeviceStatus:
    """A status with shorter texts and fewer digests."""
    replace = msgspec.structs.replace
    return replace(
        status,
        alarm=status.alarm[:most],
        quarantined=status.quarantined[-digests:],
        attempts=tuple(replace(item, reason=item.reason[:most]) for item in status.attempts),
        poll=None if status.poll is None else replace(status.poll, reason=status.poll.reason[:most]),
        error=None if status.error is None else replace(status.error, message=status.error.message[: 2 * most]),
    )


def _last_poll(folder: Path) -> Poll | None:
    """What an earlier process noted of its last poll."""
    found = last_outcome(folder) or {}
    try:
        poll = msgspec.convert({key: found.get(key) for key in ("status", "reason", "time", "failures")}, type=Poll)
    except msgspec.ValidationError:
        return None
    return msgspec.structs.replace(poll, status=plain_text(poll.status, 32), reason=plain_text(poll.reason))


__all__ = ["ATTEMPTS", "STATUS_EVERY_S", "StatusReporter", "reporter_of"]
