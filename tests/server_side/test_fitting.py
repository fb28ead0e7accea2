"""Fitting on painted parts: what is held out stays out, and known defects are taught as such."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from edgead.detector_file import read_detector
from edgead.runtime.errors import ImageError, InputError, OutputExistsError
from edgead.runtime.image import encode_png, list_images, prepare, read_image
from edgead.runtime.spec import Preprocessing, Region, Tiling
from edgead.server_side.fitting import HOLD_OUT_FROM, FitOptions, Learned, fit_memory_bank, learn_memory_bank
from edgead.server_side.painting import paint_defect, paint_part

SMALL = FitOptions(backbone="random", preprocessing=Preprocessing(64, 64), rows=100)


def with_options(**changes: object) -> FitOptions:
    return FitOptions(**{**vars(SMALL), **changes})


def patches_of(detector: Learned, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    frame = prepare(read_image(path), detector.spec.preprocessing)
    with torch.inference_mode():
        patches = detector.trunk(torch.from_numpy(frame))
    return np.asarray(patches.numpy().reshape(-1, patches.shape[-1]))


@pytest.fixture(scope="module")
def learned(painted_normals: Path) -> Learned:
    return learn_memory_bank(painted_normals, SMALL)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`HOLD_OUT_FROM` painted parts."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(1)
    for index in range(HOLD_OUT_FROM):
        (folder / f"{index:02d}.png").write_bytes(encode_png(paint_part("flange", rng=rng, size=64).image))
    return folder


@pytest.fixture(scope="module")
def defects(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Two parts with a painted stain, and the masks of them."""
    folder = tmp_path_factory.mktemp("defects")
    found = []
    for index, path in enumerate(list_images(painted_normals)[:2]):
        image, mask = paint_defect(
            read_image(path),
            "stain",
            size=0.3,
            place=(0.5, 0.3),
            contrast=1.0,
            colour=(200, 30, 30),
            rng=np.random.default_rng(index),
        )
        picture, marks = folder / f"{index}.png", folder / f"{index}_mask.png"
        picture.write_bytes(encode_png(image))
        cv2.imwrite(str(marks), mask)
        found.append((picture, marks))
    return found


def test_the_same_photographs_and_seed_give_the_same_file(
    small_detector: Path, learned: Learned, painted_normals: Path
) -> None:
    written = read_detector(small_detector)
    assert written.pack.digest == learned.pack.digest
    assert np.array_equal(written.golden, learned.golden)
    assert written.card == learned.card
    other = learn_memory_bank(painted_normals, with_options(seed=1))
    assert other.pack.digest != learned.pack.digest


def test_every_row_of_the_bank_is_a_patch_of_a_photograph(learned: Learned, painted_normals: Path) -> None:
    known = {row.tobytes() for path in list_images(painted_normals) for row in patches_of(learned, path)}
    bank = learned.pack.arrays["bank.normal"]
    assert len(bank) == 100
    assert all(row.tobytes() in known for row in bank)


def test_with_enough_images_the_bank_holds_nothing_of_those_it_is_calibrated_on(many: Path) -> None:
    detector = learn_memory_bank(many, with_options(rows=10**6))
    bank = {row.tobytes() for row in detector.pack.arrays["bank.normal"]}
    held = [path for path in list_images(many) if patches_of(detector, path)[0].tobytes() not in bank]
    assert len(held) == detector.pack.calibration.held_out == detector.card["images"]["held_out"] == 5
    for path in held:
        assert not bank & {row.tobytes() for row in patches_of(detector, path)}


def test_with_few_images_each_is_scored_without_its_own_rows(painted_normals: Path) -> None:
    calibration = learn_memory_bank(painted_normals, with_options(rows=10**6)).pack.calibration
    assert calibration.held_out == 12
    # Every patch is in the bank: scored with its own rows, each image would be at a distance of 0.
    assert calibration.typical > 0
    assert calibration.threshold > calibration.typical


def test_a_bad_part_among_the_good_ones_is_named(
    painted_normals: Path, defects: list[tuple[Path, Path]], learned: Learned
) -> None:
    spoilt = learn_memory_bank([*list_images(painted_normals)[2:], defects[1][0]], SMALL)
    first = spoilt.card["most_unusual"][0]
    assert first["image"] == defects[1][0].name
    assert spoilt.card["most_unusual"][1]["score"] < first["score"] <= spoilt.pack.calibration.threshold
    assert spoilt.pack.calibration.threshold > learned.pack.calibration.threshold


def test_golden_frames_are_normals_and_the_same_with_a_defect(learned: Learned) -> None:
    golden = learned.golden.astype(int)
    assert len(golden) == 8
    for normal, painted in zip(golden[::2], golden[1::2], strict=True):
        changed = np.abs(normal - painted).max(2) > 8
        assert 0.0005 < changed.mean() < 0.5


def test_a_region_of_interest_and_tiles_are_what_is_learnt(painted_normals: Path) -> None:
    spec = Preprocessing(64, 64, roi=Region(8, 8, 80, 80), tiles=Tiling(2, 2, 0.1))
    detector = learn_memory_bank(painted_normals, with_options(preprocessing=spec))
    assert detector.spec.preprocessing == spec
    bank = {row.tobytes() for row in detector.pack.arrays["bank.normal"]}
    known = {row.tobytes() for path in list_images(painted_normals) for row in patches_of(detector, path)}
    assert bank <= known


def test_masked_defects_become_rows_of_the_anomalous_bank_and_no_normal_patch_does(
    painted_normals: Path, defects: list[tuple[Path, Path]]
) -> None:
    detector = learn_memory_bank(painted_normals, SMALL, anomalous=defects)
    rows = detector.pack.arrays["bank.anomalous"]
    patches = len(patches_of(detector, defects[0][0]))
    assert 0 < len(rows) < 2 * patches * 0.4
    normal = detector.pack.arrays["bank.normal"]
    nearest = np.linalg.norm(rows[:, None] - normal[None], axis=2).min(1)
    assert np.median(nearest) > detector.pack.calibration.typical / 2


def test_of_a_picture_without_a_mask_only_what_is_unlike_normals_is_learnt_as_defect(
    painted_normals: Path, learned: Learned, defects: list[tuple[Path, Path]]
) -> None:
    pictures: list[tuple[Path, Path | None]] = [(picture, None) for picture, _ in defects]
    taught = learn_memory_bank(painted_normals, SMALL, anomalous=pictures)
    rows = taught.pack.arrays["bank.anomalous"]
    assert 2 <= len(rows) < 2 * len(patches_of(taught, pictures[0][0])) * 0.4
    # Normal patches in that bank would have raised the good parts and the threshold with them.
    assert taught.pack.calibration.threshold == pytest.approx(learned.pack.calibration.threshold, rel=0.02)


def test_a_black_mask_or_one_of_another_size_is_refused(
    painted_normals: Path, defects: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    for name, mask in (("black", np.zeros((96, 96), np.uint8)), ("small", np.full((9, 9), 255, np.uint8))):
        path = tmp_path / f"{name}_mask.png"
        cv2.imwrite(str(path), mask)
        with pytest.raises(InputError, match="mask"):
            learn_memory_bank(painted_normals, SMALL, anomalous=[(defects[0][0], path)])


def test_two_photographs_are_enough_and_one_is_not(painted_normals: Path) -> None:
    paths = list_images(painted_normals)
    detector = learn_memory_bank(paths[:2], SMALL)
    assert detector.pack.calibration.held_out == 2
    assert "extrapolated" in detector.card["calibration"]
    with pytest.raises(InputError, match="at least 2"):
        learn_memory_bank(paths[:1], SMALL)


@pytest.fixture
def spoilt(painted_normals: Path, tmp_path: Path) -> Path:
    """The painted parts beside a truncated, an empty and a text file that are called pictures."""
    folder = tmp_path / "good"
    shutil.copytree(painted_normals, folder)
    (folder / "005-cut.png").write_bytes((folder / "000.png").read_bytes()[:500])
    (folder / "006-empty.jpg").write_bytes(b"")
    (folder / "zz-text.png").write_text("not a picture")
    return folder


def test_unreadable_pictures_are_left_out_if_asked_and_named_with_their_reasons(
    spoilt: Path, painted_normals: Path, learned: Learned
) -> None:
    detector = learn_memory_bank(spoilt, with_options(skip_unreadable=True))
    assert detector.pack.digest == learned.pack.digest, "as if they had never been there"
    assert detector.card["images"]["all"] == 12
    assert detector.card["images"]["left_out_unreadable"] == 3
    assert [item["image"] for item in detector.card["left_out"]] == ["005-cut.png", "006-empty.jpg", "zz-text.png"]
    assert all(item["reason"] for item in detector.card["left_out"])
    assert learned.card["images"]["left_out_unreadable"] == 0


def test_an_unreadable_picture_is_an_error_that_names_the_way_out(spoilt: Path) -> None:
    with pytest.raises(ImageError, match=r"(?s)005-cut\.png.*--skip-unreadable"):
        learn_memory_bank(spoilt, SMALL)


def test_too_few_readable_pictures_are_an_error_that_says_what_is_wrong_with_the_others(
    spoilt: Path,
) -> None:
    paths = [spoilt / name for name in ("000.png", "005-cut.png", "006-empty.jpg")]
    with pytest.raises(InputError, match=r"2 unreadable, such as .*005-cut\.png \(.+\)"):
        learn_memory_bank(paths, with_options(skip_unreadable=True))


def test_a_known_defect_goes_with_its_unreadable_mask(
    painted_normals: Path, defects: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    mask = tmp_path / "1_mask.png"
    mask.write_bytes(b"rot")
    samples: list[tuple[Path, Path | None]] = [defects[0], (defects[1][0], mask)]
    detector = learn_memory_bank(painted_normals, with_options(skip_unreadable=True), anomalous=samples)
    alone = learn_memory_bank(painted_normals, SMALL, anomalous=defects[:1])
    assert detector.pack.digest == alone.pack.digest
    assert "mask" in detector.card["left_out"][0]["reason"]


def test_a_region_outside_the_photograph_is_refused(painted_normals: Path) -> None:
    spec = Preprocessing(64, 64, roi=Region(50, 50, 80, 80))
    with pytest.raises(ImageError, match="region of interest"):
        learn_memory_bank(painted_normals, with_options(preprocessing=spec))


def test_an_existing_file_is_kept_before_any_work_is_done(painted_normals: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.detector"
    path.write_text("mine")
    with pytest.raises(OutputExistsError):
        fit_memory_bank(painted_normals, path, SMALL)
    assert path.read_text() == "mine"
