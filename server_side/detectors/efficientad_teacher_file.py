"""Teachers of EfficientAD as files: one serves many parts, and published ones are read as they are.

Ours are safetensors with what they were distilled from. Published checkpoints (`.pth`) of other implementations hold
PDN-S under the names `conv1` to `conv4` or as a sequence `0`, `3`, `6`, `8`; they are read as plain tensors only. What
a teacher says is standardised over the normals of each fit, so a file's scale does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgead.runtime.errors import BackboneError
from edgead.server_side.detectors.efficientad_networks import PatchDescription
from edgead.server_side.tensor_files import ForeignFileError, read_checkpoint, read_tensors, write_tensors

SCHEMA = "2"
_KIND = "teacher"
_LAYERS = ("first", "second", "third", "last")
_PUBLISHED = (("conv1", "conv2", "conv3", "conv4"), ("0", "3", "6", "8"))
"""What others call the four convolutions."""


def write_teacher(path: Path, teacher: PatchDescription, record: Mapping[str, Any]) -> None:
    """Write a teacher, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        teacher: with its weights.
        record: how it was made, JSON-like.

    Raises:
        StorageError: the file system refused.
    """
    write_tensors(path, teacher, _KIND, SCHEMA, record)


def read_teacher(path: Path) -> tuple[PatchDescription, dict[str, Any]]:
    """Read a teacher of PDN-S: our own file, or a published checkpoint (`.pth`, `.pt`).

    Returns:
        the teacher, frozen, and how it was made as far as the file says.

    Raises:
        BackboneError: no such file, something else, or a network of other sizes.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise BackboneError(
            wanted=f"a teacher at {path}",
            got="a folder" if path.is_dir() else "nothing there",
            next_step="Name a file of an earlier fit or a published checkpoint.",
        )
    try:
        if path.suffix in (".pth", ".pt"):
            state, record = _renamed(read_checkpoint(path, _KIND)), {"published": path.name}
        else:
            state, record = read_tensors(path, _KIND, SCHEMA)
    except ForeignFileError as error:
        raise BackboneError(
            wanted=f"a teacher in {path}: edgead's safetensors, or a checkpoint of PDN-S",
            got=f"something else ({error})",
            next_step="Name a file of an earlier fit or a published checkpoint.",
        ) from error
    teacher = PatchDescription()
    wanted = {name: list(tensor.shape) for name, tensor in teacher.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    if found != wanted:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise BackboneError(
            wanted=f"a teacher of PDN-S: {name} {wanted.get(name, 'not among its weights')}",
            got=f"{found.get(name, 'none')} in {path}",
            next_step="Name the small teacher with 384 channels; PDN-M is another network.",
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise BackboneError(wanted="a teacher of finite numbers", got=f"NaN or infinity in {path}")
    teacher.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return teacher.eval().requires_grad_(False), record


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint by our names."""
    names = next((names for names in _PUBLISHED if f"{names[0]}.weight" in state), None)
    if names is None:
        raise ForeignFileError(f"none of the layers {', '.join(first for first, *_ in _PUBLISHED)}")
    ours = dict(zip(names, _LAYERS, strict=True))
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{ours.get(layer, layer)}.{kind}"] = tensor
    return renamed


__all__ = ["SCHEMA", "read_teacher", "write_teacher"]
