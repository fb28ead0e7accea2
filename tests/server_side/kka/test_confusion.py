"""The confusion evaluator: folds that keep what is judged out of training, its limit, and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file

from edgead.runtime.errors import DetectorError, InputError
from edgead.runtime.image import read_image
from edgead.server_side.kka import confusion
from edgead.server_side.kka.config import Judge
from edgead.server_side.kka.confusion import fitted_evaluator, fold_of, folds_of_normals
from edgead.server_side.kka.jobs import painted_image
from edgead.server_side.kka.records import Cost, Image, Judgement, Normal
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.stages import judge
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


def folds(work: WorkFolder) -> dict[str, int]:
    return folds_of_normals(work.config, [record.id for record in work.records(Normal)])


def test_photographs_are_divided_into_folds_of_about_one_size(painted: WorkFolder) -> None:
    names = [f"n{number:05d}" for number in range(31)]
    for count in (2, 3, 10):
        config = structs.replace(painted.config, judge=Judge(folds=count))
        found = folds_of_normals(config, names)
        sizes = [list(found.values()).count(fold) for fold in range(count)]
        assert sum(sizes) == len(names) == len(found)
        assert max(sizes) - min(sizes) <= 1
        assert found == folds_of_normals(config, names)
        # Never more folds than photographs, so that each has one to set its limit by.
        assert sorted(folds_of_normals(config, names[:2]).values()) == [0, 1]


def test_an_image_is_in_the_fold_of_its_photograph(painted: WorkFolder) -> None:
    normals = folds(painted)
    records = painted.records(Image, 0)
    assert {fold_of(record, normals) for record in records} == {0, 1}
    for record in records:
        assert fold_of(record, normals) == normals[record.normal]
    # One that was painted on nothing has a fold by its name.
    alone = [structs.replace(records[0], id=f"i0-{number:05d}", normal="") for number in range(400)]
    assert 150 < sum(fold_of(record, normals) for record in alone) < 250
    one = folds_of_normals(structs.replace(painted.config, judge=Judge(folds=1)), list(normals))
    assert {fold_of(record, one) for record in records} == {0}
    assert sorted(one.values()) == [-1] * 10 + [0] * 2


def test_an_image_is_judged_by_the_fold_that_did_not_train_on_it(painted: WorkFolder) -> None:
    evaluator = fitted_evaluator(painted, 0)
    records, normals = painted.records(Image, 0), folds(painted)
    names = [record.id for record in records]
    measured = evaluator.measure(names, [painted_image(painted.path, record) for record in records])
    facts = [json.loads(data) for name, data in files(painted).items() if name.endswith(".json")]
    assert len(facts) == 2
    assert facts[0]["limit"] != facts[1]["limit"]
    for record, (distance, limit) in zip(records, measured, strict=True):
        assert limit == pytest.approx(facts[fold_of(record, normals)]["limit"])
        assert distance >= 0
    for fold, each in enumerate(facts):
        assert each["anomalies"] == sum(fold_of(record, normals) != fold for record in records)
        assert each["normals"] == sum(found != fold for found in normals.values())
    assert sum(each["anomalies"] for each in facts) == len(names)


def trained_again(work: WorkFolder, data: confusion._Data, fold: int) -> dict[str, bytes]:
    """The files of round 0 after a fold was trained anew with other pictures."""
    for name in (f"evaluator-{fold}.json", f"evaluator-{fold}.safetensors"):
        (work.round_folder(0) / name).unlink()
    confusion._train(work, 0, fold, confusion.load_backbone(work.config.backbone).eval(), data)
    return files(work)


def test_nothing_painted_on_a_photograph_that_is_judged_changes_the_weights(painted: WorkFolder) -> None:
    fitted_evaluator(painted, 0)
    data = confusion._read(painted, 0, folds(painted))
    before = files(painted)
    spoilt = data.anomalies.copy()
    spoilt[data.folds_of_anomalies == 0] = 0
    assert trained_again(painted, dataclasses.replace(data, anomalies=spoilt), 0) == before


def test_no_photograph_that_is_judged_or_sets_the_limit_is_learned_from(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    # Without validations the held-out photographs cannot even choose among the steps.
    work = new_work(SETTINGS.replace("steps = 6", "steps = 1"), "unseen", rounds=1, captions=10)
    run(work, makers_of_tests.makers(), stage="paint", last_round=0)
    fitted_evaluator(work, 0)
    before = load_file(work.round_folder(0) / "evaluator-0.safetensors")
    data = confusion._read(work, 0, folds(work))
    spoilt = data.normals.copy()
    spoilt[data.folds_of_normals == 0] = 0
    trained_again(work, dataclasses.replace(data, normals=spoilt), 0)
    after = load_file(work.round_folder(0) / "evaluator-0.safetensors")
    assert not torch.equal(before.pop("normal_distances"), after.pop("normal_distances"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_limit_is_the_quantile_of_normals_that_were_held_out(painted: WorkFolder) -> None:
    evaluator = fitted_evaluator(painted, 0)
    for fold in range(2):
        facts = json.loads(files(painted)[f"evaluator-{fold}.json"])
        distances = load_file(painted.round_folder(0) / f"evaluator-{fold}.safetensors")["normal_distances"].numpy()
        assert len(distances) == facts["held_out"] == 6
        assert facts["normals"] == 6
        assert facts["limit"] == pytest.approx(float(np.quantile(distances.astype(np.float64), 0.5)))
    assert len(evaluator.normal_distances) == 12
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
    trained = [cost for cost in other.records(Cost) if cost.stage == "evaluator"]
    assert [cost.items for cost in trained] == [2, 1]
    assert all(cost.seconds > 0 for cost in trained)


@pytest.mark.parametrize("harm", ["weights", "record", "no object", "no record"])
def test_a_file_that_was_changed_is_refused(
    harm: str, painted: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    fitted_evaluator(painted, 0)
    work = new_work(SETTINGS + "hard_quantile = 0.5\n", "harmed", rounds=1, captions=10)
    with pytest.raises(InputError, match="edgead kka describe"):
        fitted_evaluator(work, 0)
    run(work, makers_of_tests.makers(), stage="describe")
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
    name = painted.records(Image, 0)[0].id
    (small, _), (big, _) = evaluator.measure([name, name], [frame, large])
    assert np.isfinite([small, big]).all()
    assert torch.is_tensor(evaluator._folds[0].centre)
