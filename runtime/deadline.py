"""One worker thread that does work against the clock.

A native call cannot be interrupted. What can be kept is the promise to the caller: an answer by the deadline,
even if that answer is "not done". The late call ends in the background, and whoever comes next waits for it
within a deadline of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class _Job(Generic[Result]):
    def __init__(self, action: Callable[[], Result]) -> None:
        self.action = action
        self.done = threading.Event()
        self.result: Result | None = None
        self.error: BaseException | None = None


class DeadlineWorker(Generic[Result]):
    """Runs one action at a time on a thread of its own.

    There is no queue: an action whose turn does not come before its deadline is never begun, so a hung
    engine piles up neither work nor frames. The thread is a daemon: a call that never returns does not keep
    the process alive.
    """

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._job: _Job[Result] | None = None
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], Result], until: float) -> tuple[bool, Result | None]:
        """Do `action` on the worker, but answer by `until`, a time of `time.perf_counter`.

        Returns:
            whether the action was begun, and its result, or None if it was not done in time.

        Raises:
            whatever `action` raised, if it did so in time; later errors are lost with the late result.
        """
        job = _Job(action)
        with self._state:
            while self._busy or self._closed:
                left = until - time.perf_counter()
                if self._closed or left <= 0 or not self._state.wait(left):
                    return False, None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edgead-deadline", daemon=True)
                self._thread.start()
            self._busy = True
            self._job = job
            self._state.notify_all()
        if not job.done.wait(max(0.0, until - time.perf_counter())):
            return True, None
        if job.error is not None:
            raise job.error
        return True, job.result

    def close(self) -> None:
        """Let the thread end after the action that it is doing. Does not wait. May be called twice."""
        with self._state:
            self._closed = True
            self._state.notify_all()

    def _work(self) -> None:
        while True:
            with self._state:
                while self._job is None:
                    if self._closed:
                        return
                    self._state.wait()
                job, self._job = self._job, None
            try:
                job.result = job.action()
            except BaseException as error:  # handed to the caller's thread
                job.error = error
            job.done.set()
            del job
            with self._state:
                self._busy = False
                self._state.notify_all()


class LateError(Exception):
    """A frame's deadline has passed; says which. Never leaves the inspector."""


class Clock:
    """Times of one frame's stages, and its deadline, looked at between them.

    Args:
        start: when the frame came, a time of `time.perf_counter`.
        until: its deadline, likewise; None if it has none.
    """

    def __init__(self, start: float, until: float | None) -> None:
        self.start, self._until = start, until
        self.timings: dict[str, float] = {}
        """Milliseconds by stage."""
        self.begin()

    def begin(self) -> None:
        """What comes now is not part of the stage before."""
        self._lap = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage is done."""
        now = time.perf_counter()
        self.timings[stage] = (now - self._lap) * 1e3
        self._lap = now

    def total(self) -> None:
        """All is done."""
        self.timings["total"] = (time.perf_counter() - self.start) * 1e3

    def check(self) -> None:
        """Go on only if there is time left.

        Raises:
            LateError: there is none.
        """
        if self._until is not None and time.perf_counter() >= self._until:
            raise LateError(late((self._until - self.start) * 1e3))


def late(deadline_ms: float) -> str:
    """The reason of a frame that missed its deadline."""
    return f"deadline of {deadline_ms:g} ms"
