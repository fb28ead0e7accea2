"""A real chat-completions server on this machine that behaves, and misbehaves, as a test tells it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[[BaseHTTPRequestHandler], None]


def completion(text: Any, *, finish: str = "stop", **message: Any) -> bytes:
    """The body of a chat completion with this answer."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


def send(body: bytes, status: int = 200, **headers: str) -> Act:
    """Answer with this body."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body)

    return act


def say(text: Any, **rest: Any) -> Act:
    """Answer with this text."""
    return send(completion(text, **rest))


def endless(size: int, status: int = 200) -> Act:
    """Begin an answer and go on to `size` bytes, unless the client hangs up."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(b'{"choices":[{"message":{"content":"')
            for _ in range(size // 65536):
                handler.wfile.write(b"thread " * 9362)
            handler.wfile.write(b'"}}]}')

    return act


def drip(pause_s: float, status: int = 200) -> Act:
    """A byte now and then, for a minute at most."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            for byte in completion("thread " * 100)[: int(60 / pause_s)]:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(pause_s)

    return act


def silence(seconds: float) -> Act:
    """Say nothing at all for a while, then hang up."""
    return lambda handler: time.sleep(seconds)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True


@dataclass
class ChatServer:
    """Plays its acts one after the other; the last one again and again."""

    url: str
    acts: list[Act] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests, in order."""
    keys: list[str] = field(default_factory=list)
    """Authorization headers, in order."""
    paths: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chat_server(*acts: Act) -> Iterator[ChatServer]:
    """Run a server on a free port until the block ends."""
    played = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with played:
                server.requests.append(json.loads(body))
                server.keys.append(self.headers.get("Authorization", ""))
                server.paths.append(self.path)
                act = server.acts.pop(0) if len(server.acts) > 1 else server.acts[0]
            act(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1", list(acts))
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
