"""The picture of a result: it shows where, and leaves good parts alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from edgead.runtime.inspection import DefectRegion, Inspection, Verdict, not_inspected
from edgead.runtime.overlay import LARGEST, SMALLEST, overlay
from edgead.runtime.regions import find_regions
from edgead.runtime.spec import Preprocessing, Region

SPEC = Preprocessing(64, 64)
RED = np.array([255, 48, 48])


def inspected(shape: tuple[int, int], *, peak: float, threshold: float = 1.0) -> Inspection:
    """An inspection whose map is 0.2 but for a spot of `peak` in its upper right quarter."""
    anomaly_map = np.full((64, 64), 0.2, np.float32)
    anomaly_map[8:16, 44:52] = peak
    regions: tuple[DefectRegion, ...] = ()
    if peak > threshold:
        regions = find_regions(anomaly_map, shape, SPEC, threshold=threshold)
    verdict = Verdict.NG if regions else Verdict.OK
    return Inspection(verdict, peak, 0.5, threshold, anomaly_map, regions, (), "bolt", "0123456789ab")


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 128, np.uint8)


def test_a_good_part_looks_like_its_photograph() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    picture = overlay(frame, inspected((400, 500), peak=0.3), SPEC)
    np.testing.assert_array_equal(picture[:400], frame)
    assert picture.shape[0] > 400
    assert picture.shape[1] == 500


def test_a_defect_is_tinted_and_outlined_where_it_is_and_nowhere_else() -> None:
    frame = grey(640, 640)
    result = inspected((640, 640), peak=2.0)
    picture = overlay(frame, result, SPEC)[:640].astype(int)
    changed = (picture != 128).any(axis=2)
    box = result.regions[0].box
    assert (box.x, box.y, box.width, box.height) == (440, 80, 80, 80)
    near = np.zeros_like(changed)
    near[box.y - 12 : box.y + box.height + 12, box.x - 12 : box.x + box.width + 12] = True
    assert not changed[~near].any()
    centre = picture[120, 480]
    assert centre[0] > centre[1] + 40
    assert (np.abs(picture - RED).sum(axis=2) < 30).any()
    assert (frame == 128).all()


def test_an_ng_frame_whose_map_stays_below_the_threshold_is_still_outlined() -> None:
    result = inspected((640, 640), peak=2.0)
    result = dataclasses.replace(result, map_threshold=5.0)
    picture = overlay(grey(640, 640), result, SPEC)[:640].astype(int)
    assert (np.abs(picture - RED).sum(axis=2) < 30).any()


@pytest.mark.parametrize(
    ("shape", "longer"),
    [((1, 1), SMALLEST), ((3, 40), SMALLEST), ((40, 3), SMALLEST), ((500, 700), 700), ((3000, 4000), LARGEST)],
)
def test_frames_of_any_size_get_a_picture_of_a_useful_size(shape: tuple[int, int], longer: int) -> None:
    picture = overlay(grey(*shape), inspected(shape, peak=2.0), SPEC)
    assert picture.dtype == np.uint8
    strip = 24
    assert longer <= max(picture.shape[0] - strip, picture.shape[1]) <= longer + 64


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_strip_shows_the_verdict_by_its_colour(verdict: Verdict) -> None:
    plain = Inspection(verdict, 1.0, 0.5, 1.0, None, (), (), "bolt", "0123456789ab")
    badge = overlay(grey(400, 400), plain, SPEC)[-2, 1].astype(int)
    strongest = {Verdict.OK: 1, Verdict.NG: 0, Verdict.NOT_INSPECTED: 0}[verdict]
    assert badge.argmax() == strongest
    assert len({tuple(overlay(grey(400, 400), plain, SPEC)[-2, x]) for x in (1, 398)}) == 2


def test_a_frame_without_an_answer_says_why() -> None:
    result = not_inspected("deadline missed", product="bolt", knowledge="0123456789ab", threshold=1.0)
    silent = not_inspected("", product="bolt", knowledge="0123456789ab", threshold=1.0)
    said, unsaid = overlay(grey(400, 800), result, SPEC), overlay(grey(400, 800), silent, SPEC)
    np.testing.assert_array_equal(said[:400], grey(400, 800))
    assert (said != unsaid).any()


def test_the_map_lands_inside_the_region_of_interest_of_a_rotated_frame() -> None:
    spec = Preprocessing(64, 64, rotate=90, roi=Region(100, 50, 200, 300))
    shape = (400, 600)
    anomaly_map = np.full((64, 64), 0.2, np.float32)
    anomaly_map[20:40, 20:40] = 2.0
    regions = find_regions(anomaly_map, shape, spec, threshold=1.0)
    result = Inspection(Verdict.NG, 2.0, 0.9, 1.0, anomaly_map, regions, (), "bolt", "0123456789ab")
    changed = (overlay(grey(*shape), result, spec)[:400] != 128).any(axis=2)
    y, x = np.nonzero(changed)
    box = regions[0].box
    assert abs((x.min() + x.max()) / 2 - (box.x + box.width / 2)) < 3
    assert abs((y.min() + y.max()) / 2 - (box.y + box.height / 2)) < 3
