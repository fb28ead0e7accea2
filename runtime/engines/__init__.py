"""Engines: one interface over the inference libraries, one module per library, imported only when used.

An `Engine` opens the trunk and the heads of one engine of a bundle. A `Session` is one compiled graph. The
public `Session.infer` checks names, dtypes and shapes and turns foreign exceptions into `EngineError`; a
library's module supplies only `_infer`.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EdgeadError, EngineError, InputError, missing_dependency
from edgead.runtime.spec import EngineRecord, Port

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle
    from edgead.runtime.knowledge import Pack

Arrays = Mapping[str, NDArray[Any]]

_MODULES = {
    "onnx": ("edgead.runtime.engines.onnxruntime", "OnnxRuntimeEngine", ("onnxruntime",)),
    "openvino": ("edgead.runtime.engines.openvino", "OpenVinoEngine", ("openvino",)),
    "tensorrt": ("edgead.runtime.engines.tensorrt", "TensorRtEngine", ("tensorrt", "tensorrt_rtx")),
}
_PREFERENCE = ("tensorrt", "openvino", "onnx")
"""Fastest first; see `default_record`."""
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu")
"""One of them is there where NVIDIA's driver is: the first on ordinary machines, the others on Jetson."""


class Session(abc.ABC):
    """One compiled graph: named arrays in, named arrays out. Not for two threads at once.

    Attributes:
        inputs: what `infer` takes; the batch is a number here.
        outputs: what `infer` gives.
    """

    def __init__(self, name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs

    def infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Args:
            feeds: an array for each input, in its dtype and shape; C-contiguous arrays are not copied.

        Returns:
            an array for each output. They may share memory with the session: read or copy them before
            the next call.

        Raises:
            EngineError: an input is missing, unknown or of another dtype or shape; or the library failed.
        """
        if feeds.keys() != {port.name for port in self.inputs}:
            raise self._refusal(
                f"the inputs {', '.join(port.name for port in self.inputs)}",
                ", ".join(sorted(feeds)) or "none",
            )
        for port in self.inputs:
            array = feeds[port.name]
            if array.dtype != port.dtype or array.shape != port.shape:
                raise self._refusal(
                    f"'{port.name}' as {port.dtype} {list(port.shape)}", f"{array.dtype} {list(array.shape)}"
                )
        try:
            return self._infer(feeds)
        except EdgeadError:
            raise
        except Exception as error:  # the library's own exception types stop here
            raise EngineError(
                wanted=f"an answer of {self.name}",
                got=f"{type(error).__name__}: {first_line(error)}",
                next_step="Check the machine with: edgead bench BUNDLE",
            ) from error

    def _refusal(self, wanted: str, got: str) -> EngineError:
        return EngineError(wanted=f"{wanted} for {self.name}", got=got, next_step="Prepare the frame first.")

    @abc.abstractmethod
    def _infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]: ...

    def close(self) -> None:
        """Free what the library holds; the session is of no use afterwards. May be called twice."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine(abc.ABC):
    """The compiled trunk and heads of one engine of a bundle.

    Heads are made here, with the knowledge bound in the way that is fast for the library: as constants on
    a CPU, as device-resident buffers on a GPU. Making one is off the frame path and touches no other.

    Args:
        bundle: where the files are read from, checked.
        record: which engine.
        threads: processor threads per inference; None for all that the process may use, or `OMP_NUM_THREADS` of them.
        device: the library's name of a device, None for its default.
    """

    def __init__(
        self, bundle: Bundle, record: EngineRecord, threads: int | None = None, device: str | None = None
    ) -> None:
        self.bundle = bundle
        self.record = record
        self.threads = threads if threads is not None else available_threads()
        self.device = device
        self.spec = bundle.manifest.detector

    def normality(self) -> Engine | None:
        """The engine's second pair of graphs as an engine of its own; None in a bundle without it.

        Its heads take the same packs as those of this one, and bind the arrays that they have ports for.

        Raises:
            EngineMismatchError: its plans were built for another GPU or library.
        """
        normality, record = self.bundle.manifest.normality, normality_record(self.record)
        if normality is None or record is None:
            return None
        pair = self._pair(record)
        pair.spec = normality.detector
        return pair

    def _pair(self, record: EngineRecord) -> Engine:
        return type(self)(self.bundle, record, self.threads, self.device)

    def trunk(self, batch: int = 1) -> Session:
        """A session of the trunk: `image` uint8 [batch, H, W, 3] -> features.

        Raises:
            BundleError: the file is missing or edited.
            EngineError: the library refused it.
        """
        inputs, outputs = with_batch((self.spec.image,), batch), with_batch(self.spec.features, batch)
        return self._guard(f"trunk of {self.record.name}", lambda: self._trunk(inputs, outputs))

    def head(self, pack: Pack, batch: int = 1) -> Session:
        """A session of the head with `pack` bound: features -> outputs.

        Raises:
            KnowledgeError: the pack does not fit the detector or is over the engine's capacity.
            EngineError: the library refused it.
        """
        from edgead.runtime.knowledge import head_feeds

        taken = {port.name for port in self.spec.head_inputs()}
        feeds = head_feeds(pack, self.bundle.manifest.knowing, self.record.capacity)
        knowledge = {name: array for name, array in feeds.items() if name in taken}
        inputs, outputs = with_batch(self.spec.features, batch), with_batch(self.spec.outputs, batch)
        return self._guard(f"head of {self.record.name}", lambda: self._head(inputs, outputs, knowledge))

    def _guard(self, what: str, make: Any) -> Session:
        try:
            session: Session = make()
        except EdgeadError:
            raise
        except Exception as error:  # the library's own exception types stop here
            raise EngineError(
                wanted=f"the {what} in {self.record.made_with}",
                got=f"{type(error).__name__}: {first_line(error)}",
                next_step="Check the library's version here, or export the bundle again.",
            ) from error
        return session

    @abc.abstractmethod
    def _trunk(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Session: ...

    @abc.abstractmethod
    def _head(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knowledge: Arrays) -> Session: ...

    def close(self) -> None:
        """Free what the library holds beside the sessions. May be called twice."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(
    bundle: Bundle, target: str | None = None, *, threads: int | None = None, device: str | None = None
) -> Engine:
    """Open one engine of a bundle.

    Args:
        bundle: an open bundle.
        target: an engine's name ('onnx-fp32'), a target ('onnx'), a target with its precision
            ('openvino:fp16'), or None for the first that this machine has a library for.
        threads: processor threads per inference; None for all that the process may use, or `OMP_NUM_THREADS` of them.
        device: the library's name of a device, None for its default.

    Raises:
        BundleError: the bundle has no such engine.
        MissingDependencyError: the library is not installed; says which extra brings it.
        EngineMismatchError: a plan built for another GPU or library.
    """
    record = bundle.engine(target) if target is not None else default_record(bundle)
    module_name, class_name, libraries = _MODULES[record.target]
    if not is_available(record.target):
        extra = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "tensorrt-rtx"}[record.target]
        raise missing_dependency(libraries[0], extra, f"the engine '{record.name}'")
    engine: Engine = getattr(importlib.import_module(module_name), class_name)(bundle, record, threads, device)
    return engine


def default_record(bundle: Bundle) -> EngineRecord:
    """The engine that `open_engine` takes when none is named.

    Full precision comes before half, and TensorRT counts only where a GPU's driver is there.

    Raises:
        InputError: no library for any engine of the bundle is installed.
    """
    usable = [record for record in bundle.manifest.engines if _usable(bundle, record)]
    if not usable:
        raise InputError(
            wanted=f"a library for one of: {', '.join(r.name for r in bundle.manifest.engines)}",
            got="an environment without any of them",
            next_step="Run: pip install edgead 'edgead[openvino]'",
        )
    return min(usable, key=lambda record: (_PREFERENCE.index(record.target), record.precision != "fp32", record.name))


def normality_record(record: EngineRecord) -> EngineRecord | None:
    """The second pair of an engine's graphs as a record of its own; None if it has none."""
    pair = record.normality
    if pair is None:
        return None
    return msgspec.structs.replace(
        record,
        name=f"{record.name}.normality",
        trunk=pair.trunk,
        head=pair.head,
        tolerance=pair.tolerance,
        parity=pair.parity,
        normality=None,
    )


def _usable(bundle: Bundle, record: EngineRecord) -> bool:
    if not is_available(record.target):
        return False
    if record.target != "tensorrt":
        return True
    from edgead.runtime.engines.tensorrt_plans import has_plan

    pair = normality_record(record)
    plans = has_plan(bundle, record) and (pair is None or has_plan(bundle, pair))
    return plans and any(map(os.path.exists, _GPU_DEVICES))


def is_available(target: str) -> bool:
    """Whether a library for `target` is installed; nothing is imported to find out."""
    return any(importlib.util.find_spec(library) is not None for library in _MODULES[target][2])


def with_batch(ports: tuple[Port, ...], batch: int) -> tuple[Port, ...]:
    """The ports with the symbol `B` replaced by a number."""
    return tuple(
        Port(port.name, port.dtype, tuple(batch if size == "B" else size for size in port.shape)) for port in ports
    )


def available_threads() -> int:
    """Threads for one inference: as many as this process has processors, and no more than `OMP_NUM_THREADS` says.

    The engines here do not read that variable (OpenMP 5.2, section 21.2) for themselves; but whoever sets it for a
    service, or for processes side by side, means all its numerics. The first of a list counts; what is no number of
    threads is ignored.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(there, int(said)) if said.isdecimal() and int(said) > 0 else there


def first_line(error: Exception) -> str:
    """The first line of an exception's message, for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if its bytes are in C order, else a copy."""
    return np.ascontiguousarray(array)


__all__ = [
    "Arrays",
    "Engine",
    "Session",
    "available_threads",
    "contiguous",
    "default_record",
    "first_line",
    "is_available",
    "normality_record",
    "open_engine",
    "with_batch",
]
