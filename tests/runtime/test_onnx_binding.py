"""Inputs become constants without the onnx package; the onnx package itself is the judge here."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgead.runtime.engines.onnx_binding import bind_inputs
from edgead.runtime.errors import EngineError


def model_with_bank() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "bank.normal"], ["y"])],
        "head",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4]),
            helper.make_tensor_value_info("bank.normal", TensorProto.FLOAT, [4, "N"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "N"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture
def bank() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)


def test_a_bound_input_becomes_an_external_initializer_of_its_shape(bank: NDArray[np.float32]) -> None:
    bound = onnx.ModelProto.FromString(bind_inputs(model_with_bank(), {"bank.normal": bank}))
    assert [value.name for value in bound.graph.input] == ["x"]
    (tensor,) = bound.graph.initializer
    assert (tensor.name, list(tensor.dims), tensor.data_type) == ("bank.normal", [4, 300], TensorProto.FLOAT)
    assert tensor.data_location == TensorProto.EXTERNAL
    assert {entry.key: entry.value for entry in tensor.external_data}["length"] == str(bank.nbytes)


def test_everything_else_in_the_model_is_left_as_it_was(bank: NDArray[np.float32]) -> None:
    before = onnx.ModelProto.FromString(model_with_bank())
    after = onnx.ModelProto.FromString(bind_inputs(model_with_bank(), {"bank.normal": bank}))
    assert after.graph.node == before.graph.node
    assert after.graph.output == before.graph.output
    assert after.opset_import == before.opset_import
    assert after.ir_version == before.ir_version


def test_a_session_with_a_bound_bank_computes_with_the_bank(bank: NDArray[np.float32]) -> None:
    options = ort.SessionOptions()
    options.add_external_initializers(["bank.normal"], [ort.OrtValue.ortvalue_from_numpy(bank)])
    session = ort.InferenceSession(bind_inputs(model_with_bank(), {"bank.normal": bank}), options)
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ bank, rtol=1e-5, atol=1e-6)


def test_a_model_without_the_input_is_refused_by_name(bank: NDArray[np.float32]) -> None:
    with pytest.raises(EngineError, match=r"bank\.missing"):
        bind_inputs(model_with_bank(), {"bank.missing": bank})


@pytest.mark.parametrize("damage", [b"\xff" * 40, b"\x3a\xff\xff\xff\x7f", b"\x3b\x00"])
def test_bytes_that_are_no_model_are_refused(damage: bytes, bank: NDArray[np.float32]) -> None:
    with pytest.raises(EngineError):
        bind_inputs(damage, {"bank.normal": bank})


def test_every_truncation_of_a_model_is_refused_or_lacks_nothing(bank: NDArray[np.float32]) -> None:
    model = model_with_bank()
    graph_end = len(model) - 6  # the opset record comes last; without it the graph is still whole
    for length in range(graph_end):
        with pytest.raises(EngineError):
            bind_inputs(model[:length], {"bank.normal": bank})
