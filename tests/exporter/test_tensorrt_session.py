"""What a TensorRT session does with memory, tried on a machine without a GPU.

`HostGpu` keeps "device" memory in ordinary memory, and `OnnxPlan` has the interface of a deserialised plan but
computes with ONNX Runtime on exactly the addresses that it was given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgead.detector_file import FittedDetector
from edgead.runtime.bundle import open_bundle
from edgead.runtime.engines import with_batch
from edgead.runtime.engines.tensorrt import TensorRtSession
from edgead.runtime.errors import EngineError
from edgead.runtime.knowledge import head_feeds

_NAMES = {
    "tensor(uint8)": "UINT8",
    "tensor(float)": "FLOAT",
    "tensor(int32)": "INT32",
}
_NUMPY = {"UINT8": np.uint8, "FLOAT": np.float32, "INT32": np.int32}


class HostGpu:
    """The interface of `Cuda` over the processor's own memory; work in a stream is done when it is queued."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.uploads: list[int] = []
        self.streams = 0

    def activate(self) -> None: ...

    def allocate(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.memory[address]

    def stream(self) -> int:
        self.streams += 1
        return self.streams

    def drop_stream(self, stream: int) -> None:
        self.streams -= 1

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        assert array.nbytes <= len(self.memory[address])
        self.uploads.append(array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        assert array.nbytes <= len(self.memory[address])
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self, stream: int) -> None: ...


class OnnxPlan:
    """The interface of `ICudaEngine` and `IExecutionContext` over an ONNX Runtime session."""

    def __init__(self, model: bytes, largest_batch: int = 4) -> None:
        self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.types = {
            value.name: _NAMES[value.type] for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }
        self.names = list(self.types)
        self.num_io_tensors = len(self.names)
        self.largest_batch = largest_batch
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.types[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1,), (1,), (self.largest_batch,)]

    def create_execution_context(self) -> OnnxPlan:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name != "image" or shape[0] <= self.largest_batch

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def _at(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(_NUMPY[self.types[name]])
        block = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(block, dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        feeds = {value.name: self._at(value.name, self.shapes[value.name]) for value in self.session.get_inputs()}
        for value, answer in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            self._at(value.name, answer.shape)[...] = answer
        return True


@pytest.fixture(scope="module")
def models(tensorrt_bundle: Path) -> dict[str, bytes]:
    bundle = open_bundle(tensorrt_bundle)
    return {part: bundle.read(f"engines/tensorrt-fp16/{part}.onnx") for part in ("trunk", "head")}


def trunk_session(bank: FittedDetector, plan: OnnxPlan, gpu: HostGpu, batch: int = 1) -> TensorRtSession:
    inputs, outputs = with_batch((bank.spec.image,), batch), with_batch(bank.spec.features, batch)
    return TensorRtSession("trunk of test", inputs, outputs, plan, gpu, {})  # type: ignore[arg-type]


@pytest.fixture
def head(bank: FittedDetector, models: dict[str, bytes]) -> Iterator[tuple[TensorRtSession, OnnxPlan, HostGpu]]:
    gpu, plan = HostGpu(), OnnxPlan(models["head"])
    capacity = {"bank.normal": 1024, "bank.anomalous": 1024}
    knowledge = head_feeds(bank.pack, bank.spec, capacity)
    inputs, outputs = with_batch(bank.spec.features, 1), with_batch(bank.spec.outputs, 1)
    session = TensorRtSession("head of test", inputs, outputs, plan, gpu, knowledge)  # type: ignore[arg-type]
    yield session, plan, gpu
    session.close()


def test_a_frame_goes_through_and_several_at_once(bank: FittedDetector, models: dict[str, bytes]) -> None:
    reference = ort.InferenceSession(models["trunk"], providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        frames = np.concatenate([bank.golden] * 3)[:batch]
        with trunk_session(bank, OnnxPlan(models["trunk"]), HostGpu(), batch) as trunk:
            got = trunk.infer({"image": frames})["patches"]
        assert np.array_equal(got, reference.run(None, {"image": frames})[0])


def test_knowledge_is_uploaded_once_and_stays(
    bank: FittedDetector, head: tuple[TensorRtSession, OnnxPlan, HostGpu]
) -> None:
    session, _, gpu = head
    port = with_batch(bank.spec.features, 1)[0]
    features = np.random.default_rng(0).random(port.shape, np.float32)  # type: ignore[arg-type]
    before = len(gpu.uploads)
    first = {name: array.copy() for name, array in session.infer({"patches": features}).items()}
    again = session.infer({"patches": features})
    assert gpu.uploads[before:] == [features.nbytes] * 2
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert first["score"][0] > 0
    assert int(first["nearest_row"].max()) < len(bank.pack.arrays["bank.normal"])


def test_the_first_run_is_not_the_first_frames(head: tuple[TensorRtSession, OnnxPlan, HostGpu]) -> None:
    assert head[1].runs == 1


def test_closing_gives_everything_back_even_twice(bank: FittedDetector, models: dict[str, bytes]) -> None:
    gpu = HostGpu()
    session = trunk_session(bank, OnnxPlan(models["trunk"]), gpu)
    assert gpu.memory
    session.close()
    session.close()
    assert not gpu.memory
    assert gpu.streams == 0
    with pytest.raises(EngineError, match=r"closed"):
        session.infer({"image": bank.golden[:1]})


def test_a_batch_that_the_plan_was_not_built_for_is_refused_and_frees_its_memory(
    bank: FittedDetector, models: dict[str, bytes]
) -> None:
    gpu = HostGpu()
    with pytest.raises(EngineError, match=r"'image' of shape \[9, 64, 64, 3\]"):
        trunk_session(bank, OnnxPlan(models["trunk"]), gpu, batch=9)
    assert not gpu.memory
    assert gpu.streams == 0


def test_a_plan_with_other_inputs_is_refused(bank: FittedDetector, models: dict[str, bytes]) -> None:
    with pytest.raises(EngineError, match=r"a plan of the trunk of test with image, patches; got .*bank\.normal"):
        trunk_session(bank, OnnxPlan(models["head"]), HostGpu())
