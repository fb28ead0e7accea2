"""Another text table for a bundle: checked against the model of its engine, with a threshold of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgead.cli import main
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import open_bundle
from edgead.runtime.chain import read_chain
from edgead.runtime.notes import read_note
from edgead.server_side.detectors import winclip
from edgead.server_side.vision_language.options import VisionLanguageOptions
from tests.test_fit_language import TINY, run

MODEL = ("--model-weights", "random:3")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's configuration and a zero-shot bundle of it."""
    folder = tmp_path_factory.mktemp("sentences")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    options = VisionLanguageOptions(model=str(folder / "tiny.json"), weights="random:3", class_name="carpet")
    fitted = winclip.learn([], options).write(folder / "carpet.detector")
    export_bundle(fitted, folder / "carpet.bundle", ["onnx"])
    with pytest.raises(SystemExit):
        main(["prompts", "new", "carpet", "-o", str(folder / "carpet.json")])
    with pytest.raises(SystemExit):
        main(["prompts", "add", str(folder / "carpet.json"), "frayed {}", "--state", "anomalous"])
    return folder


def test_new_sentences_and_their_threshold_come_as_one_delta(
    capsys: pytest.CaptureFixture[str], work: Path, painted_normals: Path
) -> None:
    table, delta = work / "carpet.table", work / "sentences.delta"
    model = ("--model", work / "tiny.json", *MODEL)
    code, _, error = run(capsys, "text-table", work / "carpet.json", *model, "-o", table)
    assert code == 0, error
    code, out, error = run(
        capsys, "knowledge", "sentences", work / "carpet.bundle", table, "--held-out", painted_normals, "-o", delta,
        "--json",
    )  # fmt: skip
    assert code == 0, error
    said = json.loads(out)
    assert said["threshold"][0] == 0.5
    assert said["threshold"][1] != 0.5
    bundle = open_bundle(work / "carpet.bundle")
    before, after = bundle.pack("part"), read_chain(bundle, [delta])["part"]
    assert after.digest == said["result"]
    texts = [row["text"] for row in read_note(after, "text.table")["rows"]]
    assert "a photo of a frayed carpet." in texts
    assert len(texts) == len(after.arrays["text.table"]) > len(before.arrays["text.table"])
    assert after.calibration.threshold == said["threshold"][1]
    kept = [name for name in before.arrays if not name.startswith("text.")]
    assert all(np.array_equal(before.arrays[name], after.arrays[name]) for name in kept)


def test_a_table_of_other_weights_is_refused(
    capsys: pytest.CaptureFixture[str], work: Path, painted_normals: Path
) -> None:
    other = work / "other.table"
    model = ("--model", work / "tiny.json", "--model-weights", "random:4")
    code, _, error = run(capsys, "text-table", work / "carpet.json", *model, "-o", other)
    assert code == 0, error
    code, _, error = run(
        capsys, "knowledge", "sentences", work / "carpet.bundle", other, "--held-out", painted_normals,
        "-o", work / "x.delta",
    )  # fmt: skip
    assert code == 2
    assert "random:3" in error
    assert "random:4" in error
    assert not (work / "x.delta").exists()


def test_a_detector_without_sentences_is_refused(
    capsys: pytest.CaptureFixture[str], work: Path, small_bundle: Path, painted_normals: Path
) -> None:
    table = work / "third.table"
    model = ("--model", work / "tiny.json", *MODEL)
    run(capsys, "text-table", work / "carpet.json", *model, "-o", table)
    code, _, error = run(
        capsys, "knowledge", "sentences", small_bundle, table, "--held-out", painted_normals, "-o", work / "x.delta"
    )
    assert code == 2
    assert "takes sentences" in error
