"""Which key each device signs its statuses with, as the publisher knows it.

A device is known by the key that it was registered with: `edgead device key` on the device prints the line, `edgead ota
devices add` takes it. A registry is the file `devices.json` of a folder, or a table of the database that keeps the
statuses. A known device never gets another key by itself; who replaces one says so.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, Protocol

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.disk import RealDisk, locked, put_file
from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.spec import Digest, Name, canonical_json

DEVICES = "devices.json"
"""Name of a folder's registry."""
SCHEMA = 1
REGISTRY_BYTES = 64 * 2**20
"""Largest registry, and largest list that is imported."""
NOTE = 300
"""Characters that a note may have."""
_LOCK_SECONDS = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")
_KEY = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class DeviceKey:
    """A device that the publisher knows.

    Attributes:
        device: its name.
        key: its public key, 64 hex digits.
        added: seconds since 1970; 0 if not known.
        note: for people.
    """

    device: str
    key: str
    added: float = 0.0
    note: str = ""


class Devices(Protocol):
    """A registry of devices."""

    def all(self) -> list[DeviceKey]:
        """All devices, by name."""
        ...

    def add(self, new: Sequence[DeviceKey], *, replace: bool = False) -> int:
        """Register devices: all of them or none.

        Args:
            new: whom, as `checked` gives them; the ones that are known already stay as they are.
            replace: give known devices their new key. What was heard from them under the old one goes.

        Returns:
            how many were new or changed.

        Raises:
            InputError: a device has another key, and `replace` was not said.
            StorageError: the registry cannot be read or written.
        """
        ...

    def remove(self, device: str) -> None:
        """Forget a device, and what was heard from it.

        Raises:
            InputError: there is none of that name.
            StorageError: the registry cannot be read or written.
        """
        ...


def checked(device: str, key: str, note: str = "", added: float | None = None) -> DeviceKey:
    """A device's record from what somebody typed.

    Raises:
        InputError: a name or key that is none, or a note that is too long.
    """
    key = key.lower()
    if not _NAME.match(device):
        raise InputError(
            wanted="a device's name of letters, digits, '.', '_', '-'",
            got=repr(device[:80]),
            next_step="Take the line that this prints on the device: edgead device key FOLDER",
        )
    if not _KEY.match(key):
        raise InputError(
            wanted=f"the public key of {device} as 64 hex digits",
            got=repr(key[:80]),
            next_step="Take the line that this prints on the device: edgead device key FOLDER",
        )
    if len(note) > NOTE or not (note.isprintable() or not note):
        raise InputError(
            wanted=f"a note of at most {NOTE} letters in one line", got=repr(note[:80]), next_step="Shorten it."
        )
    return DeviceKey(device, key, time.time() if added is None else added, note)


def read_list(path: Path) -> list[DeviceKey]:
    """Devices of a file with lines `ID HEX [note]`, or of a `devices.json`. Empty lines and `#` lines are skipped.

    Raises:
        InputError: a line that is none, or one device with two keys.
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "to read a list of devices"), path.open("rb") as stream:
        data = stream.read(REGISTRY_BYTES + 1)
    if data.lstrip()[:1] == b"{":
        return _decoded(data, path)
    found: dict[str, DeviceKey] = {}
    for number, line in enumerate(_text(data, path).splitlines(), 1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        if len(words) == 1:
            _refuse(f"'ID HEX' in line {number} of {path}", repr(line[:80]))
        record = checked(words[0], words[1], words[2].strip() if len(words) == 3 else "")
        if found.setdefault(record.device, record).key != record.key:
            _refuse(f"one key for {record.device} in {path}", "two")
    return list(found.values())


class DeviceFile:
    """The registry `devices.json` of a folder; one that is not there is empty.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / DEVICES
        self._disk = RealDisk()

    def all(self) -> list[DeviceKey]:
        """All devices, by name.

        Raises:
            InputError: the file is damaged.
            StorageError: it cannot be read.
        """
        with storage_errors(self.path, "to read the registry of devices"):
            try:
                data = self._disk.read(self.path, REGISTRY_BYTES + 1)
            except FileNotFoundError:
                return []
        return _decoded(data, self.path)

    def add(self, new: Sequence[DeviceKey], *, replace: bool = False) -> int:
        """See `Devices.add`."""
        with self._changing() as known:
            changed = 0
            for record in new:
                old = known.get(record.device)
                if old is not None and old.key == record.key:
                    continue
                if old is not None and not replace:
                    raise another_key(record, old.key)
                known[record.device] = record
                changed += 1
        return changed

    def remove(self, device: str) -> None:
        """See `Devices.remove`."""
        with self._changing() as known:
            if known.pop(device, None) is None:
                raise no_device(device, str(self.path))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, DeviceKey]]:
        with storage_errors(self.path.parent, "to make a folder"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._disk, self.path.with_name(".devices.lock"), _LOCK_SECONDS, "to change the registry"):
            known = {record.device: record for record in self.all()}
            yield known
            entries = {name: _Entry(one.key, one.added, one.note) for name, one in known.items()}
            put_file(self._disk, self.path, [canonical_json(_Registry(SCHEMA, entries))])


def another_key(record: DeviceKey, known: str) -> InputError:
    """The error for a device that is known by another key."""
    return InputError(
        wanted=f"the key {known[:16]} that {record.device} is known by",
        got=f"the key {record.key[:16]}",
        next_step="If the device was set up anew, replace its key: edgead ota devices add --replace",
    )


def no_device(device: str, place: str) -> InputError:
    """The error for a device that is not registered."""
    return InputError(
        wanted=f"a device registered in {place}",
        got=repr(device[:80]),
        next_step="See which there are: edgead ota devices list",
    )


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    key: Digest
    added: float = 0.0
    note: Annotated[str, Meta(max_length=NOTE)] = ""


class _Registry(Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    devices: dict[Name, _Entry]


def _decoded(data: bytes, path: Path) -> list[DeviceKey]:
    if len(data) > REGISTRY_BYTES:
        _refuse(f"a registry of at most {REGISTRY_BYTES} bytes at {path}", "more")
    try:
        registry = msgspec.json.decode(data, type=_Registry)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        _refuse(f"a registry of devices at {path}", str(error)[:300])
    if registry.schema != SCHEMA:
        _refuse(f"a registry of schema {SCHEMA} at {path}", f"schema {registry.schema}")
    return [DeviceKey(name, one.key, one.added, one.note) for name, one in sorted(registry.devices.items())]


def _text(data: bytes, path: Path) -> str:
    if len(data) > REGISTRY_BYTES:
        _refuse(f"a list of at most {REGISTRY_BYTES} bytes at {path}", "more")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            wanted=f"lines of text in {path}", got=str(error)[:200], next_step="Save it as UTF-8."
        ) from error


def _refuse(wanted: str, got: str) -> NoReturn:
    raise InputError(wanted=wanted, got=got, next_step="Correct it; a line is what 'edgead device key FOLDER' prints.")


__all__ = ["DEVICES", "DeviceFile", "DeviceKey", "Devices", "another_key", "checked", "no_device", "read_list"]
