"""Sends the statuses of a device's spool, and waits longer after each failure.

A status leaves the spool when who received it said so, see `edgead.runtime.status_targets`. After a failure the next
attempt waits, longer each time, with jitter, or as long as the collector asked; over restarts too.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from edgead.runtime.device_status import plain_text
from edgead.runtime.disk import Disk, RealDisk, put_file
from edgead.runtime.errors import EdgeadError, FetchError, UpdateError
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.status_spool import StatusSpool, batches
from edgead.runtime.status_targets import MOST_REASONS, Sent, TooLargeError, checked_address, target_of

if TYPE_CHECKING:
    from edgead.runtime.mqtt import MqttLink

BATCH_BYTES = 256 * 2**10
"""Largest body of a request."""
LIMITS = FetchLimits(total_s=60.0, first_wait_s=30.0, longest_wait_s=3600.0)
"""`total_s` is for all that one call sends, the waits for those between calls."""
SENT = "sent.json"
"""How sending went, in the spool's folder."""
_LONGEST_ASKED_S = 86_400.0
_RECORD_BYTES = 64 * 2**10
_LOOK_S = 0.25


class SentRecord(Struct, frozen=True):
    """How sending went, over restarts. Times in seconds since 1970 by the device's clock.

    Attributes:
        time: when statuses were last received; 0 for never.
        accepted, known, refused: how many, in all.
        refusal: the last reason of a refusal.
        error: why the last attempt failed; empty if it did not.
        failures: attempts in a row that failed.
        not_before: when the next one may be.
    """

    time: int = 0
    accepted: int = 0
    known: int = 0
    refused: int = 0
    refusal: str = ""
    error: str = ""
    failures: int = 0
    not_before: float = 0.0


class StatusSender:
    """Empties a spool. `send` may be called from any thread.

    Args:
        address: as `checked_address` gives it.
        spool: of the device.
        device_id, product: of the device.
        limits: how patient it is.
        context: of TLS; by default the system's certificates, verified.
        rng: for jitter; differs from device to device.
        clock: seconds since 1970 in UTC.
        disk: that of the spool.
        link: a line to a broker that is there already; another one is made where the address asks for it.

    Raises:
        InputError: an address that is none.
        MissingDependencyError: the package for MQTT is not installed.
    """

    def __init__(
        self,
        address: str,
        spool: StatusSpool,
        *,
        device_id: str,
        product: str,
        limits: FetchLimits = LIMITS,
        context: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
        link: MqttLink | None = None,
    ) -> None:
        self._spool = spool
        self._limits = limits
        self._rng = rng or random.Random()
        self._clock = clock
        self._disk = disk or RealDisk()
        self._most = BATCH_BYTES
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._target = target_of(
            address,
            device_id=device_id,
            product=product,
            limits=limits,
            disk=self._disk,
            context=context,
            link=link,
        )
        self.record = read_sent(spool.folder, disk=self._disk)
        """How sending went."""

    def due(self) -> bool:
        """Whether it is time for another attempt."""
        ahead = self.record.not_before - self._clock()
        return ahead <= 0 or ahead > 2 * _LONGEST_ASKED_S  # a clock that was set back must not silence a device

    def send(self) -> Sent:
        """Send what waits, if it is time for that; never raises."""
        with self._sending:
            if not self.due():
                return Sent(waiting=len(self._spool.waiting()))
            try:
                sent = self._send()
            except Exception as error:  # a foreign library's surprise must not end the reports of a device
                surprise = UpdateError(
                    wanted="to send statuses without surprises", got=f"{type(error).__name__}: {error}"[:300]
                )
                surprise.__cause__ = error
                sent = Sent(error=surprise)
            self._note(sent)
            return replace(sent, waiting=len(self._spool.waiting()))

    def wake(self) -> None:
        """There is something new to send."""
        self._wake.set()

    def start(self, stop: threading.Event, report: Callable[[Sent], object] = lambda sent: None) -> threading.Thread:
        """Send on a thread of its own, which ends with the process, whenever something waits and it is time.

        Args:
            stop: ends it.
            report: called on that thread with what came of each attempt.
        """

        def run() -> None:
            while not stop.wait(_LOOK_S):
                if (self._wake.is_set() or self.record.failures) and self.due():
                    self._wake.clear()
                    report(self.send())

        self.wake()  # what an earlier process left
        thread = threading.Thread(target=run, name="edgead-statuses", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Let go of the line."""
        self._target.close()

    def _send(self) -> Sent:
        end = time.monotonic() + self._limits.total_s
        done, again = Sent(), True
        try:
            while again:
                again = False
                for numbers, lines in batches(self._spool, self._most):
                    try:
                        lot = self._target.deliver(numbers, lines, end)
                    except TooLargeError:
                        self._most, again = sum(map(len, lines)) // 2, True
                        break
                    self._spool.remove(numbers)
                    done = Sent(
                        done.accepted + lot.accepted,
                        done.known + lot.known,
                        done.refused + lot.refused,
                        (*done.refusals, *lot.refusals)[-MOST_REASONS:],
                    )
        except EdgeadError as error:
            return replace(done, error=error)
        return done

    def _note(self, sent: Sent) -> None:
        old, now = self.record, self._clock()
        if sent == Sent() and not old.failures:
            return
        new = old
        if sent.accepted or sent.known or sent.refused:
            new = msgspec.structs.replace(
                new,
                time=int(now),
                accepted=old.accepted + sent.accepted,
                known=old.known + sent.known,
                refused=old.refused + sent.refused,
                refusal=sent.refusals[-1] if sent.refusals else old.refusal,
            )
        if sent.error is None:
            new = msgspec.structs.replace(new, error="", failures=0, not_before=0.0)
        else:
            failures = old.failures + 1
            wait = min(self._limits.longest_wait_s, self._limits.first_wait_s * 2.0 ** min(failures - 1, 20))
            wait *= self._rng.uniform(0.5, 1.0)
            asked = sent.error.retry_after if isinstance(sent.error, FetchError) else None
            # Devices that were asked together must not come back together.
            asked = min(asked or 0.0, _LONGEST_ASKED_S) * self._rng.uniform(1.0, 1.2)
            new = msgspec.structs.replace(
                new, error=plain_text(sent.error.got), failures=failures, not_before=round(now + max(wait, asked), 3)
            )
        self.record = new
        with contextlib.suppress(EdgeadError):  # it holds in this process all the same
            put_file(self._disk, self._spool.folder / SENT, [msgspec.json.encode(new)])


def read_sent(folder: Path, *, disk: Disk | None = None) -> SentRecord:
    """How sending from the spool in `folder` went; all zeros if nobody knows."""
    try:
        return msgspec.json.decode((disk or RealDisk()).read(folder / SENT, _RECORD_BYTES), type=SentRecord)
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return SentRecord()


__all__ = ["BATCH_BYTES", "SENT", "Sent", "SentRecord", "StatusSender", "checked_address", "read_sent"]
