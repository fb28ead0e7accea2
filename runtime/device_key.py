"""The key that a device signs its statuses with: `device.key` and `device.copy.key`, 64 hex digits each, for its owner
alone. It is made where it is missing, stays when a device is initialised anew, and is never shown, sent or logged."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from edgead.runtime.device_status import new_device_key
from edgead.runtime.disk import Disk, RealDisk, put_file
from edgead.runtime.errors import StorageError

_NAMES = ("device.key", "device.copy.key")
_SEED = re.compile(rb"([0-9a-f]{64})\n?\Z")


def read_key(folder: Path, *, disk: Disk | None = None) -> bytes | None:
    """The 32 bytes of a device's private key; None if neither copy is sound."""
    found = (_sound(disk or RealDisk(), folder / name) for name in _NAMES)
    return next((seed for seed in found if seed is not None), None)


def ensure_key(folder: Path, *, disk: Disk | None = None) -> tuple[bytes, bool]:
    """The private key of a device, and whether it was made just now.

    Raises:
        StorageError: there is none, and the file system refused to keep a new one.
    """
    disk = disk or RealDisk()
    found = read_key(folder, disk=disk)
    seed = found or new_device_key()
    for name in _NAMES:
        if _sound(disk, folder / name):
            continue
        # Without any copy the device has no key; one that is lost beside a sound one is no reason to stop.
        with contextlib.suppress(*(() if found is None else (StorageError,))):
            put_file(disk, folder / name, [seed.hex().encode()], private=True)
    return seed, found is None


def _sound(disk: Disk, path: Path) -> bytes | None:
    try:
        found = _SEED.match(disk.read(path, 100))
    except OSError:
        return None
    return None if found is None else bytes.fromhex(found[1].decode())
