"""ONNX becomes OpenVINO IR: deterministic, half the size in fp16."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgead.runtime.errors import EngineError

pytest.importorskip("openvino")
from edgead.exporter.openvino_from_onnx import openvino_from_onnx


@pytest.fixture(scope="module")
def trunk(small_bundle: Path) -> Path:
    return small_bundle / "engines/onnx-fp32/trunk.onnx"


def converted(source: Path, folder: Path, precision: str) -> tuple[bytes, bytes]:
    folder.mkdir()
    names = openvino_from_onnx(source, folder, "trunk", precision=precision)  # type: ignore[arg-type]
    assert names == ["trunk.xml", "trunk.bin"]
    return (folder / "trunk.xml").read_bytes(), (folder / "trunk.bin").read_bytes()


def test_the_same_model_gives_the_same_bytes(trunk: Path, tmp_path: Path) -> None:
    first = converted(trunk, tmp_path / "a", "fp16")
    assert converted(trunk, tmp_path / "b", "fp16") == first


def test_half_precision_halves_the_weights(trunk: Path, tmp_path: Path) -> None:
    _, full = converted(trunk, tmp_path / "full", "fp32")
    _, half = converted(trunk, tmp_path / "half", "fp16")
    assert len(half) < 0.55 * len(full)


def test_no_path_of_this_machine_is_left_in_it(trunk: Path, tmp_path: Path) -> None:
    xml, _ = converted(trunk, tmp_path / "a", "fp32")
    assert str(tmp_path).encode() not in xml
    assert str(trunk.parent).encode() not in xml


def test_a_file_that_is_no_model_is_refused_with_what_openvino_said(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"wanted trunk as an OpenVINO model"):
        openvino_from_onnx(tmp_path / "broken.onnx", tmp_path, "trunk", precision="fp32")
