"""What an isolated inspector and its worker process say to each other.

Two stream sockets lead to the worker: one for frames, one for everything else, so that a new knowledge pack never
stands in the way of a frame. A message is two lengths, a msgpack record and raw bytes. Frames themselves lie in shared
memory, an anonymous file that dies with its last user: neither a killed worker nor a killed parent leaves it behind.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import socket
import struct
import tempfile
from typing import Any, TypeVar, get_type_hints

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edgead.runtime import errors
from edgead.runtime.bundle import Bundle
from edgead.runtime.errors import EdgeadError, EngineError
from edgead.runtime.inspection import Inspection
from edgead.runtime.spec import canonical_json

_LENGTHS = struct.Struct("<IQ")
_MOST_RECORD = 2**24
"""Bytes of a record; regions of a noisy map are the largest."""

_FACTS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Inspection).items() if name != "anomaly_map"}

Record = TypeVar("Record")


class Order(Struct, frozen=True):
    """What a worker is to open. The packs follow as raw bytes, one behind the other."""

    bundle: str
    manifest: str
    """SHA-256 of the manifest that the parent opened: a bundle that is replaced meanwhile is another one."""
    target: str | None
    threads: int | None
    device: str | None
    suppression: str | None
    packs: tuple[int, ...]
    """Bytes of each pack."""


class Ready(Struct, frozen=True, tag="ready"):
    """The worker's engine is open and has run once."""

    engine: str
    threads: int


class Refused(Struct, frozen=True, tag="refused"):
    """An error of edgead in the worker."""

    kind: str
    wanted: str
    got: str
    next_step: str

    def error(self) -> EdgeadError:
        """The error as it was raised; `EngineError` for a kind that is not in the tree."""
        kind = getattr(errors, self.kind, None)
        chosen = kind if isinstance(kind, type) and issubclass(kind, EdgeadError) else EngineError
        return chosen(wanted=self.wanted, got=self.got, next_step=self.next_step)


class Look(Struct, frozen=True):
    """The frame in the shared memory is to be inspected."""

    shape: tuple[int, int, int]
    product: str


class Answer(Struct, frozen=True):
    """An `Inspection` without its map, whose bytes follow."""

    facts: dict[str, Any]
    """Its other attributes by name, as msgspec spells them."""
    map_shape: tuple[int, int] | None


class Swap(Struct, frozen=True, tag="swap"):
    """The pack that follows is to become active."""


class Swapped(Struct, frozen=True, tag="swapped"):
    """It is."""

    old: str | None
    new: str


class Embed(Struct, frozen=True, tag="embed"):
    """The frame that follows is to be embedded."""

    shape: tuple[int, int, int]


class Embedded(Struct, frozen=True, tag="embedded"):
    """Names and shapes of the features, float32, whose bytes follow."""

    features: dict[str, tuple[int, ...]]


Asked = Swap | Embed
Replied = Swapped | Embedded | Refused


def manifest_digest(bundle: Bundle) -> str:
    """SHA-256 of a bundle's manifest, 64 hex digits; it names the content of every file."""
    return hashlib.sha256(canonical_json(bundle.manifest)).hexdigest()


def refused(error: Exception) -> Refused:
    """An exception as a message; what is no error of edgead becomes an `EngineError`."""
    if isinstance(error, EdgeadError):
        return Refused(type(error).__name__, error.wanted, error.got, error.next_step)
    return Refused("EngineError", "an answer of the engine", f"{type(error).__name__}: {error}", "")


def to_answer(inspection: Inspection) -> tuple[Answer, bytes | memoryview]:
    """An inspection as a message: the record, and the bytes of its map."""
    facts = {name: msgspec.to_builtins(getattr(inspection, name)) for name in _FACTS}
    found = inspection.anomaly_map
    if found is None:
        return Answer(facts, None), b""
    return Answer(facts, (found.shape[0], found.shape[1])), raw(np.ascontiguousarray(found, np.float32))


def from_answer(answer: Answer, data: bytearray, total: float) -> Inspection:
    """The inspection that was sent; `total` is what the caller waited, in milliseconds."""
    facts = {name: msgspec.convert(answer.facts[name], kind) for name, kind in _FACTS.items()}
    facts["timings"] = {**facts["timings"], "total": total}
    found = None if answer.map_shape is None else np.frombuffer(data, np.float32).reshape(answer.map_shape)
    return Inspection(anomaly_map=found, **facts)


def raw(array: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array that is not empty, not copied."""
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # an array is a buffer, which numpy's stubs do not say


def send(channel: socket.socket, record: Struct, *parts: bytes | memoryview) -> None:
    """Send a record and the bytes that follow it.

    Raises:
        OSError: the other side is gone, or took nothing within the channel's timeout.
    """
    head = msgspec.msgpack.encode(record)
    channel.sendall(_LENGTHS.pack(len(head), sum(len(part) for part in parts)) + head)
    for part in parts:
        if len(part):
            channel.sendall(part)


def receive(channel: socket.socket, kind: type[Record] | Any) -> tuple[Record, bytearray]:
    """The next record, of type `kind`, and the bytes that follow it.

    Raises:
        EOFError: the other side is gone.
        OSError: it sent nothing within the channel's timeout, or the channel is broken.
    """
    head, body = _LENGTHS.unpack(_exactly(channel, _LENGTHS.size))
    if head > _MOST_RECORD:
        raise EOFError("not a message")
    record: Record = msgspec.msgpack.decode(_exactly(channel, head), type=kind)
    return record, _exactly(channel, body)


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        more = channel.recv_into(view[got:])
        if not more:
            raise EOFError("the other side is gone")
        got += more
    return data


class FrameArea:
    """Shared memory for one frame. The parent makes it and lets it grow; the worker maps what it was told of.

    Args:
        descriptor: of the file that is shared; None to make a new one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Copy a frame, uint8 [H, W, 3] in any memory order, into the area."""
        if self._map is None or len(self._map) < frame.nbytes:
            # A mapping that arrays still look at cannot be closed; it goes with the last of them.
            os.ftruncate(self.descriptor, frame.nbytes)
            self._map = mmap.mmap(self.descriptor, frame.nbytes)
        self._view(frame.shape)[...] = frame

    def frame(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The frame in the area, not copied: it is another one after the next `write`."""
        size = shape[0] * shape[1] * shape[2]
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self.descriptor, size)
        return self._view(shape)

    def close(self) -> None:
        """Let go of the file. The memory goes when the worker has let go of it too."""
        self._map = None
        os.close(self.descriptor)

    def _view(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        assert self._map is not None
        return np.frombuffer(self._map, np.uint8, count=int(np.prod(shape))).reshape(shape)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("edgead-frame", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
