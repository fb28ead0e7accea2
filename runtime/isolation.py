"""An inspector whose engine works in a process of its own: a call that hangs or crashes takes only that process along.

A thread cannot end a hung native call, and a library that crashes takes its process with it. Here that process is a
worker. The one who asks is answered in time, NOT_INSPECTED; the worker is killed, and a new one is started in the
background with the knowledge that is active now.
"""

from __future__ import annotations

import contextlib
import random
import select
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.errors import EdgeadError, EngineError, InputError
from edgead.runtime.inspection import Inspection, not_inspected
from edgead.runtime.isolation_process import Worker, start_worker
from edgead.runtime.isolation_wire import Embed, Embedded, Refused, Swap, Swapped, from_answer, raw
from edgead.runtime.knowledge import Pack, encode_pack
from edgead.runtime.normality import Mode
from edgead.runtime.preprocess import check_frame

HUNG_AFTER = 30.0
"""Seconds after which a frame without a deadline counts as hung."""
LATE_TIMES, LATE_LEAST = 10.0, 1.0
"""A frame with a deadline counts as hung after so many times its deadline, and after so many seconds at least."""
CONTROL_SECONDS = 60.0
"""Most seconds that new knowledge or an embedding may take."""
START_SECONDS = 300.0
"""Most seconds that a worker may take to open its engine."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
"""Seconds between attempts to start a worker that does not start: doubled each time, with jitter."""
_POLL = 0.1
_CLOSE_SECONDS = 10.0
"""Most seconds that `close` waits for a frame."""


class IsolatedInspector:
    """An `Inspector` in a worker process; `inspect`, `swap`, `embed` and `close` are the same.

    A frame that is later than its deadline is answered NOT_INSPECTED at the deadline. It is *hung* if its call has not
    come back after `hung_after`: then the worker is killed and a new one started. So it is when a worker dies; the
    frame that it held is NOT_INSPECTED. While no worker is ready, frames with a deadline wait for one until then, and
    others until the start has succeeded or failed.

    Starting costs what starting the program costs, about half a second with ONNX Runtime, and the worker's memory comes
    on top of this process's. A frame costs one copy of its pixels and one of its map more.

    Args:
        bundle, target, threads, device, packs, products, suppression: see `Inspector`. The bundle must stay where
            it is: a new worker reads it again, and refuses another one in its place.
        hung_after: seconds after which a call that has not come back is hung; None for ten times the frame's
            deadline and at least 1 s, or 30 s without a deadline.

    Raises:
        EdgeadError: see `Inspector`.
        EngineError: the worker died while it opened the engine, or did not open it in five minutes.
    """

    engine: str
    """The name of the engine in use, such as 'onnx-fp32'."""
    threads: int
    """Processor threads per inference."""

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        target: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        packs: Iterable[Pack] = (),
        products: Iterable[str] | None = None,
        suppression: Mode | None = None,
        hung_after: float | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        self.spec = self.bundle.manifest.detector
        given = {pack.product: pack for pack in packs}
        for product in self.bundle.products if products is None else products:
            if product not in given:
                given[product] = self.bundle.pack(product)
        wanted = self.bundle.manifest.default
        self.default = wanted if wanted in given else next(iter(given), wanted)
        self.restarts = 0
        """Workers that died or were killed and were replaced."""
        self._options: dict[str, Any] = {
            "target": target,
            "threads": threads,
            "device": device,
            "suppression": suppression,
        }
        self._hung_after = hung_after
        self._packs = given
        self._state = threading.Condition()
        self._frame_turn = threading.Lock()
        self._control_turn = threading.Lock()
        self._worker: Worker | None = None
        self._starting = True
        self._lost = ""
        self._failure: EdgeadError | None = None
        self._closed = False
        self._close_by = 0.0
        # Linux kills the worker when the thread that started it ends: this one lives as long as the inspector.
        self._keeper = threading.Thread(target=self._keep, name="edgead-isolation", daemon=True)
        self._keeper.start()
        with self._state:
            self._state.wait_for(lambda: not self._starting)
            if self._worker is None:
                self._closed = True
                raise self._failure or EngineError(wanted="a worker process", got="none")
            self.engine, self.threads = self._worker.ready.engine, self._worker.ready.threads

    @property
    def products(self) -> tuple[str, ...]:
        """Products that frames can be inspected for, the default one first."""
        with self._state:
            return tuple(sorted(self._packs, key=lambda product: (product != self.default, product)))

    @property
    def process_id(self) -> int | None:
        """The worker's process id; None while there is none."""
        with self._state:
            return self._worker.process.pid if self._worker is not None else None

    def knowledge(self, product: str | None = None) -> Pack:
        """The active pack of a product.

        Raises:
            InputError: there is no such product here, or the inspector is closed.
        """
        name = self.default if product is None else product
        with self._state:
            if not self._closed and name in self._packs:
                return self._packs[name]
        known = "(none: the inspector is closed)" if self._closed else ", ".join(self.products)
        raise InputError(
            wanted=f"one of the products {known}",
            got=repr(name),
            next_step="Name one of these, or add its knowledge with swap(pack).",
        )

    def inspect(
        self, frame: NDArray[np.uint8], *, product: str | None = None, deadline_ms: float | None = None
    ) -> Inspection:
        """Inspect one frame; see `Inspector.inspect`. The frame is copied: it may change afterwards.

        Raises:
            ImageError: `frame` is no uint8 RGB picture, or the region of interest is not inside it.
            InputError: unknown product, or the inspector is closed.
        """
        start = time.perf_counter()
        check_frame(frame, self.spec.preprocessing)
        pack = self.knowledge(product)
        until = None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3
        if not self._frame_turn.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic())):
            return _unanswered(pack, start, _late(deadline_ms))
        try:
            worker = self._free_worker(until)
            if worker is None:
                return _unanswered(pack, start, self._why_none(deadline_ms))
            with contextlib.suppress(OSError):  # such a worker is condemned, which ends the waiting below
                worker.ask(frame, pack.product, self._patience(deadline_ms))
            with self._state:
                done = self._state.wait_for(
                    lambda: worker.reply is not None or self._worker is not worker,
                    None if until is None else max(0.0, until - time.monotonic()),
                )
                if not done:
                    return _unanswered(pack, start, _late(deadline_ms))
                if worker.reply is None:
                    return _unanswered(pack, start, f"engine: {self._lost}")
                answer, data = worker.reply
            return from_answer(answer, data, (time.perf_counter() - start) * 1e3)
        finally:
            self._frame_turn.release()

    def refusal(self, reason: str, product: str | None = None) -> Inspection:
        """The NOT_INSPECTED answer for a frame that never was a picture, naming the active knowledge.

        Raises:
            InputError: unknown product, or the inspector is closed.
        """
        return _unanswered(self.knowledge(product), time.perf_counter(), reason)

    def swap(self, pack: Pack) -> tuple[str | None, str]:
        """Make `pack` the active knowledge of its product, between two frames; see `Inspector.swap`.

        If the worker dies or hangs of it, the worker that takes its place has the old knowledge.

        Raises:
            KnowledgeError: the pack is of another feature space, or over the engine's capacity.
            EngineError: the engine's library refused the new head or crashed on it, or there is no worker.
            InputError: the inspector is closed.
        """
        with self._control(f"new knowledge for {pack.product!r}") as worker:
            old = self._packs.get(pack.product)
            if old is not None and old.digest == pack.digest:
                return old.version, old.version
            reply, _ = worker.control(Swap(), encode_pack(pack), seconds=CONTROL_SECONDS)
            if isinstance(reply, Refused):
                raise reply.error()
            assert isinstance(reply, Swapped)
            with self._state:
                if self._worker is not worker:  # its successor has begun with the old knowledge
                    raise OSError("the worker ended")
                self._packs[pack.product] = pack
            return reply.old, reply.new

    def embed(self, frame: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """The trunk's features of a frame, for enrolment: each [T, ...] with T tiles.

        Raises:
            ImageError: see `inspect`.
            EngineError: the engine failed or its process died, or its precision is below what enrolment needs.
            InputError: the inspector is closed.
        """
        check_frame(frame, self.spec.preprocessing)
        pixels = np.ascontiguousarray(frame)
        height, width, channels = pixels.shape
        with self._control("features of a frame") as worker:
            asked = Embed((height, width, channels))
            reply, data = worker.control(asked, raw(pixels), seconds=CONTROL_SECONDS)
        if isinstance(reply, Refused):
            raise reply.error()
        assert isinstance(reply, Embedded)
        features, start = {}, 0
        for name, shape in reply.features.items():
            count = int(np.prod(shape))
            features[name] = np.frombuffer(data, np.float32, count, start).reshape(shape)
            start += 4 * count
        return features

    def close(self) -> None:
        """End the worker once the frame in flight is done, or was late. May be called twice."""
        with self._state:
            self._closed = True
            self._close_by = time.monotonic() + _CLOSE_SECONDS
            self._state.notify_all()
        if self._keeper.is_alive() and self._keeper is not threading.current_thread():
            self._keeper.join()

    def __enter__(self) -> IsolatedInspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _patience(self, deadline_ms: float | None) -> float:
        if self._hung_after is not None:
            return self._hung_after
        return HUNG_AFTER if deadline_ms is None else max(LATE_LEAST, LATE_TIMES * deadline_ms / 1e3)

    def _free_worker(self, until: float | None) -> Worker | None:
        """The worker once it is ready and its last frame, which was late, has come back; None if that is not to be."""

        def settled() -> bool:
            if self._closed or (self._worker is None and not self._starting):
                return True
            return self._worker is not None and not self._worker.busy

        with self._state:
            done = self._state.wait_for(settled, None if until is None else max(0.0, until - time.monotonic()))
            return self._worker if done and not self._closed else None

    def _why_none(self, deadline_ms: float | None) -> str:
        with self._state:
            if self._worker is not None:
                return _late(deadline_ms)
            if self._closed:
                return "engine: the inspector is closed"
            if self._starting:
                return f"engine: {self._lost}; a new process is being started"
            return f"engine: no process ({self._failure.got if self._failure else self._lost})"

    @contextlib.contextmanager
    def _control(self, what: str) -> Iterator[Worker]:
        """The worker for something that is no frame; its end while it does that is an error."""
        until = time.monotonic() + CONTROL_SECONDS
        with self._control_turn:
            with self._state:
                self._state.wait_for(
                    lambda: self._closed or not self._starting, timeout=max(0.0, until - time.monotonic())
                )
                worker = self._worker
                if self._closed:
                    raise InputError(wanted="an open inspector", got="a closed one", next_step="Make a new one.")
            if worker is None:
                raise _control_error(what, self._why_none(None).removeprefix("engine: "))
            try:
                yield worker
            except TimeoutError as error:
                raise _control_error(what, f"none in {CONTROL_SECONDS:g} s; its process is killed") from error
            except (OSError, EOFError) as error:
                raise _control_error(what, "the end of its process") from error

    def _keep(self) -> None:
        """Start workers and watch them, until the inspector is closed."""
        try:
            self._start_and_watch()
        finally:  # whoever waits for a worker must not wait for a thread that is gone
            with self._state:
                self._worker, self._starting = None, False
                self._state.notify_all()

    def _start_and_watch(self) -> None:
        wait = _FIRST_WAIT
        while True:
            with self._state:
                if self._closed:
                    return
                packs = list(self._packs.values())
            try:
                worker = start_worker(
                    self.bundle, packs, **self._options, seconds=START_SECONDS, closed=lambda: self._closed
                )
            except EdgeadError as error:
                with self._state:
                    first = self._failure is None and not self._lost
                    self._failure, self._starting = error, False
                    self._state.notify_all()
                    if first or self._state.wait_for(lambda: self._closed, wait * random.uniform(0.75, 1.25)):
                        return
                    self._starting = True
                wait = min(2 * wait, _LONGEST_WAIT)
                continue
            wait = _FIRST_WAIT
            with self._state:
                self._worker, self._starting = worker, False
                self._state.notify_all()
            reason = self._watch(worker)
            with self._state:
                self._worker, self._starting, self._lost = None, not self._closed, reason
                self.restarts += not self._closed
                self._state.notify_all()
            worker.end(kill=not self._closed or worker.busy)

    def _watch(self, worker: Worker) -> str:
        """Take a worker's answers until it ends, hangs or is no longer wanted; says why it is over."""
        while True:
            ready, _, _ = select.select([worker.frames], [], [], _POLL)
            # What has come in is taken before anything is called late: this process may have been stopped itself.
            if ready:
                try:
                    reply = worker.take()
                except TimeoutError:
                    return "its process hung in the middle of an answer and was killed"
                except (OSError, EOFError):
                    return worker.obituary()
                with self._state:
                    worker.reply, worker.busy = reply, False
                    self._state.notify_all()
                continue
            if self._closed and (not worker.busy or time.monotonic() > self._close_by):
                return "the inspector was closed"
            if worker.condemned is not None:
                return f"its process {worker.condemned}"
            if worker.is_hung():
                return f"its process hung for {worker.patience:g} s and was killed"


def _control_error(what: str, got: str) -> EngineError:
    return EngineError(
        wanted=f"{what} from the engine's process", got=got, next_step="Try again; the old knowledge is active."
    )


def _unanswered(pack: Pack, start: float, reason: str) -> Inspection:
    return not_inspected(
        reason,
        product=pack.product,
        knowledge=pack.version,
        threshold=pack.calibration.threshold,
        timings={"total": (time.perf_counter() - start) * 1e3},
    )


def _late(deadline_ms: float | None) -> str:
    return f"deadline of {deadline_ms:g} ms"
