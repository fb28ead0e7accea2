"""The part is found where it lies on a background; a texture, a tile and noise are the part altogether."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edgead.server_side.painting import paint_part
from edgead.server_side.part_finder import find_part


def disc_of(surface: np.ndarray) -> np.ndarray:
    """The flange [S, S] with its holes; its surface ends 2 % of the side before its outline."""
    outlines, _ = cv2.findContours(surface.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(surface.shape, np.uint8)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    return cv2.distanceTransform(1 - filled, cv2.DIST_L2, 5) <= 0.02 * len(surface) + 1.0


def plate(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An angle of sheet metal on a board of nearly its own grey, brighter to the right; and where it is."""
    rng = np.random.default_rng(seed)
    height, width = shape
    board = np.linspace(120, 170, width)[None, :, None] + rng.normal(0, 1.5, (height, width, 3))
    metal = 150 + rng.normal(0, 4.0, (height, width, 3))
    angle = np.zeros(shape, np.uint8)
    corners = np.array([[0.2, 0.2], [0.8, 0.25], [0.8, 0.6], [0.62, 0.78], [0.2, 0.75]]) * [width, height]
    cv2.fillPoly(angle, [corners.astype(np.int32)], 1)
    rim = cv2.dilate(angle, np.ones((5, 5), np.uint8)) - angle
    picture = np.where(angle[..., None] > 0, metal, np.where(rim[..., None] > 0, 60, board))
    return cv2.GaussianBlur(picture.clip(0, 255).astype(np.uint8), (0, 0), 0.8), angle > 0


@pytest.mark.parametrize("size", [160, 320, 500])
def test_a_flange_is_found_with_its_holes_and_without_its_shadow(size: int) -> None:
    for seed in range(4):
        part = paint_part("flange", rng=np.random.default_rng(seed), size=size)
        found = find_part(part.image)
        disc = disc_of(part.surface)
        assert not (found & ~disc).any()
        assert (found & disc).sum() > 0.93 * disc.sum()
        assert found[size // 2, size // 2]


@pytest.mark.parametrize("shape", [(240, 360), (300, 180), (1200, 900)])
def test_a_part_of_the_boards_own_grey_is_found_by_its_outline(shape: tuple[int, int]) -> None:
    picture, angle = plate(shape)
    found = find_part(picture)
    near = cv2.dilate(angle.astype(np.uint8), np.ones((2 * (max(shape) // 80) + 1,) * 2, np.uint8)) > 0
    assert not (found & ~near).any()
    assert (found & angle).sum() > 0.9 * angle.sum()


@pytest.mark.parametrize("size", [64, 160, 320])
def test_a_fabric_is_all_part(size: int) -> None:
    for seed in range(3):
        assert find_part(paint_part("fabric", rng=np.random.default_rng(seed), size=size).image).all()


@pytest.mark.parametrize("cell", [1, 4, 16, 60])
def test_in_noise_of_any_scale_no_part_is_found(cell: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (240 // cell + 2, 320 // cell + 2, 3), dtype=np.uint8)
        assert find_part(cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (5, 5), (40, 2000), (64, 64)])
def test_a_picture_without_anything_is_all_part_whatever_its_shape(shape: tuple[int, int]) -> None:
    found = find_part(np.full((*shape, 3), 90, np.uint8))
    assert found.dtype == np.bool_
    assert found.shape == shape
    assert found.all()


def test_a_close_up_and_a_speck_are_no_parts() -> None:
    part = paint_part("flange", rng=np.random.default_rng(1), size=320)
    assert find_part(part.image[60:260, 60:260].copy()).all()
    speck = np.full((200, 200, 3), 120, np.uint8)
    cv2.circle(speck, (100, 100), 14, (20, 20, 20), cv2.FILLED)
    assert find_part(speck).all()


def test_the_same_photograph_has_the_same_part_and_stays_as_it_is() -> None:
    picture, _ = plate((300, 400))
    before = picture.copy()
    assert np.array_equal(find_part(picture), find_part(picture))
    assert np.array_equal(picture, before)
    assert np.array_equal(find_part(picture), find_part(np.ascontiguousarray(picture[:, ::-1])[:, ::-1]))
