"""`edgead fit` with sentences, through the command line: what each method takes, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgead.cli import main

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method winclip", "no --model"),
        ("--method winclip --model MobileCLIP-S1", "no --class"),
        ("--method winclip --model MobileCLIP-S1 --class carpet", "edgead downloads nothing"),
        ("--method winclip --model MobileCLPI-S1 --model-weights random:0 --class carpet", "MobileCLIP-S1"),
        ("--method winclip --model MobileCLIP-S1 --class carpet --projections p", "april-gan, normality"),
        ("--method winclip --model MobileCLIP-S1 --class carpet --size 256", "--size 256"),
        ("--method alfa --model MobileCLIP-S1 --class carpet --rows 5", "memory-bank"),
        ("--method april-gan --model MobileCLIP-S1 --class carpet --layers 0", "numbers from 1"),
        ("--class carpet --normal somewhere", "winclip"),
        ("--method winclp", "winclip"),
        ("", "no --normal"),
    ],
)
def test_an_option_that_is_missing_or_foreign_to_the_method_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, said: str
) -> None:
    code, _, error = run(capsys, "fit", *words.split(), "-o", tmp_path / "x.detector")
    assert code == 2, error
    assert said in error
    assert not (tmp_path / "x.detector").exists()


def test_an_empty_class_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    code, _, error = run(
        capsys, "fit", "--method", "winclip", "--model", tiny, "--class", "  ", "-o", tmp_path / "x.detector"
    )
    assert code == 2
    assert "an empty --class" in error


def test_projections_are_trained_once_and_serve_a_detector_and_its_normality(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    model = ("--model", tiny, "--model-weights", "random:0")
    file = tmp_path / "tiny.projections"
    code, out, error = run(capsys, "projections", *model, "--epochs", 1, "--batch", 32, "-o", file, "--json")
    assert code == 0, error
    assert json.loads(out)["layers"] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.projections"]
    prints = []
    for method in ("april-gan", "normality"):
        output = tmp_path / f"{method}.detector"
        words = ("--method", method, *model, "--class", "carpet", "--projections", file, "-o", output)
        code, _, error = run(capsys, "fit", *words)
        assert code == 0, error
        code, out, _ = run(capsys, "show", output, "--json")
        prints.append(json.loads(out)["detector"]["fingerprint"])
    assert prints[0] == prints[1]
    code, _, error = run(capsys, "projections", *model, "-o", file)
    assert code == 2
    assert "--force" in error
