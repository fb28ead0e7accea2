"""Distillation: the student's target and loss, what it learns, its engines, and what is said of it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from edgead.cli import main
from edgead.detector_file import FittedDetector, read_detector
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import DetectorError, InputError
from edgead.runtime.image import encode_png, list_images, prepare, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.spec import Preprocessing, Region, Tiling
from edgead.server_side import distil_report
from edgead.server_side.detectors import padim, ssd
from edgead.server_side.detectors.trained import TrainedOptions
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.distil import FLOOR, StudentTask, distil, map_loss
from edgead.server_side.distil_cli import _tell
from edgead.server_side.distil_data import painted_on, split_paths, with_defects
from edgead.server_side.distil_student import StudentDecoder
from edgead.server_side.distil_teacher import Teacher
from edgead.server_side.learned import Learned, Modules

OPTIONS = TrainedOptions(preprocessing=Preprocessing(64, 64), steps=25, batch=8)


@pytest.fixture(scope="module")
def padim_detector(painted_normals: Path) -> Learned:
    options = TrainedOptions(preprocessing=Preprocessing(96, 96))
    return padim.learn(list_images(painted_normals), options, dimensions=16)


@pytest.fixture(scope="module")
def both(small_detector: Path, padim_detector: Learned) -> Teacher:
    """A memory bank of 64 pixels and a PaDiM of 96."""
    return Teacher([read_detector(small_detector), padim_detector], ["bank", "padim"])


def by_hand(detector: FittedDetector | Learned, frame: Any) -> tuple[float, Any]:
    """Score and map of a detector's graphs."""
    trunk, head = (
        graph.module() if isinstance(graph, ExportedProgram) else graph for graph in (detector.trunk, detector.head)
    )
    with torch.inference_mode():
        features = trunk(torch.from_numpy(prepare(frame, detector.spec.preprocessing)))
        feeds = [torch.from_numpy(array.copy()) for array in head_feeds(detector.pack, detector.spec).values()]
        score, found, *_ = head(*(features if isinstance(features, tuple) else (features,)), *feeds)
    return float(score[0]), found.numpy()


def test_of_several_teachers_the_map_is_the_mean_in_units_of_their_thresholds(
    both: Teacher, painted_normals: Path
) -> None:
    frame = read_image(list_images(painted_normals)[0])
    expected, scores = [], []
    for detector in both.detectors:
        alone = Teacher([detector], ["alone"])
        score, found = by_hand(detector, frame)
        unit = detector.pack.calibration.map_threshold
        assert unit is not None
        assert np.allclose(alone.outputs(frame)[1].numpy(), found / unit, rtol=1e-4, atol=1e-6)
        scores.append(score / detector.pack.calibration.threshold)
        expected.append(found / unit)
    score, mean = both.outputs(frame)
    assert score == pytest.approx(np.mean(scores), rel=1e-4)
    assert mean.shape == (1, 64, 64)
    larger = torch.from_numpy(expected[1])[:, None]
    smaller = torch.nn.functional.interpolate(larger, (64, 64), mode="bilinear", antialias=True)[:, 0]
    assert np.allclose(mean.numpy(), (expected[0] + smaller.numpy()) / 2, rtol=1e-4)
    cells = both.targets(frame, (8, 8))
    assert cells[0, 2, 3] == pytest.approx(float(mean[0, 16:24, 24:32].mean()), rel=1e-5)


def test_the_loss_is_that_of_the_docstring_in_float64() -> None:
    rng = np.random.default_rng(0)
    targets, logarithms = rng.uniform(-0.2, 8, (3, 4, 4)), rng.normal(size=(3, 4, 4)) * 2
    total = 0.0
    for target, value in zip(targets.ravel(), logarithms.ravel(), strict=True):
        away = abs(value - math.log(max(target, FLOOR)))
        huber = away**2 / 2 if away < 1 else away - 0.5
        total += (1 + min(max(target, 0), 4)) * huber / targets.size
    assert float(map_loss(torch.from_numpy(logarithms), torch.from_numpy(targets))) == pytest.approx(total, rel=1e-12)


def test_parts_never_mix_and_painted_defects_differ_between_them(painted_normals: Path) -> None:
    paths = list_images(painted_normals)
    parts = split_paths(paths, paths[:5], 0.2, 0)
    assert sorted([*parts.train, *parts.stop]) == paths
    assert parts.stop == parts.calibration
    assert sorted([*parts.anomalies, *parts.stop_anomalies]) == paths[:5]
    many = split_paths([Path(f"{number}") for number in range(200)], [], 0.2, 0)
    assert (len(many.train), len(many.stop), len(many.calibration)) == (160, 20, 20)
    assert not set(many.stop) & set(many.calibration)
    frame = read_image(paths[0])
    painted, mask = painted_on(frame, "a.png", 0)
    again, _ = painted_on(frame, "a.png", 0)
    other, _ = painted_on(frame, "b.png", 0)
    assert mask.any()
    assert np.array_equal(painted, again)
    assert not np.array_equal(painted, other)
    assert len(list(with_defects(paths[:2], paths[3:4], 0))) == 9


def test_a_teacher_without_a_map_or_of_another_region_is_refused(painted_normals: Path, small_detector: Path) -> None:
    paths = list_images(painted_normals)
    flat = ssd.learn(paths[:4], TrainedOptions(preprocessing=Preprocessing(64, 64)))
    with pytest.raises(DetectorError, match="method ssd has none"):
        Teacher([flat], ["ssd.detector"])
    spec = Preprocessing(64, 64, roi=Region(8, 8, 80, 80))
    options = TrainedOptions(preprocessing=spec)
    other = padim.learn(paths[:4], options, dimensions=8)
    with pytest.raises(DetectorError, match=r"roi\.detector"):
        Teacher([read_detector(small_detector), other], ["bank.detector", "roi.detector"])


def test_a_student_learns_a_map_and_the_same_seed_gives_the_same_one(both: Teacher, painted_normals: Path) -> None:
    paths = list_images(painted_normals)
    found, again = (distil(both, paths, OPTIONS) for _ in range(2))
    assert found.learned.spec.fingerprint == again.learned.spec.fingerprint
    assert found.learned.pack.digest == again.learned.pack.digest
    assert [each["method"] for each in found.learned.card["teachers"]] == ["memory-bank", "padim"]
    student = Teacher([found.learned], ["student"])
    loss = distil_report.on_painted(both, student, paths, 0)
    assert loss.images == 24
    assert loss.correlation is not None
    assert loss.correlation > 0.5
    assert loss.map_correlation is not None
    assert loss.map_correlation > 0.2
    figures = distil_report.gained(both, student, read_image(paths[0]))
    assert figures["teacher"]["milliseconds_in_torch"] > figures["student"]["milliseconds_in_torch"] > 0
    assert figures["student"]["parameters"] == sum(
        tensor.numel()
        for module in (found.learned.trunk, found.learned.head)
        for tensor in module.state_dict().values()
    )


def test_a_student_has_the_teachers_tiles_and_the_size_that_was_asked_for(painted_normals: Path) -> None:
    paths = list_images(painted_normals)[:6]
    spec = Preprocessing(64, 64, rotate=90, tiles=Tiling(2, 1, 0.1))
    teacher = Teacher([padim.learn(paths, TrainedOptions(preprocessing=spec), dimensions=8)], ["tiled"])
    learned = distil(teacher, paths, TrainedOptions(preprocessing=Preprocessing(32, 32), steps=3)).learned
    assert learned.spec.preprocessing == Preprocessing(32, 32, rotate=90, tiles=Tiling(2, 1, 0.1))
    loss = distil_report.on_painted(teacher, Teacher([learned], ["student"]), paths[:2], 0)
    assert loss.images == 4
    assert loss.student.pixel_auroc is not None


def test_a_student_is_exported_like_the_rest(both: Teacher, painted_normals: Path, tmp_path: Path) -> None:
    paths = list_images(painted_normals)
    options = TrainedOptions(preprocessing=Preprocessing(96, 64), steps=5)
    learned = distil(both, paths, options).learned
    spec = learned.spec
    assert (spec.preprocessing.width, spec.preprocessing.height) == (96, 64)
    learned.write(tmp_path / "s.detector")
    export_bundle(tmp_path / "s.detector", tmp_path / "s.bundle", ["onnx", "openvino"])
    opened = open_bundle(tmp_path / "s.bundle")
    assert all(engine.parity is not None for engine in opened.manifest.engines)
    modules = Modules(
        learned.trunk,
        learned.head,
        method=spec.method,
        preprocessing=spec.preprocessing,
        features=spec.features,
        knowledge=spec.knowledge,
        outputs=spec.outputs,
    )
    frame = read_image(paths[0])
    expected = float(modules.outputs(modules.embed(frame), learned.pack)["score"].max())
    with Inspector(opened, target="onnx") as inspector:
        inspection = inspector.inspect(frame)
        assert inspection.score == pytest.approx(expected, rel=1e-3)
        assert inspection.anomaly_map is not None


def test_two_sides_that_are_one_lose_nothing(both: Teacher, painted_normals: Path) -> None:
    loss = distil_report.on_painted(both, both, list_images(painted_normals)[:4], 0)
    assert loss.correlation == pytest.approx(1)
    assert loss.rank_correlation == pytest.approx(1)
    assert loss.map_correlation == pytest.approx(1)
    assert (loss.agreement, loss.teacher) == (1.0, loss.student)
    assert loss.teacher.false_alarms is None


class _Cut(StudentTask):
    """Presses Ctrl-C at step 3."""

    def step(self, number: int) -> dict[str, float]:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


def test_a_distillation_of_another_teacher_does_not_go_on_with_its_checkpoint(tmp_path: Path) -> None:
    maps = [torch.randn(6, 4, 8, 8), torch.randn(6, 4, 4, 4)]
    targets = torch.rand(6, 8, 8) * 2
    checkpoint = tmp_path / "s.training"
    cut = _Cut(maps, targets, maps, targets, identity={"teacher": "a"})
    with pytest.raises(KeyboardInterrupt):
        train(cut, Schedule(9), label="s", checkpoint=checkpoint)
    other = StudentTask(maps, targets, maps, targets, identity={"teacher": "b"})
    with pytest.raises(DetectorError, match="another training"):
        train(other, Schedule(9), label="s", checkpoint=checkpoint)
    whole, continued = (StudentTask(maps, targets, maps, targets, identity={"teacher": "a"}) for _ in range(2))
    train(continued, Schedule(9), label="s", checkpoint=checkpoint)
    train(whole, Schedule(9), label="s")
    assert torch.equal(continued.module.last.weight, whole.module.last.weight)
    assert isinstance(whole.module, StudentDecoder)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_the_command_writes_a_student_and_says_what_was_lost_and_gained(
    capsys: pytest.CaptureFixture[str], small_detector: Path, painted_normals: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "s.detector"
    for kind in ("good", "stain"):
        (data / "test" / kind).mkdir(parents=True)
    for path in list_images(painted_normals)[:3]:
        (data / "test" / "good" / path.name).write_bytes(path.read_bytes())
        painted, _ = painted_on(read_image(path), path.name, 5)
        (data / "test" / "stain" / path.name).write_bytes(encode_png(painted))
    words = ["distil", small_detector, "--normal", painted_normals, "--anomalous", data / "test" / "stain"]
    words += ["--data", data, "--steps", 5, "-o", output]
    code, out, error = run(capsys, *words, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["lost"]["data"]["images"] == 6
    assert found["lost"]["data"]["teacher"]["pixel_auroc"] is None
    assert found["lost"]["data"]["student"]["false_alarms"] is not None
    assert found["gained"]["student"]["bytes"] > 0
    assert found["card"]["data"]["anomalies"] == 3
    assert read_detector(output).card["distillation"]["painted"]["images"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "s.detector"]
    assert run(capsys, *words)[0] == 2, "an existing file is kept"
    _tell(output, found["card"], found)
    out = capsys.readouterr().out
    assert "ms per frame" in out
    assert "edgead export" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.detector", "--normal", "NORMALS"], "nowhere.detector"),
        (["TEACHER", "--normal", "nowhere"], "nowhere"),
        (["TEACHER", "--normal", "NORMALS", "--limit", "3"], "--data"),
        (["TEACHER", "--normal", "NORMALS", "--size", "33"], "multiples of 32"),
        (["TEACHER", "--normal", "NORMALS", "--data", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_told_before_any_work(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    small_detector: Path,
    painted_normals: Path,
    tmp_path: Path,
) -> None:
    places = {"TEACHER": str(small_detector), "NORMALS": str(painted_normals)}
    code, _, error = run(capsys, "distil", *[places.get(word, word) for word in words], "-o", tmp_path / "s.detector")
    assert code == 2
    assert said in error
    assert not list(tmp_path.iterdir())


def test_one_photograph_is_not_enough(both: Teacher, painted_normals: Path) -> None:
    with pytest.raises(InputError, match="at least 2"):
        distil(both, list_images(painted_normals)[:1], OPTIONS)
