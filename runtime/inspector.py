"""The inspector: a bundle and knowledge in, a verdict per frame out; knowledge changes between frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.engines import Session, open_engine
from edgead.runtime.errors import EngineError, InputError
from edgead.runtime.image import check_frame, merge_maps, prepare, tile_count
from edgead.runtime.inspection import DefectRegion, Evidence, Inspection, Verdict, not_inspected
from edgead.runtime.knowledge import Pack
from edgead.runtime.regions import find_regions
from edgead.runtime.spec import Port

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


@dataclass(frozen=True, eq=False)
class _Knowing:
    """A head with the pack that is bound in it. Frames hold it whole, so they never see half of two."""

    pack: Pack
    head: Session
    version: str


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

    Raises:
        BundleError: the bundle is damaged or has no such engine.
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
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        self.spec = self.bundle.manifest.detector
        self.default = self.bundle.manifest.default
        self._tiles = tile_count(self.spec.preprocessing)
        self._engine = open_engine(self.bundle, target, threads=threads, device=device)
        self._trunk = self._engine.trunk(self._tiles)
        self._turn = threading.Lock()
        self._swapping = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._active: dict[str, _Knowing] = {}
        given = {pack.product: pack for pack in packs}
        for product in self.bundle.products:
            if product not in given:
                given[product] = self.bundle.pack(product)
        for pack in given.values():
            self.swap(pack)

    @property
    def engine(self) -> str:
        """The name of the engine in use, such as 'onnx-fp32'."""
        return self._engine.record.name

    @property
    def products(self) -> tuple[str, ...]:
        """Products that frames can be inspected for, the default one first."""
        return tuple(sorted(self._active, key=lambda product: (product != self.default, product)))

    def knowledge(self, product: str | None = None) -> Pack:
        """The active pack of a product.

        Raises:
            InputError: there is no such product here.
        """
        return self._knowing(product).pack

    def swap(self, pack: Pack) -> tuple[str | None, str]:
        """Make `pack` the active knowledge of its product; a product that is new here is added.

        The trunk is not touched. If anything fails the old knowledge stays active.

        Returns:
            the version that was active (None for a new product), and the new one.

        Raises:
            KnowledgeError: the pack is of another feature space, or over the engine's capacity.
            EngineError: the engine's library refused the new head.
        """
        with self._swapping:
            head = self._engine.head(pack, self._tiles)
            # A first run allocates and chooses kernels; better here than on a frame.
            head.infer({port.name: _zeros(port) for port in head.inputs})
            old = self._active.get(pack.product)
            new = _Knowing(pack, head, pack.version)
            # One assignment of a new table: a frame sees the one or the other. Frames that still hold the
            # old head keep it alive; it is freed with the last of them.
            self._active = {**self._active, pack.product: new}
            return (old.version if old else None), new.version

    def inspect(
        self, frame: NDArray[np.uint8], *, product: str | None = None, deadline_ms: float | None = None
    ) -> Inspection:
        """Inspect one frame.

        Args:
            frame: uint8 RGB [H, W, 3].
            product: whose knowledge to compare with; the bundle's default product if None.
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
        knowing = self._knowing(product)
        check_frame(frame, self.spec.preprocessing)
        if deadline_ms is None:
            return self._inspect(frame, knowing, start, None)
        if self._worker is None:
            from concurrent.futures import ThreadPoolExecutor

            self._worker = ThreadPoolExecutor(1, "edgead-inspect")
        until = start + deadline_ms / 1000.0
        future = self._worker.submit(self._inspect, frame, knowing, start, until)
        try:
            return future.result(max(0.0, until - time.perf_counter()))
        except Exception as error:
            # By name: before Python 3.11 the futures have a TimeoutError of their own.
            if type(error).__name__ != "TimeoutError":
                raise
            future.cancel()
            return self._unanswered(knowing, frame, start, {}, f"deadline of {deadline_ms:g} ms")

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
        with self._turn:
            features = self._trunk.infer({"image": prepare(frame, self.spec.preprocessing)})
            return {name: np.array(array) for name, array in features.items()}

    def close(self) -> None:
        """Free the engine. May be called twice; `inspect` fails afterwards."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None
        with self._turn:
            for knowing in self._active.values():
                knowing.head.close()
            self._active = {}
            self._trunk.close()
            self._engine.close()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _knowing(self, product: str | None) -> _Knowing:
        knowing = self._active.get(self.default if product is None else product)
        if knowing is None:
            raise InputError(
                wanted=f"one of the products {', '.join(self.products) or '(none: the inspector is closed)'}",
                got=f"'{product}'",
                next_step="Name one of these, or add its knowledge with swap(pack).",
            )
        return knowing

    def _inspect(
        self, frame: NDArray[np.uint8], knowing: _Knowing, start: float, until: float | None
    ) -> Inspection:
        timings: dict[str, float] = {}
        spec = self.spec.preprocessing
        with self._turn:
            began = time.perf_counter()
            timings["wait"] = (began - start) * 1e3
            if until is not None and began >= until:
                return self._unanswered(knowing, frame, start, timings, "deadline passed before its turn")
            try:
                image = prepare(frame, spec)
                prepared = _lap(timings, "prepare", began)
                features = self._trunk.infer({"image": image})
                trunked = _lap(timings, "trunk", prepared)
                if until is not None and trunked >= until:
                    return self._unanswered(knowing, frame, start, timings, "deadline passed in the trunk")
                outputs = knowing.head.infer(features)
                headed = _lap(timings, "head", trunked)
            except EngineError as error:
                return self._unanswered(knowing, frame, start, timings, str(error))
            scores = outputs["score"]
            score = float(scores.max())
            # Engines may lend their buffers until the next run: what is kept is copied before the turn ends.
            merged = self._merged(outputs, frame)
            nearest = self._nearest_row(outputs, int(scores.argmax()))
        if not np.isfinite(scores).all() or (merged is not None and not np.isfinite(merged).all()):
            return self._unanswered(knowing, frame, start, timings, "the engine's answer is not a number")
        calibration = knowing.pack.calibration
        anomalous = score > calibration.threshold
        shape = (frame.shape[0], frame.shape[1])
        regions: tuple[DefectRegion, ...] = ()
        if anomalous and merged is not None:
            regions = find_regions(merged, shape, spec, threshold=calibration.map_threshold)
        _lap(timings, "regions", headed)
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
            evidence=self._evidence(nearest, knowing.pack, regions[0].point if regions else None),
            timings=timings,
        )

    def _merged(
        self, outputs: Mapping[str, NDArray[Any]], frame: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        maps = outputs.get("anomaly_map")
        if maps is None:
            return None
        merged = merge_maps(maps, (frame.shape[0], frame.shape[1]), self.spec.preprocessing)
        return merged.copy() if np.shares_memory(merged, maps) else merged

    def _nearest_row(self, outputs: Mapping[str, NDArray[Any]], tile: int) -> int | None:
        """Index of the bank row nearest to the most anomalous patch; None if the head is silent."""
        nearest, worst = outputs.get("nearest_row"), outputs.get("worst_patch")
        return None if nearest is None or worst is None else int(nearest[tile, int(worst[tile])])

    def _evidence(
        self, row: int | None, pack: Pack, point: tuple[int, int] | None
    ) -> tuple[Evidence, ...]:
        bank = next((port.name for port in self.spec.knowledge if port.rows is not None), None)
        if row is None or bank is None:
            return ()
        ids = pack.ids(bank)
        return (Evidence(bank, row, int(ids[row]), point),) if 0 <= row < len(ids) else ()

    def _unanswered(
        self,
        knowing: _Knowing,
        frame: NDArray[np.uint8],
        start: float,
        timings: dict[str, float],
        reason: str,
    ) -> Inspection:
        return not_inspected(
            reason,
            product=knowing.pack.product,
            knowledge=knowing.version,
            threshold=knowing.pack.calibration.threshold,
            timings={**timings, "total": (time.perf_counter() - start) * 1e3},
        )


def _zeros(port: Port) -> NDArray[Any]:
    return np.zeros([int(size) for size in port.shape], port.dtype)


def _lap(timings: dict[str, float], stage: str, since: float) -> float:
    now = time.perf_counter()
    timings[stage] = (now - since) * 1e3
    return now
