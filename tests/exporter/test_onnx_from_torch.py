"""Traced graphs become plain, typed, deterministic ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn

from edgead.detector_file import FittedDetector
from edgead.exporter.onnx_float16 import to_float16
from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
from edgead.runtime.errors import DetectorError
from edgead.runtime.knowledge import head_feeds


@pytest.fixture(scope="module")
def trunk(bank: FittedDetector) -> bytes:
    model = onnx_from_torch(bank.trunk, (bank.spec.image,), bank.spec.features, part="trunk")
    return model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def half(trunk: bytes) -> bytes:
    return to_float16(onnx.load_from_string(trunk)).SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def head(bank: FittedDetector) -> bytes:
    model = onnx_from_torch(bank.head, bank.spec.head_inputs(), bank.spec.outputs, part="head")
    return model.SerializeToString(deterministic=True)


def run(model: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_are_named_and_shaped_as_the_ports(bank: FittedDetector, head: bytes) -> None:
    graph = onnx.load_from_string(head).graph
    ports = bank.spec.head_inputs()
    assert [(value.name, shape_of(value)) for value in graph.input] == [(port.name, list(port.shape)) for port in ports]
    assert "bank.normal.rows" in [value.name for value in graph.input]
    assert [(value.name, shape_of(value)) for value in graph.output] == [
        (port.name, list(port.shape)) for port in bank.spec.outputs
    ]


def test_old_parsers_read_it(trunk: bytes, head: bytes) -> None:
    for data in (trunk, head):
        model = onnx.load_from_string(data)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert model.ir_version == 8


def test_the_same_detector_gives_the_same_bytes(bank: FittedDetector, trunk: bytes, head: bytes) -> None:
    again = onnx_from_torch(bank.trunk, (bank.spec.image,), bank.spec.features, part="trunk")
    assert again.SerializeToString(deterministic=True) == trunk
    again = onnx_from_torch(bank.head, bank.spec.head_inputs(), bank.spec.outputs, part="head")
    assert again.SerializeToString(deterministic=True) == head


def test_nothing_of_the_exporting_machine_is_left_in_it(trunk: bytes, half: bytes, head: bytes) -> None:
    for data in (trunk, half, head):
        for leak in (b".py", b"stack_trace", b"site-packages", str(Path.cwd()).encode(), b"pytorch"):
            assert leak not in data


def test_batch_and_row_counts_stay_free(bank: FittedDetector, trunk: bytes, head: bytes) -> None:
    frames = np.concatenate([bank.golden, bank.golden])[:3]
    features = run(trunk, {"image": frames})
    one = run(trunk, {"image": frames[:1]})
    assert np.allclose(features["patches"][:1], one["patches"], atol=1e-5)
    feeds = head_feeds(bank.pack, bank.spec)
    several = run(head, {**features, **feeds})
    padded = run(head, {**features, **head_feeds(bank.pack, bank.spec, {"bank.normal": 777})})
    assert several["score"].shape == (3,)
    assert np.allclose(several["score"], padded["score"], rtol=1e-6)


def test_it_computes_what_torch_computes(bank: FittedDetector, trunk: bytes) -> None:
    with torch.inference_mode():
        wanted = bank.trunk.module()(torch.from_numpy(bank.golden[:2].copy()))[0].numpy()
    got = run(trunk, {"image": bank.golden[:2]})["patches"]
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_half_precision_is_typed_inside_and_plain_at_the_border(
    bank: FittedDetector, trunk: bytes, half: bytes
) -> None:
    model = onnx.load_from_string(half)
    onnx.checker.check_model(model, full_check=True)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert weights
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert len(half) < 0.6 * len(trunk)
    wanted = run(trunk, {"image": bank.golden[:2]})["patches"]
    got = run(half, {"image": bank.golden[:2]})["patches"]
    difference = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 0 < difference < 1e-2


def test_sums_that_leave_half_precision_are_kept_in_full(make_detector: Callable[..., FittedDetector]) -> None:
    class Summed(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor]:
            # The sum of 256 pixels of up to 255 * 4 is far beyond 65,504.
            pixels = image.permute(0, 3, 1, 2).float() * 4.0
            total = pixels.sum((2, 3)) / 1024.0
            return (total.unsqueeze(1).expand(-1, 4, -1).contiguous(),)

    detector = make_detector(trunk=Summed())
    frames = np.full((1, 16, 16, 3), 250, np.uint8)
    model = onnx_from_torch(
        detector.trunk, (detector.spec.image,), detector.spec.features, part="trunk", precision="fp16"
    )
    got = run(model.SerializeToString(), {"image": frames})["patches"]
    assert got.dtype == np.float32
    assert np.allclose(got, 250.0, rtol=2e-3)


def test_weights_over_the_limit_lie_beside_the_model(bank: FittedDetector, trunk: bytes, tmp_path: Path) -> None:
    small = save_onnx(onnx.load_from_string(trunk), tmp_path, "small.onnx")
    large = save_onnx(onnx.load_from_string(trunk), tmp_path, "large.onnx", external_bytes=1000)
    assert small == ["small.onnx"]
    assert large == ["large.onnx", "large.onnx.data"]
    assert (tmp_path / "large.onnx").stat().st_size < 0.5 * (tmp_path / "small.onnx").stat().st_size
    session = ort.InferenceSession(str(tmp_path / "large.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"image": bank.golden[:1]}
    assert np.array_equal(session.run(None, feeds)[0], run(trunk, feeds)["patches"])


def test_an_operation_that_onnx_lacks_is_named(make_detector: Callable[..., FittedDetector]) -> None:
    class Spectral(nn.Module):
        def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> tuple[Tensor]:
            return (torch.linalg.svdvals(patches)[:, 0] + normal.sum() * 0 + rows.sum() * 0,)

    detector = make_detector(head=Spectral())
    with pytest.raises(DetectorError, match=r"_linalg_svd"):
        onnx_from_torch(detector.head, detector.spec.head_inputs(), detector.spec.outputs, part="head")


def test_nothing_is_said_while_it_works(colours: FittedDetector, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = onnx_from_torch(colours.trunk, (colours.spec.image,), colours.spec.features)
    assert isinstance(model, ModelProto)
    assert capfd.readouterr() == ("", "")
