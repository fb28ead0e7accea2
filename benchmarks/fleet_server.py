"""A static file server in a process of its own that can be told to misbehave once: `python -m benchmarks.fleet_server`.

It answers GET for the files below `metadata` and `targets` of a repository, ranges included, and counts what it does
on a board: numbers in a small file that both processes map. Whoever simulates devices writes on the board what is to
go wrong with one of the next requests; nothing else passes between them but HTTP over real sockets.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

FAULTS = ("", "cut", "unavailable", "truncated", "flipped", "stalled")
"""What may go wrong with an answer; a place in this list stands on the board."""
_SLOTS = (
    "requests",
    "sent",
    "received",
    "bodies",
    "found",
    "partial",
    "missing",
    "odd",
    *FAULTS[1:],
    "fault",
    "after",
    "seconds",
)
"""`odd` counts what no static server answers; `after` the requests that pass before the fault; `seconds` are those that
`Retry-After` names. `sent` and `received` are bytes with heads, `bodies` without."""
STALL_S = 0.8
"""Real seconds for which a stalled answer is held; longer than the devices wait for the next piece."""
_PLACE = re.compile(rb"GET (/(?:metadata|targets)(?:/[A-Za-z0-9][A-Za-z0-9_.\-]*)+) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nRange: bytes=(\d+)-\r\n", re.IGNORECASE)
_IF_RANGE = re.compile(rb"\r\nIf-Range: ([^\r]*)\r\n", re.IGNORECASE)


class Board:
    """Numbers that two processes share.

    Args:
        path: of the file behind them; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as stream:
            stream.truncate(8 * len(_SLOTS))
            self._map = mmap.mmap(stream.fileno(), 8 * len(_SLOTS))
        self._numbers = memoryview(self._map).cast("q")
        self._place = {name: place for place, name in enumerate(_SLOTS)}

    def __getitem__(self, name: str) -> int:
        return self._numbers[self._place[name]]

    def __setitem__(self, name: str, number: int) -> None:
        self._numbers[self._place[name]] = number

    def add(self, name: str, number: int = 1) -> None:
        """Count. One process at a time writes."""
        self._numbers[self._place[name]] += number

    def counts(self) -> dict[str, int]:
        """All of it but what is about the next fault."""
        return {name: self[name] for name in _SLOTS[: -len(("fault", "after", "seconds"))]}

    def plan(self, fault: str, after: int, seconds: int) -> None:
        """Have something go wrong with the first answer with a body after so many requests."""
        self["after"], self["seconds"] = after, seconds
        self["fault"] = FAULTS.index(fault)


@contextlib.contextmanager
def serving(folder: Path, board: Path) -> Iterator[str]:
    """The address of a server in a process of its own while the block runs.

    Args:
        folder: the repository.
        board: file of the `Board`.
    """
    command = [sys.executable, "-m", "benchmarks.fleet_server", str(folder), str(board)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


class _Server:
    def __init__(self, folder: Path, board: Board) -> None:
        self._folder = folder
        self._board = board

    def run(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            print(listener.getsockname()[1], flush=True)
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30.0)
            kept = b""
            while True:
                while b"\r\n\r\n" not in kept:
                    piece = connection.recv(16384)
                    if not piece or len(kept) > 65536:
                        return
                    kept += piece
                head, _, kept = kept.partition(b"\r\n\r\n")
                if not self._answer(connection, head + b"\r\n\r\n"):
                    return

    def _answer(self, connection: socket.socket, asked: bytes) -> bool:
        """Answer one request; False to end the connection."""
        board = self._board
        board.add("requests")
        board.add("received", len(asked))
        found = _PLACE.match(asked)
        if found is None:
            board.add("odd")
            self._send(connection, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"")
            return False
        place = self._folder / found[1].decode()[1:]
        try:
            data, made = place.read_bytes(), place.stat().st_mtime_ns
        except (FileNotFoundError, IsADirectoryError):
            board.add("missing")
            self._send(connection, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"")
            return True
        tag = b'"%x-%x"' % (made, len(data))
        span, more = _RANGE.search(asked), _IF_RANGE.search(asked)
        offset = int(span[1]) if span and (more is None or more[1] == tag) and int(span[1]) < len(data) else 0
        fault = self._due()
        if fault:
            board.add(fault)
            return self._misbehave(connection, fault, data[offset:], tag)
        board.add("partial" if offset else "found")
        extra = b"Content-Range: bytes %d-%d/%d\r\n" % (offset, len(data) - 1, len(data)) if offset else b""
        self._send(connection, _head(206 if offset else 200, len(data) - offset, tag, extra), data[offset:])
        return True

    def _due(self) -> str:
        board = self._board
        if not board["fault"]:
            return ""
        if board["after"]:
            board.add("after", -1)
            return ""
        fault = FAULTS[board["fault"]]
        board["fault"] = 0
        return fault

    def _misbehave(self, connection: socket.socket, fault: str, data: bytes, tag: bytes) -> bool:
        half = data[: len(data) // 2]
        if fault == "unavailable":
            wait = b"Retry-After: %d\r\n" % self._board["seconds"]
            self._send(connection, b"HTTP/1.1 503 Service Unavailable\r\n" + wait + b"Content-Length: 0\r\n\r\n", b"")
            return True
        if fault == "truncated":  # by something that believes what it has
            self._send(connection, _head(200, len(half), tag), half)
            return True
        if fault == "flipped":
            body = bytearray(data)
            body[len(body) // 2] ^= 0x10
            self._send(connection, _head(200, len(body), tag), bytes(body))
            return True
        self._send(connection, _head(200, len(data), tag), half)
        if fault == "stalled":
            time.sleep(STALL_S)
        return False

    def _send(self, connection: socket.socket, head: bytes, body: bytes) -> None:
        self._board.add("sent", len(head) + len(body))
        self._board.add("bodies", len(body))
        connection.sendall(head + body)


def _head(status: int, length: int, tag: bytes, extra: bytes = b"") -> bytes:
    """As a plain web server has it."""
    words = {200: b"200 OK", 206: b"206 Partial Content"}[status]
    date = b"Date: Mon, 07 Jan 2030 00:00:00 GMT\r\nServer: nginx\r\nContent-Type: application/octet-stream\r\n"
    fields = b"Content-Length: %d\r\nETag: %s\r\nAccept-Ranges: bytes\r\nConnection: keep-alive\r\n" % (length, tag)
    return b"HTTP/1.1 " + words + b"\r\n" + date + fields + extra + b"\r\n"


def main(folder: str, board: str) -> None:
    """Serve until whoever began it ends."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    _Server(Path(folder), Board(Path(board))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
