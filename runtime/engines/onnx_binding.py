"""Turn inputs of an ONNX model into constants, without the `onnx` package.

A head's ONNX takes its knowledge as inputs. ONNX Runtime prepares the constant side of a matrix product once
and for all, but an input on every frame. So before a head session is made, each knowledge input is
rewritten as an initializer whose data lies outside the model and is handed over beside it.

Only the few fields that this touches are parsed; everything else is copied byte for byte. Field numbers and
wire types are those of onnx.proto3 and the protocol buffers encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from edgead.runtime.errors import EngineError

LOCATION = b"edgead.knowledge"
"""The name of the external data; ONNX Runtime never opens it, since it is handed the arrays."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_VALUE_INFO_NAME = 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_EXTERNAL = 1
_DATA_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10}


def bind_inputs(model: bytes, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The model with each input named in `arrays` turned into an external initializer of that shape.

    Args:
        model: a serialised ONNX ModelProto.
        arrays: by input name; only dtype and shape are used here, the data goes to
            `SessionOptions.add_external_initializers`.

    Raises:
        EngineError: the bytes are no ONNX model, or it lacks one of the inputs.
    """
    try:
        out, missing = bytearray(), set(arrays)
        for number, wire, start, value, end in _fields(memoryview(model)):
            if number == _MODEL_GRAPH and wire == _BYTES:
                graph = _bind_graph(memoryview(model)[value:end], arrays, missing)
                out += _bytes_field(_MODEL_GRAPH, graph)
            else:
                out += memoryview(model)[start:end]
    except (IndexError, ValueError) as error:
        raise EngineError(
            wanted="a head as an ONNX model", got=f"bytes that are none ({error})", next_step="Export again."
        ) from error
    if missing:
        raise EngineError(
            wanted=f"the head's inputs {', '.join(sorted(missing))}",
            got="an ONNX model without them",
            next_step="Export the bundle again.",
        )
    return bytes(out)


def _bind_graph(graph: memoryview, arrays: Mapping[str, NDArray[Any]], missing: set[str]) -> bytes:
    out = bytearray()
    for number, _, start, value, end in _fields(graph):
        if number == _GRAPH_INPUT:
            name = _name(graph[value:end])
            if name in arrays:
                missing.discard(name)
                out += _bytes_field(_GRAPH_INITIALIZER, _external_tensor(name, arrays[name]))
                continue
        out += graph[start:end]
    return bytes(out)


def _external_tensor(name: str, array: NDArray[Any]) -> bytes:
    entries = {b"location": LOCATION, b"offset": b"0", b"length": str(array.nbytes).encode()}
    out = bytearray()
    for size in array.shape:
        out += _varint(_TENSOR_DIMS << 3 | _VARINT) + _varint(size)
    out += _varint(_TENSOR_TYPE << 3 | _VARINT) + _varint(_DATA_TYPES[array.dtype.name])
    out += _bytes_field(_TENSOR_NAME, name.encode())
    for key, text in entries.items():
        out += _bytes_field(_TENSOR_EXTERNAL, _bytes_field(1, key) + _bytes_field(2, text))
    out += _varint(_TENSOR_LOCATION << 3 | _VARINT) + _varint(_EXTERNAL)
    return bytes(out)


def _name(value_info: memoryview) -> str:
    for number, _, _, value, end in _fields(value_info):
        if number == _VALUE_INFO_NAME:
            return bytes(value_info[value:end]).decode()
    return ""


def _fields(data: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Each field as (number, wire type, where it starts, where its value starts, where it ends)."""
    position = 0
    while position < len(data):
        start = position
        key, position = _read_varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            value = position
            _, position = _read_varint(data, position)
        elif wire == _BYTES:
            length, value = _read_varint(data, position)
            position = value + length
        elif wire in (_FIXED64, _FIXED32):
            value = position
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if position > len(data):
            raise ValueError(f"a field that ends behind the data at byte {start}")
        yield key >> 3, wire, start, value, position


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise ValueError(f"an endless number at byte {position}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
