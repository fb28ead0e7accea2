"""Pins on a device: a release is taken only if somebody whom the device trusts vouches for its knowledge.

Only for devices that were given such keys. The pin is fetched before any part of the release, so that a release without
one costs less than a kilobyte. A camera has the rows, and not the record of where they are from: it checks signature,
key, window, product and the digest of the whole pack; that the sources give the root, `edgead knowledge verify` checks
where the record is.

The pin of a pack that was taken is kept in `pins/` of the device's folder, for `edgead knowledge trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from edgead.runtime.disk import PART, Disk, put_file
from edgead.runtime.errors import InputError, PinError, storage_errors
from edgead.runtime.pins import (
    PIN_BYTES,
    Pin,
    TrustedKey,
    decode_pin,
    encode_pin,
    key_name,
    load_public_key,
    verify_pin_of,
)
from edgead.runtime.release import Release
from edgead.runtime.slots_files import PACKS
from edgead.runtime.trust import TrustedRepository
from edgead.runtime.update_outcome import Device

PINS = "pins"
"""Folder in that of the device."""


def pin_target(product: str, digest: str) -> str:
    """Target path of the pin of a pack."""
    return f"knowledge/{product}/{digest}.pin"


def check_pinned(repository: TrustedRepository, device: Device, release: Release, signed_time: int) -> Pin | None:
    """Check that a key of the device's vouches for the knowledge of a release.

    Args:
        repository: refreshed.
        device: who it is, with its keys.
        release: that it is about to take.
        signed_time: when the repository says that it is, seconds since 1970: a window is judged by that, and not by
            the clock of the device.

    Returns:
        the pin; None for a device without such keys.

    Raises:
        PinError: there is no pin, or one that does not count for this pack; names the release.
        FetchError, UntrustedError, StaleError, StorageError: see `TrustedRepository.read`.
    """
    if not device.pin_keys:
        return None
    digest = release.product_packs[device.product]
    try:
        data = repository.read(pin_target(device.product, digest), PIN_BYTES)
        if data is None:
            raise PinError(
                wanted=f"a pin of the knowledge {digest[:12]} by one of {', '.join(sorted(device.pin_keys))}",
                got="none in the repository",
                next_step="Sign it with: edgead ota pin",
            )
        pin = decode_pin(data)
        keys = {kid: TrustedKey(public) for kid, public in device.pin_keys.items()}
        verify_pin_of(pin, device.product, digest, keys, now=datetime.fromtimestamp(signed_time, timezone.utc))
    except PinError as error:
        raise PinError(
            wanted=error.wanted,
            got=f"release {release.counter} with {error.got}",
            next_step=error.next_step,
        ) from error
    return pin


def load_pin_keys(words: Sequence[str]) -> dict[str, bytes]:
    """Trusted keys by name, from words `FILE` or `NAME=FILE`.

    Raises:
        InputError: no Ed25519 public key, or two of one name.
        StorageError: a file cannot be read.
        MissingDependencyError: the package for signatures is not installed.
    """
    found: dict[str, bytes] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        # A path may have an equals sign in it, a name of a key has no folder.
        path = Path(rest) if equals and not Path(word).is_file() else Path(word)
        with storage_errors(path, "to read a key"), path.open("rb") as stream:
            public = load_public_key(stream.read(PIN_BYTES))
        kid = name if path == Path(rest) and equals else key_name(public)
        if found.setdefault(kid, public) != public:
            raise InputError(
                wanted="one key for each name",
                got=f"two for {kid!r}",
                next_step="Give each a name: --pin-key NAME=FILE",
            )
    return found


def keep_pin(disk: Disk, folder: Path, pin: Pin) -> None:
    """Keep a pin, and remove those of packs that are gone.

    Raises:
        StorageError: the file system refused.
    """
    place = folder / PINS
    with storage_errors(place, "to keep a pin"):
        disk.make_folder(place)
        here = {name.partition(".")[0] for name in disk.names(folder / PACKS)} | {pin.pack}
        for name in disk.names(place):
            if name.endswith(PART) or name.partition(".")[0] not in here:
                disk.remove(place / name)
    put_file(disk, place / f"{pin.pack}.pin", [encode_pin(pin)])


__all__ = ["PINS", "check_pinned", "keep_pin", "load_pin_keys", "pin_target"]
