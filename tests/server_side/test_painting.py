"""Painted parts and defects: the same seed gives the same picture, and a mask tells the truth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edgead.runtime.errors import ImageError, InputError
from edgead.server_side.painting import DEFECTS, MATERIALS, ON_TOP, paint_defect, paint_part

SIZE = 160


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("material", MATERIALS)
def test_the_same_seed_paints_the_same_part(material: str) -> None:
    first, second = (paint_part(material, rng=rng(4), size=SIZE) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert first.image.shape == (SIZE, SIZE, 3)
    assert first.image.dtype == np.uint8


@pytest.mark.parametrize("material", MATERIALS)
def test_another_seed_paints_another_part_of_the_same_kind(material: str) -> None:
    first, second = (paint_part(material, rng=rng(seed), size=SIZE).image.astype(int) for seed in (1, 2))
    assert np.abs(first - second).mean() > 2
    assert np.abs(first.mean((0, 1)) - second.mean((0, 1))).max() < 20


@pytest.mark.parametrize("material", MATERIALS)
def test_the_new_pattern_changes_the_part_where_it_says_and_hardly_elsewhere(material: str) -> None:
    plain = paint_part(material, rng=rng(7), size=SIZE)
    new = paint_part(material, rng=rng(7), size=SIZE, new_pattern=True)
    assert not plain.pattern.any()
    assert 0.003 < new.pattern.mean() < 0.25
    change = np.abs(new.image.astype(int) - plain.image).max(2)
    assert change[new.pattern].mean() > 4 * change[~new.pattern].mean()


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("material", MATERIALS)
def test_no_pixel_changes_outside_the_mask_and_most_change_inside(material: str, kind: str) -> None:
    part = paint_part(material, rng=rng(1), size=SIZE)
    image, mask = paint_defect(part.image, kind, size=0.25, contrast=0.8, rng=rng(2), within=part.surface)
    changed = (image != part.image).any(2)
    assert set(np.unique(mask)) == {0, 255}
    assert not changed[mask == 0].any()
    assert changed[mask == 255].mean() > 0.8
    assert 0.0005 < (mask > 0).mean() < 0.25
    if kind not in ON_TOP:
        assert not (mask[~part.surface] > 0).any()


@pytest.mark.parametrize("kind", DEFECTS)
def test_more_contrast_is_more_change_and_the_same_shape(kind: str) -> None:
    part = paint_part("flange", rng=rng(1), size=SIZE)
    change = []
    masks = []
    for contrast in (0.15, 0.5, 1.0):
        image, mask = paint_defect(part.image, kind, size=0.2, place=(0.75, 0.6), contrast=contrast, rng=rng(5))
        change.append(np.abs(image.astype(int) - part.image)[mask > 0].mean())
        masks.append(mask)
    assert change[0] > 0.5
    assert change[0] * 1.5 < change[1] < change[2]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[1], masks[2])


@pytest.mark.parametrize("kind", DEFECTS)
def test_size_and_place_are_obeyed_on_a_picture_of_any_shape(kind: str) -> None:
    grey = np.full((200, 360, 3), 120, np.uint8)
    for size in (0.1, 0.4):
        _, mask = paint_defect(grey, kind, size=size, place=(0.3, 0.6), rng=rng(3))
        rows, columns = np.nonzero(mask)
        extent = np.hypot(np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert 0.6 * size * 200 < extent < 2.2 * size * 200 + 12
        assert abs((rows.min() + rows.max()) / 2 - 0.6 * 199) < 0.35 * size * 200 + 5
        assert abs((columns.min() + columns.max()) / 2 - 0.3 * 359) < 0.35 * size * 200 + 5


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_colour_pulls_the_defect_towards_it(kind: str) -> None:
    grey = np.full((160, 160, 3), 120, np.uint8)
    image, mask = paint_defect(grey, kind, size=0.3, place=(0.5, 0.5), colour=(230, 20, 20), contrast=1.0, rng=rng(3))
    red, green, _ = image[mask > 0].astype(float).mean(0)
    assert red > green + 10


def test_the_source_picture_is_left_alone() -> None:
    part = paint_part("fabric", rng=rng(1), size=SIZE)
    before = part.image.copy()
    paint_defect(part.image, "stain", rng=rng(2))
    assert np.array_equal(part.image, before)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sctratch"},
        {"size": 0.0},
        {"size": float("nan")},
        {"contrast": 1.5},
        {"place": (0.5, 1.5)},
        {"colour": (0, 0, 300)},
        {"within": np.zeros((160, 160), np.bool_)},
        {"within": np.ones((10, 10), np.bool_)},
    ],
)
def test_values_outside_their_range_are_refused(change: dict[str, object]) -> None:
    grey = np.full((160, 160, 3), 120, np.uint8)
    arguments: dict[str, object] = {"kind": "dent", "rng": rng(0)} | change
    with pytest.raises(InputError):
        paint_defect(grey, **arguments)  # type: ignore[arg-type]


def test_a_place_off_the_part_is_refused() -> None:
    part = paint_part("flange", rng=rng(1), size=SIZE)
    with pytest.raises(InputError, match="allowed"):
        paint_defect(part.image, "hole", size=0.05, place=(0.01, 0.01), rng=rng(0), within=part.surface)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ImageError):
        paint_defect(np.zeros((160, 160), np.uint8), "dent", rng=rng(0))
    with pytest.raises(InputError, match="flange"):
        paint_part("marble", rng=rng(0))
    with pytest.raises(InputError, match="pixels"):
        paint_part("flange", rng=rng(0), size=8)


def test_a_missing_part_breaks_off_at_the_edge_and_shows_what_lies_around() -> None:
    plate = np.full((160, 160, 3), 30, np.uint8)
    within = np.zeros((160, 160), np.bool_)
    within[40:120, 40:120] = True
    plate[within] = 180
    for seed in range(8):
        image, mask = paint_defect(plate, "missing part", size=0.2, contrast=1.0, rng=rng(seed), within=within)
        rows, columns = np.nonzero(mask)
        assert {40, 119} & {int(at) for at in (rows.min(), rows.max(), columns.min(), columns.max())}
        assert np.median(image[mask > 0]) < 60


def test_a_missing_part_of_a_part_that_fills_the_picture_is_dark() -> None:
    grey = np.full((160, 160, 3), 150, np.uint8)
    image, mask = paint_defect(grey, "missing part", size=0.3, place=(0.5, 0.5), contrast=1.0, rng=rng(1))
    assert np.median(image[mask > 0]) < 60


def test_discolouration_is_soft_and_keeps_the_texture() -> None:
    grain = np.clip(rng(0).normal(120, 12, (160, 160, 1)), 0, 255).astype(np.uint8)
    plate = np.repeat(grain, 3, axis=2)
    image, mask = paint_defect(plate, "discolouration", size=0.5, place=(0.5, 0.5), contrast=0.8, rng=rng(2))
    inside = mask > 0
    assert np.corrcoef(image.mean(2)[inside], plate.mean(2)[inside])[0, 1] > 0.3
    change = np.abs(image.astype(float) - plate).mean(2)
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    rim, heart = inside & (depth < 3), depth > 0.6 * depth.max()
    assert change[rim].mean() < 0.35 * change[heart].mean()
