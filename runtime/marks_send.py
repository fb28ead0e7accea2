"""Ways for marked pictures to leave a device: over HTTP to a collector, or into a folder such as a stick."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from edgead import __version__
from edgead.runtime.candidates import SUFFIX
from edgead.runtime.disk import Disk, put_file
from edgead.runtime.errors import InputError, StorageError
from edgead.runtime.net import authorization, ended_after

PATH = "/candidates"
"""Where a collector takes them, if its address has no path."""
_ANSWER = 64 * 2**10
_TOTAL_S = 300.0
"""For one candidate, however slowly it goes."""

Outcome = Literal["arrived", "refused", "kept"]
"""`arrived`: it is there; `refused`: who got it does not want it; `kept`: it did not arrive, or not surely."""


def sender_to(where: str, disk: Disk, timeout_s: float) -> Callable[[str, bytes], tuple[Outcome, str]]:
    """What brings one candidate to the publisher: (digest, bytes) -> what became of it, and why.

    Args:
        where: http(s)://host[:port][/path] of a collector, or a folder or file:// address.
        disk: takes the steps in a folder.
        timeout_s: how long one step may take.

    Raises:
        InputError: `where` is neither.
    """
    parts = urlsplit(where)
    with contextlib.suppress(ValueError):
        if parts.scheme in ("http", "https") and parts.hostname:
            return _Collector(where, timeout_s)
    folder = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(where)
    if folder.is_dir():
        return _Folder(folder, disk)
    raise InputError(
        wanted="the address of a collector (http:// or https://) or a folder that is there",
        got=repr(where[:200]),
        next_step="Name one with --to.",
    )


class _Folder:
    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self.disk = folder, disk

    def __call__(self, digest: str, data: bytes) -> tuple[Outcome, str]:
        try:
            put_file(self.disk, self.folder / f"{digest}{SUFFIX}", [data])
        except StorageError as error:
            return "kept", error.got
        return "arrived", ""


class _Collector:
    """Takes one candidate after another over a connection each. Redirections are not followed."""

    def __init__(self, address: str, timeout_s: float) -> None:
        where = urlsplit(address)
        self.host, self.port = str(where.hostname), where.port
        self.secure = where.scheme == "https"
        self.path = (where.path if where.path not in ("", "/") else PATH) + (f"?{where.query}" if where.query else "")
        self.timeout = timeout_s
        self.headers = {
            "Content-Type": "application/octet-stream",
            "User-Agent": f"edgead/{__version__}",
            **authorization(where),
        }

    def __call__(self, digest: str, data: bytes) -> tuple[Outcome, str]:
        connection = (
            http.client.HTTPSConnection(
                self.host, self.port, timeout=self.timeout, context=ssl.create_default_context()
            )
            if self.secure
            else http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        )
        try:
            with contextlib.closing(connection), ended_after(connection, _TOTAL_S):
                connection.request("POST", self.path, data, self.headers)
                answer = connection.getresponse()
                status, body = answer.status, answer.read(_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            return "kept", f"no answer ({error})"[:300]
        reason = _reason(body) or f"status {status}"
        if status in (200, 201):
            # A login page answers with 200 too; only who names the candidate has it.
            named = _named(body) == digest
            return ("arrived", "") if named else ("kept", "an answer that is none of a collector")
        if status in (400, 403, 413, 422):
            return "refused", reason
        return "kept", reason


def _answer(body: bytes) -> dict[str, object]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _reason(body: bytes) -> str:
    answer = _answer(body)
    found = answer.get("reason", answer.get("error"))
    return "".join(letter for letter in found[:300] if letter.isprintable()) if isinstance(found, str) else ""


def _named(body: bytes) -> object:
    return _answer(body).get("id")


__all__ = ["PATH", "Outcome", "sender_to"]
