"""What an answer of a file server means, and how long to wait for the next one. Decisions only; no network here.

A server, a cache or a hotel's login page between it and the device may answer anything. Whatever it is, it either is
the next part of the file that was asked for, or the beginning of another attempt, or an error.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgead.runtime.errors import FetchContentError, FetchError, FetchStatusError, FetchTimeoutError


@dataclass(frozen=True)
class FetchLimits:
    """How patient a download is. Seconds, but for `least_rate` and the counts.

    Attributes:
        connect_s: to reach the server, TLS included.
        gap_s: between two pieces of an answer.
        total_s: for one file, all attempts together.
        least_rate: bytes per second, on average over any `rate_window_s`.
        rate_window_s: see there.
        tries: attempts in a row that bring nothing new.
        restarts: how often a file may be begun anew because it changed on the way.
        first_wait_s: before the second attempt; doubled each time, with jitter.
        longest_wait_s: between two attempts; a server that asks for more ends the download.
    """

    connect_s: float = 10.0
    gap_s: float = 20.0
    total_s: float = 1800.0
    least_rate: float = 256.0
    rate_window_s: float = 30.0
    tries: int = 4
    restarts: int = 3
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0


@dataclass(frozen=True)
class Part:
    """What the body of an answer is.

    Attributes:
        end: offset in the file at which it ends, or bytes of the packed body; None if the answer does not say.
        validator: the strong entity tag of the file, to ask for more of the same one.
        packed: whether the body is the whole file in gzip.
    """

    end: int | None
    validator: str | None
    packed: bool = False


class ChangedError(Exception):
    """The server cannot go on with the file that was begun: begin anew."""


_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")


def judge(
    status: int,
    headers: Mapping[str, str],
    *,
    name: str,
    offset: int,
    most: int,
    exact: bool,
    validator: str | None,
    packed: bool = False,
) -> Part:
    """What an answer means.

    Args:
        status: of the answer.
        headers: by name in lower case.
        name: of the file, for messages.
        offset: bytes that are here already, so that a range from there on was asked for.
        most: bytes that the file may have.
        exact: whether it has exactly so many.
        validator: that of the answer that the present bytes came from.
        packed: whether gzip was asked for too.

    Raises:
        FetchStatusError: no file.
        FetchContentError: a file that cannot be the one that was asked for.
        ChangedError: not the rest of what is here.
    """
    if status == 416 or (status == 200 and offset):
        raise ChangedError
    if status not in (200, 206) or (status == 206 and not offset):
        raise FetchStatusError(
            wanted=f"the file {name}",
            got=f"the answer {status}",
            next_step="Check the address of the repository; it is tried again by itself.",
            transient=status in (408, 425, 429) or status >= 500,
            status=status,
            retry_after=seconds_of(headers.get("retry-after", "")),
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    unpack = packed and encoding in ("gzip", "x-gzip")
    if encoding != "identity" and not unpack:
        raise _other(name, "a file as it is", f"one that is encoded as {headers['content-encoding'][:40]}")
    if headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
        raise _other(name, "a file of the repository", "a web page: a login page of this network?")
    tag = headers.get("etag", "")
    tag = tag if tag.startswith('"') and len(tag) <= 200 else ""
    if offset:
        found = _RANGE.match(headers.get("content-range", ""))
        if found is None or int(found[1]) != offset or int(found[2]) < offset:
            raise ChangedError
        if (exact and found[3] not in ("*", str(most))) or (validator and tag and tag != validator):
            raise ChangedError
        end: int | None = int(found[2]) + 1
    else:
        text = headers.get("content-length", "")
        if text and not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise _other(name, "a length in digits", repr(text[:40]))
        end = int(text) if text and "transfer-encoding" not in headers else None
    if end is not None and (end > (packed_most(most) if unpack else most) or (exact and not offset and end != most)):
        raise _other(name, f"{'' if exact else 'at most '}{most} bytes", f"{end}")
    # The tag of a packed answer is that of its packed form: nothing else can be continued by it.
    return Part(end, None if unpack else tag or None, unpack)


def pause(failures: int, limits: FetchLimits, rng: random.Random, asked: float | None) -> float | None:
    """Seconds to wait after so many failures in a row; None to give up.

    Args:
        failures: at least 1.
        limits: say how often and how long.
        rng: for the jitter, so that devices that failed together do not come back together.
        asked: seconds that the server asked to wait.
    """
    if failures >= limits.tries or (asked or 0.0) > limits.longest_wait_s:
        return None
    wait = min(limits.longest_wait_s, limits.first_wait_s * 2.0 ** (failures - 1)) * rng.uniform(0.5, 1.0)
    return max(wait, asked or 0.0)


def packed_most(most: int) -> int:
    """Bytes that gzip may take for content of at most so many: what does not shrink grows by a little."""
    return most + most // 1000 + 1024


def too_long(name: str, most: int) -> FetchContentError:
    """The error for a body that goes on after all bytes that it may have."""
    return _other(name, f"at most {most} bytes", "more")


def shown(url: str) -> str:
    """An address as messages may have it: without name, password and query."""
    where = urlsplit(url)
    return where._replace(netloc=where.netloc.rpartition("@")[2], query="", fragment="").geturl()[:300]


def cut(url: str, offset: int, end: int) -> FetchError:
    """The error for a connection that ended early."""
    return FetchError(
        wanted=f"{end} bytes of {shown(url)}",
        got=f"the end of the connection after {offset}",
        next_step="Check the network; it is tried again by itself.",
        transient=True,
    )


def late(url: str, limits: FetchLimits) -> FetchTimeoutError:
    """The error for a download that did not end in time."""
    return FetchTimeoutError(
        wanted=f"{shown(url)} within {limits.total_s:g} s",
        got="only a part of it",
        next_step="Check the network; it is tried again by itself.",
    )


def damaged(url: str, sha256: str) -> FetchContentError:
    """The error for content that is not the signed one."""
    return FetchContentError(
        wanted=f"the SHA-256 {sha256[:12]} of {shown(url)}",
        got="another one",
        next_step="Check the repository, and what lies between it and this device.",
    )


def restless(url: str) -> FetchContentError:
    """The error for a file that is another one each time."""
    return FetchContentError(
        wanted=f"one and the same file at {shown(url)}",
        got="another one with each attempt to continue",
        next_step="Check the server and the caches before it.",
    )


def seconds_of(text: str) -> float | None:
    """Retry-After in seconds; a date is taken as a minute, since clocks of devices are not trusted."""
    text = text.strip()
    if not text:
        return None
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 60.0


def _other(name: str, wanted: str, got: str) -> FetchContentError:
    return FetchContentError(
        wanted=f"{name} as {wanted}",
        got=got,
        next_step="Check the repository, and what lies between it and this device.",
    )


__all__ = [
    "ChangedError",
    "FetchLimits",
    "Part",
    "cut",
    "damaged",
    "judge",
    "late",
    "packed_most",
    "pause",
    "restless",
    "seconds_of",
    "shown",
    "too_long",
]
