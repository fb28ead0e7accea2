"""The inspector: a bundle and knowledge in, a verdict per frame out; knowledge changes between frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.deadline import DeadlineWorker
from edgead.runtime.engines import Session, open_engine
from edgead.runtime.errors import EngineError, InputError
from edgead.runtime.evidence import find_evidence
from edgead.runtime.inspection import DefectRegion, Inspection, Verdict, not_inspected
from edgead.runtime.knowledge import Pack
from edgead.runtime.preprocess import check_frame, merge_maps, prepare, tile_count
from edgead.runtime.regions import Outline, outline, to_regions
from edgead.runtime.spec import Port

_CLOSE_SECONDS = 10.0


@dataclass(eq=False)
class _Knowing:
    """A head with the pack that is bound in it. Frames hold it whole, so they never see half of two."""

    pack: Pack
    head: Session
    version: str
    users: int = 0
    """Frames that work with it now."""
    retired: bool = False
    """No new frame will take it; the last one that holds it closes it."""


class Inspector:
    """Inspects frames with one engine of a bundle.

    `inspect` may be called from several threads; frames take their turn on the engine. `swap` may be called
    from any thread at any time: the new head is made beside the old one, off the frame path, and takes its
    place between two frames. A frame keeps the head that it began with, and its result names that version.

    Args:
        bundle: an open bundle, or the path of one.
        target: which engine ('openvino:fp16', 'onnx', ...); None for the best that this machine has.
        threads: processor threads per inference; None for as many as the process may use.
        device: the library's name of a device, None for its default.
        packs: knowledge to start with instead of, or beside, the bundle's own.
        products: products of the bundle to open; None for all. Each costs the time of a head.

    Raises:
        BundleError: the bundle is damaged or has no such engine or product.
        KnowledgeError: a pack does not fit.
        MissingDependencyError: the engine's library is not installed.
        EngineError: the library refused the engine.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        target: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        packs: Iterable[Pack] = (),
        products: Iterable[str] | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        self.spec = self.bundle.manifest.detector
        given = {pack.product: pack for pack in packs}
        for product in self.bundle.products if products is None else products:
            if product not in given:
                given[product] = self.bundle.pack(product)
        wanted = self.bundle.manifest.default
        self.default = wanted if wanted in given else next(iter(given), wanted)
        self._tiles = tile_count(self.spec.preprocessing)
        self._turn = threading.Lock()
        self._swapping = threading.Lock()
        self._books = threading.Lock()
        self._worker: DeadlineWorker[Inspection] = DeadlineWorker()
        self._active: dict[str, _Knowing] = {}
        self._closed = False
        self._engine = open_engine(self.bundle, target, threads=threads, device=device)
        self._trunk = self._engine.trunk(self._tiles)
        for pack in given.values():
            self.swap(pack)

    @property
    def engine(self) -> str:
        """The name of the engine in use, such as 'onnx-fp32'."""
        return self._engine.record.name

    @property
    def threads(self) -> int:
        """Processor threads per inference."""
        return self._engine.threads

    @property
    def products(self) -> tuple[str, ...]:
        """Products that frames can be inspected for, the default one first."""
        with self._books:
            return tuple(sorted(self._active, key=lambda product: (product != self.default, product)))

    def knowledge(self, product: str | None = None) -> Pack:
        """The active pack of a product.

        Raises:
            InputError: there is no such product here.
        """
        return self._knowing(product).pack

    def swap(self, pack: Pack) -> tuple[str | None, str]:
        """Make `pack` the active knowledge of its product; a product that is new here is added.

        The trunk is not touched. If anything fails the old knowledge stays active. Knowledge that is active
        already is left as it is.

        Returns:
            the version that was active (None for a new product), and the new one.

        Raises:
            KnowledgeError: the pack is of another feature space, or over the engine's capacity.
            EngineError: the engine's library refused the new head.
            InputError: the inspector is closed.
        """
        with self._swapping:
            with self._books:
                old = self._active.get(pack.product)
                if self._closed:
                    raise InputError(wanted="an open inspector", got="a closed one", next_step="Make a new Inspector.")
            if old is not None and old.pack.digest == pack.digest:
                return old.version, old.version
            head = self._engine.head(pack, self._tiles)
            try:
                # A first run allocates and chooses kernels; better here than on a frame.
                head.infer({port.name: _zeros(port) for port in head.inputs})
            except BaseException:
                head.close()
                raise
            new = _Knowing(pack, head, pack.version)
            with self._books:
                self._active[pack.product] = new
                self._retire(old)
            return (old.version if old else None), new.version

    def inspect(
        self, frame: NDArray[np.uint8], *, product: str | None = None, deadline_ms: float | None = None
    ) -> Inspection:
        """Inspect one frame.

        Args:
            frame: uint8 RGB [H, W, 3]. With a deadline it must stay as it is until its work has ended, also
                after a NOT_INSPECTED.
            product: whose knowledge to compare with; the default product if None.
            deadline_ms: answer at the latest so many milliseconds after the call, with NOT_INSPECTED if the
                work is not done by then. The engine finishes in the background; a frame that finds it still
                busy waits for it within its own deadline.

        Returns:
            the inspection. An engine that fails or gives no number on this frame is an answer too
            (NOT_INSPECTED with the reason), not an exception: the stream goes on.

        Raises:
            ImageError: `frame` is no uint8 RGB picture, or the region of interest is not inside it.
            InputError: unknown product.
        """
        start = time.perf_counter()
        check_frame(frame, self.spec.preprocessing)
        knowing = self._take(product)
        if deadline_ms is None:
            return self._work(frame, knowing, start, None)
        until = start + deadline_ms / 1000.0
        begun, result = self._worker.run(lambda: self._work(frame, knowing, start, until), until)
        if not begun:
            self._give_back(knowing)
        return result or _unanswered(knowing, start, {}, _late(deadline_ms))

    def refusal(self, reason: str, product: str | None = None) -> Inspection:
        """The NOT_INSPECTED answer for a frame that never was a picture, naming the active knowledge.

        Raises:
            InputError: unknown product.
        """
        return _unanswered(self._knowing(product), time.perf_counter(), {}, reason)

    def embed(self, frame: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """The trunk's features of a frame, for enrolment: each [T, ...] with T tiles.

        Raises:
            ImageError: see `inspect`.
            EngineError: the engine failed, or its precision is below what enrolment needs.
        """
        if self._engine.record.precision == "int8":
            raise EngineError(
                wanted="an engine of 16 bits or more for enrolment",
                got=self.engine,
                next_step="Open an fp32 or fp16 engine of the bundle: rows must not carry int8 rounding.",
            )
        check_frame(frame, self.spec.preprocessing)
        image = prepare(frame, self.spec.preprocessing)
        with self._turn:
            features = self._trunk.infer({"image": image})
            return {name: np.array(array) for name, array in features.items()}

    def close(self) -> None:
        """Free the engine once the frames in flight are done. May be called twice; `inspect` fails afterwards.

        A frame that hangs in the engine's library is not waited for longer than ten seconds; its engine is
        then left to the end of the process, because freeing it under a running call would crash.
        """
        self._worker.close()
        with self._books:
            if self._closed:
                return
            self._closed = True
        # A swap that has begun comes to its end first, so that its head is among those closed.
        with self._swapping, self._books:
            for knowing in self._active.values():
                self._retire(knowing)
            self._active = {}
        if self._turn.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._trunk.close()
                self._engine.close()
            finally:
                self._turn.release()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _knowing(self, product: str | None, take: bool = False) -> _Knowing:
        with self._books:
            knowing = self._active.get(self.default if product is None else product)
            if knowing is not None:
                knowing.users += take
                return knowing
        raise InputError(
            wanted=f"one of the products {', '.join(self.products) or '(none: the inspector is closed)'}",
            got=repr(self.default if product is None else product),
            next_step="Name one of these, or add its knowledge with swap(pack).",
        )

    def _take(self, product: str | None) -> _Knowing:
        """The one snapshot that a frame takes."""
        return self._knowing(product, take=True)

    def _give_back(self, knowing: _Knowing) -> None:
        with self._books:
            knowing.users -= 1
            if knowing.retired and not knowing.users:
                knowing.head.close()

    def _retire(self, knowing: _Knowing | None) -> None:
        """Close a head, or leave that to the last frame that holds it. Under the lock of the books."""
        if knowing is not None:
            knowing.retired = True
            if not knowing.users:
                knowing.head.close()

    def _work(self, frame: NDArray[np.uint8], knowing: _Knowing, start: float, until: float | None) -> Inspection:
        timings: dict[str, float] = {}
        try:
            began = time.perf_counter()
            image = prepare(frame, self.spec.preprocessing)
            _lap(timings, "prepare", began)
            with self._turn:
                return self._decide(frame.shape, image, knowing, start, until, timings)
        except EngineError as error:
            return _unanswered(knowing, start, timings, f"engine: {error.got}")
        finally:
            self._give_back(knowing)

    def _decide(
        self,
        frame_shape: tuple[int, ...],
        image: NDArray[np.uint8],
        knowing: _Knowing,
        start: float,
        until: float | None,
        timings: dict[str, float],
    ) -> Inspection:
        """Trunk, head, map and regions of a prepared frame. Engines lend their buffers only until the next run,
        so what is kept is copied before the turn ends."""
        lap = time.perf_counter()
        if until is not None and lap >= until:
            return _unanswered(knowing, start, timings, _late((until - start) * 1e3))
        features = self._trunk.infer({"image": image})
        lap = _lap(timings, "trunk", lap)
        if until is not None and lap >= until:
            return _unanswered(knowing, start, timings, _late((until - start) * 1e3))
        outputs = knowing.head.infer(features)
        lap = _lap(timings, "head", lap)

        score = float(outputs["score"].max())
        merged = self._merged(outputs, frame_shape)
        if not _is_finite(outputs["score"]) or (merged is not None and not _is_finite(merged)):
            return _unanswered(knowing, start, timings, "engine: score or map is not a number")
        calibration = knowing.pack.calibration
        anomalous = score > calibration.threshold
        outlines: tuple[Outline, ...] = ()
        regions: tuple[DefectRegion, ...] = ()
        if anomalous and merged is not None:
            outlines = outline(merged, threshold=calibration.map_threshold)
            regions = to_regions(outlines, merged.shape, frame_shape, self.spec.preprocessing)
        peaks = [item.point for item in outlines]
        shape = None if merged is None else merged.shape
        if merged is not None and not peaks and "worst_patch" not in outputs:
            row, column = divmod(int(merged.argmax()), merged.shape[1])
            peaks = [(column, row)]
        evidence = find_evidence(outputs, peaks, knowing.pack, self.spec, shape, frame_shape)
        _lap(timings, "regions", lap)
        timings["total"] = (time.perf_counter() - start) * 1e3
        return Inspection(
            verdict=Verdict.NG if anomalous else Verdict.OK,
            product=knowing.pack.product,
            knowledge=knowing.version,
            threshold=calibration.threshold,
            score=score,
            normalised=calibration.normalise(score),
            anomaly_map=merged,
            regions=regions,
            evidence=evidence,
            timings=timings,
            map_threshold=calibration.map_threshold,
        )

    def _merged(self, outputs: Mapping[str, NDArray[Any]], frame_shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        maps = outputs.get("anomaly_map")
        if maps is None:
            return None
        merged = merge_maps(maps, frame_shape, self.spec.preprocessing)
        return merged.copy() if len(maps) == 1 else merged


def _unanswered(knowing: _Knowing, start: float, timings: dict[str, float], reason: str) -> Inspection:
    return not_inspected(
        reason,
        product=knowing.pack.product,
        knowledge=knowing.version,
        threshold=knowing.pack.calibration.threshold,
        timings={**timings, "total": (time.perf_counter() - start) * 1e3},
    )


def _late(deadline_ms: float) -> str:
    return f"deadline of {deadline_ms:g} ms"


def _is_finite(array: NDArray[Any]) -> bool:
    # Two reductions that pass NaN on, without a temporary of the array's size.
    return bool(np.isfinite(array.max()) and np.isfinite(array.min()))


def _zeros(port: Port) -> NDArray[Any]:
    return np.zeros([int(size) for size in port.shape], port.dtype)


def _lap(timings: dict[str, float], stage: str, since: float) -> float:
    now = time.perf_counter()
    timings[stage] = (now - since) * 1e3
    return now
