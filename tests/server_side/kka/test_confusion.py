"""The confusion evaluator: folds that keep what is judged out of training, its limit, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgead.runtime.errors import DetectorError
from edgead.runtime.image import read_image
from edgead.server_side.kka import confusion
from edgead.server_side.kka.confusion import fitted_evaluator, fold_of
from edgead.server_side.kka.records import Image, Judgement
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.stages import judge, painted_image
from edgead.server_side.kka.work import WorkFolder

SETTINGS = "[judge]\nsteps = 6\nsize = 32\nbatch = 8\n"


@pytest.fixture(scope="module")
def painted(begun: Callable[..., WorkFolder], makers_of_tests: ModuleType) -> WorkFolder:
    """A run whose round 0 is painted."""
    work = begun(SETTINGS + "hard_quantile = 0.5\n", "painted", rounds=1, captions=10)
    run(work, makers_of_tests.makers(), stage="paint", last_round=0)
    return work


def files(work: WorkFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(work.round_folder(0).glob("evaluator-*"))}


def test_every_image_has_one_fold_by_its_name_alone() -> None:
    names = [f"i0-{number:05d}" for number in range(400)]
    folds = [fold_of(name, 2) for name in names]
    assert 150 < sum(folds) < 250
    assert folds == [fold_of(name, 2) for name in names]
    assert {fold_of(name, 1) for name in names} == {0}


def test_an_image_is_judged_by_the_fold_that_did_not_train_on_it(painted: WorkFolder) -> None:
    evaluator = fitted_evaluator(painted, 0)
    records = painted.records(Image, 0)
    names = [record.id for record in records]
    measured = evaluator.measure(names, [painted_image(painted, record) for record in records])
    limits = [json.loads(data)["limit"] for name, data in files(painted).items() if name.endswith(".json")]
    trained = [json.loads(data)["anomalies"] for name, data in files(painted).items() if name.endswith(".json")]
    assert len(limits) == 2
    assert limits[0] != limits[1]
    for name, (distance, limit) in zip(names, measured, strict=True):
        assert limit == pytest.approx(limits[fold_of(name, 2)])
        assert distance >= 0
    for fold, count in enumerate(trained):
        assert count == sum(fold_of(name, 2) != fold for name in names)
    # A fold knows nothing of its own images: with one of them changed, it is trained to the same weights.
    assert sum(trained) == len(names)


def test_what_a_fold_judges_does_not_change_it(
    painted: WorkFolder, begun: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    fitted_evaluator(painted, 0)
    data = confusion._read(painted, 0)
    backbone = confusion.load_backbone(painted.config.backbone).eval()
    own = [fold_of(name, 2) == 0 for name in data.names]
    spoilt = data.anomalies.copy()
    spoilt[own] = 0
    before = files(painted)
    for name in ("evaluator-0.json", "evaluator-0.safetensors"):
        (painted.round_folder(0) / name).unlink()
    confusion._train(painted, 0, 0, backbone, confusion._Data(data.train, data.held, data.names, spoilt))
    assert files(painted) == before


def test_the_limit_is_the_quantile_of_normals_that_were_held_out(painted: WorkFolder) -> None:
    evaluator = fitted_evaluator(painted, 0)
    for fold in range(2):
        facts = json.loads(files(painted)[f"evaluator-{fold}.json"])
        distances = load_file(painted.round_folder(0) / f"evaluator-{fold}.safetensors")["normal_distances"].numpy()
        assert len(distances) == facts["held_out"] == 2
        assert facts["normals"] == 10
        assert facts["limit"] == pytest.approx(float(np.quantile(distances.astype(np.float64), 0.5)))
    assert len(evaluator.normal_distances) == 4
    assert np.median(evaluator.normal_distances) == pytest.approx(1, abs=0.7)


def test_an_evaluator_is_trained_once_and_the_same_anywhere(
    painted: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    fitted_evaluator(painted, 0)
    before = files(painted)
    times = {path: path.stat().st_mtime_ns for path in painted.round_folder(0).glob("evaluator-*")}
    fitted_evaluator(painted, 0)
    assert times == {path: path.stat().st_mtime_ns for path in painted.round_folder(0).glob("evaluator-*")}
    other = new_work(SETTINGS + "hard_quantile = 0.5\n", "other", rounds=1, captions=10)
    run(other, makers_of_tests.makers(), stage="paint", last_round=0)
    # As if a kill had come between the two folds, and while the record of one was written but not its weights.
    fitted_evaluator(other, 0)
    (other.round_folder(0) / "evaluator-1.safetensors").unlink()
    fitted_evaluator(other, 0)
    assert files(other) == before
    assert not list(other.round_folder(0).glob("*.training"))


@pytest.mark.parametrize("harm", ["weights", "record", "no object", "no record"])
def test_a_file_that_was_changed_is_refused(
    harm: str, painted: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    fitted_evaluator(painted, 0)
    work = new_work(SETTINGS + "hard_quantile = 0.5\n", "harmed", rounds=1, captions=10)
    work.round_folder(0).mkdir()
    for name, data in files(painted).items():
        (work.round_folder(0) / name).write_bytes(data)
    path = work.round_folder(0) / ("evaluator-1.safetensors" if harm == "weights" else "evaluator-1.json")
    if harm == "weights":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif harm == "no record":
        path.unlink()
    else:
        path.write_text("{}" if harm == "record" else "[1]")
    with pytest.raises(DetectorError, match="Delete it and its"):
        fitted_evaluator(work, 0)


def test_the_evaluator_of_round_0_may_judge_all_rounds(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(SETTINGS + 'evaluator = "first"\nfolds = 1\n', "first", rounds=1, captions=6)
    run(work, makers_of_tests.makers(), stage="paint", last_round=0)
    first = fitted_evaluator(work, 0)
    judge(work, 0, first)
    assert fitted_evaluator(work, 1).normal_distances.tolist() == first.normal_distances.tolist()
    assert not work.round_folder(1).exists()
    assert len(work.records(Judgement, 0)) == 6


def test_pictures_of_any_size_are_measured(painted: WorkFolder, photographs: Path) -> None:
    evaluator = fitted_evaluator(painted, 0)
    frame = read_image(next(iter(sorted(photographs.iterdir()))))
    large = np.ascontiguousarray(frame.repeat(3, axis=0).repeat(3, axis=1))
    (small, _), (big, _) = evaluator.measure(["i0-00000", "i0-00000"], [frame, large])
    assert np.isfinite([small, big]).all()
    assert torch.is_tensor(evaluator._folds[0].centre)
