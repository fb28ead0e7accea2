"""Metrics against hand-made cases and an exact, slow reference written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from edgead.server_side.metrics import PRO_LIMIT, PixelCounter, auroc, average_precision, f1_max


def test_image_metrics_of_a_case_that_a_person_can_count() -> None:
    labels = np.array([False, False, True, True])
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    assert auroc(labels, scores) == pytest.approx(0.75)
    assert average_precision(labels, scores) == pytest.approx(0.5 * (1.0 + 2.0 / 3.0))
    found = f1_max(labels, scores)
    assert found is not None
    assert found == (pytest.approx(0.8), pytest.approx(0.35))


def test_metrics_of_one_class_are_not_defined_rather_than_wrong() -> None:
    ones = np.ones(3, np.bool_)
    assert auroc(ones, np.arange(3.0)) is None
    assert average_precision(~ones, np.arange(3.0)) is None
    assert f1_max(~ones, np.arange(3.0)) is None


def sample() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 48, 48), np.bool_)
    masks[0, 5:15, 5:9] = masks[1, 20:40, 20:44] = masks[1, 2:4, 2:4] = masks[2, 30, 30] = True
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2)) + 0.25 * ndimage.gaussian_filter(
        masks.astype(float), (0, 1, 1)
    )
    return maps.astype(np.float32), masks


def counted() -> PixelCounter:
    maps, masks = sample()
    counter = PixelCounter()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        counter.add(anomaly_map, mask)
    return counter


def test_pixel_auroc_is_that_of_exact_sorting() -> None:
    maps, masks = sample()
    found = counted().result().auroc
    assert found == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4)


def test_pro_is_the_mean_overlap_of_regions_over_the_false_positive_rate() -> None:
    maps, masks = sample()
    regions = []
    for mask, anomaly_map in zip(masks, maps, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [anomaly_map[labels == label] for label in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        rates.append(float((maps[~masks] >= threshold).mean()))
        overlaps.append(float(np.mean([(region >= threshold).mean() for region in regions])))
        if rates[-1] > PRO_LIMIT:
            break
    fine = np.linspace(0, PRO_LIMIT, 200_001)
    exact = np.trapezoid(np.interp(fine, rates, overlaps), fine) / PRO_LIMIT
    assert counted().result().pro == pytest.approx(exact, abs=2e-3)


def test_a_perfect_map_scores_one_and_an_inverted_one_near_zero() -> None:
    _, masks = sample()
    for sign, wanted in ((1.0, 1.0), (-1.0, 0.0)):
        counter = PixelCounter()
        for mask in masks:
            counter.add((sign * mask).astype(np.float32), mask)
        result = counter.result()
        assert result.auroc == pytest.approx(wanted)
        assert result.pro == pytest.approx(wanted, abs=1e-6)


def test_without_defect_pixels_there_are_no_pixel_metrics() -> None:
    counter = PixelCounter()
    counter.add(np.zeros((4, 4), np.float32), np.zeros((4, 4), np.bool_))
    assert counter.result().auroc is None
