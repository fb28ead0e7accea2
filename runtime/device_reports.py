"""Statuses as `edgead device` has them: written beside its commands, sent, and shown."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edgead.runtime.attempts import decode_attempts
from edgead.runtime.device_key import ensure_key
from edgead.runtime.device_status import STATUS_BYTES, public_of
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import EdgeadError
from edgead.runtime.fetch_rules import shown
from edgead.runtime.slots_load import StoreView
from edgead.runtime.status_report import ATTEMPTS, StatusReporter, reporter_of
from edgead.runtime.status_sender import read_sent
from edgead.runtime.status_spool import StatusSpool
from edgead.runtime.status_targets import Sent

if TYPE_CHECKING:
    from edgead.runtime.marks_post import MarksPost
    from edgead.runtime.mqtt import MqttLink
    from edgead.runtime.update_outcome import Device, Outcome


def public_key(folder: Path) -> str:
    """The public key of a device in hex; its private one is made if there is none, and that is said.

    Raises:
        StorageError: there is none, and the disk takes none.
        MissingDependencyError: the package for signatures is not installed.
    """
    return public_of(_key(folder)).hex()


@dataclass
class _Poker:
    """Passes pokes on to an updater that is made later than the line they come over."""

    target: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        self.target()


@dataclass
class Reports:
    """What a command has to do with statuses. Whatever fails in it costs an update nothing.

    Attributes:
        reporter: writes them; None if the device cannot.
        post: brings marked pictures where the statuses go.
    """

    reporter: StatusReporter | None
    post: MarksPost
    _link: MqttLink | None
    _poker: _Poker

    def send(self, outcome: Outcome, failures: int) -> Sent | None:
        """Write the status after a poll, and send what waits; None without anybody to send it to."""
        if self.reporter is None:
            return None
        self.reporter.note(outcome, failures)
        sent = self.reporter.send()
        self.post.send()
        return sent

    @contextlib.contextmanager
    def listening(self, poke: Callable[[], object]) -> Iterator[None]:
        """Hear pokes, and send marked pictures, while the block runs."""
        self._poker.target = poke
        stop = threading.Event()
        self.post.start(stop)
        try:
            if self._link is not None:
                self._link.start()
            yield
        finally:
            stop.set()
            if self._link is not None:
                self._link.close()


def opened(folder: Path, store: StoreView, who: Device, *, every_s: float, mqtt: str | None) -> Reports:
    """The statuses of a device for `edgead device update`. What cannot be had is said, and done without.

    Args:
        folder: of the device.
        store, who: of the device.
        every_s: seconds between statuses with nothing new.
        mqtt: broker that says when to poll; empty for none, None for the device's own.
    """
    from edgead.runtime.marks_post import MarksPost

    poker, link = _Poker(), None
    address = who.mqtt if mqtt is None else mqtt
    with _said("pokes"):
        if address:
            from edgead.runtime.mqtt import MqttLink

            link = MqttLink(address, device_id=who.device_id, product=who.product, on_poke=poker)
    reporter = None
    with _said("statuses"):
        _key(folder)
        reporter = reporter_of(
            folder, store, who, link=link if who.statuses == address else None, every_s=every_s, sending=False
        )
    with _said("statuses"):
        if who.statuses:
            reporter = reporter_of(folder, store, who, link=link if who.statuses == address else None, every_s=every_s)
    return Reports(reporter, MarksPost(folder, who.statuses), link, poker)


def note(folder: Path, store: StoreView, who: Device) -> None:
    """Write a status after a command that changed something; the next update sends it."""
    with _said("statuses"):
        _key(folder)
        reporter_of(folder, store, who, sending=False).note()


def attempts(store: StoreView) -> list[dict[str, Any]]:
    """What became of the last releases, as JSON has it; as of the last status that was written."""
    try:
        found = decode_attempts(RealDisk().read(store.spool / ATTEMPTS, STATUS_BYTES))
    except OSError:
        return []
    return [msgspec.to_builtins(item.attempt) for item in found]


def spool_fields(who: Device, store: StoreView) -> dict[str, Any]:
    """The spool of a device as JSON has it."""
    spool, record = StatusSpool(store.spool), read_sent(store.spool)
    return {
        "address": shown(who.statuses),
        "mqtt": shown(who.mqtt),
        "waiting": len(spool.waiting()),
        "dropped": spool.dropped(),
        "last_sent": record.time or None,
        "accepted": record.accepted,
        "known": record.known,
        "refused": record.refused,
        "last_refusal": record.refusal,
        "error": record.error,
        "failures": record.failures,
        "not_before": record.not_before or None,
    }


def spool_text(found: dict[str, Any]) -> str:
    """The same for people."""
    parts = [f"{found['waiting']} waiting", f"{found['dropped']} dropped"]
    if not found["address"]:
        return "; ".join([", ".join(parts), "sent nowhere, see edgead device init --statuses"])
    sent = found["last_sent"]
    when = "never" if sent is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(sent))
    lines = [", ".join(parts), f"last sent {when} to {found['address']}"]
    if found["error"]:
        lines.append(f"{found['failures']} failed since: {found['error']}")
    if found["last_refusal"]:
        lines.append(f"{found['refused']} refused, the last one: {found['last_refusal']}")
    return "; ".join(lines)


def sent_fields(sent: Sent) -> dict[str, Any]:
    """What sending came to, as JSON has it."""
    return {
        "accepted": sent.accepted,
        "known": sent.known,
        "refused": sent.refused,
        "waiting": sent.waiting,
        "error": None if sent.error is None else str(sent.error)[:1000],
    }


def sent_line(sent: Sent) -> str:
    """The same for people."""
    text = f"statuses: {sent.accepted + sent.known} sent, {sent.refused} refused, {sent.waiting} waiting"
    return text if sent.error is None else f"{text}; {sent.error.got}"


def _key(folder: Path) -> bytes:
    key, made = ensure_key(folder)
    if made:
        with contextlib.suppress(EdgeadError):
            click.echo(
                f"{folder}: no key for statuses was there; a new one was made, with the public half "
                f"{public_of(key).hex()}; register it with: edgead ota devices add",
                err=True,
            )
    return key


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except EdgeadError as error:
        click.echo(f"no {what}: {error}", err=True)


__all__ = [
    "Reports",
    "attempts",
    "note",
    "opened",
    "public_key",
    "sent_fields",
    "sent_line",
    "spool_fields",
    "spool_text",
]
