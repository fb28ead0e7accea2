"""Models of others: a folder on this machine, or a hub's name of one, never fetched unless somebody named it."""

from __future__ import annotations

import hashlib
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from edgead.runtime.errors import InputError, missing_dependency, storage_errors

_REACH_S = 5.0
"""Seconds to find out whether the hub can be reached at all."""
_CHUNK = 1 << 20


def find_model(place: str, *, what: str, next_step: str, probe: str = "config.json") -> tuple[str, bool]:
    """Where a library shall load a model from, and whether only from this machine.

    Args:
        place: a folder, or the hub's name of a model ('owner/name').
        what: it is, for messages: 'a language model'.
        next_step: which option names a local folder.
        probe: a file that each such model has; tells whether the hub's cache has it.

    Raises:
        InputError: no folder, not in the hub's cache, and no way to the hub.
        MissingDependencyError: no `huggingface_hub`.
    """
    folder = Path(place)
    if folder.is_dir():
        return str(folder), True
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", place):
        raise InputError(
            wanted=f"a folder with {what} at {place}",
            got="a file" if folder.is_file() else "no such folder",
            next_step=f"Pass a folder, or the hub's name of a model (owner/name): {next_step}",
        )
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "huggingface_hub", "server", what) from error
    if isinstance(try_to_load_from_cache(place, probe), str):
        return place, True
    hub = urllib.parse.urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE or not _hub_answers(hub):
        raise InputError(
            wanted=f"{what} {place!r}",
            got=f"no folder of that name, none in the hub's cache ({constants.HF_HUB_CACHE}), "
            f"and no way to {hub} from here",
            next_step=f"Copy the model to this machine and pass its folder: {next_step}",
        )
    return place, False


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder, 64 hex digits; empty if it is no folder.

    Raises:
        StorageError: a file cannot be read.
    """
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with storage_errors(path, "to read a model"), open(path, "rb") as stream:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _hub_answers(host: str) -> bool:
    # The hub's own client tries for most of a minute before it gives up.
    if urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((host, 443), timeout=_REACH_S):
            return True
    except OSError:
        return False
