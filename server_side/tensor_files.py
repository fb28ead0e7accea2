"""Files of named tensors: our own safetensors, which say what they are, and checkpoints (`.pth`) of other code.

Both are read as plain tensors only: nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edgead.runtime.errors import StorageError, storage_errors
from edgead.runtime.files import write_file
from edgead.runtime.spec import canonical_json
from edgead.runtime.tensors import encode_tensors


class ForeignFileError(Exception):
    """The file is something else; the message says what, in one line."""


def write_tensors(path: Path, module: nn.Module, kind: str, schema: str, content: Mapping[str, Any]) -> None:
    """Write a module's tensors as safetensors, whole or not at all; the same content is always the same bytes.

    Args:
        path: the file; an existing one is replaced.
        module: whose state is written.
        kind: what the file is, such as 'teacher'.
        schema: of its content.
        content: JSON-like.

    Raises:
        StorageError: the file system refused.
    """
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}
    # safetensors' own writer puts its metadata in another order every time.
    metadata = {f"edgead.{kind}": schema, "content": canonical_json(dict(content)).decode()}
    write_file(path, encode_tensors(arrays, metadata))


def read_tensors(path: Path, kind: str, schema: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Returns:
        the tensors by name, and the content.

    Raises:
        ForeignFileError: no safetensors, or of another kind or schema.
        StorageError: the file cannot be read.
    """
    try:
        with storage_errors(path, f"to read the {kind}"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(f"edgead.{kind}") != schema:
                raise ForeignFileError(f"no {kind} of schema {schema}")
            content = json.loads(metadata["content"])
            # An open file of safetensors is no mapping: it has keys, and cannot be iterated.
            return {name: file.get_tensor(name) for name in file.keys()}, dict(content)  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ForeignFileError(_line(error)) from error


def read_checkpoint(path: Path, kind: str, within: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint of `torch.save`: a dictionary of tensors, or one that holds such a dictionary.

    Args:
        path: the file.
        kind: what is wanted of it, for a message.
        within: the key that the dictionary of tensors stands under.

    Raises:
        ForeignFileError: something else, or anything in it but tensors.
        StorageError: the file cannot be read.
    """
    try:
        with storage_errors(path, f"to read the {kind}"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(content if within is None else content[within])
    except StorageError:
        raise
    except Exception as error:  # the unpickler's refusals have a class of their own in every version
        raise ForeignFileError(_line(error)) from error
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise ForeignFileError("not only tensors")
    return state


def _line(error: Exception) -> str:
    words = f"no {error}" if isinstance(error, KeyError) else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = ["ForeignFileError", "read_checkpoint", "read_tensors", "write_tensors"]
