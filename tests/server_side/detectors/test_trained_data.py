"""Photographs as arrays for training: parts that never mix, whatever their number, tiles and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing, Tiling
from edgead.server_side.detectors.trained import Data, TrainedOptions, load_data, split_held_out

SMALL = TrainedOptions(preprocessing=Preprocessing(32, 32))


@pytest.fixture(scope="module")
def normals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """120 pictures whose grey value is their number."""
    folder = tmp_path_factory.mktemp("numbers")
    paths = [folder / f"{number:03d}.png" for number in range(120)]
    for number, path in enumerate(paths):
        path.write_bytes(encode_png(np.full((64, 64, 3), number, np.uint8)))
    return paths


@pytest.fixture(scope="module")
def anomalies(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path | None]]:
    """10 pictures whose grey value is 200 and their number; the mask, of every even one, is the upper left quarter."""
    folder = tmp_path_factory.mktemp("anomalies")
    found: list[tuple[Path, Path | None]] = []
    for number in range(10):
        path, mask = folder / f"{number}.png", folder / f"{number}_mask.png"
        path.write_bytes(encode_png(np.full((64, 64, 3), 200 + number, np.uint8)))
        marks = np.zeros((64, 64, 3), np.uint8)
        marks[:30, :30] = 255
        mask.write_bytes(encode_png(marks))
        found.append((path, mask if number % 2 == 0 else None))
    return found


def parts_of(data: Data) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the pictures to train, stop and calibrate with."""
    return (
        data.train[:, 0, 0, 0].tolist(),
        data.stop[:, 0, 0, 0].tolist(),
        [int(path.stem) for path in data.calibration],
    )


def test_no_photograph_is_in_two_parts(normals: list[Path]) -> None:
    data = load_data(normals, SMALL)
    train, stop, calibration = parts_of(data)
    assert sorted(train + stop + calibration) == list(range(120))
    assert (len(train), len(stop), len(calibration), data.shared) == (96, 12, 12, False)
    again, other = (
        load_data(normals, SMALL),
        load_data(normals, TrainedOptions(preprocessing=SMALL.preprocessing, seed=1)),
    )
    assert parts_of(again) == parts_of(data) != parts_of(other)
    assert again.digest == data.digest != other.digest


@pytest.mark.parametrize(("count", "train", "held"), [(2, 1, 1), (4, 3, 1), (12, 10, 2), (95, 76, 19)])
def test_of_few_photographs_the_same_stop_and_calibrate(normals: list[Path], count: int, train: int, held: int) -> None:
    data = load_data(normals[:count], SMALL)
    parts = parts_of(data)
    assert (len(parts[0]), len(parts[1]), parts[1] == parts[2], data.shared) == (train, held, True, True)
    assert not set(parts[0]) & set(parts[1])
    assert data.facts()["stop_and_calibration_are_one"]


def test_one_photograph_is_not_enough(normals: list[Path]) -> None:
    with pytest.raises(InputError, match="at least 2"):
        load_data(normals[:1], SMALL)
    with pytest.raises(InputError, match="at least 2"):
        split_held_out(normals[:1], SMALL)


def test_statistics_and_calibration_have_photographs_of_their_own(normals: list[Path]) -> None:
    known, held = split_held_out(normals, SMALL)
    assert (len(known), len(held)) == (96, 24)
    assert sorted([*known, *held]) == normals
    assert [len(part) for part in split_held_out(normals[:2], SMALL)] == [1, 1]


def test_anomalies_are_divided_by_picture_and_keep_their_masks(
    normals: list[Path], anomalies: list[tuple[Path, Path | None]]
) -> None:
    data = load_data(normals[:10], SMALL, anomalies)
    learn, stop = data.anomalies, data.stop_anomalies
    assert (len(learn), len(stop)) == (8, 2)
    numbers = [(part.frames[:, 0, 0, 0] - 200).tolist() for part in (learn, stop)]
    assert sorted(numbers[0] + numbers[1]) == list(range(10))
    for part, places in zip((learn, stop), numbers, strict=True):
        assert part.known.tolist() == [place % 2 == 0 for place in places]
        assert [bool(mask[:14, :14].all()) for mask in part.masks] == part.known.tolist()
        assert not part.masks[:, 17:, 17:].any()
    assert data.facts()["anomalies_with_masks"] == 5
    assert load_data(normals[:10], SMALL, anomalies[::2]).digest != data.digest


def test_tiles_of_a_picture_stay_together_and_of_a_masked_anomaly_only_those_that_show_it(
    normals: list[Path], anomalies: list[tuple[Path, Path | None]]
) -> None:
    options = TrainedOptions(preprocessing=Preprocessing(32, 32, tiles=Tiling(2, 2, 0.0)))
    data = load_data(normals[:12], options, anomalies)
    assert len(prepare(read_image(normals[0]), options.preprocessing)) == 4
    train, stop, _ = parts_of(data)
    assert (len(train), len(stop)) == (40, 8)
    assert not set(train) & set(stop)
    shown = [set(part.frames[:, 0, 0, 0].tolist()) for part in (data.anomalies, data.stop_anomalies)]
    assert not shown[0] & shown[1]
    for part in (data.anomalies, data.stop_anomalies):
        values = part.frames[:, 0, 0, 0] - 200
        for number in np.unique(values):
            assert (values == number).sum() == (1 if number % 2 == 0 else 4)


def test_a_single_anomaly_is_learned_from(normals: list[Path], anomalies: list[tuple[Path, Path | None]]) -> None:
    data = load_data(normals[:4], SMALL, anomalies[:1])
    assert (len(data.anomalies), len(data.stop_anomalies)) == (1, 0)


def test_a_mask_of_another_size_is_refused(
    normals: list[Path], anomalies: list[tuple[Path, Path | None]], tmp_path: Path
) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(encode_png(np.full((32, 32, 3), 255, np.uint8)))
    with pytest.raises(InputError, match="mask of 64 x 64"):
        load_data(normals[:4], SMALL, [(anomalies[0][0], mask)])
