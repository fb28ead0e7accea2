"""Regions: where on an NG frame, in pixels of the photograph."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from edgead.runtime.regions import LIMIT, find_regions, outline
from edgead.runtime.spec import Preprocessing, Region

SPEC = Preprocessing(64, 64)


def blank() -> np.ndarray:
    return np.zeros((64, 64), np.float32)


def test_each_connected_area_is_a_region_and_the_strongest_comes_first() -> None:
    values = blank()
    values[5:10, 5:15] = 2.0
    values[40:44, 50:54] = 3.0
    values[42, 51] = 9.0
    first, second = outline(values, threshold=1.0)
    assert (first.box, first.area, first.peak, first.point) == (Region(50, 40, 4, 4), 16, 9.0, (51, 42))
    assert (second.box, second.area, second.peak) == (Region(5, 5, 10, 5), 50, 2.0)


def test_areas_that_touch_at_a_corner_are_one() -> None:
    values = blank()
    values[10:13, 10:13] = 2.0
    values[13:16, 13:16] = 2.0
    assert len(outline(values, threshold=1.0)) == 1


def test_a_pixel_at_the_threshold_is_outside() -> None:
    values = blank()
    values[10:20, 10:20] = 1.0
    values[12:16, 12:16] = 2.0
    assert outline(values, threshold=1.0)[0].box == Region(12, 12, 4, 4)


@pytest.mark.parametrize("threshold", [None, 100.0])
def test_a_map_below_the_threshold_is_outlined_around_its_peak(threshold: float | None) -> None:
    values = cv2.GaussianBlur(np.pad(np.full((2, 2), 50, np.float32), ((20, 42), (30, 32))), (0, 0), 4)
    (region,) = outline(values, threshold=threshold)
    assert region.point in {(30, 20), (31, 20), (30, 21), (31, 21)}
    assert 4 < region.box.width < 20
    assert 4 < region.box.height < 20


@pytest.mark.parametrize("value", [0.0, -3.0, 0.1, 1e30])
def test_a_flat_map_has_one_region_of_its_whole_size(value: float) -> None:
    (region,) = outline(np.full((64, 64), value, np.float32), threshold=None)
    assert region.box == Region(0, 0, 64, 64)


def test_specks_are_left_out_but_never_all_of_them() -> None:
    values = blank()
    values[3, 3] = 5.0
    values[20:23, 20:23] = 2.0
    assert [item.peak for item in outline(values, threshold=1.0)] == [2.0]
    values[20:23, 20:23] = 0.0
    assert [item.point for item in outline(values, threshold=1.0)] == [(3, 3)]


def test_of_many_areas_the_strongest_are_kept() -> None:
    values = blank()
    for place in range(36):
        row, column = divmod(place, 6)
        values[10 * row : 10 * row + 3, 10 * column : 10 * column + 3] = 2 + place
    found = outline(values, threshold=1.0)
    assert [item.peak for item in found] == [float(value) for value in range(37, 37 - LIMIT, -1)]


def test_boxes_areas_and_points_are_in_pixels_of_the_photograph() -> None:
    values = blank()
    values[16:24, 32:40] = 2.0
    (region,) = find_regions(values, (512, 1280, 3), SPEC, threshold=1.0)
    assert region.box == Region(640, 128, 160, 64)
    assert region.area == 160 * 64
    x, y = region.point
    assert 640 <= x < 800
    assert 128 <= y < 192


def test_a_region_is_in_the_photograph_even_if_it_was_rotated_and_cropped() -> None:
    spec = Preprocessing(64, 64, rotate=90, roi=Region(100, 50, 128, 256))
    values = blank()
    values[0:16, 0:32] = 2.0  # in the rotated frame: x 100..164, y 50..114
    (region,) = find_regions(values, (400, 600), spec, threshold=1.0)
    # Clockwise by 90 degrees, the source's (x, y) went to (H - 1 - y, x).
    assert region.box == Region(50, 400 - 100 - 64, 64, 64)
    assert region.area == 64 * 64


def test_the_map_is_not_changed() -> None:
    values = cv2.GaussianBlur(np.random.default_rng(0).random((64, 64), np.float32), (0, 0), 3)
    before = values.copy()
    values.flags.writeable = False
    find_regions(values, (64, 64), SPEC, threshold=0.5)
    np.testing.assert_array_equal(values, before)


def test_outlines_agree_with_a_plain_flood_fill() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        values = cv2.GaussianBlur(rng.random((40, 56), np.float32), (0, 0), 2)
        level = float(np.quantile(values, 0.8))
        found = outline(values, threshold=level, limit=1000, min_area=1)
        expected = flood(values, level)
        assert sorted((item.area, item.peak) for item in found) == sorted(expected)


def flood(values: np.ndarray, level: float) -> list[tuple[int, float]]:
    left = {(int(y), int(x)) for y, x in np.argwhere(values > level)}
    areas = []
    while left:
        stack, member = [left.pop()], []
        while stack:
            y, x = stack.pop()
            member.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        areas.append((len(member), float(max(values[place] for place in member))))
    return areas


def test_a_usual_map_takes_well_under_a_frame() -> None:
    values = cv2.GaussianBlur(np.random.default_rng(0).random((256, 256), np.float32), (0, 0), 8)
    values[100:130, 60:100] += 0.5
    times = []
    for _ in range(20):
        start = time.perf_counter()
        find_regions(values, (1024, 1280), Preprocessing(256, 256), threshold=0.7)
        times.append(time.perf_counter() - start)
    # Under 1 ms on an idle machine; the best of many, with room for a slow and busy one.
    assert min(times) < 0.005
