"""A collector on a socket: uvicorn, with connections that have to say something in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgead.runtime.errors import StorageError
from edgead.server_side.ota.collector import CollectorLimits, Page, Tokens, application
from edgead.server_side.ota.intake import Intake

_LOG = logging.getLogger("edgead.collect")
_PRUNE_SECONDS = 3600.0
_HEAD_BYTES = 16 * 2**10


class CollectorServer:
    """Serves a collector.

    Args:
        intake: takes the statuses.
        host, port: where to listen; port 0 for any free one.
        tokens: who may send and look.
        limits: what it takes.
        page: makes the page of a fleet.
        routes: more that devices may send to.
        certificate, key: PEM files of TLS; both or none.

    Raises:
        StorageError: the port cannot be had.
    """

    def __init__(
        self,
        intake: Intake,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tokens: Tokens | None = None,
        limits: CollectorLimits | None = None,
        page: Page | None = None,
        routes: Sequence[Route] = (),
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        limits = limits or CollectorLimits()
        self._intake = intake
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=limits.connections)
        except OSError as error:
            raise StorageError(
                wanted=f"to listen on {host}:{port}",
                got=f"the system's refusal: {error.strerror or error}",
                next_step="Name another address: --listen HOST:PORT",
            ) from error
        scheme, where = "https" if certificate else "http", f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{where}:{self._socket.getsockname()[1]}"
        """Where devices find it."""
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(intake, tokens=tokens, limits=limits, page=page, routes=routes),
                http=_protocol(limits.head_seconds),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                # Whoever says that it forwards for somebody is not believed: limits are by address.
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                backlog=limits.connections,
                timeout_graceful_shutdown=10,
                h11_max_incomplete_event_size=_HEAD_BYTES,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )

    def run(self) -> None:
        """Serve until the process is asked to end, or `stop` is called."""
        ended = threading.Event()
        pruning = threading.Thread(target=self._prune, args=(ended,), name="edgead-prune", daemon=True)
        pruning.start()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            ended.set()
            pruning.join(10.0)
            self._socket.close()

    def stop(self) -> None:
        """Finish what is being answered, and end."""
        self._server.should_exit = True

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self._server.started

    def _prune(self, ended: threading.Event) -> None:
        while True:
            try:
                gone = self._intake.store.prune()
                if gone:
                    _LOG.info("%d old statuses dropped", gone)
            except StorageError as error:
                _LOG.warning("old statuses were not dropped: %s", error)
            if ended.wait(_PRUNE_SECONDS):
                return


@contextlib.contextmanager
def collecting(server: CollectorServer) -> Iterator[CollectorServer]:
    """A server in a thread of its own while the block runs."""
    thread = threading.Thread(target=server.run, name="edgead-collect", daemon=True)
    thread.start()
    try:
        while not server.ready and thread.is_alive():
            thread.join(0.02)
        yield server
    finally:
        server.stop()
        thread.join()


def _protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """HTTP of which each head has to come in time; uvicorn's own waits for ever."""

    class Punctual(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(head_seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting and self._late is not None:
                self._late.cancel()
                self._late = None
            elif waiting and self._late is None and not self.transport.is_closing():
                self._late = self.loop.call_later(head_seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

    return Punctual


__all__ = ["CollectorServer", "collecting"]
