"""Teachers of EfficientAD as files, and the precision of its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edgead.detector_file import weights_digest
from edgead.runtime.errors import BackboneError, FailureError, InputError
from edgead.runtime.image import list_images
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors import efficientad
from edgead.server_side.detectors.efficientad import EfficientAdExtras, learn
from edgead.server_side.detectors.efficientad_networks import PatchDescription
from edgead.server_side.detectors.efficientad_teacher_file import read_teacher, write_teacher
from edgead.server_side.detectors.trained import TrainedOptions

SIDE = 64


def test_a_teacher_is_made_once_and_serves_other_fits(painted_normals: Path, tmp_path: Path) -> None:
    paths, quick = list_images(painted_normals), TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    extras = EfficientAdExtras(penalty=(), teacher=tmp_path / "small.teacher", teacher_steps=2, start="random")
    first = learn(paths[:6], quick, extras=extras)
    made = (tmp_path / "small.teacher").read_bytes()
    again = learn(paths[:6], quick, extras=dataclasses.replace(extras, teacher_steps=9))
    assert (tmp_path / "small.teacher").read_bytes() == made
    assert first.spec.fingerprint == again.spec.fingerprint
    assert first.card["teacher"] == again.card["teacher"]
    assert first.card["teacher"]["steps"] == 2
    without = EfficientAdExtras(penalty=(), teacher_steps=2, start="random")
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


def test_half_precision_trains_nearly_the_same_student(
    painted_normals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough for processors that imitate it.
    monkeypatch.setattr(efficientad, "knows_bfloat16", lambda _: True)
    paths = list_images(painted_normals)[:4]
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=4)
    write_teacher(tmp_path / "x.teacher", PatchDescription(seed=2), {})
    extras = EfficientAdExtras(penalty=(), teacher=tmp_path / "x.teacher", start="random")
    whole = learn(paths, options, extras=extras)
    half = learn(paths, options, extras=dataclasses.replace(extras, precision="bfloat16"))
    assert half.card["precision"] == "bfloat16"
    losses = [each.card["training"]["validation_loss"] for each in (whole, half)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        (EfficientAdExtras(precision="float16"), "float32, bfloat16"),
        (EfficientAdExtras(start="warm"), "closed, random"),
        (EfficientAdExtras(precision="bfloat16"), "leave --precision out"),
    ],
)
def test_what_training_cannot_do_is_told_before_any_work(
    extras: EfficientAdExtras, said: str, painted_normals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientad, "knows_bfloat16", lambda _: False)
    monkeypatch.setattr(efficientad, "load_data", None)
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    with pytest.raises(InputError, match=f"(?i){said}"):
        learn(list_images(painted_normals)[:4], options, extras=extras)


def test_a_teacher_that_says_the_same_of_everything_is_refused(painted_normals: Path, tmp_path: Path) -> None:
    dead = PatchDescription()
    torch.nn.init.constant_(dead.last.weight, 0.0)
    write_teacher(tmp_path / "dead.teacher", dead, {})
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    extras = EfficientAdExtras(penalty=(), teacher=tmp_path / "dead.teacher")
    with pytest.raises(FailureError, match="384 of its 384 channels are constant there"):
        learn(list_images(painted_normals)[:4], options, extras=extras)
