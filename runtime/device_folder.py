"""The folder of a device: its store, and beside it who the device is and whom it trusts.

    device.json, device.copy.json    who it is; canonical JSON
    root.json, root.copy.json        the root of trust that it was given; never written again
    device.key, device.copy.key      what it signs its statuses with (`edgead.runtime.device_key`)
    last.json                        what the last poll came to; only to be looked at

Everything else belongs to the store. Two copies, because a device without these could never be mended over the air.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edgead.runtime.device_key import ensure_key
from edgead.runtime.disk import Disk, RealDisk, put_file
from edgead.runtime.errors import EdgeadError, InputError, OutputExistsError, storage_errors
from edgead.runtime.mqtt_line import parse_broker
from edgead.runtime.spec import Digest, Name, canonical_json
from edgead.runtime.status_targets import checked_address
from edgead.runtime.update_outcome import Device, Outcome

SCHEMA = 1
ROOT_BYTES = 512_000
"""Largest root metadata."""
_RECORD_BYTES = 64 * 2**10
_RECORD = ("device.json", "device.copy.json")
_ROOT = ("root.json", "root.copy.json")
_LAST = "last.json"
_T = TypeVar("_T")


class _Record(Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    device_id: Name
    repository: str
    product: Name
    groups: tuple[Name, ...] = ()
    pin_keys: dict[Name, Digest] = {}
    statuses: Annotated[str, Meta(max_length=2000)] | UnsetType = UNSET
    mqtt: Annotated[str, Meta(max_length=2000)] | UnsetType = UNSET


def init_device(folder: Path, device: Device, *, force: bool = False, disk: Disk | None = None) -> None:
    """Write who a device is. A store that is there stays, and so does the key for statuses; else one is made.

    Args:
        folder: of the device.
        device: who it is; `repository` may be the path of a folder.
        force: replace what is there.
        disk: takes the steps.

    Raises:
        OutputExistsError: the folder is one of a device.
        InputError: a name, an address or a root that is none.
        StorageError: the file system refused.
    """
    disk = disk or RealDisk()
    if not force and any((folder / name).exists() for name in _RECORD):
        raise OutputExistsError(
            wanted=f"a new device in {folder}",
            got="one that is there",
            next_step="Name another folder, or add --force.",
        )
    _check_root(device.root)
    address = device.repository
    if "://" not in address and Path(address).is_dir():
        address = Path(address).resolve().as_uri()
    where = urlsplit(address)
    if where.scheme not in ("http", "https", "file") or not (where.hostname or where.scheme == "file"):
        raise InputError(
            wanted="the address of a repository (http://, https://, file:// or a folder that is there)",
            got=repr(device.repository[:200]),
            next_step="Correct --repository.",
        )
    pin_keys = {kid: public.hex() for kid, public in device.pin_keys.items()}
    groups = tuple(sorted(set(device.groups)))
    statuses = checked_address(device.statuses) if device.statuses else UNSET
    if device.mqtt:
        parse_broker(device.mqtt)
    mqtt = device.mqtt or UNSET
    data = canonical_json(_Record(SCHEMA, device.device_id, address, device.product, groups, pin_keys, statuses, mqtt))
    _record(data)
    with storage_errors(folder, "to make a folder"):
        disk.make_folder(folder)
    for names, content in ((_ROOT, device.root), (_RECORD, data)):
        for name in names:
            put_file(disk, folder / name, [content])
    ensure_key(folder, disk=disk)


def read_device(folder: Path, *, disk: Disk | None = None) -> Device:
    """Who a device is.

    Raises:
        InputError: the folder is no device's, or both copies are damaged.
    """
    disk = disk or RealDisk()
    record = _either(disk, folder, _RECORD, _RECORD_BYTES, _record)
    root = _either(disk, folder, _ROOT, ROOT_BYTES, _check_root)
    pin_keys = {kid: bytes.fromhex(public) for kid, public in record.pin_keys.items()}
    return Device(
        record.device_id,
        record.repository,
        record.product,
        root,
        record.groups,
        pin_keys,
        record.statuses or "",
        record.mqtt or "",
    )


def note_outcome(folder: Path, outcome: Outcome, failures: int, *, disk: Disk | None = None) -> None:
    """Keep what a poll came to, for `edgead device status`.

    Raises:
        StorageError: the file system refused.
    """
    report = {"time": int(time.time()), "failures": failures, **outcome_fields(outcome)}
    put_file(disk or RealDisk(), folder / _LAST, [json.dumps(report).encode()])


def last_outcome(folder: Path, *, disk: Disk | None = None) -> dict[str, Any] | None:
    """What the last poll came to; None if nobody knows."""
    try:
        found = json.loads((disk or RealDisk()).read(folder / _LAST, _RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it."""
    shadow = outcome.shadow
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "release": outcome.release,
        "way": outcome.way,
        "received": outcome.received,
        "requests": outcome.requests,
        "seconds": round(outcome.seconds, 3),
        "restart": outcome.restart,
        "shadow": None
        if shadow is None
        else {
            "frames": shadow.frames,
            "changed": [
                {"frame": item.frame, "before": item.before.value, "after": item.after.value} for item in shadow.changed
            ],
        },
        "error": None
        if outcome.error is None
        else {"kind": type(outcome.error).__name__, "message": str(outcome.error)[:1000]},
    }


def _record(data: bytes) -> _Record:
    try:
        record = msgspec.json.decode(data, type=_Record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        _refuse("a record of a device", str(error)[:300])
    if record.schema != SCHEMA:
        _refuse(f"a record of schema {SCHEMA}", f"schema {record.schema}")
    return record


def _check_root(data: bytes) -> bytes:
    try:
        kind = json.loads(data)["signed"]["_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = "something else"
    if kind != "root" or len(data) > ROOT_BYTES:
        _refuse("root metadata, which `edgead ota init` leaves in the key folder as root.json", str(kind)[:100])
    return data


def _either(disk: Disk, folder: Path, names: tuple[str, ...], most: int, check: Callable[[bytes], _T]) -> _T:
    """The first copy that is sound."""
    reasons = []
    for name in names:
        try:
            return check(disk.read(folder / name, most + 1))
        except OSError as error:
            reasons.append(f"{name}: {error.strerror or error}")
        except EdgeadError as error:
            reasons.append(f"{name}: {error.got}")
    raise InputError(
        wanted=f"the folder of a device at {folder}",
        got="; ".join(reasons)[:300],
        next_step="Make it with: edgead device init",
    )


def _refuse(wanted: str, got: str) -> NoReturn:
    raise InputError(wanted=wanted, got=got, next_step="Correct it, or make it with: edgead device init --force")
