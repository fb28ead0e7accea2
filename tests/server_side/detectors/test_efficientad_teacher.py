"""Teachers of EfficientAD as files, and the precision of its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.detector_file import weights_digest
from edgead.runtime.errors import BackboneError, FailureError, InputError
from edgead.runtime.image import list_images
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.efficientad import EfficientAdExtras, learn
from edgead.server_side.detectors.efficientad_networks import PatchDescription
from edgead.server_side.detectors.efficientad_teacher import generic_frames, standardise
from edgead.server_side.detectors.efficientad_teacher_file import read_teacher, write_teacher
from edgead.server_side.detectors.efficientad_training import EfficientAdNetworks, EfficientAdTask
from edgead.server_side.detectors.trained import Anomalies, TrainedOptions
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.devices import CPU, knows_bfloat16

SIDE = 64


def test_a_teacher_is_made_once_and_serves_other_fits(painted_normals: Path, tmp_path: Path) -> None:
    paths, quick = list_images(painted_normals), TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    # Few generic pictures: a closed form takes the time of its crops.
    without = EfficientAdExtras(penalty=tuple(paths[6:8]), teacher_steps=2, start="random")
    extras = dataclasses.replace(without, teacher=tmp_path / "small.teacher")
    first = learn(paths[:6], quick, extras=extras)
    made = (tmp_path / "small.teacher").read_bytes()
    again = learn(paths[:6], quick, extras=dataclasses.replace(extras, teacher_steps=9))
    assert (tmp_path / "small.teacher").read_bytes() == made
    assert first.spec.fingerprint == again.spec.fingerprint
    assert first.card["teacher"] == again.card["teacher"]
    assert first.card["teacher"]["steps"] == 2
    assert learn(paths[:6], quick, extras=without).spec.fingerprint == first.spec.fingerprint, "a file changes nothing"


@pytest.mark.parametrize("names", [("conv1", "conv2", "conv3", "conv4"), ("0", "3", "6", "8")])
def test_published_teachers_are_read_as_they_are(names: tuple[str, ...], tmp_path: Path) -> None:
    teacher = PatchDescription(seed=4)
    layers = (teacher.first, teacher.second, teacher.third, teacher.last)
    state = {
        f"{name}.{kind}": value
        for name, layer in zip(names, layers, strict=True)
        for kind, value in layer.state_dict().items()
    }
    torch.save(state, tmp_path / "pretrained_teacher_small.pth")
    found, record = read_teacher(tmp_path / "pretrained_teacher_small.pth")
    assert weights_digest(found) == weights_digest(teacher)
    assert record == {"published": "pretrained_teacher_small.pth"}


@pytest.mark.parametrize("kind", ["missing", "text", "medium", "nan", "code", "numbers"])
def test_what_is_no_small_teacher_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.pth" if kind in ("medium", "code", "numbers") else "x.teacher")
    teacher = PatchDescription(768 if kind == "medium" else 384)
    if kind == "text":
        path.write_text("no weights")
    elif kind == "medium":
        torch.save(
            {
                f"conv{n}.{k}": v
                for n, (_, layer) in enumerate(teacher.named_children(), 1)
                for k, v in layer.state_dict().items()
            },
            path,
        )
    elif kind == "code":
        torch.save({"conv1.weight": Path(".")}, path)
    elif kind == "numbers":
        torch.save({"conv1.weight": 3.0}, path)
    elif kind == "nan":
        torch.nn.init.constant_(teacher.first.weight, float("nan"))
        write_teacher(path, teacher, {})
    with pytest.raises(BackboneError) as refused:
        read_teacher(path)
    assert str(path) in f"{refused.value.wanted} {refused.value.got}"


def test_half_precision_trains_nearly_the_same_student() -> None:
    frames = generic_frames(Preprocessing(SIDE, SIDE), seed=1, count=4)
    none = Anomalies(frames[:0], np.zeros((0, SIDE, SIDE), bool), np.zeros(0, bool))
    losses = []
    for precision in ("float32", "bfloat16"):
        networks = EfficientAdNetworks((SIDE, SIDE))
        standardise(networks.teacher, frames)
        # The task imitates it where it must; only a fit refuses to.
        task = EfficientAdTask(networks, frames, frames[:0], none, frames[:2], steps=2, precision=precision)
        losses.append(train(task, Schedule(2), label="test").best)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        (EfficientAdExtras(precision="float16"), "float32, bfloat16"),
        (EfficientAdExtras(start="warm"), "closed, random"),
        pytest.param(
            EfficientAdExtras(precision="bfloat16"),
            "leave --precision out",
            marks=pytest.mark.skipif(knows_bfloat16(CPU), reason="this processor computes in bfloat16"),
        ),
    ],
)
def test_what_training_cannot_do_is_told_before_a_photograph_is_read(
    extras: EfficientAdExtras, said: str, tmp_path: Path
) -> None:
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1, device="cpu")
    with pytest.raises(InputError, match=f"(?i){said}"):
        learn([tmp_path / "missing.png"] * 4, options, extras=extras)


def test_a_teacher_that_says_the_same_of_everything_is_refused(painted_normals: Path, tmp_path: Path) -> None:
    dead = PatchDescription()
    torch.nn.init.constant_(dead.last.weight, 0.0)
    write_teacher(tmp_path / "dead.teacher", dead, {})
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    extras = EfficientAdExtras(penalty=(), teacher=tmp_path / "dead.teacher")
    with pytest.raises(FailureError, match="384 of its 384 channels are constant there"):
        learn(list_images(painted_normals)[:4], options, extras=extras)
