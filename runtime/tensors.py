"""Canonical safetensors: named arrays to bytes and back, where the same content is always the same bytes.

The layout is that of the safetensors format (8-byte little-endian header length, JSON header, data), narrowed
until one content has one encoding:

- the header is JSON with sorted keys, no white space and UTF-8, padded at its end with spaces so that the
  data starts at a multiple of 64 bytes;
- arrays lie in the order of their names, little-endian, C-contiguous, without gaps, to the end of the file;
- `__metadata__` (strings only) is there exactly if there is metadata.

Any safetensors reader opens such a file; `decode_tensors` opens nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError

ALIGNMENT = 64
MAX_ARRAYS = 1024
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31 - 1

DTYPES: Mapping[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""safetensors' names of the dtypes that edgead uses."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ARRAY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")
_DAMAGED = "Fetch or copy the file again; it must come from edgead unchanged."


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def little_endian(array: NDArray[Any]) -> NDArray[Any]:
    """`array` as C-contiguous little-endian; itself where it already is."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)


def check_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Check that the format can hold little-endian `arrays`.

    Returns:
        dtype and shape by name.

    Raises:
        KnowledgeError: a name, dtype or number of dimensions that it does not have, or too many arrays.
    """
    _check_count(len(arrays))
    for name, array in arrays.items():
        _check_array(name, array.shape)
        if array.dtype not in _NAMES:
            raise KnowledgeError(
                wanted=f"{name!r} as one of {', '.join(dtype.name for dtype in _NAMES)}",
                got=str(array.dtype),
                next_step="Convert the array first.",
            )
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def encode_tensors(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Named arrays as one canonical safetensors file.

    Raises:
        KnowledgeError: a name or dtype that the format does not have, or too many arrays or dimensions.
    """
    return b"".join(encoded_parts(arrays, metadata))


def encoded_parts(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The same bytes as `encode_tensors` in parts, so that hashing or writing holds no second copy."""
    ordered = {name: little_endian(arrays[name]) for name in sorted(arrays)}
    yield _header(check_tensors(ordered), metadata)
    for array in ordered.values():
        yield array.reshape(-1).view(np.uint8).data


def decode_tensors(data: bytes, *, header_limit: int) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of a canonical safetensors file.

    Args:
        data: the whole file.
        header_limit: most bytes that the JSON header may have.

    Returns:
        read-only arrays by name, views into `data` where its alignment allows; and the metadata.

    Raises:
        KnowledgeError: the bytes are truncated, too long, not safetensors, or not in the canonical form.
    """
    header = _header_bytes(data, header_limit)
    entries, metadata = _parsed(header)
    _check_count(len(entries))
    described: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name, entry in entries.items():
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise _bad(f"dtypes {', '.join(DTYPES)}", f"{entry.dtype!r} of array {name!r}")
        _check_array(name, entry.shape)
        described[name] = (dtype, entry.shape)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in described.values())
    if len(data) != 8 + len(header) + size:
        raise _bad(f"{8 + len(header) + size} bytes, by its header", f"{len(data)} bytes")
    if _header(described, metadata) != data[: 8 + len(header)]:
        raise _bad(
            "the canonical header (sorted keys, no white space, arrays in name order without gaps)",
            "another spelling of it",
        )
    arrays: dict[str, NDArray[Any]] = {}
    offset = 8 + len(header)
    for name in sorted(described):
        dtype, shape = described[name]
        count = math.prod(shape)
        if count:
            array = np.frombuffer(data, dtype, count, offset).reshape(shape)
            if not array.flags.aligned:
                array = array.copy()
        else:
            array = np.empty(shape, dtype)
        array.flags.writeable = False
        arrays[name] = array
        offset += dtype.itemsize * count
    return arrays, metadata


def _header_bytes(data: bytes, limit: int) -> bytes:
    if len(data) < 8:
        raise _bad("at least 8 bytes", f"{len(data)}")
    length = int.from_bytes(data[:8], "little")
    if length > limit:
        raise _bad(f"a header of at most {limit} bytes", f"a declared length of {length}")
    if length > len(data) - 8:
        raise _bad(f"a header of {length} bytes", f"a file that ends after {len(data) - 8} of them")
    return data[8 : 8 + length]


def _parsed(header: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = raw.pop("__metadata__", None)
        return (
            {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()},
            {} if metadata is None else msgspec.json.decode(metadata, type=dict[str, str]),
        )
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _bad("a safetensors header", f"something else ({error})") from error


def _check_count(count: int) -> None:
    if count > MAX_ARRAYS:
        raise _bad(f"at most {MAX_ARRAYS} arrays", f"{count}")


def _check_array(name: str, shape: tuple[int, ...]) -> None:
    if not _ARRAY_NAME.match(name):
        raise _bad("array names of letters, digits, '.', '_', '-'", repr(name[:200]))
    if len(shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_DIMENSION for size in shape):
        raise _bad(f"at most {MAX_DIMENSIONS} dimensions of 0 to {MAX_DIMENSION}", f"shape {shape} of array {name!r}")


def _header(described: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and padded JSON: everything that comes before the data."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(described):
        dtype, shape = described[name]
        end = offset + dtype.itemsize * math.prod(shape)
        content[name] = {"data_offsets": [offset, end], "dtype": _NAMES[dtype], "shape": list(shape)}
        offset = end
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bad(wanted: str, got: str) -> KnowledgeError:
    return KnowledgeError(wanted=f"a pack file with {wanted}", got=got, next_step=_DAMAGED)
