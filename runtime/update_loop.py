"""The loop that polls, watches and never ends by itself."""

from __future__ import annotations

import abc
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgead.runtime.errors import FetchError
from edgead.runtime.update_outcome import Outcome
from edgead.runtime.update_rules import first_poll, next_poll

if TYPE_CHECKING:
    from edgead.runtime.status_report import StatusReporter

_WATCH_S = 0.5


class UpdateLoop(abc.ABC):
    """Calls `poll` and `watch` until it is told to stop.

    Args:
        stop: ends it.
        rng: for jitter; differs from device to device.
        reporter: writes statuses of what came of polls and looks; None for none.
    """

    def __init__(
        self, stop: threading.Event | None, rng: random.Random | None, reporter: StatusReporter | None = None
    ) -> None:
        self._stop = stop or threading.Event()
        self._rng = rng or random.Random()
        self._poke = threading.Event()
        self._reporter = reporter
        self.failures = 0
        """Polls in a row that failed."""

    @abc.abstractmethod
    def poll(self) -> Outcome:
        """Look once for news; never raises."""

    @abc.abstractmethod
    def watch(self) -> Outcome | None:
        """Look at what is here; never raises. None if there is nothing to say."""

    def run(
        self,
        interval: float = 60.0,
        jitter: float = 0.2,
        stop: threading.Event | None = None,
        report: Callable[[Outcome], object] = lambda outcome: None,
    ) -> None:
        """Poll and watch until it is told to stop.

        Args:
            interval: seconds between polls.
            jitter: share of it by which each pause is longer or shorter.
            stop: ends it; None for that of the updater.
            report: called with each outcome, on the calling thread.
        """
        stop = stop or self._stop
        due = time.monotonic() + first_poll(interval, jitter, self._rng)
        poked = float("-inf")
        if self._reporter is not None:
            self._reporter.start(stop)
        while not stop.is_set():
            now = time.monotonic()
            if self._poke.is_set() and now - poked >= interval:
                poked = now
                self._poke.clear()
                due = now
            if now >= due:
                outcome = self.poll()
                report(outcome)
                self._tell(outcome, polled=True)
                asked = outcome.error.retry_after if isinstance(outcome.error, FetchError) else None
                due = time.monotonic() + next_poll(interval, jitter, self.failures, asked, self._rng)
            seen = self.watch()
            if seen is not None:
                report(seen)
                self._tell(seen, polled=False)
            if self._reporter is not None:
                self._reporter.look()
            stop.wait(max(0.0, min(_WATCH_S, due - time.monotonic())))

    def start(
        self,
        interval: float = 60.0,
        jitter: float = 0.2,
        stop: threading.Event | None = None,
        report: Callable[[Outcome], object] = lambda outcome: None,
    ) -> threading.Thread:
        """`run` on a thread of its own, which ends with the process."""
        thread = threading.Thread(
            target=self.run, args=(interval, jitter, stop, report), name="edgead-updater", daemon=True
        )
        thread.start()
        return thread

    def poke(self) -> None:
        """Somebody says that there is something new. Costs at most one poll more per interval, whoever says it."""
        self._poke.set()

    def _tell(self, outcome: Outcome, *, polled: bool) -> None:
        if self._reporter is not None:
            self._reporter.note(outcome, self.failures, polled=polled)
