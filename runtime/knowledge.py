"""Knowledge packs: what an engine compares an image with. Bytes in, verified arrays or an error out.

A pack is one canonical safetensors file (see `edgead.runtime.tensors`). Its metadata holds four strings:

- `edgead.pack`: version of this schema, "1";
- `product`: the product it is for;
- `fingerprint`: the feature space its rows live in, 64 hex digits;
- `calibration`: thresholds as canonical JSON; fields at their defaults are left out.

Memory banks are float arrays [rows, dim] named `bank.*`, each with its row ids in `<name>.ids`: uint64
[rows], strictly increasing. What the rows of an array mean may stand in `<name>.text` (see
`edgead.runtime.notes`). Floats are finite and never -0.0. So one content has one encoding, and its
SHA-256 names it; parent, release and signature are not part of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime import files
from edgead.runtime.errors import KnowledgeError, storage_errors
from edgead.runtime.notes import NOTE, is_note
from edgead.runtime.pack_checks import calibration_text, check_arrays, check_names, read_calibration
from edgead.runtime.spec import DEFAULT_LIMITS, PACK_SCHEMA, Calibration, DetectorSpec, KnowledgePort, Limits
from edgead.runtime.tensors import check_tensors, decode_tensors, encode_tensors, encoded_parts, little_endian

IDS = ".ids"
"""What the name of a bank's row ids ends with."""


@dataclass(frozen=True, eq=False)
class Pack:
    """Knowledge of one product in one feature space. A pack that exists has passed every check.

    Attributes:
        product: the product's name.
        fingerprint: feature-space fingerprint, 64 hex digits.
        calibration: thresholds that belong to exactly these arrays.
        arrays: by name, in name order; read-only, C-contiguous, little-endian. Writable arrays are copied.

    Raises:
        KnowledgeError: an array, a name or a number breaks the rules of the format.
    """

    product: str
    fingerprint: str
    calibration: Calibration
    arrays: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        check_names(self.product, self.fingerprint)
        arrays = {name: _frozen(self.arrays[name]) for name in sorted(self.arrays)}
        check_tensors(arrays)
        check_arrays(arrays)
        object.__setattr__(self, "arrays", MappingProxyType(arrays))
        object.__setattr__(self, "calibration", read_calibration(calibration_text(self.calibration)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `encode_pack(self)` as 64 hex digits."""
        whole = hashlib.sha256()
        for part in encoded_parts(self.arrays, _metadata(self)):
            whole.update(part)
        return whole.hexdigest()

    @property
    def version(self) -> str:
        """The first 12 hex digits of the digest: what results and logs name."""
        return self.digest[:12]

    @property
    def banks(self) -> tuple[str, ...]:
        """Names of the memory banks."""
        return tuple(name for name in self.arrays if is_bank(name))

    def ids(self, bank: str) -> NDArray[np.uint64]:
        """Row ids of a bank, uint64 [rows].

        Raises:
            KnowledgeError: the pack has no such bank.
        """
        if bank + IDS not in self.arrays:
            raise KnowledgeError(
                wanted=f"a memory bank named {bank!r} in the pack of {self.product!r}",
                got=f"banks {', '.join(self.banks) or 'none'}",
                next_step="Name one of these.",
            )
        return self.arrays[bank + IDS]


def is_bank(name: str) -> bool:
    """Whether an array's name is that of a memory bank."""
    return name.startswith("bank.") and not name.endswith(IDS) and not is_note(name)


def new_pack(
    *,
    product: str,
    fingerprint: str,
    calibration: Calibration,
    arrays: Mapping[str, NDArray[Any]],
    first_id: int = 1,
) -> Pack:
    """A pack from arrays as they were computed: copied, -0.0 made +0.0, row ids allocated.

    Args:
        product: the product's name.
        fingerprint: of the detector whose trunk made the rows.
        calibration: thresholds for exactly these arrays.
        arrays: banks float [rows, dim] as `bank.*` and other knowledge by name. A bank without `<name>.ids`
            gets consecutive ids; ids are unique over all banks of the pack.
        first_id: the first id to allocate; the publisher keeps the next one, so that none is used twice.

    Raises:
        KnowledgeError: NaN or infinity, a name or dtype that the format does not have, given ids that are
            not strictly increasing or not one per row.
    """
    made: dict[str, NDArray[Any]] = {}
    given = [array for name, array in arrays.items() if name.endswith(IDS) and np.size(array)]
    next_id = max([first_id, *(int(np.max(ids)) + 1 for ids in given)])
    for name in sorted(arrays):
        array = np.array(arrays[name], order="C", copy=True)
        if array.dtype.kind == "f":
            array += array.dtype.type(0)  # IEEE 754: -0.0 + 0.0 is +0.0, every other value stays as it is
        made[name] = array
        if is_bank(name) and name + IDS not in arrays:
            rows = array.shape[0] if array.ndim else 0
            if next_id < 0 or next_id + rows > 2**64:
                raise KnowledgeError(
                    wanted=f"row ids of 64 bits for {name!r}",
                    got=f"{rows} rows from id {next_id} on",
                    next_step="Begin with a smaller first id.",
                )
            made[name + IDS] = np.arange(next_id, next_id + rows, dtype=np.uint64)
            next_id += rows
    for array in made.values():
        array.flags.writeable = False
    return Pack(product, fingerprint, calibration, made)


def encode_pack(pack: Pack) -> bytes:
    """The one encoding of `pack`: canonical safetensors."""
    return encode_tensors(pack.arrays, _metadata(pack))


def decode_pack(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Pack:
    """A verified pack from its bytes; arrays are views into `data` where its alignment allows.

    Raises:
        KnowledgeError: the bytes are over the limits, truncated, damaged, of a newer schema, not canonical,
            or what they hold breaks the rules of a pack.
    """
    if len(data) > limits.pack_bytes:
        raise _too_big(len(data), limits)
    arrays, metadata = decode_tensors(data, header_limit=limits.pack_header_bytes)
    schema = metadata.get("edgead.pack", "")
    if schema != str(PACK_SCHEMA):
        newer = schema.isascii() and schema.isdigit() and len(schema) < 10 and int(schema) > PACK_SCHEMA
        raise KnowledgeError(
            wanted=f"a knowledge pack of schema {PACK_SCHEMA}",
            got=f"schema {schema}" if newer else "a safetensors file that is no edgead pack",
            next_step="Update edgead on this machine." if newer else "Name a pack that edgead made.",
        )
    expected = {"calibration", "edgead.pack", "fingerprint", "product"}
    if set(metadata) != expected:
        raise KnowledgeError(
            wanted=f"the metadata {', '.join(sorted(expected))}",
            got=", ".join(sorted(metadata))[:400],
            next_step="Name a pack that edgead made.",
        )
    for name, array in arrays.items():
        if is_bank(name) and array.ndim and array.shape[0] > limits.bank_rows:
            raise KnowledgeError(
                wanted=f"at most {limits.bank_rows} rows in a bank",
                got=f"{array.shape[0]} in {name}",
                next_step="Make the bank smaller with a coreset.",
            )
    calibration = read_calibration(metadata["calibration"])
    pack = Pack(metadata["product"], metadata["fingerprint"], calibration, arrays)
    if calibration_text(pack.calibration) != metadata["calibration"]:
        raise KnowledgeError(
            wanted="calibration as canonical JSON",
            got="another spelling of it",
            next_step="Write the pack with edgead; do not edit it.",
        )
    return pack


def read_pack(path: str | Path, *, limits: Limits = DEFAULT_LIMITS) -> Pack:
    """Read and verify a pack file.

    Raises:
        KnowledgeError: see `decode_pack`; or not a plain file.
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "to read a knowledge pack"), open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise KnowledgeError(
                wanted=f"a knowledge pack at {path}",
                got="a device or pipe",
                next_step="Name a file.",
            )
        if status.st_size > limits.pack_bytes:
            raise _too_big(status.st_size, limits)
        data = stream.read(status.st_size + 1)
    return decode_pack(data, limits=limits)


def write_pack(path: str | Path, pack: Pack, *, force: bool = False) -> None:
    """Write a pack file, atomically.

    Raises:
        OutputExistsError: `path` exists and `force` is false.
        StorageError: the file system refused; `path` is then as it was.
    """
    files.refuse_existing(Path(path), force)
    with files.new_file(Path(path)) as stream:
        for part in encoded_parts(pack.arrays, _metadata(pack)):
            stream.write(part)


def check_fits(pack: Pack, detector: DetectorSpec, capacity: Mapping[str, int] | None = None) -> None:
    """Check that a detector's head can take `pack`.

    Args:
        pack: the knowledge.
        detector: the detector, whose `knowledge` ports say what the head takes.
        capacity: rows that a static engine has room for, by bank.

    Raises:
        KnowledgeError: another feature space, a missing or surplus array, a wrong dtype or dimension, more
            rows than the capacity, or an empty bank where the head needs rows.
    """
    if pack.fingerprint != detector.fingerprint:
        raise KnowledgeError(
            wanted=f"a pack of feature space {detector.fingerprint[:12]}, which this engine makes",
            got=f"one of {pack.fingerprint[:12]} (other weights, preprocessing or contract)",
            next_step="Use the pack that was made for this detector, or enrol the product again with it.",
        )
    taken = {port.name for port in detector.knowledge}
    for name in pack.arrays:
        about = next((name[: -len(end)] for end in (IDS, NOTE) if name.endswith(end)), None)
        if name not in taken and about not in taken:
            raise _no_fit(f"only knowledge that the head takes ({', '.join(sorted(taken))})", f"{name!r} too")
    sizes: dict[str, tuple[int, str]] = {}
    for port in detector.knowledge:
        if port.name not in pack.arrays:
            raise _no_fit(f"the array {port.name!r}", f"arrays {', '.join(pack.arrays) or 'none'}")
        _check_port(port, pack.arrays[port.name], sizes, (capacity or {}).get(port.name))


def head_feeds(pack: Pack, detector: DetectorSpec, pad_to: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
    """The knowledge inputs of a head, in graph order, from a pack that fits (`check_fits`).

    Args:
        pack: the knowledge.
        detector: the detector that the head belongs to.
        pad_to: rows to pad a bank to with zeros, by name; others are given exactly. Arrays that share the
            bank's row symbol are padded with it.

    Returns:
        arrays in the head's dtypes, and the int32 [1] counts of valid rows. An empty bank is `min_rows` zero
        rows (one, by default) with a count of 0.

    Raises:
        KnowledgeError: see `check_fits`.
    """
    check_fits(pack, detector, pad_to)
    feeds: dict[str, NDArray[Any]] = {}
    wanted: dict[int | str, int] = {}
    for port in detector.knowledge:
        if port.rows is not None and isinstance(port.shape[0], str):
            room = (pad_to or {}).get(port.name, len(pack.arrays[port.name]))
            wanted[port.shape[0]] = max(room, port.min_rows)
    for port in detector.knowledge:
        array = pack.arrays[port.name]
        rows = array.shape[0] if array.ndim else 0
        room = wanted.get(port.shape[0], rows) if array.ndim else 0
        if room > rows:
            padded = np.zeros((room, *array.shape[1:]), array.dtype)
            padded[:rows] = array
            array = padded
        feeds[port.name] = array
        if port.rows is not None:
            feeds[port.rows] = np.array([rows], np.int32)
    return feeds


def _check_port(
    port: KnowledgePort, array: NDArray[Any], sizes: dict[str, tuple[int, str]], capacity: int | None
) -> None:
    if array.dtype.name != port.dtype:
        raise _no_fit(f"{port.name} of {port.dtype}", array.dtype.name)
    shape = f"[{', '.join(map(str, port.shape))}]"
    if len(array.shape) != len(port.shape):
        raise _no_fit(f"{port.name} of shape {shape}", str(list(array.shape)))
    for size, wanted in zip(array.shape, port.shape, strict=True):
        if isinstance(wanted, int):
            if size != wanted:
                raise _no_fit(f"{port.name} of shape {shape}", str(list(array.shape)))
        elif sizes.setdefault(wanted, (size, port.name))[0] != size:
            other = sizes[wanted]
            raise _no_fit(
                f"one size {wanted} of {other[1]} and {port.name}",
                f"{other[0]} in {other[1]}, {size} in {port.name}",
            )
    if array.size == 0 and not port.empty_ok:
        raise _no_fit(f"at least {port.min_rows} rows in {port.name}", "an empty array")
    if port.rows is not None and 0 < array.shape[0] < port.min_rows:
        raise _no_fit(f"at least {port.min_rows} rows in {port.name}", str(array.shape[0]))
    if capacity is not None and array.shape[0] > capacity:
        raise KnowledgeError(
            wanted=f"at most {capacity} rows in {port.name}, the capacity of this engine",
            got=f"{array.shape[0]}",
            next_step="Make the bank smaller, or export the engine again with a larger capacity.",
        )


def _metadata(pack: Pack) -> dict[str, str]:
    return {
        "calibration": calibration_text(pack.calibration),
        "edgead.pack": str(PACK_SCHEMA),
        "fingerprint": pack.fingerprint,
        "product": pack.product,
    }


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """`array` contiguous, little-endian, read-only; a copy if somebody else could still write into it."""
    frozen = little_endian(np.asarray(array))
    if frozen.flags.writeable:
        frozen = frozen.copy()
        frozen.flags.writeable = False
    return frozen


def _no_fit(wanted: str, got: str) -> KnowledgeError:
    return KnowledgeError(
        wanted=f"knowledge with {wanted}",
        got=got,
        next_step="Use a pack that was made for this detector.",
    )


def _too_big(size: int, limits: Limits) -> KnowledgeError:
    return KnowledgeError(
        wanted=f"a pack of at most {limits.pack_bytes} bytes",
        got=f"{size}",
        next_step="Make the bank smaller with a coreset.",
    )
