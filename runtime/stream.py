"""From a source through the inspector, one answer for each frame.

A finite source is inspected whole, however long it takes. A live one is read by a thread of its own into a small
buffer: if the engine is slower than the camera, the oldest frames are dropped and counted, so that an answer
is always about a recent frame.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Container, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError
from edgead.runtime.inspection import STAGES, Inspection, Verdict, percentile
from edgead.runtime.sources import Capture, Source

CAPACITY = 2
"""Frames that wait for the engine: one being looked at next, one that may replace it."""
SILENCE = 5.0
"""Seconds without a frame after which a live source is reported as silent."""
_POLL = 0.2
_KEPT_TIMES = 20_000
"""Frames whose times the summary of an endless stream rests on: the last so many."""


class Inspecting(Protocol):
    """What a stream asks for: an `Inspector`, or an `IsolatedInspector`."""

    def inspect(
        self, frame: NDArray[np.uint8], *, product: str | None = None, deadline_ms: float | None = None
    ) -> Inspection: ...

    def refusal(self, reason: str, product: str | None = None) -> Inspection: ...


class LiveFeed:
    """Reads a live source on a thread and keeps the newest captures.

    Args:
        source: read until it ends or `close`.
        capacity: captures kept; a new one pushes out the oldest.
        silence: seconds without a capture after which the iteration gives one that says so.
    """

    def __init__(self, source: Source, *, capacity: int = CAPACITY, silence: float = SILENCE) -> None:
        self.dropped = 0
        self._source = source
        self._silence = silence
        self._waiting: deque[Capture] = deque()
        self._capacity = capacity
        self._state = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="edgead-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading. A read that hangs in a driver is left to end by itself."""
        self._source.close()
        with self._state:
            self._ended = True
            self._state.notify_all()
        self._thread.join(timeout=1.0)

    def next(self, timeout: float) -> Capture | None:
        """The oldest capture that waits; None if none comes within `timeout` seconds.

        Raises:
            StopIteration: the source has ended and all is taken.
            whatever reading the source raised.
        """
        until = time.monotonic() + timeout
        with self._state:
            while not self._waiting:
                if self._error is not None:
                    raise self._error
                if self._ended:
                    raise StopIteration
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._state.wait(left)
            return self._waiting.popleft()

    def captures(self, stop: threading.Event) -> Iterator[Capture]:
        """Captures until the source ends or `stop` is set."""
        heard = time.monotonic()
        while not stop.is_set():
            try:
                capture = self.next(_POLL)
            except StopIteration:
                return
            now = time.monotonic()
            if capture is None and now - heard < self._silence:
                continue
            heard = now
            yield capture or Capture("silence", "silence", None, f"camera: no frame for {self._silence:g} s")

    def _read(self) -> None:
        try:
            for capture in self._source.captures():
                with self._state:
                    if self._ended:
                        return
                    if len(self._waiting) >= self._capacity:
                        self._waiting.popleft()
                        self.dropped += 1
                    self._waiting.append(capture)
                    self._state.notify_all()
        except BaseException as error:  # handed to the thread that iterates
            self._error = error
        finally:
            with self._state:
                self._ended = True
                self._state.notify_all()


class Stream:
    """Captures of a source with their inspections; iterate once.

    Args:
        inspector: may be given new knowledge by another thread meanwhile.
        source: a live one is read by a thread of its own and closed at the end.
        product: whose knowledge to compare with.
        deadline_ms: for each frame, see `Inspector.inspect`.
        skip: names of captures to leave out.
        limit: most frames to inspect.
        stop: ends the stream after the current frame.
    """

    def __init__(
        self,
        inspector: Inspecting,
        source: Source,
        *,
        product: str | None = None,
        deadline_ms: float | None = None,
        skip: Container[str] = (),
        limit: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._inspector = inspector
        self._source = source
        self._product = product
        self._deadline_ms = deadline_ms
        self._skip = skip
        self._limit = limit
        self._stop = stop if stop is not None else threading.Event()
        self._feed: LiveFeed | None = None

    @property
    def dropped(self) -> int:
        """Frames of a live source that came faster than the engine and were never looked at."""
        return self._feed.dropped if self._feed is not None else 0

    def __iter__(self) -> Iterator[tuple[Capture, Inspection]]:
        try:
            if self._stop.is_set():
                return
            for number, capture in enumerate(self._captures(), 1):
                yield capture, self._inspect(capture)
                # Before the next capture is asked for: reading it costs time, and a camera may be silent.
                if self._stop.is_set() or number == self._limit:
                    return
        finally:
            if self._feed is not None:
                self._feed.close()

    def _captures(self) -> Iterator[Capture]:
        if not self._source.live:
            return self._source.captures(self._skip)
        self._feed = LiveFeed(self._source)
        return self._feed.captures(self._stop)

    def _inspect(self, capture: Capture) -> Inspection:
        if capture.image is None:
            return self._inspector.refusal(capture.reason or "no image", self._product)
        try:
            return self._inspector.inspect(capture.image, product=self._product, deadline_ms=self._deadline_ms)
        except ImageError as error:
            return self._inspector.refusal(f"image: {error.got}, wanted {error.wanted}", self._product)


class Tally:
    """Counts and times of a stream."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.reasons: Counter[str] = Counter()
        self.knowledge: dict[str, None] = {}
        """Versions that answered, in the order of their first answer."""
        self.times: dict[str, deque[float]] = {stage: deque(maxlen=_KEPT_TIMES) for stage in STAGES}

    def add(self, inspection: Inspection) -> None:
        """Count one inspection. Times are kept of frames that were answered."""
        self.verdicts[inspection.verdict] += 1
        self.knowledge.setdefault(inspection.knowledge)
        if inspection.reason is not None:
            # An endless stream can meet endlessly many texts; the rare ones share a place.
            known = inspection.reason in self.reasons or len(self.reasons) < 50
            self.reasons[inspection.reason if known else "other"] += 1
            return
        for stage, value in inspection.timings.items():
            if stage in self.times:
                self.times[stage].append(value)

    @property
    def frames(self) -> int:
        """Frames that were counted."""
        return sum(self.verdicts.values())

    @property
    def inspected(self) -> int:
        """Frames with an answer."""
        return self.verdicts[Verdict.OK] + self.verdicts[Verdict.NG]

    def milliseconds(self, share: float) -> dict[str, float]:
        """By stage, the time that `share` of the frames do not exceed."""
        return {stage: percentile(values, share) for stage, values in self.times.items()}
