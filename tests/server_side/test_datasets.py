"""The MVTec layout: what belongs together, and what is missing, is told by name."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edgead.runtime.errors import ImageError, InputError
from edgead.server_side import datasets
from edgead.server_side.datasets import Sample, read_mask


def put(path: Path, shape: tuple[int, ...] = (20, 30), value: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full(shape, value, np.uint8))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("test/good/000", "test/crack/000", "test/crack/001", "test/stain/000"):
        put(tmp_path / f"{name}.png")
    for name in ("000", "001"):
        put(tmp_path / f"ground_truth/crack/{name}_mask.png")
    return tmp_path


def test_samples_come_with_their_type_and_mask(root: Path) -> None:
    found = [(s.kind, s.path.name, s.mask.name if s.mask else None) for s in datasets.test_samples(root)]
    assert found == [
        ("crack", "000.png", "000_mask.png"),
        ("crack", "001.png", "001_mask.png"),
        ("good", "000.png", None),
        ("stain", "000.png", None),
    ]


def test_masks_may_carry_the_plain_name_and_another_format(root: Path) -> None:
    put(root / "ground_truth/stain/000.bmp")
    assert [s.mask.name for s in datasets.test_samples(root) if s.kind == "stain" and s.mask] == ["000.bmp"]


def test_a_mask_without_its_image_is_named(root: Path) -> None:
    put(root / "ground_truth/crack/007_mask.png")
    with pytest.raises(InputError, match=r"007_mask\.png"):
        datasets.test_samples(root)


def test_an_image_without_its_mask_is_named_if_others_of_its_type_have_one(root: Path) -> None:
    put(root / "test/crack/002.png")
    with pytest.raises(InputError, match="no mask for 002"):
        datasets.test_samples(root)


@pytest.mark.parametrize("missing", ["no/such/folder", "empty"])
def test_what_is_no_data_set_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty" / "test").mkdir(parents=True)
    with pytest.raises(InputError):
        datasets.test_samples(tmp_path / missing)


def test_a_good_part_has_an_empty_mask(tmp_path: Path) -> None:
    assert not read_mask(Sample(tmp_path / "x.png", "good", None), (4, 5, 3)).any()


@pytest.mark.parametrize("value", [1, 128, 255])
def test_masks_of_0_and_1_and_of_0_and_255_mean_the_same(tmp_path: Path, value: int) -> None:
    mask = np.zeros((8, 9), np.uint8)
    mask[2:4, 3:7] = value
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    found = read_mask(Sample(tmp_path / "x.png", "crack", tmp_path / "m.png"), (8, 9, 3))
    assert np.array_equal(found, mask > 0)


def test_a_black_mask_marks_nothing_and_one_of_another_size_is_refused(tmp_path: Path) -> None:
    black = Sample(tmp_path / "x.png", "crack", put(tmp_path / "m.png", (8, 9), 0))
    assert not read_mask(black, (8, 9, 3)).any()
    with pytest.raises(InputError, match="10 x 8"):
        read_mask(black, (8, 10, 3))


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"m\.png"):
        read_mask(Sample(tmp_path / "x.png", "crack", tmp_path / "m.png"), (8, 9, 3))
