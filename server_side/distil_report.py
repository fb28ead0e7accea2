"""What a distillation lost and what it gained: scores and maps of teacher and student on the same pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from edgead.runtime.image import Frame, map_to_frame, read_image
from edgead.runtime.preprocess import merge_maps
from edgead.runtime.progress import Progress
from edgead.server_side.datasets import read_mask, test_samples
from edgead.server_side.distil_data import painted_on
from edgead.server_side.distil_teacher import Teacher
from edgead.server_side.metrics import PixelCounter, auroc

_TIMED = 11
_HELD_OUT_SEED = 1_000_003
"""Added to the seed of the painted defects, so that none is one that the student saw."""

Labelled = tuple[Frame, bool, NDArray[np.bool_] | None]
"""A picture, whether it is anomalous, and where (None where nobody knows)."""


@dataclass(frozen=True)
class Side:
    """Teacher or student.

    Attributes:
        image_auroc, pixel_auroc: None where not defined.
        false_alarms: share of good pictures above the threshold; None where the threshold was set on them.
    """

    image_auroc: float | None
    pixel_auroc: float | None
    false_alarms: float | None


@dataclass(frozen=True)
class Loss:
    """Both sides on one set of pictures.

    Attributes:
        images: how many.
        correlation: of the scores (Pearson); None of scores that are all alike.
        rank_correlation: the same by rank (Spearman).
        map_correlation: median over the pictures of the correlation of both maps.
        agreement: share of pictures with the same verdict.
    """

    images: int
    correlation: float | None
    rank_correlation: float | None
    map_correlation: float | None
    agreement: float
    teacher: Side
    student: Side


def compared(teacher: Teacher, student: Teacher, pictures: Iterable[Labelled], count: int) -> Loss:
    """Run both on pictures.

    Args:
        teacher, student: both in units of their thresholds.
        pictures: one at a time, so that their number does not matter.
        count: how many there are.
    """
    scores: list[tuple[float, float]] = []
    labels: list[bool] = []
    alike: list[float] = []
    counters = (PixelCounter(), PixelCounter())
    with Progress("teacher and student", count) as progress:
        for frame, anomalous, mask in progress.track(pictures):
            found = [side.outputs(frame) for side in (teacher, student)]
            spec = teacher.detectors[0].spec.preprocessing
            maps = []
            for side, (_, tiles) in zip((teacher, student), found, strict=True):
                own = side.detectors[0].spec.preprocessing
                maps.append(map_to_frame(merge_maps(tiles.numpy(), frame.shape, own), frame.shape, spec))
            scores.append((found[0][0], found[1][0]))
            labels.append(anomalous)
            correlation = _correlation(maps[0][::4, ::4].ravel(), maps[1][::4, ::4].ravel())
            alike += [] if correlation is None else [correlation]
            if mask is not None:
                for counter, each in zip(counters, maps, strict=True):
                    counter.add(each, mask)
    table = np.array(scores, np.float64)
    truth = np.array(labels, np.bool_)
    sides = []
    for column, counter in enumerate(counters):
        good = table[~truth, column]
        sides.append(
            Side(
                auroc(truth, table[:, column]),
                counter.result().auroc,
                float((good > 1).mean()) if len(good) else None,
            )
        )
    ranks = None if _correlation(table[:, 0], table[:, 1]) is None else float(spearmanr(table[:, 0], table[:, 1])[0])
    return Loss(
        len(table),
        _correlation(table[:, 0], table[:, 1]),
        ranks,
        float(np.median(alike)) if alike else None,
        float(((table[:, 0] > 1) == (table[:, 1] > 1)).mean()),
        sides[0],
        sides[1],
    )


def on_painted(teacher: Teacher, student: Teacher, held_out: Sequence[Path], seed: int) -> Loss:
    """Both on photographs that the student was not trained on, and on the same with painted defects."""

    def pictures() -> Iterable[Labelled]:
        for path in held_out:
            frame = read_image(path)
            yield frame, False, np.zeros(frame.shape[:2], np.bool_)
            painted, mask = painted_on(frame, path.name, seed + _HELD_OUT_SEED)
            yield painted, True, mask

    found = compared(teacher, student, pictures(), 2 * len(held_out))
    return replace(
        found,
        teacher=replace(found.teacher, false_alarms=None),
        student=replace(found.student, false_alarms=None),
    )


def on_data(teacher: Teacher, student: Teacher, data: Path, limit: int | None = None) -> Loss:
    """Both on a labelled data set in the MVTec layout; pixels count where there are masks.

    Raises:
        InputError: the data set lacks what the layout asks for.
    """
    from edgead.server_side.evaluation import limited

    samples = limited(test_samples(data), limit)
    masked = any(sample.mask is not None for sample in samples)

    def pictures() -> Iterable[Labelled]:
        for sample in samples:
            frame = read_image(sample.path)
            known = masked and (sample.mask is not None or not sample.anomalous)
            mask = read_mask(sample, frame.shape) if known else None
            # A defect that nobody marked is no normal picture either.
            yield frame, sample.anomalous, None if mask is None or (sample.anomalous and not mask.any()) else mask

    return compared(teacher, student, pictures(), len(samples))


def milliseconds(side: Teacher, frame: Frame) -> float:
    """Median time of a whole answer of all graphs in torch, preparation included, with the threads that torch has."""
    with torch.inference_mode():
        side.outputs(frame)
        times = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            side.outputs(frame)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def gained(teacher: Teacher, student: Teacher, frame: Frame) -> dict[str, Any]:
    """Time, parameters and bytes of both."""
    return {
        name: {
            "milliseconds_in_torch": round(milliseconds(side, frame), 2),
            "parameters": side.parameters,
            "bytes": side.size,
        }
        for name, side in (("teacher", teacher), ("student", student))
    }


def _correlation(first: NDArray[Any], second: NDArray[Any]) -> float | None:
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second):
        return None
    return float(np.corrcoef(first, second)[0, 1])


__all__ = ["Loss", "Side", "compared", "gained", "milliseconds", "on_data", "on_painted"]
