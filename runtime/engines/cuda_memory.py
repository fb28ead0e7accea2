"""One NVIDIA GPU through the CUDA runtime's Python bindings: what it is, memory on it, copies, a stream.

The bindings (`cuda.bindings`, or `cuda.cudart` before 12.6) are imported when a GPU is opened, not before.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EngineError, InputError, missing_dependency


class Cuda:
    """An open GPU.

    Attributes:
        compute_capability: such as '8.6'.
        name: the product's name, such as 'NVIDIA RTX A2000'.
    """

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime = runtime
        self._index = index
        self.activate()
        properties = self._call("cudaGetDeviceProperties", index)
        self.compute_capability = f"{properties.major}.{properties.minor}"
        name = properties.name
        self.name = (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip("\0 ")

    def activate(self) -> None:
        """Make it the calling thread's GPU; CUDA keeps that choice by thread."""
        self._call("cudaSetDevice", self._index)

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes on the GPU."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._call("cudaFree", address)

    def stream(self) -> Any:
        """A new stream: a queue of work on the GPU."""
        return self._call("cudaStreamCreate")

    def drop_stream(self, stream: Any) -> None:
        """End a stream."""
        self._call("cudaStreamDestroy", stream)

    def upload(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Queue a copy of `array` (C-contiguous) to the GPU; keep it until the stream is done."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Queue a copy from the GPU into `array`; it is there when the stream is done."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def wait(self, stream: Any) -> None:
        """Wait until the stream has done all its work."""
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            raise EngineError(
                wanted=f"the CUDA call {name} to succeed",
                got=str(getattr(status, "name", status)),
                next_step="Look at the GPU's state and free memory with: nvidia-smi",
            )
        return results[0] if results else None


def open_gpu(device: str | None = None) -> Cuda:
    """Open a GPU.

    Args:
        device: its number, as '1' or 'cuda:1'; the first one if None.

    Raises:
        MissingDependencyError: no CUDA bindings for Python are installed.
        InputError: `device` is no number of a GPU that is there.
        EngineError: no driver, a driver that is too old, or no GPU.
    """
    runtime = _bindings()
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise EngineError(
            wanted="an NVIDIA GPU with its driver, to use or build a TensorRT plan",
            got=str(getattr(status, "name", status)) if int(status) != 0 else "a driver without any GPU",
            next_step="Install or update the driver, or use another engine of the bundle: --target onnx",
        )
    number = (device or "0").removeprefix("cuda:")
    if not number.isdecimal() or int(number) >= int(count):
        raise InputError(
            wanted=f"a GPU number from 0 to {int(count) - 1}", got=repr(device), next_step="Name one of them."
        )
    return Cuda(runtime, int(number))


def _bindings() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise missing_dependency("cuda.bindings", "tensorrt", "memory on the GPU")


def empty(shape: tuple[int | str, ...], dtype: str) -> NDArray[Any]:
    """A host array to download into."""
    return np.empty([int(size) for size in shape], np.dtype(dtype))
