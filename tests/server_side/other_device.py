"""A device that is not the CPU, for machines without a GPU.

Its tensors say that they are on torch's 'meta' device, yet hold numbers, which the CPU computes with. As on a GPU, an
operation between devices raises, and so does drawing there from a generator of the CPU; what a GPU allows is allowed:
copies between devices, single numbers of the CPU, and indices of the CPU. It tells whether everything of a computation
is on one device, nothing of speed or rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class TensorThere(torch.Tensor):
    """A tensor on the other device."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> TensorThere:
        made: TensorThere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=DEVICE
        )
        made.value = value
        return made

    # With these two, Module.to keeps its parameters and swaps what is in them, as it does between CPU and GPU.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], _: Any, *__: Any) -> TensorThere:
        return TensorThere(inner["value"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


class OtherDevice(TorchDispatchMode):
    """While it is entered, `DEVICE` holds numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = any(isinstance(each, TensorThere) for each in tensors)
    first = isinstance(args[0], TensorThere) if args else False
    if func in _COPIES:
        there = first
    elif there and func in _INDEXED and not first:
        raise RuntimeError(f"{func}: a tensor of the CPU, and indices of another device")
    elif there and func not in _INDEXED and any(each.dim() and not isinstance(each, TensorThere) for each in tensors):
        raise RuntimeError(f"{func}: tensors of two devices")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == DEVICE
        kwargs["device"] = torch.device("cpu")
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU, and a result on another device")
    args_here, kwargs_here = tree_map(
        lambda each: each.value if isinstance(each, TensorThere) else each, (args, kwargs)
    )
    found = func(*args_here, **kwargs_here)
    if func._schema.is_mutable and isinstance(found, torch.Tensor):
        return kwargs.get("out", args[0])
    return tree_map(lambda each: TensorThere(each) if there and isinstance(each, torch.Tensor) else each, found)


def _value(each: Any) -> Any:
    return each.value if isinstance(each, TensorThere) else each
