"""Collects the statuses of a fleet over HTTP: a Starlette application.

    POST /candidates what somebody marked at a camera, where a folder for them was named; see `candidates_http`
    POST /statuses   envelopes, one per line -> 200 {"accepted": n, "known": n, "refused": [{"line": i, "reason": ...}]}
    GET /            the fleet as a page; GET /summary.json the same as numbers
    GET /metrics     counters for Prometheus
    GET /healthz     whether the database answers

What was answered with 200 is on the disk. Every other answer leaves statuses with the device, which comes again:
400 no lines, 401 no token, 408 a body that drips, 413 too large, 429 too often and 503 the database is away or too much
at once, these two with Retry-After. All that a stranger can make grow has a limit.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgead.runtime.errors import EdgeadError
from edgead.server_side.ota.intake import Intake, Result, reason_text
from edgead.server_side.ota.status_store import StatusStore
from edgead.server_side.ota.statuses import Found, RefusedStatusError

Page = Callable[[Found], str]
_LOG = logging.getLogger("edgead.collect")
_DRAIN_BYTES = 2**20
_AWAY_SECONDS = 30
_BUSY_SECONDS = 5
_SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class CollectorLimits:
    """What a collector is willing to take.

    Attributes:
        body_bytes: of a request.
        lines: of a request.
        body_seconds: for a request's body to come.
        head_seconds: for its head, and for a connection to say anything.
        rate, burst: requests of an address per second, and how many may come at once.
        addresses: whose rate is remembered.
        parallel: requests whose bodies are held.
        wait_seconds: for which others wait their turn.
        connections: in all.
        threads: that write to the database.
        page_seconds: for which a page is shown again.
    """

    body_bytes: int = 256 * 2**10
    lines: int = 1000
    body_seconds: float = 15.0
    head_seconds: float = 10.0
    rate: float = 50.0
    burst: int = 500
    addresses: int = 10_000
    parallel: int = 64
    wait_seconds: float = 10.0
    connections: int = 1000
    threads: int = 4
    page_seconds: float = 5.0


@dataclass(frozen=True)
class Tokens:
    """Who may send and who may look. Neither shows.

    Attributes:
        device: of who sends statuses; None for anybody, since they are signed.
        reader: of who looks at page and counters; None for the same as `device`.
    """

    device: str | None = field(default=None, repr=False)
    reader: str | None = field(default=None, repr=False)


class Rates:
    """A bucket of requests for each address; for the networks of IPv6, as one host has all of one."""

    def __init__(self, rate: float, burst: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._most, self._clock = rate, float(burst), most, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Count a request of an address.

        Returns:
            seconds that it comes too early; 0 if it may come.
        """
        now, key = self._clock(), _network(address)
        left, before = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - before) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._left[key] = (left if wait else left - 1.0, now)
        while len(self._left) > self._most:
            self._left.popitem(last=False)
        return wait


class _RefusedRequest(Exception):
    def __init__(self, status: int, text: str, retry_after: float = 0.0) -> None:
        self.status, self.text, self.retry_after = status, text, retry_after


def application(
    intake: Intake,
    *,
    tokens: Tokens | None = None,
    limits: CollectorLimits | None = None,
    page: Page | None = None,
    routes: Sequence[Route] = (),
) -> Starlette:
    """A collector as an application for any ASGI server.

    Args:
        intake: takes the statuses.
        tokens: who may send and look; anybody if left out.
        limits: what it takes.
        page: makes the page of a fleet.
        routes: more that devices may send to, with the same token and rate.
    """
    made = _Collector(intake, tokens or Tokens(), limits or CollectorLimits(), page)
    for route in routes:
        route.app = made.guarded(route.app)
    return Starlette(
        routes=[
            *routes,
            Route("/statuses", made.statuses, methods=["POST"]),
            Route("/healthz", made.health),
            Route("/metrics", made.metrics),
            Route("/summary.json", made.summary),
            Route("/", made.page),
        ]
    )


class _Collector:
    def __init__(self, intake: Intake, tokens: Tokens, limits: CollectorLimits, page: Page | None) -> None:
        self._intake, self._tokens, self._limits, self._make = intake, tokens, limits, page
        self._rates = Rates(limits.rate, limits.burst, limits.addresses)
        self._turns = anyio.Semaphore(limits.parallel)
        self._threads = anyio.CapacityLimiter(limits.threads)
        self._readers = anyio.CapacityLimiter(1)
        self._shown: tuple[float, str] | None = None

    async def statuses(self, request: Request) -> Response:
        try:
            answer = await self._statuses(request)
        except _RefusedRequest as refused:
            headers = {"Connection": "close"}
            if refused.retry_after:
                headers["Retry-After"] = str(math.ceil(refused.retry_after))
            if refused.status == 401:
                headers["WWW-Authenticate"] = 'Bearer realm="edgead"'
            answer = _json({"error": refused.text}, refused.status, headers)
            # An answer while the body still comes is lost with the connection; a short rest is waited for.
            await self._drain(request)
        except ClientDisconnect:
            answer = Response(status_code=400)
        self._intake.requests.labels(str(answer.status_code)).inc()
        return answer

    async def _statuses(self, request: Request) -> Response:
        early = self._rates.wait(_address(request))
        if early:
            raise _RefusedRequest(429, "too many requests from this address", early)
        if not _may(request, self._tokens.device):
            raise _RefusedRequest(401, "wanted the token of this collector")
        with anyio.move_on_after(self._limits.wait_seconds) as waiting:
            await self._turns.acquire()
        if waiting.cancelled_caught:
            raise _RefusedRequest(503, "too much at once", _BUSY_SECONDS)
        try:
            lines = self._lines(await self._body(request))
            try:
                results = await anyio.to_thread.run_sync(self._intake.take, lines, "http", limiter=self._threads)
            except EdgeadError as error:
                raise _RefusedRequest(503, "the database is away", _AWAY_SECONDS) from error
        finally:
            self._turns.release()
        return _json(_told(results))

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body_bytes
        too_large = f"at most {most} bytes at a time"
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise _RefusedRequest(413, too_large)
        body = bytearray()
        with anyio.move_on_after(self._limits.body_seconds) as patience:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise _RefusedRequest(413, too_large)
        if patience.cancelled_caught:
            raise _RefusedRequest(408, "the body did not come in time")
        return bytes(body)

    def _lines(self, body: bytes) -> list[bytes]:
        lines = body.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        # Of a damaged file among statuses the device is told by its line; a body of no such line is something else.
        if not any(line.startswith(b"{") for line in lines):
            raise _RefusedRequest(400, "wanted statuses, one per line")
        if len(lines) > self._limits.lines:
            raise _RefusedRequest(413, f"at most {self._limits.lines} statuses at a time")
        return lines

    async def _drain(self, request: Request) -> None:
        left = _DRAIN_BYTES
        with anyio.move_on_after(1.0):
            try:
                while left > 0:
                    message = await request.receive()
                    left -= len(message.get("body", b"")) + 1
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
            except (ClientDisconnect, RuntimeError):
                return

    def guarded(self, app: ASGIApp) -> ASGIApp:
        """An application that is asked only by who may send, and not too often."""

        async def asked(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope)
            early = self._rates.wait(_address(request))
            if early:
                headers = {"Retry-After": str(math.ceil(early)), "Connection": "close"}
                await _json({"error": "too many requests"}, 429, headers)(scope, receive, send)
            elif not _may(request, self._tokens.device):
                await _json({"error": "wanted a token"}, 401, {"Connection": "close"})(scope, receive, send)
            else:
                await app(scope, receive, send)

        return asked

    async def health(self, request: Request) -> Response:
        try:
            await anyio.to_thread.run_sync(self._intake.store.ping, limiter=self._threads)
        except EdgeadError:
            return _json({"database": False}, 503, {"Retry-After": str(_AWAY_SECONDS)})
        return _json({"database": True})

    async def metrics(self, request: Request) -> Response:
        refused = self._reader(request)
        if refused is not None:
            return refused
        content = await anyio.to_thread.run_sync(self._intake.metrics, limiter=self._readers)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8", headers=_SAFE)

    async def summary(self, request: Request) -> Response:
        return await self._show(request, lambda: _json(summary(self._intake.store), headers=_SAFE))

    async def page(self, request: Request) -> Response:
        return await self._show(request, lambda: Response(self._page(), media_type="text/html", headers=_SAFE))

    async def _show(self, request: Request, make: Callable[[], Response]) -> Response:
        refused = self._reader(request)
        if refused is not None:
            return refused
        try:
            return await anyio.to_thread.run_sync(make, limiter=self._readers)
        except EdgeadError:
            return _json({"error": "the database is away"}, 503, {"Retry-After": str(_AWAY_SECONDS)})

    def _page(self) -> str:
        now = time.monotonic()
        if self._shown is None or now - self._shown[0] > self._limits.page_seconds:
            found = found_in(self._intake.store)
            text = self._make(found) if self._make is not None else json.dumps(summary(self._intake.store), indent=1)
            self._shown = (now, text)
        return self._shown[1]

    def _reader(self, request: Request) -> Response | None:
        """Why somebody may not look."""
        early = self._rates.wait(_address(request))
        if early:
            return _json({"error": "too many requests"}, 429, {"Retry-After": str(math.ceil(early))})
        if _may(request, self._tokens.reader or self._tokens.device):
            return None
        # A browser asks for name and password; the token is the password.
        return _json({"error": "wanted a token"}, 401, {"WWW-Authenticate": 'Basic realm="edgead"'})


def found_in(store: StatusStore) -> Found:
    """What the page of a fleet is made of.

    Raises:
        StorageError: the database is away.
    """
    latest, refused = store.read_latest()
    return Found(latest, refused, store.devices.all())


def summary(store: StatusStore) -> dict[str, object]:
    """Devices by product and release.

    Raises:
        StorageError: the database is away.
    """
    rows = store.releases()
    return {
        "devices": sum(count for _, _, count in rows),
        "never_heard_from": sum(count for product, _, count in rows if not product),
        "releases": [
            {"product": product, "release": release, "devices": count} for product, release, count in rows if product
        ],
    }


def _told(results: Sequence[Result]) -> dict[str, object]:
    return {
        "accepted": sum(one == "accepted" for one in results),
        "known": sum(one == "known" for one in results),
        "refused": [
            {"line": index, "reason": reason_text(one)}
            for index, one in enumerate(results)
            if isinstance(one, RefusedStatusError)
        ],
    }


def _may(request: Request, token: str | None) -> bool:
    """Whether a request has the token, as a bearer's or as the password of any name."""
    if token is None:
        return True
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    # Digests are of one length, so that the time says nothing about the token's.
    return hmac.compare_digest(_digest(given.strip()), _digest(token))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status_code=status, headers=headers, media_type="application/json")


__all__ = ["CollectorLimits", "Page", "Rates", "Tokens", "application", "found_in", "summary"]
