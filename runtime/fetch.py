"""Files of an update repository, over HTTP, HTTPS or from a folder (`file://`, such as a USB stick).

Nothing that comes is trusted: a file counts when its length and SHA-256 are those that were signed. What is done here
is that a bad line costs time and not the update: a transfer that is cut goes on where it stopped, one that stalls or
drips is ended, and whatever goes wrong is one of the `FetchError`s. Redirections are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import ssl
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import url2pathname

from edgead import __version__
from edgead.runtime.disk import PART, Disk
from edgead.runtime.errors import FetchContentError, FetchError, FetchStatusError, FetchTimeoutError, storage_errors
from edgead.runtime.fetch_rules import (
    ChangedError,
    FetchLimits,
    Part,
    cut,
    damaged,
    judge,
    late,
    pause,
    restless,
    shown,
    too_long,
)
from edgead.runtime.net import authorization, ended_after
from edgead.runtime.packed import unpacked

_CHUNK = 64 * 2**10
_SAFE = "!#$%&'()*+,/:;=?@[]~"
"""What an address may hold as it is; the names of targets are parts of addresses already."""
_OLD = ".old"
"""What the name of a part ends with while it is copied into its successor."""


class Fetcher:
    """Fetches files, one at a time; not for several threads.

    Args:
        limits: how patient it is.
        stop: ends waits between attempts when it is set.
        rng: for the jitter of waits.
        context: of TLS; by default the system's certificates, verified.

    Attributes:
        received: bytes of bodies so far, as they came over the line.
        requests: requests so far.
    """

    def __init__(
        self,
        limits: FetchLimits | None = None,
        *,
        stop: threading.Event | None = None,
        rng: random.Random | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.limits = limits or FetchLimits()
        self.received = 0
        self.requests = 0
        self._stop = stop or threading.Event()
        self._rng = rng or random.Random()
        self._context = context
        self._packs = True
        self._kept: tuple[tuple[str, str], http.client.HTTPConnection] | None = None

    def read(self, url: str, most: int, *, sha256: str | None = None, packed: bool = False) -> bytes:
        """A small file.

        Args:
            url: where it is.
            most: bytes that it may have; with `sha256`, exactly.
            sha256: that it must have.
            packed: let the server send it in gzip, which it may ignore. What arrives counts unpacked; an answer that
                was cut is begun anew, as it is.

        Raises:
            FetchError: it cannot be had.
        """
        end = time.monotonic() + self.limits.total_s
        for _ in range(self.limits.restarts + 1):
            try:
                data = b"".join(self._stream(url, 0, most, sha256 is not None, end, packed and self._packs))
            except ChangedError:
                packed = False
                continue
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise damaged(url, sha256)
            return data
        raise restless(url)

    def save(self, url: str, path: Path, disk: Disk, *, length: int, sha256: str) -> None:
        """A large file onto the disk; what an interrupted call left of it is not fetched again.

        Args:
            url: where it is.
            path: where to; appears whole, or not at all. Its name should tell the content.
            disk: takes the steps.
            length: bytes that it has.
            sha256: that it has.

        Raises:
            FetchError: it cannot be had; what came so far is kept for the next call if it may be of use.
            StorageError: the file system refused.
        """
        end = time.monotonic() + self.limits.total_s
        part = path.with_name(path.name + PART)
        # A copy that was interrupted is of less use than what it was made from.
        old = path.with_name(path.name + _OLD)
        for _ in range(self.limits.restarts + 1):
            with storage_errors(path, "to download a file"):
                here = self._present(disk, part, old, length)
                digest = hashlib.sha256()
                try:
                    disk.write(part, _noted(self._whole(url, disk, old, here, length, end), digest))
                except ChangedError:
                    disk.remove(part)
                    disk.remove(old)
                    continue
                disk.remove(old)
                if digest.hexdigest() != sha256:
                    disk.remove(part)
                    if here:  # what lay here may have been of another file
                        continue
                    raise damaged(url, sha256)
                disk.sync(part)
                disk.replace(part, path)
                disk.sync_folder(path.parent)
                return
        raise restless(url)

    def close(self) -> None:
        """Let the connection go; the next file opens another one."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    def _present(self, disk: Disk, part: Path, old: Path, length: int) -> int:
        """Bytes in `old`, which is the longer of what earlier calls left."""
        sizes = {name: _size(disk, name) for name in (part, old)}
        if sizes[part] > sizes[old]:
            disk.replace(part, old)
        here = max(sizes.values())
        if here >= length:
            disk.remove(old)
            return 0
        return here

    def _whole(self, url: str, disk: Disk, old: Path, here: int, length: int, end: float) -> Iterator[bytes]:
        if here:
            yield from disk.chunks(old)
        yield from self._stream(url, here, length, True, end)

    def _stream(
        self, url: str, offset: int, most: int, exact: bool, end: float, packed: bool = False
    ) -> Iterator[bytes]:
        """The file from `offset` on, over as many connections as it takes.

        Raises:
            FetchError: it cannot be had.
            ChangedError: it cannot be continued.
        """
        validator: str | None = None
        failures, unpacking = 0, False
        while True:
            before = offset
            try:
                with self._opened(url, offset, most, exact, validator, end, packed) as (part, pieces):
                    validator, unpacking = part.validator or validator, part.packed
                    for piece in self._unpacked(url, pieces, part.end, most) if unpacking else pieces:
                        offset += len(piece)
                        if offset > most:
                            raise too_long(shown(url), most)
                        self.received += 0 if unpacking else len(piece)
                        yield piece
                    if part.end is not None and offset < part.end and not unpacking:
                        raise cut(url, offset, part.end)
                if not exact or offset == most:
                    return
                if part.end is None:
                    raise cut(url, offset, most)
                failures = 0 if offset > before else failures + 1
                if failures < self.limits.tries:
                    continue  # a range that was answered in part
                raise cut(url, offset, most)
            except FetchError as error:
                # An answer that says "no" is a whole answer; `_settle` has closed what did not end well.
                if not isinstance(error, FetchStatusError):
                    self.close()
                failures = 1 if offset > before else failures + 1
                wait = pause(failures, self.limits, self._rng, error.retry_after) if error.transient else None
                if wait is None or time.monotonic() + wait >= end or self._stop.wait(wait):
                    raise
                if unpacking and offset:
                    raise ChangedError from error

    def _unpacked(self, url: str, pieces: Iterable[bytes], end: int | None, most: int) -> Iterator[bytes]:
        def counted(piece: bytes) -> bytes:
            self.received += len(piece)
            return piece

        try:
            yield from unpacked(map(counted, pieces), url, end, most)
        except FetchContentError:
            # Whoever packs wrongly is not asked to again, so that this costs one poll and not all of them.
            self._packs = False
            raise

    @contextlib.contextmanager
    def _opened(
        self, url: str, offset: int, most: int, exact: bool, validator: str | None, end: float, packed: bool
    ) -> Iterator[tuple[Part, Iterator[bytes]]]:
        where = urlsplit(url)
        self.requests += 1
        if where.scheme == "file":
            with _local(where, offset, most, exact) as found:
                yield found
            return
        if where.scheme not in ("http", "https") or not where.hostname:
            raise FetchError(wanted="an address with http, https or file", got=shown(url), next_step="Correct it.")
        packed = packed and not offset  # a range of a packed file is of no use
        headers = {"Accept-Encoding": "gzip" if packed else "identity", "User-Agent": f"edgead/{__version__}"}
        headers |= authorization(where)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        with self._foreign(url, end):
            connection, answer = self._answer(where, headers, end)
            try:
                part = judge(
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    name=shown(url),
                    offset=offset,
                    most=most,
                    exact=exact,
                    validator=validator,
                    packed=packed,
                )
                yield part, self._pieces(url, connection, answer, end)
            finally:
                self._settle(connection, answer)

    def _answer(
        self, where: SplitResult, headers: dict[str, str], end: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        key = (where.scheme, where.netloc)
        kept = self._kept is not None and self._kept[0] == key
        while True:
            if not kept:
                self.close()
                self._kept = (key, self._connected(where, end))
            assert self._kept is not None
            connection = self._kept[1]
            try:
                # A head that drips is ended like a body; a socket's own timeout begins anew with each byte.
                most = max(0.01, min(2.0 * self.limits.gap_s, end - time.monotonic()))
                with ended_after(connection, most):
                    self._arm(connection, end)
                    target = quote(where.path + (f"?{where.query}" if where.query else ""), safe=_SAFE)
                    connection.request("GET", target or "/", headers=headers)
                    return connection, connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError):
                # A server closes a connection that it kept long enough; nothing is wrong with it then.
                if not kept:
                    raise
                kept = False

    def _settle(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        """Keep the connection if the rest of the answer is short, as that of "not found" is."""
        left = answer.length
        if left == 0:
            # An answer that was read to its last byte, or has none, is not closed before somebody asks for one more.
            answer.read()
        elif not answer.isclosed() and left is not None and left < _CHUNK:
            with (
                contextlib.suppress(OSError, http.client.HTTPException, ValueError),
                ended_after(connection, self.limits.gap_s),
            ):
                answer.read()
        if not answer.isclosed() or answer.will_close:
            self.close()

    def _connected(self, where: SplitResult, end: float) -> http.client.HTTPConnection:
        timeout = max(0.01, min(self.limits.connect_s, end - time.monotonic()))
        host = str(where.hostname)
        connection: http.client.HTTPConnection
        if where.scheme == "https":
            context = self._context or ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, where.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(host, where.port, timeout=timeout)
        connection.connect()
        return connection

    def _pieces(
        self, url: str, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, end: float
    ) -> Iterator[bytes]:
        begun, count = time.monotonic(), 0
        while True:
            self._arm(connection, end)
            with self._foreign(url, end):
                piece = answer.read1(_CHUNK)
            if not piece:
                return
            now = time.monotonic()
            count += len(piece)
            if now >= end:
                raise late(url, self.limits)
            if now - begun >= self.limits.rate_window_s:
                if count < self.limits.least_rate * (now - begun):
                    raise FetchTimeoutError(
                        wanted=f"{shown(url)} at {self.limits.least_rate:g} bytes per second or more",
                        got=f"{count} bytes in {now - begun:.1f} s",
                        next_step="Check the network; it is tried again by itself.",
                        transient=True,
                    )
                begun, count = now, 0
            yield piece

    def _arm(self, connection: http.client.HTTPConnection, end: float) -> None:
        if connection.sock is not None:  # it is None once the last byte of a closing connection was read
            connection.sock.settimeout(max(0.01, min(self.limits.gap_s, end - time.monotonic())))

    @contextlib.contextmanager
    def _foreign(self, url: str, end: float) -> Iterator[None]:
        """Errors of the network become ours here."""
        try:
            yield
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                raise late(url, self.limits) from error
            kind = FetchTimeoutError if isinstance(error, TimeoutError) else FetchError
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
            raise kind(
                wanted=f"the file {shown(url)}",
                got=f"{type(error).__name__}: {reason}"[:300],
                next_step="Check the network and the address of the repository; it is tried again by itself.",
                transient=not isinstance(error, (ssl.SSLCertVerificationError, ValueError)),
            ) from error


@contextlib.contextmanager
def _local(where: SplitResult, offset: int, most: int, exact: bool) -> Iterator[tuple[Part, Iterator[bytes]]]:
    """A file of a folder; judged as if a server had answered."""
    name = where.geturl()[:300]
    if where.netloc not in ("", "localhost"):
        raise FetchError(wanted="an address of a folder here (file:///...)", got=name, next_step="Correct it.")
    try:
        descriptor = os.open(url2pathname(where.path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise FetchStatusError(
            wanted=f"the file {name}",
            got=getattr(error, "strerror", "") or str(error),
            next_step="Check that the medium is there and whole.",
            status=404 if missing else 403,
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FetchContentError(wanted=f"a plain file at {name}", got="something else")
    with os.fdopen(descriptor, "rb") as stream:
        headers = {"content-length": str(status.st_size)}
        if offset:
            headers["content-range"] = f"bytes {offset}-{status.st_size - 1}/{status.st_size}"
        part = judge(206 if offset else 200, headers, name=name, offset=offset, most=most, exact=exact, validator=None)
        stream.seek(offset)
        try:
            yield part, iter(lambda: stream.read(_CHUNK), b"")
        except OSError as error:
            raise FetchError(wanted=f"the file {name}", got=error.strerror or str(error)) from error


def _noted(chunks: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _size(disk: Disk, path: Path) -> int:
    try:
        return disk.size(path)
    except FileNotFoundError:
        return 0
