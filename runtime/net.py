"""What every request over HTTP has in common: who asks, and that it ends."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from urllib.parse import SplitResult, unquote


def authorization(where: SplitResult) -> dict[str, str]:
    """The header for name and password of an address; none without."""
    if where.username is None:
        return {}
    secret = f"{unquote(where.username)}:{unquote(where.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}


@contextlib.contextmanager
def ended_after(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """End the connection if the block takes longer.

    Raises:
        TimeoutError: it did.
    """
    ended = threading.Event()
    # A connection lets go of its socket when an answer says that it is the last one; the answer still reads from it.
    held = connection.sock

    def end() -> None:
        ended.set()
        with contextlib.suppress(OSError, AttributeError):
            (connection.sock or held).shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    # The end of a connection also ends a head, which then looks whole.
    if ended.is_set():
        raise TimeoutError(f"no whole answer in {seconds:.3g} s")


__all__ = ["authorization", "ended_after"]
