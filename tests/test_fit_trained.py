"""`edgead fit` with trained methods, through the command line: their options, their checkpoint, an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.cli import main
from edgead.detector_file import read_detector
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.server_side.detectors.efficientad_networks import PatchDescription
from edgead.server_side.devices import knows_bfloat16, torch_device
from edgead.server_side.painting import paint_defect

TRAINED = ["fit", "--method", "deep-sad", "--size", "64"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def anomalies(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four painted defects with masks."""
    folder = tmp_path_factory.mktemp("anomalies")
    for number, path in enumerate(list_images(painted_normals)[:4]):
        picture, mask = paint_defect(read_image(path), "stain", size=0.4, rng=np.random.default_rng(number))
        (folder / path.name).write_bytes(encode_png(picture))
        (folder / f"{path.stem}_mask.png").write_bytes(encode_png(np.repeat(mask[..., None], 3, 2)))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method deep-sad --rows 5", "memory-bank"),
        ("--method deep-sad --neighbours 3", "memory-bank"),
        ("--method deep-sad --shots 4", "winclip"),
        ("--method deep-sad --class carpet", "winclip"),
        ("--method padim --steps 5", "deep-sad"),
        ("--method ssd --anomalous somewhere", "deep-sad"),
        ("--method memory-bank --steps 5", "deep-sad"),
        ("--method memory-bank --device cpu", "cmda"),
        ("--method simplenet --teacher some.teacher", "efficientad"),
        ("--method simplenet --precision bfloat16", "efficientad"),
        ("--method simplenet --start random", "efficientad"),
        ("--method winclip --device cpu", "cmda"),
        ("--method deepsad", "deep-sad"),
        ("--method ssd --normal nowhere", "nowhere"),
    ],
)
def test_an_option_that_is_foreign_to_the_method_is_told_before_any_work(
    words: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, anomalies: Path
) -> None:
    words = words.replace("somewhere", str(anomalies))
    code, _, error = run(capsys, "fit", *words.split(), "-o", tmp_path / "x.detector")
    assert code == 2, error
    assert said in error
    assert not list(tmp_path.iterdir())


def test_good_parts_are_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run(capsys, *TRAINED, "-o", tmp_path / "x.detector")
    assert code == 2
    assert "no --normal" in error


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named_with_what_to_do(
    device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path
) -> None:
    words = [*TRAINED, "--normal", painted_normals, "--device", device, "-o", tmp_path / "x.detector"]
    code, _, error = run(capsys, *words)
    assert code == 2
    assert f"'{device}'" in error
    assert "leave --device out" in error.lower()
    assert not list(tmp_path.iterdir())


def test_what_is_printed_says_how_many_anomalies_were_learned_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path, anomalies: Path
) -> None:
    words = [*TRAINED, "--steps", 2, "--normal", painted_normals, "-o", tmp_path / "x.detector"]
    code, out, error = run(capsys, *words, "--anomalous", anomalies)
    assert code == 0, error
    assert "  images      12\n  anomalies   4 frames, 4 with masks\n" in out
    code, out, error = run(capsys, *words, "--force")
    assert code == 0, error
    assert "  anomalies " not in out


@pytest.mark.parametrize("method", ["deep-sad", "padim", "ssd"])
def test_a_detector_is_written_and_no_checkpoint_is_left(
    method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path, anomalies: Path
) -> None:
    output = tmp_path / "part.detector"
    words = ["fit", "--method", method, "--size", "64", "--normal", painted_normals, "-o", output, "--json"]
    words += ["--steps", 5, "--anomalous", anomalies, "--device", "cpu"] if method == "deep-sad" else []
    code, out, error = run(capsys, *words)
    assert code == 0, error
    card = json.loads(out)
    assert card["method"] == method
    if method == "deep-sad":
        assert card["data"]["anomalies_with_masks"] == 4
        assert card["training"]["steps"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["part.detector"]
    assert read_detector(output).spec.method == method
    code, _, error = run(capsys, *words)
    assert code == 2, "an existing file is kept"
    assert "part.detector" in error


def test_a_published_teacher_and_own_pictures_serve_efficientad(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path, anomalies: Path
) -> None:
    precision = "bfloat16" if knows_bfloat16(torch_device()) else "float32"
    teacher = PatchDescription(seed=3)
    state = {
        f"conv{at}.{name}": value
        for at, layer in enumerate(teacher.children(), 1)
        for name, value in layer.state_dict().items()
    }
    torch.save(state, tmp_path / "published.pth")
    words = ["fit", "--method", "efficientad", "--size", "64", "--steps", "1", "--normal", painted_normals, "--json"]
    words += ["--teacher", tmp_path / "published.pth", "--generic", anomalies]
    words += ["--precision", precision, "--start", "random"]
    code, out, error = run(capsys, *words, "-o", tmp_path / "part.detector")
    assert code == 0, error
    card = json.loads(out)
    assert card["teacher"] == {"published": "published.pth"}
    assert card["penalty"] == {"pictures": 8, "kind": "own pictures"}
    assert card["precision"] == precision
    assert card["student_unlearned"] > 0.5, "after one step"
    code, out, error = run(capsys, *[word for word in words if word != "--json"], "-o", tmp_path / "other.detector")
    assert code == 0, error
    assert "warning: the student has not learned" in out


def test_an_unreadable_picture_is_left_out_if_asked_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path
) -> None:
    folder = tmp_path / "good"
    shutil.copytree(painted_normals, folder)
    (folder / "zz.png").write_text("no picture")
    words = ["fit", "--method", "ssd", "--size", "64", "--normal", folder, "-o", tmp_path / "x.detector"]
    code, _, error = run(capsys, *words)
    assert code == 2
    assert "--skip-unreadable" in error
    code, _, error = run(capsys, *words, "--skip-unreadable")
    assert code == 0
    assert "left out zz.png" in error
    assert read_detector(tmp_path / "x.detector").card["images"]["left_out_unreadable"] == 1


INTERRUPTED = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def press_ctrl_c():
    # The training loop is the first to listen.
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.01)
    time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press_ctrl_c, daemon=True).start()
from edgead.cli import main
main(sys.argv[1:])
"""


def test_an_interrupted_fit_goes_on_when_the_same_command_is_given_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, painted_normals: Path
) -> None:
    cut, whole = tmp_path / "cut.detector", tmp_path / "whole.detector"
    words = [*TRAINED, "--normal", str(painted_normals), "--steps", "150"]
    checkpoint = tmp_path / "cut.detector.training"
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words, "-o", str(cut)], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 130, done.stderr.decode()
    assert checkpoint.is_file()
    assert not cut.exists()
    code, _, said = run(capsys, *[*words[:-1], "151"], "-o", cut)
    assert code == 2
    assert "another training" in said
    code, _, said = run(capsys, *words, "-o", cut)
    assert code == 0, said
    assert run(capsys, *words, "-o", whole)[0] == 0
    assert not checkpoint.exists()
    found, expected = read_detector(cut), read_detector(whole)
    assert found.spec.fingerprint == expected.spec.fingerprint
    assert found.pack.digest == expected.pack.digest
