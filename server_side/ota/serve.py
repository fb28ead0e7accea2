"""A static file server for trials: ranges, entity tags, metadata in gzip for who asks. A plant uses any web server."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from edgead.runtime.errors import StorageError

_SERVED = ("metadata", "targets")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)\Z")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,254}\Z")
_IDLE_SECONDS = 30.0
_ACCEPTED = re.compile(r"\s*(x-)?gzip\s*(;\s*q\s*=\s*(0\.\d*[1-9]\d*|1(\.0*)?)\s*)?\Z", re.IGNORECASE)
_PACKED_BYTES = 16 * 2**20
"""Of packed metadata that is kept; what is over goes, the oldest first."""


class RepositoryServer(ThreadingHTTPServer):
    """Serves the folders `metadata` and `targets` of a repository.

    Args:
        folder: the repository.
        host, port: where to listen; port 0 for any free one.
        quiet: whether requests are not printed.

    Attributes:
        requests: of each request, path, status and bytes of the body.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0, *, quiet: bool = True) -> None:
        self.folder = folder
        self.quiet = quiet
        self._packed: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.requests: list[tuple[str, int, int]] = []
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise StorageError(
                wanted=f"to listen on {host}:{port}",
                got=f"the system's refusal: {error.strerror or error}",
                next_step="Name another --port.",
            ) from error

    @property
    def url(self) -> str:
        """Where devices find it: metadata in `<url>/metadata/`, targets in `<url>/targets/`."""
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def packed(self, tag: str, stream: BinaryIO) -> bytes:
        """The content of a stream in gzip; the same bytes each time, and made once.

        Args:
            tag: differs for each content.
            stream: at its beginning.
        """
        with self._lock:
            found = self._packed.get(tag)
        if found is None:
            found = gzip.compress(stream.read(), 9, mtime=0)
            with self._lock:
                self._packed[tag] = found
                while sum(map(len, self._packed.values())) > _PACKED_BYTES and len(self._packed) > 1:
                    self._packed.pop(next(iter(self._packed)))
        return found


@contextlib.contextmanager
def serving(folder: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[RepositoryServer]:
    """A server in a thread of its own while the block runs."""
    with RepositoryServer(folder, host, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: RepositoryServer
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    # Head and body in one segment; a keep-alive client else waits for the other end's delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self._place()
        try:
            if path is None:
                raise FileNotFoundError
            stream = path.open("rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with stream:
            self._send(path.name, stream, body)

    def _send(self, name: str, stream: BinaryIO, body: bool) -> None:
        status = os.fstat(stream.fileno())
        size, tag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"'
        extra = {"Vary": "Accept-Encoding"} if self._shrinks() else {}
        if extra and self._unpacks() and "Range" not in self.headers:
            data = self.server.packed(tag, stream)
            if len(data) < size:
                # Another entity than the file as it is, so that nobody continues one with the other.
                stream, size, tag = io.BytesIO(data), len(data), f'{tag[:-1]}-gzip"'
                extra["Content-Encoding"] = "gzip"
        if self.headers.get("If-None-Match") in (tag, "*"):
            self._head(HTTPStatus.NOT_MODIFIED, name, tag, None, extra)
            return
        span = self._span(size, tag)
        if span is None:
            self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
            return
        first, last = span
        partial = (first, last) != (0, size)
        if partial:
            extra["Content-Range"] = f"bytes {first}-{last - 1}/{size}"
        code = HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK
        self._head(code, name, tag, last - first, extra)
        if body:
            stream.seek(first)
            shutil.copyfileobj(_Slice(stream, last - first), self.wfile)

    def _span(self, size: int, tag: str) -> tuple[int, int] | None:
        """Bytes to send as (first, end); all of them without a range, None for one outside of the file."""
        asked = self.headers.get("Range")
        match = _RANGE.match(asked) if asked else None
        if match is None or match.group(0) == "bytes=-" or self.headers.get("If-Range", tag) != tag:
            return 0, size
        first, last = match.groups()
        if not first:
            return (max(0, size - int(last)), size) if int(last) else None
        end = min(int(last) + 1, size) if last else size
        return (int(first), end) if int(first) < size and int(first) < end else None

    def _shrinks(self) -> bool:
        """Whether it is signed metadata; engines and packs are fetched in ranges, and do not shrink."""
        path = urlsplit(self.path).path
        return path.startswith("/metadata/") and path.endswith(".json")

    def _unpacks(self) -> bool:
        return any(_ACCEPTED.match(part) for part in self.headers.get("Accept-Encoding", "").split(","))

    def _place(self) -> Path | None:
        parts = unquote(urlsplit(self.path).path).split("/")[1:]
        # Plain names alone, so that nothing leads out of the folder or to what is not for devices.
        if not parts or parts[0] not in _SERVED or not all(_PART.match(part) for part in parts):
            return None
        path = self.server.folder.joinpath(*parts)
        return path if path.is_file() else None

    def _head(
        self, code: HTTPStatus, name: str, tag: str, length: int | None, extra: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        self.send_header("ETag", tag)
        self.send_header("Accept-Ranges", "bytes")
        fixed = name != "timestamp.json"
        self.send_header("Cache-Control", "public, max-age=31536000, immutable" if fixed else "no-cache")
        if length is not None:
            kind = "application/json" if name.endswith(".json") else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
        for key, value in (extra or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.server.requests.append((self.path, int(code), length or 0))

    def _refuse(self, code: HTTPStatus, extra: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (extra or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.requests.append((self.path, int(code), 0))

    def version_string(self) -> str:
        return "edgead"

    def log_message(self, format: str, *args: object) -> None:
        if not self.server.quiet:
            super().log_message(format, *args)


class _Slice:
    """The next `length` bytes of a stream, for `copyfileobj`."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream, self._left = stream, length

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
