"""How good a detector is: image and pixel metrics of the field.

Area under the ROC curve and average precision are scikit-learn's. The per-region overlap (PRO) follows Bergmann
et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

PRO_LIMIT = 0.3
"""False-positive rate up to which the PRO curve is integrated."""

Scores = NDArray[np.floating]
Labels = NDArray[np.bool_]


def auroc(labels: Labels, scores: Scores) -> float | None:
    """Area under the ROC curve; None if only one class is there. `labels` and `scores`: [n]."""
    if labels.all() or not labels.any():
        return None
    return float(roc_auc_score(labels, scores))


def average_precision(labels: Labels, scores: Scores) -> float | None:
    """Area under the precision-recall curve as the step-wise sum; None if only one class is there."""
    if labels.all() or not labels.any():
        return None
    return float(average_precision_score(labels, scores))


def f1_max(labels: Labels, scores: Scores) -> tuple[float, float] | None:
    """Largest F1 over all thresholds and the score at which it is reached; None without positives."""
    if not labels.any():
        return None
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    best = int(f1.argmax())
    return float(f1[best]), float(thresholds[best])


def roc_points(labels: Labels, scores: Scores, most: int = 200) -> list[tuple[float, float]]:
    """Points (false-positive rate, true-positive rate) of the ROC curve, thinned to about `most`."""
    false, true, _ = roc_curve(labels, scores)
    step = max(1, len(false) // most)
    keep = sorted({*range(0, len(false), step), len(false) - 1})
    return [(float(false[place]), float(true[place])) for place in keep]


@dataclass(frozen=True)
class PixelMetrics:
    """Metrics over all pixels of a test set; None where they are not defined.

    Attributes:
        auroc: area under the pixel ROC curve.
        f1_max: largest pixel F1 over all thresholds.
        pro: area under the per-region overlap curve up to `PRO_LIMIT`, divided by it.
    """

    auroc: float | None
    f1_max: float | None
    pro: float | None


class PixelCounter:
    """Adds up pixel metrics image by image, in memory that does not grow with the number of images.

    Scores are counted by the upper 19 bits of their float32 pattern, whose order is that of the scores: no
    range has to be known before, and two scores are told apart if they differ by more than 0.1 % (2 ** -10).
    Closer ones count as ties. One octave of scores takes 24 KiB.
    """

    def __init__(self) -> None:
        self._first = 0
        self._normal = np.zeros(0, np.int64)
        self._defect = np.zeros(0, np.int64)
        self._overlap = np.zeros(0, np.float64)
        self._regions = 0

    def add(self, anomaly_map: NDArray[np.float32], mask: Labels) -> None:
        """Count one image: map float32 [H, W] and mask bool [H, W]. Regions are 8-connected."""
        keys = _ordered_keys(anomaly_map)
        self._reserve(int(keys.min()), int(keys.max()) + 1)
        keys -= self._first
        length = len(self._normal)
        self._normal += np.bincount(keys[~mask], minlength=length)
        if not mask.any():
            return
        count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
        inside, region = keys[mask], labels[mask]
        self._defect += np.bincount(inside, minlength=length)
        share = 1.0 / np.bincount(region, minlength=count).clip(1)
        self._overlap += np.bincount(inside, weights=share[region], minlength=length)
        self._regions += count - 1

    def merge(self, other: PixelCounter) -> None:
        """Count what `other` has counted, too."""
        if not len(other._normal):
            return
        self._reserve(other._first, other._first + len(other._normal))
        start = other._first - self._first
        window = slice(start, start + len(other._normal))
        self._normal[window] += other._normal
        self._defect[window] += other._defect
        self._overlap[window] += other._overlap
        self._regions += other._regions

    def result(self) -> PixelMetrics:
        """The metrics of everything added so far."""
        positives, negatives = int(self._defect.sum()), int(self._normal.sum())
        if not positives or not negatives:
            return PixelMetrics(None, None, None)
        # From the highest score down: what is called anomalous as the threshold falls.
        seen = np.flatnonzero(self._defect + self._normal)[::-1]
        true = np.concatenate([[0], np.cumsum(self._defect[seen])])
        false = np.concatenate([[0], np.cumsum(self._normal[seen])])
        overlap = np.concatenate([[0.0], np.cumsum(self._overlap[seen]) / self._regions])
        recall, fall_out = true / positives, false / negatives
        precision = true[1:] / np.maximum(true[1:] + false[1:], 1)
        f1 = 2 * precision * recall[1:] / np.maximum(precision + recall[1:], 1e-12)
        return PixelMetrics(
            auroc=float(auc(fall_out, recall)),
            f1_max=float(f1.max()),
            pro=_area_until(fall_out, overlap, PRO_LIMIT) / PRO_LIMIT,
        )

    def _reserve(self, low: int, high: int) -> None:
        """Make room for keys from `low` to `high`, exclusive."""
        first, last = self._first, self._first + len(self._normal)
        if not len(self._normal):
            first, last = low, low
        before, behind = max(first - low, 0), max(high - last, 0)
        if before or behind:
            room = (before, behind)
            self._normal = np.pad(self._normal, room)
            self._defect = np.pad(self._defect, room)
            self._overlap = np.pad(self._overlap, room)
        self._first = first - before


def _ordered_keys(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers [H, W] that order scores as they are: IEEE 754 patterns, negative ones reversed."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)  # -0.0 and +0.0 are one score
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(13)).astype(np.int64)


def _area_until(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Area under a curve with rising x from 0 to `limit`; between points it is linear."""
    inside = int(np.searchsorted(x, limit, side="right"))
    ends = y[inside - 1]
    if inside < len(x):
        ends = ends + (y[inside] - ends) * (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
    return float(auc(np.append(x[:inside], limit), np.append(y[:inside], ends)))
