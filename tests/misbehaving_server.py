"""A web server on loopback that misbehaves on purpose, over real sockets. Loaded by its path; tests are no package."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Answer = Callable[["Handler", bytes], bool | None]
"""Called with the handler and the file's content; returns True to have the honest answer sent instead."""


class MisbehavingServer(ThreadingHTTPServer):
    """Serves files from memory or a folder; `fault` says how.

    Attributes:
        files: content by path, such as '/a.bin'.
        folder: where other paths are looked up.
        fault: misbehaves; None for none.
        only: misbehaves for paths that contain this.
        log: of each request, path and Range.
        sent: bytes of bodies.
        etags: whether honest answers carry entity tags.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.folder = folder
        self.fault: Answer | None = None
        self.only = ""
        self.log: list[tuple[str, str | None]] = []
        self.sent = 0
        self.etags = True
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    server: MisbehavingServer
    protocol_version = "HTTP/1.1"
    timeout = 10.0
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((path, self.headers["Range"]))
        content = self._content(path)
        fault = self.server.fault
        if fault is not None and self.server.only in path and not fault(self, content or b""):
            return
        if content is None:
            self.send_status(404)
        else:
            self.send_file(content)

    def _content(self, path: str) -> bytes | None:
        if path in self.server.files:
            return self.server.files[path]
        place = None if self.server.folder is None else self.server.folder / path.lstrip("/")
        return place.read_bytes() if place is not None and place.is_file() else None

    def start(self, content: bytes) -> bytes:
        """The honest head for what was asked; the body that belongs to it."""
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, tag)
        if asked and same and int(asked[1]) >= len(content):
            self.send_status(416)
            return b""
        body = content[int(asked[1]) :] if asked and same else content
        self.send_response(206 if asked and same else 200)
        self.send_header("Content-Length", str(len(body)))
        if self.server.etags:
            self.send_header("ETag", tag)
        if asked and same:
            self.send_header("Content-Range", f"bytes {asked[1]}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        return body

    def send_file(self, content: bytes) -> None:
        self.put(self.start(content))

    def send_status(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"no\n") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.put(body)

    def put(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        self.server.sent += len(body)

    def cut(self) -> None:
        """End the connection with a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def wait(self) -> None:
        """Say nothing more."""
        self.wfile.flush()
        self.server.over.wait(10.0)
        self.close_connection = True


@contextlib.contextmanager
def misbehaving(folder: Path | None = None) -> Iterator[MisbehavingServer]:
    """A server in a thread of its own while the block runs."""
    with MisbehavingServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def status(code: int, **headers: str) -> Answer:
    """Always this answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.send_status(code, named)


def times(count: int, fault: Answer) -> Answer:
    """`fault` for the first so many requests; then honest."""
    left = [count]

    def answer(handler: Handler, content: bytes) -> bool | None:
        left[0] -= 1
        return True if left[0] < 0 else fault(handler, content)

    return answer


def cut_after(count: int, *, reset: bool = True) -> Answer:
    """The honest head, so many bytes of the body, and the end of the connection."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.put(handler.start(content)[:count])
        if reset:
            # Let the bytes arrive: a reset throws away what the client has not read.
            time.sleep(0.01)
            handler.cut()
        else:
            handler.close_connection = True

    return answer


def stalls(after: int) -> Answer:
    """So many bytes of the body, and then silence."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.put(handler.start(content)[:after])
        handler.wait()

    return answer


def silent(handler: Handler, content: bytes) -> None:
    """Not even a head."""
    handler.wait()


def drips(gap: float) -> Answer:
    """One byte at a time."""

    def answer(handler: Handler, content: bytes) -> None:
        body = handler.start(content)
        for index in range(len(body)):
            handler.put(body[index : index + 1])
            if handler.server.over.wait(gap):
                return

    return answer


def drips_head(gap: float) -> Answer:
    """The head one byte at a time, for ever."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not handler.server.over.wait(gap):
            handler.put(b"a")

    return answer


def endless(handler: Handler, content: bytes) -> None:
    """A body without length or end."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    while not handler.server.over.is_set():
        handler.put(content or b"x" * 4096)


def oversize(handler: Handler, content: bytes) -> None:
    """More than the file, with a length that says so."""
    handler.send_file(content + b"more")


def truncated(handler: Handler, content: bytes) -> None:
    """Half of the file, with a length that is honest about it."""
    handler.send_file(content[: len(content) // 2])


def flipped(handler: Handler, content: bytes) -> None:
    """One bit is another."""
    middle = len(content) // 2
    handler.send_file(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def portal(handler: Handler, content: bytes) -> None:
    """The login page of a hotel's network."""
    handler.send_status(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Welcome! Please log in.</html>")


def ignores_range(count: int) -> Answer:
    """Cuts the first answer after so many bytes, then sends the whole file whatever was asked."""
    first = [True]

    def answer(handler: Handler, content: bytes) -> None:
        if first[0]:
            first[0] = False
            cut_after(count)(handler, content)
            return
        handler.send_status(200, {}, content)

    return answer


def wrong_range(count: int, shift: int, *, honest_after: int | None = None) -> Answer:
    """Cuts whole answers after so many bytes; to a range it sends another one, and says so."""
    asked = [0]

    def answer(handler: Handler, content: bytes) -> bool | None:
        begin = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
        if begin is None:
            asked[0] += 1
            if honest_after is not None and asked[0] > honest_after:
                return True
            cut_after(count)(handler, content)
            return None
        start = max(0, int(begin[1]) + shift)
        body = content[start:]
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send_status(206, {"Content-Range": where}, body)
        return None

    return answer


def swaps(count: int, other: bytes, *, tags: bool) -> Answer:
    """Cuts the first answer; from then on another object of the same size is there."""
    first = [True]

    def answer(handler: Handler, content: bytes) -> None:
        handler.server.etags = tags
        if first[0]:
            first[0] = False
            cut_after(count)(handler, content)
            return
        handler.send_file(other)

    return answer
