"""Where networks are trained and photographs are embedded: the CPU, or a GPU if there is one.

Photographs, their embeddings and every random draw stay on the CPU; batches are moved to the device. A training
therefore sees the same batches everywhere, and its results differ between devices by rounding alone. What is
calibrated, kept or exported is moved back first.

Nobody has run this on a GPU yet. What the tests show, with a device that only says it is another one, is that no step
mixes devices and that the trained weights come back.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from edgead.runtime.errors import InputError, OutOfMemoryError

CPU = torch.device("cpu")


def torch_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: 'cpu', 'cuda' for the first GPU, 'cuda:N' for one of several, or 'auto': the first GPU that torch can
            use, else the CPU.

    Raises:
        InputError: another name, or a GPU that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else CPU
    if name == "cpu":
        return CPU
    found = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name)
    if found is None:
        raise InputError(
            wanted="a device to train on: auto, cpu, cuda, or one of several GPUs such as cuda:1",
            got=f"'{name}'",
            next_step="Name one of these, or leave --device out.",
        )
    number = int(found[1] or 0)
    if number >= count:
        raise InputError(
            wanted=f"the GPU '{name}' to train on",
            got=f"{count} that torch can use, from cuda:0 on" if count else "none that torch can use",
            next_step="Leave --device out: a GPU is used if there is one. Where torch sees none, install its build for "
            "GPUs, and look at the driver.",
        )
    return torch.device("cuda", number)


def knows_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; others imitate it, a hundred times slower than float32."""
    if device.type == "cuda":
        # Compute capability 8.0 on: before it, bfloat16 is imitated too.
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU if it has none."""
    found = next(chain(module.parameters(), module.buffers()), None)
    return CPU if found is None else found.device


@contextlib.contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on a device for a while; afterwards it is where it was.

    Raises:
        OutOfMemoryError: the device's memory does not hold it, or what is done with it.
    """
    home = device_of(module)
    try:
        with computing_on(device):
            module.to(device)
            yield
    finally:
        module.to(home)


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """On a GPU: convolutions in float32 as on the CPU, where torch takes TF32, and by the same algorithm each time.

    Raises:
        OutOfMemoryError: the GPU's memory does not hold it.
    """
    if device.type != "cuda":
        yield
        return
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            wanted=f"memory for this on {device}",
            got=str(error).partition(". ")[0],
            next_step="Name another --device, such as cpu, or a smaller --size.",
        ) from error


def on_cpu(state: Any) -> Any:
    """A state of a module or an optimizer with every tensor on the CPU, those that are there not copied."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        kept = copy.copy(state)
        for key, value in state.items():
            kept[key] = on_cpu(value)
        return kept
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


__all__ = ["CPU", "computing_on", "device_of", "knows_bfloat16", "on_cpu", "placed", "torch_device"]
