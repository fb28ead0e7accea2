"""Provenance records and pins on disk: beside the file that they are about, whatever kind of file that is.

`part.safetensors` has `part.safetensors.provenance` and `part.safetensors.pin`; a delta or a bundle has its own in the
same way, about the pack that the delta makes or the initial pack of the bundle.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgead.runtime.chain import write_knowledge
from edgead.runtime.errors import InputError, KnowledgeError, PinError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.knowledge import Pack
from edgead.runtime.pins import PIN_BYTES, Pin, decode_pin, encode_pin
from edgead.runtime.provenance import (
    PROVENANCE_BYTES,
    Provenance,
    check_provenance,
    decode_provenance,
    encode_provenance,
)

PROVENANCE_SUFFIX = ".provenance"
PIN_SUFFIX = ".pin"


def provenance_path(path: Path) -> Path:
    """Where the record about a pack, delta, detector or bundle stands."""
    return path.with_name(path.name + PROVENANCE_SUFFIX)


def pin_path(path: Path) -> Path:
    """Where the pin of a pack or bundle stands."""
    return path.with_name(path.name + PIN_SUFFIX)


def read_provenance(path: Path) -> Provenance:
    """Read and verify a record.

    Raises:
        KnowledgeError: see `decode_provenance`; names the file.
        StorageError: it cannot be read.
    """
    try:
        return decode_provenance(_read(path, PROVENANCE_BYTES))
    except KnowledgeError as error:
        raise KnowledgeError(wanted=error.wanted, got=f"{error.got}, in {path}", next_step=error.next_step) from error


def provenance_beside(path: Path) -> Provenance | None:
    """The record about a pack, delta, detector or bundle; None if there is none.

    Raises:
        KnowledgeError, StorageError: see `read_provenance`.
    """
    beside = provenance_path(path)
    return read_provenance(beside) if beside.is_file() else None


def write_provenance(path: Path, provenance: Provenance) -> None:
    """Write a record to `path`, atomically; replaces an old one.

    Raises:
        KnowledgeError: over a limit of the format.
        StorageError: the file system refused; `path` is then as it was.
    """
    write_file(path, encode_provenance(provenance))


def read_pin(path: Path) -> Pin:
    """Read a pin. That it is well formed says nothing; see `verify_pin`.

    Raises:
        PinError: see `decode_pin`; names the file.
        StorageError: it cannot be read.
    """
    try:
        return decode_pin(_read(path, PIN_BYTES))
    except PinError as error:
        raise PinError(wanted=error.wanted, got=f"{error.got}, in {path}", next_step=error.next_step) from error


def write_pin(path: Path, pin: Pin) -> None:
    """Write a pin to `path`, atomically; replaces an old one.

    Raises:
        StorageError: the file system refused; `path` is then as it was.
    """
    write_file(path, encode_pin(pin))


def _read(path: Path, limit: int) -> bytes:
    if path.exists() and not path.is_file():
        raise InputError(wanted=f"a file at {path}", got="a folder or device", next_step="Name a file.")
    with storage_errors(path, "to read"), path.open("rb") as stream:
        return stream.read(limit + 1)


def write_with_provenance(path: Path, base: Pack, result: Pack, provenance: Provenance, *, force: bool = False) -> int:
    """Write a delta (`.delta`) or a whole pack, and beside it the record of its rows. An old pin there is removed.

    Returns:
        bytes of the delta or pack.

    Raises:
        KnowledgeError: the record is not that of `result`, or the change cannot be a delta.
        OutputExistsError: one of the files exists and `force` is false.
        StorageError: the file system refused.
    """
    check_provenance(result, provenance)
    beside = provenance_path(path)
    for place in (path, beside, pin_path(path)):
        refuse_existing(place, force)
    with storage_errors(path, "to replace what was signed"):
        pin_path(path).unlink(missing_ok=True)
    write_provenance(beside, provenance)
    try:
        return write_knowledge(path, base, result, force=force)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
