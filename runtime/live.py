"""An inspector of whatever release is active: it takes the next one between two frames, engine and all."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import open_bundle
from edgead.runtime.device_status import ScoreStatistics
from edgead.runtime.errors import EdgeadError
from edgead.runtime.frames import FrameRing
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.score_statistics import ScoreCounter
from edgead.runtime.slots_load import Active


@dataclass(frozen=True)
class Health:
    """How a release does.

    Attributes:
        digest: of the release.
        since: `time.monotonic()` when it was taken.
        frames: asked for since.
        failures: frames that were not inspected among them.
    """

    digest: str
    since: float
    frames: int = 0
    failures: int = 0


@dataclass(eq=False)
class _Running:
    inspector: Inspector
    users: int = 0
    retired: bool = False


class LiveInspector:
    """Inspects with a store's active release. All methods may be called from any thread.

    A release with the same engine exchanges the knowledge alone. One with another engine is opened beside the old one,
    which ends with its last frame. A frame is inspected with one release, and names its knowledge.

    Args:
        active: the release to begin with, as `Store.start` gives it.
        frames: where some frames are kept for a shadow replay; None for nowhere.
        options: for `Inspector`: target, threads, device, suppression.

    Raises:
        EdgeadError: see `Inspector`.
    """

    def __init__(self, active: Active, *, frames: FrameRing | None = None, **options: Any) -> None:
        self._options = options
        self._frames = frames
        self._writer = ThreadPoolExecutor(1, "edgead-frames")
        self._written: Future[bool] = Future()
        self._written.set_result(False)
        self._taking = threading.Lock()
        self._books = threading.Lock()
        self._active = active
        self._running = _Running(self._open(active))
        self._health = Health(active.digest, time.monotonic())
        self._scores = ScoreCounter()

    @property
    def active(self) -> Active:
        """The release that new frames are inspected with."""
        return self._active

    @property
    def health(self) -> Health:
        """How that release does."""
        return self._health

    def statistics(self) -> tuple[ScoreStatistics, ...]:
        """What its frames came to, by product; counted anew for each release that is taken."""
        return self._scores.statistics()

    def take(self, active: Active) -> None:
        """Inspect new frames with another release. If anything fails, the old one goes on.

        Raises:
            EdgeadError: see `Inspector` and `Inspector.swap`.
        """
        with self._taking:
            before = self._active
            if active.digest == before.digest:
                return
            if active.release.engine == before.release.engine and active.packs.keys() == before.packs.keys():
                self._swap(before, active)
                with self._books:
                    self._active, self._health = active, Health(active.digest, time.monotonic())
                    self._scores.reset()
                return
            opened = _Running(self._open(active))
            with self._books:
                old, self._running = self._running, opened
                self._active, self._health = active, Health(active.digest, time.monotonic())
                self._scores.reset()
                old.retired = True
                idle = not old.users
            if idle:
                old.inspector.close()

    def inspect(
        self, frame: NDArray[np.uint8], *, product: str | None = None, deadline_ms: float | None = None
    ) -> Inspection:
        """Inspect one frame; see `Inspector.inspect`."""
        running = self._begin()
        try:
            result = running.inspector.inspect(frame, product=product, deadline_ms=deadline_ms)
        finally:
            self._end(running)
        self._count(result)
        self._keep(frame)
        return result

    def refusal(self, reason: str, product: str | None = None) -> Inspection:
        """The answer for a frame that never was a picture; no fault of the release."""
        running = self._begin()
        try:
            return running.inspector.refusal(reason, product)
        finally:
            self._end(running)

    def close(self) -> None:
        """Free the engine once the frames in flight are done."""
        self._running.inspector.close()
        self._writer.shutdown()

    def __enter__(self) -> LiveInspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, active: Active) -> Inspector:
        # The store checked every byte of the file when it loaded the release.
        bundle = open_bundle(active.engine, verify=False)
        return Inspector(bundle, packs=active.packs.values(), products=active.packs, **self._options)

    def _swap(self, before: Active, after: Active) -> None:
        done = []
        try:
            for product, pack in after.packs.items():
                self._running.inspector.swap(pack)
                done.append(product)
        except EdgeadError:
            for product in done:
                self._running.inspector.swap(before.packs[product])
            raise

    def _begin(self) -> _Running:
        with self._books:
            self._running.users += 1
            return self._running

    def _end(self, running: _Running) -> None:
        with self._books:
            running.users -= 1
            last = running.retired and not running.users
        if last:
            running.inspector.close()

    def _keep(self, frame: NDArray[np.uint8]) -> None:
        """Have a frame written by another thread: to compress it may take longer than to inspect the next one."""
        now = time.monotonic()
        if self._frames is not None and self._written.done() and self._frames.due(now):
            self._written = self._writer.submit(self._frames.add, frame.copy(), now)

    def _count(self, result: Inspection) -> None:
        with self._books:
            old = self._health
            failed = result.verdict is Verdict.NOT_INSPECTED
            self._health = Health(old.digest, old.since, old.frames + 1, old.failures + failed)
            pack = self._active.packs.get(result.product)
            # A frame that was begun with the release before says nothing of this one.
            if pack is not None and pack.version == result.knowledge:
                self._scores.add(result)
