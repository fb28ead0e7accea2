"""The examples run as far as this machine allows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgead.exporter.export import export_bundle
from edgead.runtime.image import encode_png, list_images
from edgead.runtime.inspection import decode_line
from edgead.runtime.spec import Preprocessing
from edgead.server_side.fitting import FitOptions

EXAMPLES = Path(__file__).resolve().parent.parent / "edge_examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_start_says_ok_to_a_part_that_it_learnt(painted_normals: Path, tmp_path: Path) -> None:
    options = FitOptions(backbone="random", preprocessing=Preprocessing(64, 64), rows=100)
    photo = list_images(painted_normals)[0]
    assert example("quick_start").main(painted_normals, photo, tmp_path / "part.bundle", options) == "OK"


def test_an_own_detector_runs_and_its_knowledge_changes(tmp_path: Path) -> None:
    assert example("own_detector").main(tmp_path / "own.bundle") == ["OK", "NG", "NG"]


def test_the_watched_folder_gets_a_line_for_each_picture_also_for_a_broken_one(
    small_bundle: Path, painted_normals: Path, tmp_path: Path
) -> None:
    inbox, outbox = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    (inbox / "a.png").write_bytes(list_images(painted_normals)[0].read_bytes())
    (inbox / "b.png").write_bytes(encode_png(np.zeros((80, 80, 3), np.uint8))[:60])
    assert example("openvino_watch_folder").watch(small_bundle, inbox, outbox, rounds=2) == 2
    lines = [decode_line(line) for line in (outbox / "results.jsonl").read_bytes().splitlines()]
    assert [(line.path, line.verdict) for line in lines] == [("a.png", "OK"), ("b.png", "NOT_INSPECTED")]
    assert (outbox / "a.png").is_file()


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="a GPU is here: the example runs for real instead")
def test_without_a_gpu_the_jetson_example_says_what_is_missing(
    small_detector: Path, painted_normals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "trt.bundle"
    export_bundle(small_detector, bundle, ["tensorrt"])
    assert example("jetson").main(bundle, painted_normals) in (1, 2)
    assert "this machine cannot run TensorRT" in capsys.readouterr().err
