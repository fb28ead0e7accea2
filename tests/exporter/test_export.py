"""`export_bundle`: whole bundles or nothing, engines that were held against torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.exporter.targets import parse_target
from edgead.runtime.bundle import open_bundle
from edgead.runtime.engines import open_engine
from edgead.runtime.errors import InputError, OutputExistsError, ParityError
from edgead.runtime.inspector import Inspector


def contents(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("text", "engine"),
    [("onnx", "onnx-fp32"), ("openvino:fp16", "openvino-fp16"), ("tensorrt", "tensorrt-fp32")],
)
def test_targets_are_full_precision_unless_they_say_else(text: str, engine: str) -> None:
    assert parse_target(text).engine == engine


@pytest.mark.parametrize(("text", "near"), [("onxx", "onnx"), ("openvino:fp61", "openvino:fp16")])
def test_a_misspelt_target_is_answered_with_near_ones(text: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(text)
    assert near in caught.value.next_step


@pytest.mark.parametrize("text", ["", ":", "onnx:", "onnx:fp32:fp16", ":fp16", "ONNX"])
def test_a_half_written_target_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_target(text)


def test_int8_says_that_it_is_not_there_yet() -> None:
    with pytest.raises(InputError, match=r"no int8 engines") as caught:
        parse_target("openvino:int8")
    assert "openvino:fp16" in caught.value.next_step


def test_every_engine_of_a_bundle_carries_its_parity(small_bundle: Path) -> None:
    bundle = open_bundle(small_bundle)
    assert [engine.name for engine in bundle.manifest.engines] == [
        "onnx-fp32",
        "onnx-fp16",
        "openvino-fp32",
        "openvino-fp16",
    ]
    for engine in bundle.manifest.engines:
        assert engine.parity is not None
        assert engine.tolerance is not None
        assert engine.parity.map <= engine.tolerance.map
        assert (engine.parity.map < 1e-4) == (engine.precision == "fp32")
    report = json.loads(bundle.read("parity.json"))
    assert report["engines"]["onnx-fp32"]["engine"]["trunk"]["patches"] < 1e-4
    assert "openvino-fp16" in bundle.read("card.md").decode()


def test_the_same_detector_gives_the_same_bundle(colours: FittedDetector, tmp_path: Path) -> None:
    targets = ["onnx", "onnx:fp16", "openvino:fp16", "tensorrt"]
    export_bundle(colours, tmp_path / "a", targets, name="same")
    export_bundle(colours, tmp_path / "b", targets, name="same")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_score_without_a_map_is_inspected(colours: FittedDetector, tmp_path: Path) -> None:
    bundle = export_bundle(colours, tmp_path / "colour.edgead", ["onnx", "openvino"])
    assert bundle.golden_maps() is None
    with torch.inference_mode():
        features = colours.trunk.module()(torch.from_numpy(colours.golden[:1].copy()))
    for target in ("onnx", "openvino"):
        inspector = Inspector(bundle, target=target)
        inspection = inspector.inspect(colours.golden[0])
        inspector.close()
        assert inspection.anomaly_map is None
        assert inspection.score == pytest.approx(bundle.manifest.golden[0].score, abs=1e-5)
    assert features[0].shape == (1, 4, 3)


def test_an_existing_output_is_kept_unless_forced(colours: FittedDetector, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"--force"):
        export_bundle(colours, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "precious"
    export_bundle(colours, tmp_path / "bundle", force=True)
    assert not (tmp_path / "bundle" / "mine.txt").exists()


def test_a_capacity_below_the_initial_rows_is_refused(colours: FittedDetector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least the 32 initial rows of bank.normal"):
        export_bundle(colours, tmp_path / "bundle", ["tensorrt"], capacity=31)
    assert not list(tmp_path.iterdir())


def test_a_failed_gate_leaves_nothing_and_keeps_what_was_there(
    make_detector: Callable[..., FittedDetector], tmp_path: Path
) -> None:
    class OutOfRange(nn.Module):
        """Right in float32; its middle value is beyond the 65,504 of float16."""

        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Parameter(torch.tensor(1e5), requires_grad=False)

        def forward(self, image: Tensor) -> tuple[Tensor]:
            pixels = image.permute(0, 3, 1, 2).float() * self.large
            return ((nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)) / self.large / 255,)

    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old.txt").write_text("old")
    detector = make_detector(trunk=OutOfRange())
    with pytest.raises(ParityError, match=r"'onnx-fp16'.*begins in the trunk"):
        export_bundle(detector, tmp_path / "bundle", ["onnx", "onnx:fp16"], force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "old.txt").read_text() == "old"


def test_an_interrupt_leaves_nothing(colours: FittedDetector, tmp_path: Path) -> None:
    class Interrupting:
        """Golden frames at which the operator presses Ctrl-C, once engines were built."""

        def __init__(self, frames: np.ndarray) -> None:
            self.frames, self.passes = frames, 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            if self.passes > 1:
                raise KeyboardInterrupt
            return iter(self.frames)

        def __len__(self) -> int:
            return len(self.frames)

    golden: Any = Interrupting(colours.golden)
    # `enumerate` asks for a second pass in the gate, after torch's own.
    with pytest.raises(KeyboardInterrupt):
        export_bundle(replace(colours, golden=golden), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_named_after_its_output(colours: FittedDetector, tmp_path: Path) -> None:
    assert export_bundle(colours, tmp_path / "part 7 (left).bundle").manifest.name == "part-7--left-"


def test_engines_of_a_single_file_bundle_open(colours: FittedDetector, tmp_path: Path) -> None:
    bundle = export_bundle(colours, tmp_path / "one.edgead", ["openvino:fp16"])
    assert (tmp_path / "one.edgead").is_file()
    with open_engine(bundle, "openvino:fp16") as engine, engine.trunk(batch=2) as trunk:
        assert trunk.infer({"image": colours.golden[:2]})["patches"].shape == (2, 4, 3)
