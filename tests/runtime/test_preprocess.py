"""The way from a frame to the engine and back: nothing is lost, nothing is misplaced."""

from __future__ import annotations

import itertools
import time
from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError
from edgead.runtime.preprocess import (
    map_to_frame,
    merge_maps,
    prepare,
    stack,
    tile_boxes,
    tile_count,
    to_frame,
)
from edgead.runtime.spec import Preprocessing, Region, Tiling

Frame = NDArray[np.uint8]
Case = tuple[tuple[int, int], Preprocessing]


@st.composite
def cases(draw: st.DrawFn, largest: int = 120) -> Case:
    """A frame's height and width, and a preprocessing that fits it."""
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    turns: list[Literal[0, 90, 180, 270]] = [0, 90, 180, 270]
    rotate = draw(st.sampled_from(turns))
    turned_height, turned_width = (width, height) if rotate in (90, 270) else (height, width)
    roi = None
    if draw(st.booleans()):
        x, y = draw(st.integers(0, turned_width - 1)), draw(st.integers(0, turned_height - 1))
        roi = Region(x, y, draw(st.integers(1, turned_width - x)), draw(st.integers(1, turned_height - y)))
    tiles = None
    if draw(st.booleans()):
        tiles = Tiling(draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.floats(0, 0.5)))
    engine = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return (height, width), Preprocessing(*engine, rotate=rotate, roi=roi, tiles=tiles)


def noise(height: int, width: int) -> Frame:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def region_of_interest(shape: tuple[int, int], spec: Preprocessing) -> Region:
    height, width = (shape[1], shape[0]) if spec.rotate in (90, 270) else shape
    return spec.roi or Region(0, 0, width, height)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_tiles_are_equal_and_cover_exactly_the_region_of_interest(case: Case) -> None:
    shape, spec = case
    boxes = tile_boxes(shape, spec)
    assert len(boxes) == tile_count(spec)
    assert len({(box.width, box.height) for box in boxes}) == 1
    roi = region_of_interest(shape, spec)
    seen = np.zeros((roi.height, roi.width), int)
    for box in boxes:
        assert box.x >= roi.x
        assert box.y >= roi.y
        assert box.x + box.width <= roi.x + roi.width
        assert box.y + box.height <= roi.y + roi.height
        seen[box.y - roi.y : box.y - roi.y + box.height, box.x - roi.x : box.x - roi.x + box.width] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5])
def test_neighbouring_tiles_share_what_was_asked_for(overlap: float) -> None:
    boxes = tile_boxes((1000, 3000), Preprocessing(64, 64, tiles=Tiling(5, 1, overlap)))
    for left, right in itertools.pairwise(boxes):
        assert left.x + left.width - right.x == pytest.approx(overlap * left.width, abs=2.5)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 30), st.integers(1, 30))
def test_the_merged_map_of_constant_tiles_is_constant(case: Case, height: int, width: int) -> None:
    shape, spec = case
    merged = merge_maps(np.full((tile_count(spec), height, width), 0.3, np.float32), shape, spec)
    assert merged.dtype == np.float32
    assert merged.min() == merged.max() == np.float32(0.3)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_no_peak_is_lost_when_tiles_are_merged(case: Case, data: st.DataObject) -> None:
    shape, spec = case
    maps = np.zeros((tile_count(spec), 7, 9), np.float32)
    tile = data.draw(st.integers(0, len(maps) - 1))
    maps[tile, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 8))] = 1.0
    merged = merge_maps(maps, shape, spec)
    assert merged.max() == 1.0
    assert np.count_nonzero(merged) == 1


def test_merged_tiles_of_a_picture_are_the_picture_again() -> None:
    frame = noise(90, 210)
    spec = Preprocessing(70, 45, tiles=Tiling(4, 3, 0.25))
    boxes = tile_boxes(frame.shape, spec)
    maps = np.stack([frame[b.y : b.y + b.height, b.x : b.x + b.width, 0] for b in boxes]).astype(np.float32)
    np.testing.assert_array_equal(merge_maps(maps, frame.shape, spec), frame[..., 0])


@settings(max_examples=200, deadline=None)
@given(cases(largest=60))
def test_prepare_is_rotate_then_crop_then_resize_as_written_down(case: Case) -> None:
    shape, spec = case
    frame = noise(*shape)
    before = frame.copy()
    out = prepare(frame, spec)
    turned = np.rot90(frame, -spec.rotate // 90)
    expected = []
    for box in tile_boxes(shape, spec):
        part = np.ascontiguousarray(turned[box.y : box.y + box.height, box.x : box.x + box.width])
        shrinks = box.width >= spec.width and box.height >= spec.height
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        expected.append(cv2.resize(part, (spec.width, spec.height), interpolation=how))
    np.testing.assert_array_equal(out, np.stack(expected))
    np.testing.assert_array_equal(frame, before)
    assert out.flags.c_contiguous
    assert not np.shares_memory(out, frame)


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_a_box_on_the_map_comes_back_to_the_pixels_it_came_from(case: Case, data: st.DataObject) -> None:
    shape, spec = case
    roi = region_of_interest(shape, spec)
    x, y = data.draw(st.integers(0, roi.width - 1)), data.draw(st.integers(0, roi.height - 1))
    box = Region(x, y, data.draw(st.integers(1, roi.width - x)), data.draw(st.integers(1, roi.height - y)))
    # Marked in the source, turned and cropped as `prepare` does it, the mark must lie where the box is.
    back = to_frame(box, (roi.height, roi.width), shape, spec)
    mark = np.zeros(shape, np.uint8)
    mark[back.y : back.y + back.height, back.x : back.x + back.width] = 1
    turned = np.rot90(mark, -spec.rotate // 90)
    expected = np.zeros((roi.height, roi.width), np.uint8)
    expected[y : y + box.height, x : x + box.width] = 1
    np.testing.assert_array_equal(turned[roi.y : roi.y + roi.height, roi.x : roi.x + roi.width], expected)
    assert mark.sum() == box.width * box.height


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_box_of_any_map_lies_inside_the_frame(case: Case, height: int, width: int, data: st.DataObject) -> None:
    shape, spec = case
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = Region(x, y, data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y)))
    back = to_frame(box, (height, width), shape, spec)
    assert back.x >= 0
    assert back.y >= 0
    assert back.width >= 1
    assert back.height >= 1
    assert back.x + back.width <= shape[1]
    assert back.y + back.height <= shape[0]
    roi = region_of_interest(shape, spec)
    turned = to_frame(Region(0, 0, width, height), (height, width), shape, spec)
    assert turned.width * turned.height == roi.width * roi.height


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_a_bright_spot_comes_back_to_its_place_in_the_frame(rotate: int) -> None:
    frame = np.zeros((120, 200, 3), np.uint8)
    frame[30:36, 150:156] = 255
    roi = Region(20, 20, 90, 170) if rotate in (90, 270) else Region(20, 20, 170, 90)
    spec = Preprocessing(64, 64, rotate=rotate, roi=roi)  # type: ignore[arg-type]
    seen = prepare(frame, spec)[0, :, :, 0].astype(np.float32)
    full = map_to_frame(seen, frame.shape, spec)
    assert full.shape == (120, 200)
    y, x = np.unravel_index(int(full.argmax()), full.shape)
    assert abs(y - 32.5) <= 3
    assert abs(x - 152.5) <= 3


def test_outside_the_region_of_interest_the_map_is_at_its_least() -> None:
    spec = Preprocessing(8, 8, roi=Region(10, 20, 30, 40))
    full = map_to_frame(np.array([[2.0, 3.0], [4.0, 5.0]], np.float32), (80, 90, 3), spec)
    outside = np.ones(full.shape, bool)
    outside[20:60, 10:40] = False
    assert set(np.unique(full[outside])) == {2.0}
    assert full.max() == 5.0


def test_frames_with_any_memory_order_are_taken() -> None:
    frame = noise(50, 40)
    spec = Preprocessing(16, 16, rotate=90)
    expected = prepare(frame, spec)
    for other in (np.asfortranarray(frame), frame[::-1][::-1], np.repeat(frame, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(prepare(other, spec), expected)
    flipped = prepare(frame[..., ::-1], spec)
    np.testing.assert_array_equal(flipped, expected[..., ::-1])


def test_a_read_only_frame_is_taken() -> None:
    frame = noise(50, 40)
    frame.flags.writeable = False
    assert prepare(frame, Preprocessing(16, 16)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 1), np.uint8),
        np.zeros((10, 10, 3), np.float32),
        np.zeros((10, 10, 3), np.uint16),
        np.zeros((2, 10, 10, 3), np.uint8),
        np.zeros((0, 10, 3), np.uint8),
        np.zeros((10, 0, 3), np.uint8),
        None,
        [[1, 2, 3]],
    ],
    ids=lambda value: f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else str(value),
)
def test_what_is_no_frame_is_an_image_error(frame: object) -> None:
    with pytest.raises(ImageError) as caught:
        prepare(frame, Preprocessing(8, 8))  # type: ignore[arg-type]
    assert caught.value.next_step


@pytest.mark.parametrize("rotate", [0, 90])
def test_a_region_of_interest_outside_the_frame_is_an_image_error(rotate: int) -> None:
    wide = Preprocessing(8, 8, rotate=rotate, roi=Region(0, 0, 60, 40))  # type: ignore[arg-type]
    fits, short = ((40, 60), (60, 40)) if rotate == 0 else ((60, 40), (40, 60))
    assert prepare(noise(*fits), wide).shape == (1, 8, 8, 3)
    with pytest.raises(ImageError, match="after rotation"):
        prepare(noise(*short), wide)


def test_prepared_frames_make_one_batch() -> None:
    spec = Preprocessing(8, 8, tiles=Tiling(2, 1))
    assert stack([prepare(noise(20, 20), spec), prepare(noise(30, 30), spec)]).shape == (4, 8, 8, 3)


def test_a_camera_frame_is_prepared_in_a_few_milliseconds() -> None:
    frame, spec = noise(1024, 1280), Preprocessing(256, 256)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        prepare(frame, spec)
        times.append(time.perf_counter() - start)
    # About 1 ms where nothing else runs; the bound leaves room for busy machines, not for a second copy.
    assert min(times) < 0.02
