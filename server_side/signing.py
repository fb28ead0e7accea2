"""Keys of pins as files: read, and opened with a passphrase that stands in no command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgead.runtime.errors import storage_errors
from edgead.runtime.pins import load_private_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY_BYTES = 64 * 1024


def read_key(path: Path) -> bytes:
    """The bytes of a key file.

    Raises:
        StorageError: it cannot be read.
    """
    with storage_errors(path, "to read a key"), path.open("rb") as stream:
        return stream.read(_KEY_BYTES)


def open_key(path: Path, variable: str) -> Ed25519PrivateKey:
    """A private key from PEM.

    Args:
        path: of the key.
        variable: environment variable with its passphrase; asked for at a terminal if it is not set.

    Raises:
        InputError: no such key, or one that the passphrase does not open.
        StorageError: it cannot be read.
        MissingDependencyError: the package for signatures is not installed.
    """
    data = read_key(path)
    return load_private_key(data, _passphrase(data, variable))


def _passphrase(key: bytes, variable: str) -> bytes | None:
    if b"ENCRYPTED" not in key:
        return None
    text = os.environ.get(variable)
    if text is None and sys.stdin.isatty():
        text = click.prompt("passphrase of the key", hide_input=True, err=True)
    return None if text is None else text.encode()


__all__ = ["open_key", "read_key"]
