"""How good a detector is: image and pixel metrics of the field.

Area under the ROC curve and average precision are scikit-learn's. The per-region overlap (PRO) follows Bergmann
et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

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

    Scores are sorted into `bins` equal steps between `low` and `high`. With 10,000 bins the area under a
    curve moves by less than 1e-4 against exact sorting, unless the scores of a test set crowd into a few bins.

    Args:
        low: smallest score that will come.
        high: largest score that will come.
        bins: number of steps.
    """

    def __init__(self, low: float, high: float, bins: int = 10_000) -> None:
        self.low, self.bins = low, bins
        self.scale = (bins - 1) / max(high - low, 1e-12)
        self.normal = np.zeros(bins, np.int64)
        self.defect = np.zeros(bins, np.int64)
        self.overlap = np.zeros(bins, np.float64)
        self.regions = 0

    def add(self, anomaly_map: NDArray[np.float32], mask: Labels) -> None:
        """Count one image: map float32 [H, W] and mask bool [H, W]."""
        index = ((anomaly_map - self.low) * self.scale).astype(np.int64).clip(0, self.bins - 1)
        self.normal += np.bincount(index[~mask], minlength=self.bins)
        if not mask.any():
            return
        self.defect += np.bincount(index[mask], minlength=self.bins)
        count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
        for label in range(1, count):
            inside = index[labels == label]
            self.overlap += np.bincount(inside, minlength=self.bins) / len(inside)
            self.regions += 1

    def result(self) -> PixelMetrics:
        """The metrics of everything added so far."""
        positives, negatives = int(self.defect.sum()), int(self.normal.sum())
        if not positives or not negatives:
            return PixelMetrics(None, None, None)
        # From the highest score down: what is called anomalous as the threshold falls.
        true = np.concatenate([[0], np.cumsum(self.defect[::-1])])
        false = np.concatenate([[0], np.cumsum(self.normal[::-1])])
        overlap = np.concatenate([[0.0], np.cumsum(self.overlap[::-1]) / self.regions])
        recall, fall_out = true / positives, false / negatives
        precision = true[1:] / np.maximum(true[1:] + false[1:], 1)
        f1 = 2 * precision * recall[1:] / np.maximum(precision + recall[1:], 1e-12)
        return PixelMetrics(
            auroc=float(np.trapezoid(recall, fall_out)),
            f1_max=float(f1.max()),
            pro=_area_until(fall_out, overlap, PRO_LIMIT) / PRO_LIMIT,
        )


def _area_until(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Area under a curve with rising x from 0 to `limit`; between points it is linear."""
    inside = x < limit
    ends = float(np.interp(limit, x, y))
    return float(np.trapezoid(np.append(y[inside], ends), np.append(x[inside], limit)))
