"""Measure a bundle, with any of its engines, on a labelled test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EngineError, InputError
from edgead.runtime.image import map_to_frame, read_image
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.progress import Progress
from edgead.server_side.datasets import GOOD, Sample, read_mask, test_samples
from edgead.server_side.metrics import PixelCounter, auroc, average_precision, f1_max


@dataclass(frozen=True)
class Outcome:
    """One test image and what the inspector said.

    Attributes:
        sample: the labelled image.
        inspection: the answer, without its map.
    """

    sample: Sample
    inspection: Inspection

    @property
    def score(self) -> float:
        """Image score."""
        return float(self.inspection.score or 0.0)


@dataclass(frozen=True)
class KindResult:
    """Metrics of one defect type against the good images, or of all of them.

    Attributes:
        kind: the type, 'good', or 'all'.
        images: images of the type.
        auroc, aupr, f1_max: image metrics; None where not defined.
        pixel_auroc, pixel_f1_max, pro: pixel metrics; None without masks.
        wrong: false alarms (of good) or misses (of a defect type) at the calibrated threshold.
    """

    kind: str
    images: int
    auroc: float | None = None
    aupr: float | None = None
    f1_max: float | None = None
    pixel_auroc: float | None = None
    pixel_f1_max: float | None = None
    pro: float | None = None
    wrong: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_bundle`.

    Attributes:
        engine: which engine answered.
        knowledge: version of the knowledge.
        threshold: image scores above it are NG.
        kinds: 'all' first, then each defect type, then 'good'.
        outcomes: every image.
        milliseconds: medians by stage.
        notes: what a reader of the figures must know (types without masks).
    """

    engine: str
    knowledge: str
    threshold: float
    kinds: tuple[KindResult, ...]
    outcomes: tuple[Outcome, ...]
    milliseconds: dict[str, float]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-like values, without the single images."""
        return {
            "engine": self.engine,
            "knowledge": self.knowledge,
            "threshold": self.threshold,
            "milliseconds": {stage: round(value, 3) for stage, value in self.milliseconds.items()},
            "kinds": {
                kind.kind: {name: value for name, value in vars(kind).items() if name != "kind"}
                for kind in self.kinds
            },
            "notes": list(self.notes),
        }


def evaluate_bundle(
    bundle: str | Path | Inspector,
    data: Path,
    *,
    target: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Inspect the test images of a data set and measure.

    Args:
        bundle: a bundle's path, or an inspector that is already open.
        data: a data set in the MVTec layout (`edgead.server_side.datasets`).
        target: which engine.
        threads: processor threads.
        limit: at most so many images of each type, the first by name; all if None.

    Raises:
        InputError: the data set lacks what the layout asks for.
        ImageError: an image cannot be read.
        EngineError: an image was not answered.
    """
    samples = _limited(test_samples(data), limit)
    if isinstance(bundle, Inspector):
        return _evaluate(bundle, samples)
    with Inspector(bundle, target=target, threads=threads) as inspector:
        return _evaluate(inspector, samples)


def _limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    if limit is None:
        return samples
    if limit < 1:
        raise InputError(wanted="a limit of at least 1 image", got=str(limit))
    seen: dict[str, int] = {}
    kept = []
    for sample in samples:
        seen[sample.kind] = seen.get(sample.kind, 0) + 1
        if seen[sample.kind] <= limit:
            kept.append(sample)
    return kept


def _evaluate(inspector: Inspector, samples: Sequence[Sample]) -> Evaluation:
    outcomes: list[Outcome] = []
    maps: list[NDArray[np.float32] | None] = []
    shapes: list[tuple[int, int]] = []
    with Progress("inspecting", len(samples)) as progress:
        for sample in progress.track(samples):
            frame = read_image(sample.path)
            inspection = inspector.inspect(frame)
            if inspection.verdict is Verdict.NOT_INSPECTED:
                raise EngineError(
                    wanted=f"an answer for {sample.path}",
                    got=f"none: {inspection.reason}",
                    next_step="Check the engine with: edgead bench BUNDLE",
                )
            outcomes.append(Outcome(sample, _without_map(inspection)))
            maps.append(inspection.anomaly_map)
            shapes.append((frame.shape[0], frame.shape[1]))
    counters = _pixel_counters(inspector, samples, maps, shapes)
    kinds = sorted({sample.kind for sample in samples} - {GOOD})
    results = [_kind_result("all", kinds, outcomes, counters.get("all"))]
    results += [_kind_result(kind, [kind], outcomes, counters.get(kind)) for kind in kinds]
    good = [outcome for outcome in outcomes if not outcome.sample.anomalous]
    alarms = sum(outcome.inspection.verdict is Verdict.NG for outcome in good)
    results.append(KindResult(GOOD, len(good), wrong=alarms))
    unmasked = sorted({sample.kind for sample in samples if sample.anomalous and sample.mask is None})
    notes = [f"no masks for {', '.join(unmasked)}: left out of the pixel metrics"] if unmasked else []
    stages = outcomes[0].inspection.timings.keys() if outcomes else ()
    first = outcomes[0].inspection
    return Evaluation(
        engine=inspector.engine,
        knowledge=first.knowledge,
        threshold=first.threshold,
        kinds=tuple(results),
        outcomes=tuple(outcomes),
        milliseconds={
            stage: float(np.median([outcome.inspection.timings.get(stage, 0.0) for outcome in outcomes]))
            for stage in stages
        },
        notes=tuple(notes),
    )


def _without_map(inspection: Inspection) -> Inspection:
    from dataclasses import replace

    return replace(inspection, anomaly_map=None)


def _pixel_counters(
    inspector: Inspector,
    samples: Sequence[Sample],
    maps: Sequence[NDArray[np.float32] | None],
    shapes: Sequence[tuple[int, int]],
) -> dict[str, PixelCounter]:
    """A counter for each type with masks and one for all of them; good images count in each."""
    present = [anomaly_map for anomaly_map in maps if anomaly_map is not None]
    masked = sorted({sample.kind for sample in samples if sample.mask is not None})
    if not present or not masked:
        return {}
    low = min(float(anomaly_map.min()) for anomaly_map in present)
    high = max(float(anomaly_map.max()) for anomaly_map in present)
    counters = {kind: PixelCounter(low, high) for kind in ["all", *masked]}
    spec = inspector.spec.preprocessing
    with Progress("comparing with masks", len(samples)) as progress:
        for sample, anomaly_map, shape in zip(samples, maps, shapes, strict=True):
            progress.advance()
            if anomaly_map is None or (sample.anomalous and sample.mask is None):
                continue
            mask = read_mask(sample, shape)
            full = map_to_frame(anomaly_map, shape, spec)
            for kind in [sample.kind] if sample.anomalous else masked:
                counters[kind].add(full, mask)
            counters["all"].add(full, mask)
    return counters


def _kind_result(
    name: str, kinds: Sequence[str], outcomes: Sequence[Outcome], counter: PixelCounter | None
) -> KindResult:
    chosen = [o for o in outcomes if not o.sample.anomalous or o.sample.kind in kinds]
    labels = np.array([outcome.sample.anomalous for outcome in chosen], np.bool_)
    scores = np.array([outcome.score for outcome in chosen])
    misses = sum(o.sample.anomalous and o.inspection.verdict is Verdict.OK for o in chosen)
    best = f1_max(labels, scores)
    pixels = counter.result() if counter is not None else None
    return KindResult(
        kind=name,
        images=int(labels.sum()),
        auroc=auroc(labels, scores),
        aupr=average_precision(labels, scores),
        f1_max=best[0] if best else None,
        pixel_auroc=pixels.auroc if pixels else None,
        pixel_f1_max=pixels.f1_max if pixels else None,
        pro=pixels.pro if pixels else None,
        wrong=int(misses),
    )
