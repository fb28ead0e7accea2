"""TensorRT and TensorRT for RTX: compiled plans on an NVIDIA GPU, knowledge resident on it.

A plan is used only where library, version, compute capability and GPU are those that it was built for. A
head's banks are padded to the engine's capacity and copied to the GPU once, when the head is made; a frame
moves only pixels, features and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle
from edgead.runtime.engines import Arrays, Engine, Session, contiguous
from edgead.runtime.engines.cuda_memory import Cuda, empty, open_gpu
from edgead.runtime.engines.tensorrt_build import Backend, load_backend
from edgead.runtime.engines.tensorrt_plans import (
    describe,
    differences,
    plan_folder,
    read_plan,
    read_record,
    sources_of,
)
from edgead.runtime.errors import EngineError, EngineMismatchError, MissingDependencyError
from edgead.runtime.spec import DeviceMatch, EngineRecord, Port

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8"}


class TensorRtEngine(Engine):
    """Trunk and heads as TensorRT plans.

    Plans that this machine compiled for itself come before those of the bundle.

    Args:
        bundle: where the files are read from, checked.
        record: which engine.
        threads: not used; the work is on the GPU.
        device: number of the GPU, as '1' or 'cuda:1'.
        gpu: an open GPU instead of `device`.

    Raises:
        EngineError: no GPU or no driver.
        EngineMismatchError: no plan was built for this machine; says what there is.
        MissingDependencyError: the library or the CUDA bindings are not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        record: EngineRecord,
        threads: int | None = None,
        device: str | None = None,
        *,
        gpu: Cuda | None = None,
    ) -> None:
        super().__init__(bundle, record, threads, device)
        self._gpu = gpu if gpu is not None else open_gpu(device)
        self._backend, self._read = choose_plans(bundle, record, self._gpu)
        self._plans: dict[str, Any] = {}

    def _pair(self, record: EngineRecord) -> Engine:
        return TensorRtEngine(self.bundle, record, self.threads, self.device, gpu=self._gpu)

    def _trunk(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Session:
        return self._session("trunk", inputs, outputs, {})

    def _head(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knowledge: Arrays) -> Session:
        return self._session("head", inputs, outputs, knowledge)

    def _session(self, part: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knowledge: Arrays) -> Session:
        self._gpu.activate()
        if part not in self._plans:
            self._plans[part] = deserialise(self._backend, self._read(part), part)
        name = f"{part} of {self.record.name}"
        return TensorRtSession(name, inputs, outputs, self._plans[part], self._gpu, knowledge)

    def close(self) -> None:
        self._plans.clear()


def choose_plans(bundle: Bundle, record: EngineRecord, gpu: Cuda) -> tuple[Backend, Callable[[str], bytes]]:
    """The library to use and a reader of its plans ('trunk' or 'head' -> bytes) for this machine.

    Raises:
        EngineMismatchError: there is no plan, or none for this machine; says why for each.
        MissingDependencyError: there is one, and its library is not installed.
    """
    reasons: list[str] = []
    missing: MissingDependencyError | None = None
    folder = plan_folder(bundle, record)
    found = read_record(folder)
    candidates: list[tuple[DeviceMatch, Callable[[str], bytes]]] = []
    if folder is not None and found is not None:
        if found.sources == sources_of(bundle, record):
            place, compiled = folder, found
            candidates.append((found.match, lambda part: read_plan(place, compiled, part)))
        else:
            reasons.append("plans compiled here from another version of the bundle")
    if record.match is not None:
        paths = {"trunk": record.trunk, "head": record.head}
        candidates.append((record.match, lambda part: bundle.read(paths[part])))
    here = ""
    for match, read in candidates:
        try:
            backend = load_backend(match.library)
        except MissingDependencyError as error:
            missing = error
            continue
        local = this_machine(backend, gpu)
        here = describe(local)
        off = differences(match, local)
        if not off:
            return backend, read
        reasons.append(f"a plan for {describe(match)} (differs in {'; '.join(off)})")
    if missing is not None and not reasons:
        raise missing
    raise EngineMismatchError(
        wanted=f"a plan of '{record.name}' for {here or f'compute capability {gpu.compute_capability}, {gpu.name}'}",
        got="; ".join(reasons) or "only its source, which this machine has not compiled yet",
        next_step=f"Run: edgead compile {bundle.path}",
    )


def this_machine(backend: Backend, gpu: Cuda) -> DeviceMatch:
    """What a plan must have been built for to be used here."""
    return DeviceMatch(backend.library, backend.version, gpu.compute_capability, gpu.name)


def deserialise(backend: Backend, plan: bytes, part: str) -> Any:
    """A plan loaded by its library.

    Raises:
        EngineError: it refused, as it does without a driver; says what it said.
    """
    backend.errors.clear()
    try:
        runtime = backend.trt.Runtime(backend.logger)
        engine = runtime.deserialize_cuda_engine(plan)
    except Exception as error:  # bindings raise whatever their C++ side threw
        backend.errors.append(f"{type(error).__name__}: {error}")
        engine = None
    if engine is None:
        raise backend.failure(
            f"the plan of the {part} to load",
            "Check GPU and driver with nvidia-smi, then run: edgead compile BUNDLE",
        )
    return engine


class TensorRtSession(Session):
    """One execution context of a plan, its buffers on the GPU and its own stream.

    Args:
        name: for messages.
        inputs: what `infer` takes.
        outputs: what `infer` gives.
        plan: a deserialised plan (`ICudaEngine`).
        gpu: where it runs.
        knowledge: inputs that are copied to the GPU now and stay there.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        plan: Any,
        gpu: Cuda,
        knowledge: Arrays,
    ) -> None:
        super().__init__(name, inputs, outputs)
        self._gpu = gpu
        self._addresses: dict[str, int] = {}
        self._stream: Any = None
        self._context: Any = None
        self._results = {port.name: empty(port.shape, port.dtype) for port in outputs}
        fixed = {key: contiguous(array) for key, array in knowledge.items()}
        _check_names(name, plan, {*fixed, *(port.name for port in (*inputs, *outputs))})
        try:
            self._context = plan.create_execution_context()
            if self._context is None:
                raise self._failed("a context to run in", "none; is there enough memory on the GPU?")
            self._stream = gpu.stream()
            for port in inputs:
                self._add(plan, port.name, empty(port.shape, port.dtype), is_input=True)
            for key, array in fixed.items():
                gpu.upload(self._add(plan, key, array, is_input=True), array, self._stream)
            for key, array in self._results.items():
                self._add(plan, key, array, is_input=False)
            # TensorRT for RTX finishes its kernels at the first run: better now than on the first frame.
            self._infer({port.name: np.zeros(empty(port.shape, port.dtype).shape, port.dtype) for port in inputs})
        except BaseException:
            self.close()
            raise

    def _add(self, plan: Any, name: str, array: NDArray[Any], *, is_input: bool) -> int:
        """Give one tensor its shape and its memory on the GPU; returns the address."""
        dtype = _DTYPES.get(plan.get_tensor_dtype(name).name, "another type")
        if dtype != array.dtype.name:
            raise self._failed(f"'{name}' as {array.dtype.name}", dtype)
        if is_input and not self._context.set_input_shape(name, tuple(array.shape)):
            raise self._failed(
                f"'{name}' of shape {list(array.shape)}",
                f"a plan for {[list(shape) for shape in plan.get_tensor_profile_shape(name, 0)]}",
            )
        address = self._gpu.allocate(max(array.nbytes, 1))
        self._addresses[name] = address
        self._context.set_tensor_address(name, address)
        return address

    def _infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        if self._context is None:
            raise RuntimeError("the session is closed")
        self._gpu.activate()
        held = {name: contiguous(array) for name, array in feeds.items()}
        for name, array in held.items():
            self._gpu.upload(self._addresses[name], array, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise self._failed("an answer", "a failure of the GPU's work")
        for name, array in self._results.items():
            self._gpu.download(array, self._addresses[name], self._stream)
        self._gpu.wait(self._stream)
        return dict(self._results)

    def _failed(self, wanted: str, got: str) -> EngineError:
        return EngineError(
            wanted=f"{wanted} of the {self.name}",
            got=got,
            next_step="Compile it again with: edgead compile BUNDLE --force",
        )

    def close(self) -> None:
        self._context = None
        addresses, self._addresses = self._addresses, {}
        for address in addresses.values():
            self._gpu.free(address)
        if self._stream is not None:
            self._gpu.drop_stream(self._stream)
            self._stream = None


def _check_names(name: str, plan: Any, wanted: set[str]) -> None:
    found = {plan.get_tensor_name(index) for index in range(plan.num_io_tensors)}
    if found != wanted:
        raise EngineError(
            wanted=f"a plan of the {name} with {', '.join(sorted(wanted))}",
            got=", ".join(sorted(found)),
            next_step="Export the bundle again.",
        )


__all__ = ["TensorRtEngine", "TensorRtSession", "choose_plans", "deserialise", "this_machine"]
