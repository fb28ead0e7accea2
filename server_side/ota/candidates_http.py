"""POST /candidates: where cameras send what somebody marked; a route for the collector, or any Starlette application.

The body is one candidate. Nothing is written before its size, form and signature were checked, and a device that is not
registered gets nothing in. Answers are JSON with `id` and `state`, or with `reason`:

    201   kept               200   was here already
    400   no candidate, or another key than the device's      403   a device that is not registered
    408   the body did not come in time                       413   more than 8 MiB
    429   no room for more of this device, or too many at once; with Retry-After
    503   registry or disk do not answer; with Retry-After
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgead.runtime.candidates import CANDIDATE_BYTES
from edgead.runtime.errors import CandidateError, EdgeadError, missing_dependency
from edgead.runtime.marks_send import PATH
from edgead.server_side.ota.candidates import CandidateStore, FullError, Keys, UnknownDeviceError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route


@dataclass(frozen=True)
class IntakeLimits:
    """What is taken at most.

    Attributes:
        bytes: of one body.
        seconds: until a body is whole.
        at_once: bodies in memory.
        retry_after: seconds that a sender is asked to wait.
    """

    bytes: int = CANDIDATE_BYTES
    seconds: float = 60.0
    at_once: int = 8
    retry_after: int = 60


class _TooLargeError(Exception):
    pass


def candidate_routes(store: CandidateStore, keys: Keys, limits: IntakeLimits | None = None) -> list[Route]:
    """The route that takes candidates.

    Args:
        store: where they are kept.
        keys: of the devices that are registered; see `edgead.server_side.ota.candidates.keys_of`.
        limits: what is taken at most.

    Raises:
        MissingDependencyError: Starlette is not installed.
    """
    try:
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise missing_dependency("starlette", "fleet", "a collector") from error
    most = limits or IntakeLimits()
    held = 0

    def refuse(status: int, reason: str) -> Response:
        wait = {"Retry-After": str(most.retry_after)} if status in (429, 503) else {}
        # Who sends a body that is not wanted is not listened to any further.
        return JSONResponse({"reason": reason[:300]}, status, {"Connection": "close", **wait})

    async def take(request: Request) -> Response:
        nonlocal held
        if held >= most.at_once:
            return refuse(429, "too many at once")
        held += 1
        try:
            data = await asyncio.wait_for(_body(request, most.bytes), most.seconds)
            entry, new = await run_in_threadpool(store.put, data, keys)
        except asyncio.TimeoutError:
            return refuse(408, "the body did not come in time")
        except _TooLargeError:
            return refuse(413, f"more than {most.bytes} bytes")
        except ClientDisconnect:
            return refuse(400, "the body ended early")
        except UnknownDeviceError as error:
            return refuse(403, error.got)
        except CandidateError as error:
            return refuse(400, f"wanted {error.wanted}, got {error.got}")
        except FullError as error:
            return refuse(429, error.wanted)
        except EdgeadError:
            # What the disk or the database said is for the publisher's log, and names places there.
            return refuse(503, "not now")
        finally:
            held -= 1
        return JSONResponse({"id": entry.id, "state": entry.state}, 201 if new else 200)

    return [Route(PATH, take, methods=["POST"])]


async def _body(request: Request, most: int) -> bytes:
    """The body, given up as soon as it is known to be too large."""
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > most:
        raise _TooLargeError
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _TooLargeError
        parts.append(part)
    return b"".join(parts)


__all__ = ["IntakeLimits", "candidate_routes"]
