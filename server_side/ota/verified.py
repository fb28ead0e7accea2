"""Signed metadata from bytes, and whether those signed it who may; for the publisher, who signs on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError

from edgead.runtime.disk import Disk
from edgead.runtime.errors import InputError, storage_errors
from edgead.server_side.ota.roles import Settings


def parsed(data: bytes, kind: type[Any], name: str) -> Metadata[Any]:
    """Metadata of one kind; its signatures are not looked at.

    Raises:
        InputError: it is none, or of another kind.
    """
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise forged(f"TUF metadata in {name}", "something else") from error
    if type(metadata.signed) is not kind:
        raise forged(f"{kind.__name__} metadata in {name}", type(metadata.signed).__name__)
    return metadata


def verify(above: Root | Targets, role: str, metadata: Metadata[Any]) -> None:
    """Whether a threshold of the keys that `above` names for `role` signed it.

    Raises:
        InputError: they did not.
    """
    try:
        above.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise forged(
            f"the role {role} with signatures of its keys", f"forged or unsigned metadata ({error})"
        ) from error


def read_settings(disk: Disk, place: Path) -> Settings:
    """How a repository is laid out.

    Raises:
        InputError: it does not say so.
        StorageError: the file cannot be read.
    """
    with storage_errors(place, "to read the layout of a repository"):
        data = disk.read(place, 16 * 2**20)
    try:
        return msgspec.json.decode(data, type=Settings)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise forged(f"the layout of a repository in {place.name}", str(error)) from error


def forged(wanted: str, got: str) -> InputError:
    """What is said of a repository that does not verify."""
    return InputError(
        wanted=f"a repository with {wanted}",
        got=got,
        next_step="Do not sign on top of it: restore the repository from a copy that verifies.",
    )


__all__ = ["forged", "parsed", "read_settings", "verify"]
