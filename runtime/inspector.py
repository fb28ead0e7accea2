"""The inspector: a bundle and knowledge in, a verdict per frame out; knowledge changes between frames."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.active import ActiveKnowledge, Knowing
from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.deadline import Clock, DeadlineWorker, LateError, late
from edgead.runtime.engines import open_engine
from edgead.runtime.errors import EngineError, InputError
from edgead.runtime.evidence import find_evidence, find_sentences
from edgead.runtime.inspection import DefectRegion, Inspection, SuppressedRegion, Verdict, not_inspected
from edgead.runtime.knowledge import Pack
from edgead.runtime.normality import (
    Mode,
    explained_regions,
    is_due,
    suppress_map,
    suppress_score,
    suppression_map,
)
from edgead.runtime.preprocess import check_frame, merge_maps, prepare, tile_count
from edgead.runtime.regions import Outline, outline, to_regions

_CLOSE_SECONDS = 10.0
_MODES = ("lazy", "eager")


class Inspector:
    """Inspects frames with one engine of a bundle.

    `inspect` may be called from several threads; frames take their turn on the engine. `swap` may be called
    from any thread at any time: the new head is made beside the old one, off the frame path, and takes its
    place between two frames. A frame keeps the head that it began with, and its result names that version.

    Args:
        bundle: an open bundle, or the path of one.
        target: which engine ('openvino:fp16', 'onnx', ...); None for the best that this machine has.
        threads: processor threads per inference; None for all that the process may use, or `OMP_NUM_THREADS` of them.
        device: the library's name of a device, None for its default.
        packs: knowledge to start with instead of, or beside, the bundle's own.
        products: products of the bundle to open; None for all. Each costs the time of a head.
        suppression: when frames are compared with the sentences of their pack, if it has any. 'lazy' only after
            an alarm, which changes no decision (see `edgead.runtime.normality`); 'eager' always, for whoever
            needs the suppressed score and map of every frame. None is 'lazy'.

    Raises:
        InputError: another word for `suppression`.
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
        suppression: Mode | None = None,
    ) -> None:
        if suppression is not None and suppression not in _MODES:
            raise InputError(
                wanted=f"a suppression of {' or '.join(_MODES)}", got=repr(suppression), next_step="Name one of these."
            )
        self.suppression: Mode = suppression or "lazy"
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
        self._worker: DeadlineWorker[Inspection] = DeadlineWorker()
        self._closed = False
        self._engine = open_engine(self.bundle, target, threads=threads, device=device)
        self._trunk = self._engine.trunk(self._tiles)
        self._active = ActiveKnowledge(self._engine, self._tiles)
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
        return tuple(sorted(self._active.products, key=lambda product: (product != self.default, product)))

    def knowledge(self, product: str | None = None) -> Pack:
        """The active pack of a product.

        Raises:
            InputError: there is no such product here.
        """
        knowing = self._take(product)
        self._active.give_back(knowing)
        return knowing.pack

    def swap(self, pack: Pack) -> tuple[str | None, str]:
        """Make `pack` the active knowledge of its product; a product that is new here is added.

        Trunks are not touched, and a head only if arrays that it takes changed: thresholds make no new head, and
        sentences none of the bank's. If anything fails the old knowledge stays active. Knowledge that is active
        already is left as it is.

        Returns:
            the version that was active (None for a new product), and the new one.

        Raises:
            KnowledgeError: the pack is of another feature space, or over the engine's capacity.
            EngineError: the engine's library refused the new head.
            EngineMismatchError: the first sentence came, and the second trunk has no plan for this machine.
            InputError: the inspector is closed.
        """
        return self._active.swap(pack)

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
            self._active.give_back(knowing)
        return result or _unanswered(knowing, start, {}, late(deadline_ms))

    def refusal(self, reason: str, product: str | None = None) -> Inspection:
        """The NOT_INSPECTED answer for a frame that never was a picture, naming the active knowledge.

        Raises:
            InputError: unknown product.
        """
        knowing = self._take(product)
        self._active.give_back(knowing)
        return _unanswered(knowing, time.perf_counter(), {}, reason)

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
        if self._closed:
            return
        self._closed = True
        self._active.close()
        if self._turn.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._trunk.close()
                self._active.close_normality()
                self._engine.close()
            finally:
                self._turn.release()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, product: str | None) -> Knowing:
        """The one snapshot that a frame takes."""
        name = self.default if product is None else product
        knowing = self._active.take(name)
        if knowing is None:
            raise InputError(
                wanted=f"one of the products {', '.join(self.products) or '(none: the inspector is closed)'}",
                got=repr(name),
                next_step="Name one of these, or add its knowledge with swap(pack).",
            )
        return knowing

    def _work(self, frame: NDArray[np.uint8], knowing: Knowing, start: float, until: float | None) -> Inspection:
        clock = Clock(start, until)
        try:
            image = prepare(frame, self.spec.preprocessing)
            clock.lap("prepare")
            with self._turn:
                clock.begin()
                return self._decide(frame, image, knowing, clock)
        except LateError as error:
            return _unanswered(knowing, start, clock.timings, str(error))
        except EngineError as error:
            return _unanswered(knowing, start, clock.timings, f"engine: {error.got}")
        finally:
            self._active.give_back(knowing)

    def _decide(self, frame: NDArray[np.uint8], image: NDArray[np.uint8], knowing: Knowing, clock: Clock) -> Inspection:
        """Trunk, head, map and regions of a prepared frame. Engines lend their buffers only until the next run,
        so what is kept is copied before the turn ends."""
        clock.check()
        features = self._trunk.infer({"image": image})
        clock.lap("trunk")
        clock.check()
        outputs = knowing.head.infer(features)
        clock.lap("head")

        base = score = float(outputs["score"].max())
        before = merged = self._merged(outputs, frame.shape)
        if not _is_finite(outputs["score"]) or (merged is not None and not _is_finite(merged)):
            return _unanswered(knowing, clock.start, clock.timings, "engine: score or map is not a number")
        calibration = knowing.pack.calibration
        second: Mapping[str, NDArray[Any]] | None = None
        if (
            knowing.normality is not None
            and before is not None
            and is_due(self.suppression, score, calibration.threshold)
        ):
            second, share = self._compare(frame, features, before.shape, knowing, clock)
            merged = suppress_map(before, share)
            score = suppress_score(score, before, merged)
        clock.lap("normality")

        anomalous = score > calibration.threshold
        outlines: tuple[Outline, ...] = ()
        regions: tuple[DefectRegion, ...] = ()
        if anomalous and merged is not None:
            outlines = outline(merged, threshold=calibration.map_threshold)
            regions = to_regions(outlines, merged.shape, frame.shape, self.spec.preprocessing)
        suppressed: tuple[SuppressedRegion, ...] = ()
        normality = self.bundle.manifest.normality
        if (
            second is not None
            and normality is not None
            and before is not None
            and merged is not None
            and base > calibration.threshold
        ):
            suppressed = explained_regions(
                before,
                merged,
                outlines,
                passes=not anomalous,
                map_threshold=calibration.map_threshold,
                outputs=second,
                pack=knowing.pack,
                texts=knowing.texts,
                normality=normality.detector,
                base=self.spec.preprocessing,
                frame_shape=frame.shape,
            )
        if second is not None:
            # The patch that made the score before suppression need not be the one that decides now.
            outputs = {name: array for name, array in outputs.items() if name != "worst_patch"}
        peaks = [item.point for item in outlines]
        shape = None if merged is None else merged.shape
        if merged is not None and not peaks and "worst_patch" not in outputs:
            row, column = divmod(int(merged.argmax()), merged.shape[1])
            peaks = [(column, row)]
        evidence = find_evidence(outputs, peaks, knowing.pack, self.spec, shape, frame.shape)
        sentences = find_sentences(outputs, knowing.pack, self.spec, knowing.texts)
        clock.lap("regions")
        clock.total()
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
            timings=clock.timings,
            map_threshold=calibration.map_threshold,
            suppressed=suppressed,
            base_score=None if second is None else base,
            sentences=sentences,
        )

    def _compare(
        self,
        frame: NDArray[np.uint8],
        features: Mapping[str, NDArray[Any]],
        shape: tuple[int, ...],
        knowing: Knowing,
        clock: Clock,
    ) -> tuple[Mapping[str, NDArray[Any]], NDArray[np.float32]]:
        """The normality head's outputs for a frame, and the share of the map of `shape` that they suppress."""
        record = self.bundle.manifest.normality
        assert record is not None
        assert knowing.normality is not None
        trunk = self._active.normality_trunk
        clock.check()
        if trunk is not None:
            features = trunk.infer({"image": prepare(frame, record.detector.preprocessing)})
            clock.check()
        outputs = knowing.normality.infer(features)
        return outputs, suppression_map(outputs, shape, frame.shape, record.detector.preprocessing)

    def _merged(self, outputs: Mapping[str, NDArray[Any]], frame_shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        maps = outputs.get("anomaly_map")
        if maps is None:
            return None
        merged = merge_maps(maps, frame_shape, self.spec.preprocessing)
        return merged.copy() if len(maps) == 1 else merged


def _unanswered(knowing: Knowing, start: float, timings: dict[str, float], reason: str) -> Inspection:
    return not_inspected(
        reason,
        product=knowing.pack.product,
        knowledge=knowing.version,
        threshold=knowing.pack.calibration.threshold,
        timings={**timings, "total": (time.perf_counter() - start) * 1e3},
    )


def _is_finite(array: NDArray[Any]) -> bool:
    # Two reductions that pass NaN on, without a temporary of the array's size.
    return bool(np.isfinite(array.max()) and np.isfinite(array.min()))
