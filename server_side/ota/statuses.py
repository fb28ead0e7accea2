"""Statuses of devices as their publisher takes them: what is refused and why, and statuses in folders of files.

A status counts if it is well formed, signed with the key that it names, and that key is the one by which the device is
known (`edgead.server_side.ota.devices`). The order of a device's statuses is that of their sequence numbers, never of
clocks: one that was recorded and is sent again is known already, and changes nothing. `StatusStore` in
`edgead.server_side.ota.status_store` keeps them in a database; `read_statuses` reads that, or a folder such as a
device's spool or a USB stick with those of many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

from edgead.runtime.device_status import STATUS_BYTES, DeviceStatus, Envelope, decode_status
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import InputError, StatusError
from edgead.server_side.ota.devices import DEVICES, DeviceFile, DeviceKey

Reason = Literal[
    "malformed", "forged", "unknown device", "another key", "sequence", "too many devices", "another topic"
]
REASONS: tuple[Reason, ...] = get_args(Reason)
AHEAD_SECONDS = 86_400.0
"""How far ahead of the receiver a device's clock may be before that is noted."""
MOST_FILES = 1_000_000
"""Files of a folder that are looked at."""
_DEPTH = 8
_OTHERS = frozenset(
    {DEVICES, "device.json", "device.copy.json", "root.json", "root.copy.json", "last.json", "sent.json"}
)
"""Files beside statuses that are none, by their names."""


class RefusedStatusError(StatusError):
    """A status that does not count.

    Args:
        reason: in a word, for counters and for the device.
    """

    def __init__(self, *, wanted: str, got: str, next_step: str = "", reason: Reason) -> None:
        self.reason: Reason = reason
        super().__init__(wanted=wanted, got=got, next_step=next_step)


@dataclass(frozen=True)
class Seen:
    """A status that counts.

    Attributes:
        status: what the device said.
        received: seconds since 1970 by the receiver's clock; of a file, when it was written.
        key: public key that it is signed with, 64 hex digits.
        verified: whether the publisher knows the device by that key. False where there was no registry to ask: whoever
            made the key can then be any device.
        note: what is odd about it, for people; empty if nothing is.
    """

    status: DeviceStatus
    received: float
    key: str
    verified: bool
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A status that was found and does not count.

    Attributes:
        where: file or row.
        reason: in a word.
        message: for people.
    """

    where: str
    reason: Reason
    message: str


@dataclass(frozen=True)
class Found:
    """What a source of statuses holds.

    Attributes:
        latest: the newest status of each device, by name.
        refused: what does not count.
        devices: the registry; None where there was none to ask.
    """

    latest: list[Seen]
    refused: list[Refused] = field(default_factory=list)
    devices: list[DeviceKey] | None = None


def opened(data: bytes) -> Envelope:
    """A status that is well formed and signed with the key that it names; whose key that is, is not asked.

    Raises:
        RefusedStatusError: `malformed` or `forged`.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        envelope = decode_status(data)
    except StatusError as error:
        raise _refusal(error, "malformed") from error
    try:
        envelope.verify()
    except StatusError as error:
        raise _refusal(error, "forged") from error
    return envelope


def check_key(envelope: Envelope, known: str | None) -> None:
    """Ask for the key by which a device is known.

    Args:
        envelope: as `opened` gave it.
        known: the device's key, 64 hex digits; None if there is no such device.

    Raises:
        RefusedStatusError: `unknown device` or `another key`.
    """
    device = envelope.status.device
    if known is None:
        raise RefusedStatusError(
            wanted="a device that is registered",
            got=repr(device),
            next_step=f"If it is yours: edgead ota devices add SOURCE {device} {envelope.key}",
            reason="unknown device",
        )
    if known != envelope.key:
        raise RefusedStatusError(
            wanted=f"the key {known[:16]} of {device!r}",
            got=f"the key {envelope.key[:16]}",
            next_step="If the device was set up anew: edgead ota devices add --replace. Else somebody plays it.",
            reason="another key",
        )


def seen(envelope: Envelope, received: float, *, verified: bool) -> Seen:
    """A status that counts, with what is odd about it."""
    ahead = envelope.status.time - received
    note = f"its clock is {ahead / 86_400:.0f} days ahead" if ahead > AHEAD_SECONDS else ""
    return Seen(envelope.status, received, envelope.key, verified, note)


def is_database(source: str) -> bool:
    """Whether a source is a database's URL or file, rather than a folder."""
    return ("://" in source and not source.startswith("file://")) or (
        not Path(source).is_dir() and Path(source).suffix in (".db", ".sqlite", ".sqlite3")
    )


def read_statuses(source: str | Path, devices: Sequence[DeviceKey] | None = None) -> Found:
    """The newest status of each device, from a database or a folder.

    Args:
        source: a database's URL or file, or a folder with statuses in files; folders in it are looked into.
        devices: the registry to ask; else the database's own, or the `devices.json` of the folder.

    Raises:
        InputError: there is no such source, or it is of a newer edgead.
        StorageError: it cannot be read.
        MissingDependencyError: a database, and the package for it is not installed.
    """
    if is_database(str(source)):
        from edgead.server_side.ota.status_store import StatusStore

        with StatusStore(str(source), create=False) as store:
            known = {record.device: record for record in store.devices.all()}
            statuses, refused = store.read_latest()
        if devices is not None:
            known = {record.device: record for record in devices}
        kept = []
        for one in statuses:
            record = known.get(one.status.device)
            if record is not None and record.key == one.key:
                kept.append(one)
            else:
                reason: Reason = "unknown device" if record is None else "another key"
                refused.append(Refused(one.status.device, reason, "by the list of devices that was given"))
        return Found(kept, refused, list(known.values()))
    return _read_folder(Path(str(source).removeprefix("file://")), devices)


def _read_folder(folder: Path, devices: Sequence[DeviceKey] | None) -> Found:
    if not folder.is_dir():
        raise InputError(
            wanted=f"a folder of statuses, or a database, at {folder}",
            got="a file" if folder.exists() else "nothing there",
            next_step="Name a device's spool, a folder of several, a .db file or a URL such as postgresql://HOST/NAME",
        )
    if devices is None and (folder / DEVICES).exists():
        devices = DeviceFile(folder).all()
    known = None if devices is None else {record.device: record.key for record in devices}
    pinned: dict[str, str] = {}
    disk = RealDisk()
    best: dict[str, Seen] = {}
    refused: list[Refused] = []
    for path in _files(folder):
        try:
            received = path.stat().st_mtime
            envelope = opened(disk.read(path, STATUS_BYTES + 1))
            device = envelope.status.device
            # Without a registry a device is who was there first; two that claim to be one are told apart at least.
            key = known.get(device) if known is not None else pinned.setdefault(device, envelope.key)
            check_key(envelope, key)
        except OSError as error:
            refused.append(Refused(str(path), "malformed", error.strerror or str(error)))
            continue
        except RefusedStatusError as error:
            refused.append(Refused(str(path), error.reason, str(error)))
            continue
        old = best.get(device)
        if old is None or envelope.status.sequence > old.status.sequence:
            best[device] = seen(envelope, received, verified=known is not None)
    return Found([best[device] for device in sorted(best)], refused, None if devices is None else list(devices))


def _files(folder: Path) -> Iterator[Path]:
    """Files of a folder that may be statuses, in the order of their names."""
    count = 0
    base = len(folder.parts)
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(here.parts) - base >= _DEPTH:
            folders.clear()
        for name in sorted(files):
            if not name.endswith(".json") or name.startswith(".") or name in _OTHERS:
                continue
            count += 1
            if count > MOST_FILES:
                return
            yield here / name


def _refusal(error: StatusError, reason: Reason) -> RefusedStatusError:
    return RefusedStatusError(wanted=error.wanted, got=error.got, next_step=error.next_step, reason=reason)


def when(seconds: float) -> str:
    """A time as people read it; clocks of devices can be anything."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "out of all calendars"


__all__ = [
    "REASONS",
    "Found",
    "Reason",
    "Refused",
    "RefusedStatusError",
    "Seen",
    "check_key",
    "is_database",
    "opened",
    "read_statuses",
    "seen",
    "when",
]
