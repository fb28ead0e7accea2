"""Measure a bundle, with any of its engines, on a labelled test set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

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
        product: whose knowledge the images were compared with.
        knowledge: version of the knowledge.
        threshold: image scores above it are NG.
        kinds: 'all' first, then each defect type, then 'good'.
        outcomes: every image.
        milliseconds: medians by stage.
        notes: what a reader of the figures must know (types without masks).
    """

    engine: str
    product: str
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
            "product": self.product,
            "knowledge": self.knowledge,
            "threshold": self.threshold,
            "milliseconds": {stage: round(value, 3) for stage, value in self.milliseconds.items()},
            "kinds": {
                kind.kind: {name: value for name, value in vars(kind).items() if name != "kind"} for kind in self.kinds
            },
            "notes": list(self.notes),
        }


def evaluate_bundle(
    bundle: str | Path | Inspector,
    data: Path,
    *,
    product: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Inspect the test images of a data set and measure.

    Args:
        bundle: a bundle's path, or an inspector that is already open.
        data: a data set in the MVTec layout (`edgead.server_side.datasets`).
        product: whose knowledge to compare with; the bundle's default if None.
        target: which engine.
        threads: processor threads.
        limit: at most so many images of each type, the first by name; all if None.

    Raises:
        InputError: the data set lacks what the layout asks for, or the inspector has no such product.
        BundleError: the bundle has no such product.
        ImageError: an image cannot be read.
        EngineError: an image was not answered.
    """
    samples = limited(test_samples(data), limit)
    if isinstance(bundle, Inspector):
        return _evaluate(bundle, samples, product)
    products = None if product is None else [product]
    with Inspector(bundle, target=target, threads=threads, products=products) as inspector:
        return _evaluate(inspector, samples, product)


def limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """At most `limit` samples of each type, the first by name; all if None.

    Raises:
        InputError: a limit below 1.
    """
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


def _evaluate(inspector: Inspector, samples: Sequence[Sample], product: str | None) -> Evaluation:
    product = inspector.knowledge(product).product
    outcomes: list[Outcome] = []
    masked = {sample.kind for sample in samples if sample.mask is not None}
    counters: dict[str, PixelCounter] = {}
    unmarked: list[Sample] = []
    with Progress("inspecting", len(samples)) as progress:
        for sample in progress.track(samples):
            frame = read_image(sample.path)
            inspection = inspector.inspect(frame, product=product)
            if inspection.verdict is Verdict.NOT_INSPECTED:
                raise EngineError(
                    wanted=f"an answer for {sample.path}",
                    got=f"none: {inspection.reason}",
                    next_step="Check the engine with: edgead bench BUNDLE",
                )
            found = inspection.anomaly_map
            if found is not None and masked and (sample.mask is not None or not sample.anomalous):
                mask = read_mask(sample, frame.shape)
                # A defect that nobody marked is no normal picture either: its pixels count for nothing.
                if sample.anomalous and not mask.any():
                    unmarked.append(sample)
                else:
                    full = map_to_frame(found, frame.shape, inspector.spec.preprocessing)
                    counters.setdefault(sample.kind, PixelCounter()).add(full, mask)
            # A map is large and there may be thousands of frames: it is counted, not kept.
            outcomes.append(Outcome(sample, replace(inspection, anomaly_map=None)))
    first = outcomes[0].inspection
    return Evaluation(
        engine=inspector.engine,
        product=product,
        knowledge=first.knowledge,
        threshold=first.threshold,
        kinds=tuple(_results(outcomes, counters)),
        outcomes=tuple(outcomes),
        milliseconds={
            stage: float(np.median([outcome.inspection.timings.get(stage, 0.0) for outcome in outcomes]))
            for stage in first.timings
        },
        notes=tuple(_notes(samples, unmarked, with_map=inspector.spec.has_map)),
    )


def _results(outcomes: Sequence[Outcome], counters: Mapping[str, PixelCounter]) -> Iterator[KindResult]:
    """'all', each defect type, 'good'; the pixels of good images count in each."""
    kinds = sorted({outcome.sample.kind for outcome in outcomes} - {GOOD})
    yield _kind_result("all", kinds, outcomes, _pixels(counters, kinds))
    for kind in kinds:
        yield _kind_result(kind, [kind], outcomes, _pixels(counters, [kind]))
    good = [outcome for outcome in outcomes if not outcome.sample.anomalous]
    yield KindResult(GOOD, len(good), wrong=sum(o.inspection.verdict is Verdict.NG for o in good))


def _pixels(counters: Mapping[str, PixelCounter], kinds: Sequence[str]) -> PixelCounter | None:
    """What was counted of good images and of `kinds`; None if none of them has masks."""
    chosen = [counters[kind] for kind in kinds if kind in counters]
    if not chosen:
        return None
    total = PixelCounter()
    for counter in (*chosen, *([counters[GOOD]] if GOOD in counters else [])):
        total.merge(counter)
    return total


def _notes(samples: Sequence[Sample], unmarked: Sequence[Sample], *, with_map: bool) -> Iterator[str]:
    kinds = {sample.kind for sample in samples}
    if GOOD not in kinds:
        yield "no good images in the test set: image AUROC and false alarms are not defined"
    if kinds == {GOOD}:
        yield "no defects in the test set: only false alarms are measured"
    if not with_map:
        yield "the detector makes no anomaly maps: there are no pixel metrics"
    unmasked = sorted({sample.kind for sample in samples if sample.anomalous and sample.mask is None})
    if unmasked and with_map:
        yield f"no masks for {', '.join(unmasked)}: left out of the pixel metrics"
    if unmarked:
        first = f"{unmarked[0].kind}/{unmarked[0].path.name}"
        yield f"{len(unmarked)} masks mark nothing (first: {first}): left out of the pixel metrics"


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
