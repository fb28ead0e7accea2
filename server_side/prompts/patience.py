"""Waiting: back-off between attempts, a rate limit, and what Retry-After means. No network here."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from datetime import datetime, timezone


class Backoff:
    """Waits that double up to a longest one, each shortened by up to a half at random.

    The jitter keeps several clients that failed together from coming back together.

    Args:
        first_s: the first wait, before jitter.
        longest_s: no wait is longer.
        seed: of the jitter; None differs from run to run.
    """

    def __init__(self, first_s: float, longest_s: float, seed: int | None = None) -> None:
        self._wait, self._longest, self._random = first_s, longest_s, random.Random(seed)

    def next(self) -> float:
        """The next wait in seconds."""
        wait = min(self._wait, self._longest)
        self._wait = min(self._wait * 2, self._longest)
        return wait * self._random.uniform(0.5, 1.0)


class RateLimit:
    """Lets at most so many requests through in a minute, evenly spaced.

    Args:
        per_minute: requests; 0 for no limit.
        clock: seconds, monotonic.
        sleep: how to wait.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval = 60.0 / per_minute if per_minute > 0 else 0.0
        self._clock, self._sleep = clock, sleep
        self._free = clock()

    def wait(self) -> None:
        """Return when the next request may go."""
        pause = self._free - self._clock()
        if pause > 0:
            self._sleep(pause)
        self._free = max(self._free, self._clock()) + self._interval


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, or None if it is absent or says nothing usable.

    Source: RFC 9110, section 10.2.3: a number of seconds or a date.
    """
    if header is None:
        return None
    text = header.strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    if not seconds < float("inf"):
        return None
    return max(0.0, seconds)
