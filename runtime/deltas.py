"""Deltas: the way from one knowledge pack to another of the same product and feature space.

Bytes in, a verified pack or an error out; no files here. A delta travels instead of a pack: a sentence costs
kilobytes where the pack has megabytes. What it gives is checked to the last byte: the result's digest stands in it.

**Frame.** A delta file is

    offset  bytes  what
    0       8      the ASCII letters "edgead.d"
    8       8      length L of the content in bytes, unsigned, little-endian
    16      to the end   one zlib stream (RFC 1950), which unpacks to exactly L bytes and ends with the file

Compressors may differ, so the frame is not canonical; the content is. No more than L bytes are ever unpacked, and L is
bounded (`Limits.delta_bytes`), as zlib can make 1,000 bytes of one.

**Content.** A canonical safetensors file (`edgead.runtime.tensors`). Metadata, all of it always there:

- `edgead.delta`: version of this schema, "1";
- `product`, `fingerprint`: of both packs;
- `base`, `result`: digests of the pack that it applies to and of the one that it makes, 64 hex digits each;
- `calibration`: that of the result, spelled as in a pack;
- `removed`: canonical JSON list, sorted, of the names of arrays that the result lacks;
- `splices`: canonical JSON object, name -> [first row, rows to take out], of arrays that change in part; a third
  number is a row of the base, which is put in once more.

Arrays, for the array NAME of a pack:

- `del.NAME`: uint64, increasing: ids of the rows that a bank loses; and
- `add.NAME` with `ids.NAME` (uint64, increasing): rows that a bank gains, and their ids. The bank's rows then stand in
  the order of their ids, as ever. An id is never used for two rows, so one that the base has cannot be added;
- `put.NAME`: rows that replace those which `splices` names by two numbers, in any array that is no bank; an
  insertion takes none out;
- `set.NAME`: an array as a whole, new or of another dtype or shape.

Arrays that none of these names stay as they are. Applying a delta to its result gives that result again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.knowledge import IDS, Pack, is_bank
from edgead.runtime.pack_checks import calibration_text, check_names, read_calibration
from edgead.runtime.spec import DEFAULT_LIMITS, Calibration, Limits, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors

MAGIC = b"edgead.d"
"""What a delta file begins with."""
SCHEMA = 1
_FRAME = 16
_METADATA = frozenset(["base", "calibration", "edgead.delta", "fingerprint", "product", "removed", "result", "splices"])
_KINDS = ("add", "del", "ids", "put", "set")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Delta:
    """A delta as read. It is well formed; whether it is true shows when it is applied.

    Attributes:
        product, fingerprint: of both packs.
        base, result: digests of both packs, 64 hex digits.
        calibration: of the result.
        removed: names of arrays that the result lacks.
        splices: by array, (first row, rows to take out) and perhaps the row of the base to put in.
        arrays: as in the content, by 'add.NAME', 'del.NAME', 'ids.NAME', 'put.NAME' and 'set.NAME'.
    """

    product: str
    fingerprint: str
    base: str
    result: str
    calibration: Calibration
    removed: tuple[str, ...]
    splices: Mapping[str, tuple[int, ...]]
    arrays: Arrays

    def of(self, kind: str) -> dict[str, NDArray[Any]]:
        """Arrays of one kind by the name of the pack's array."""
        start = f"{kind}."
        return {name[len(start) :]: array for name, array in self.arrays.items() if name.startswith(start)}


def is_delta(data: bytes) -> bool:
    """Whether a file that begins with `data` says that it is a delta."""
    return data.startswith(MAGIC)


def make_delta(base: Pack, result: Pack) -> bytes:
    """The delta that turns `base` into `result`.

    Raises:
        KnowledgeError: packs of different products or feature spaces, a bank that has another row under an id
            of the base, or a change too large for a delta.
    """
    if (base.product, base.fingerprint) != (result.product, result.fingerprint):
        raise KnowledgeError(
            wanted=f"two packs of {base.product!r} in the feature space {base.fingerprint[:12]}",
            got=f"one of {result.product!r} in {result.fingerprint[:12]}",
            next_step="Publish the whole pack instead.",
        )
    arrays: dict[str, NDArray[Any]] = {}
    splices: dict[str, list[int]] = {}
    for name, new in result.arrays.items():
        old = base.arrays.get(name)
        if name.endswith(IDS) and is_bank(name[: -len(IDS)]):
            if old is None or not _alike(base, result, name[: -len(IDS)]):
                arrays[f"set.{name}"] = new  # otherwise it follows from the bank's rows
        elif old is None or old.dtype != new.dtype or old.shape[1:] != new.shape[1:] or not new.ndim:
            if old is None or not (old.dtype == new.dtype and np.array_equal(old, new)):
                arrays[f"set.{name}"] = new
        elif is_bank(name):
            arrays |= _bank_changes(name, base, result)
        elif not (old is new or np.array_equal(old, new)):
            first, out, rows = _splice(old, new)
            splices[name] = [first, out]
            # Sentences about one part are compared with one and the same feature.
            once = len(rows) == 1 < old.ndim and len(old) > 0
            again = np.flatnonzero((old == rows).all(tuple(range(1, old.ndim)))) if once else rows[:0]
            if len(again):
                splices[name].append(int(again[0]))
            else:
                arrays[f"put.{name}"] = rows
    content = encode_tensors(
        arrays,
        {
            "base": base.digest,
            "calibration": calibration_text(result.calibration),
            "edgead.delta": str(SCHEMA),
            "fingerprint": base.fingerprint,
            "product": base.product,
            "removed": canonical_json(sorted(base.arrays.keys() - result.arrays.keys())).decode(),
            "result": result.digest,
            "splices": canonical_json(splices).decode(),
        },
    )
    if len(content) > DEFAULT_LIMITS.delta_bytes:
        raise _too_large(len(content), DEFAULT_LIMITS)
    return MAGIC + len(content).to_bytes(8, "little") + zlib.compress(content, 9)


def read_delta(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Delta:
    """A delta from its bytes.

    Raises:
        KnowledgeError: not a delta, truncated, damaged, of a newer schema, not canonical, or one that would
            unpack to more than the limit.
    """
    content = _unpacked(data, limits)
    arrays, metadata = decode_tensors(content, header_limit=limits.pack_header_bytes)
    schema = metadata.get("edgead.delta", "")
    if schema != str(SCHEMA):
        newer = schema.isascii() and schema.isdigit() and len(schema) < 10 and int(schema) > SCHEMA
        raise KnowledgeError(
            wanted=f"a delta of schema {SCHEMA}",
            got=f"schema {schema}" if newer else "something else in a delta's frame",
            next_step="Update edgead on this machine." if newer else "Fetch the delta again.",
        )
    if metadata.keys() != _METADATA:
        _refuse(f"the metadata {', '.join(sorted(_METADATA))}", ", ".join(sorted(metadata))[:400])
    check_names(metadata["product"], metadata["fingerprint"])
    for name in ("base", "result"):
        check_names(metadata["product"], metadata[name])
    found = Delta(
        product=metadata["product"],
        fingerprint=metadata["fingerprint"],
        base=metadata["base"],
        result=metadata["result"],
        calibration=read_calibration(metadata["calibration"]),
        removed=_listed(metadata["removed"]),
        splices=_spliced(metadata["splices"]),
        arrays=arrays,
    )
    _check_arrays(found)
    return found


def apply_delta(base: Pack, delta: Delta | bytes, *, limits: Limits = DEFAULT_LIMITS) -> Pack:
    """The pack that a delta makes of `base`; `base` itself if it is that pack already.

    Args:
        base: the pack that the delta was made against.
        delta: as read, or its bytes.
        limits: most bytes that it may unpack to, and most rows of a bank.

    Raises:
        KnowledgeError: see `read_delta`; another base; a deleted id that is not there, an added one that is;
            rows that break the rules of a pack; or a result with another digest than the delta says.
    """
    if not isinstance(delta, Delta):
        delta = read_delta(delta, limits=limits)
    if (delta.product, delta.fingerprint) != (base.product, base.fingerprint):
        raise KnowledgeError(
            wanted=f"a delta for {base.product!r} in the feature space {base.fingerprint[:12]}",
            got=f"one for {delta.product!r} in {delta.fingerprint[:12]}",
            next_step="Use the delta that was made for this pack.",
        )
    if base.digest == delta.result:
        return base
    if base.digest != delta.base:
        raise KnowledgeError(
            wanted=f"a delta against version {base.version}, which is here",
            got=f"one from {delta.base[:12]} to {delta.result[:12]}",
            next_step="Apply the deltas in their order, or fetch the whole pack.",
        )
    arrays: dict[str, NDArray[Any]] = {name: array for name, array in base.arrays.items() if name not in delta.removed}
    for name in delta.removed:
        if name not in base.arrays:
            _refuse("removed arrays that the base has", repr(name))
    added, ids, deleted = delta.of("add"), delta.of("ids"), delta.of("del")
    for name in sorted({*added, *deleted}):
        merged = _merged(name, arrays, deleted.get(name), ids.get(name), added.get(name), limits)
        arrays[name], arrays[name + IDS] = merged
    put = delta.of("put")
    for name, place in delta.splices.items():
        arrays[name] = _put(name, arrays.get(name), put.get(name), place)
    arrays |= delta.of("set")
    result = Pack(base.product, base.fingerprint, delta.calibration, arrays)
    if result.digest != delta.result:
        _refuse(f"the result {delta.result[:12]} that it promises", result.version)
    return result


def _unpacked(data: bytes, limits: Limits) -> bytes:
    if not is_delta(data) or len(data) < _FRAME:
        _refuse("the beginning of a delta file", "another one, or too few bytes")
    length = int.from_bytes(data[8:_FRAME], "little")
    if length > limits.delta_bytes:
        raise _too_large(length, limits)
    stream = zlib.decompressobj()
    try:
        # One byte of room shows a stream that goes on.
        content = stream.decompress(data[_FRAME:], length + 1)
    except zlib.error as error:
        _refuse("a whole zlib stream", str(error))
    if len(content) != length or not stream.eof or stream.unused_data:
        _refuse(f"a zlib stream of {length} bytes that ends with the file", "a shorter or longer one")
    return content


def _bank_changes(name: str, base: Pack, result: Pack) -> dict[str, NDArray[Any]]:
    """The rows that a bank loses and gains."""
    old, new = base.ids(name), result.ids(name)
    kept_old, kept_new = np.isin(old, new, assume_unique=True), np.isin(new, old, assume_unique=True)
    if base.arrays[name][kept_old].tobytes() != result.arrays[name][kept_new].tobytes():
        raise KnowledgeError(
            wanted=f"rows of {name!r} that never change under their id",
            got="an id that stands for another row in the new pack",
            next_step="Publish the whole pack; a bank that was fitted anew has new rows.",
        )
    found: dict[str, NDArray[Any]] = {}
    if not kept_old.all():
        found[f"del.{name}"] = old[~kept_old]
    if not kept_new.all():
        found[f"add.{name}"] = result.arrays[name][~kept_new]
        found[f"ids.{name}"] = new[~kept_new]
    return found


def _alike(base: Pack, result: Pack, bank: str) -> bool:
    """Whether a bank's rows are of one kind in both packs, so that it changes by rows."""
    old, new = base.arrays.get(bank), result.arrays.get(bank)
    return old is not None and new is not None and old.dtype == new.dtype and old.shape[1:] == new.shape[1:]


def _splice(old: NDArray[Any], new: NDArray[Any]) -> tuple[int, int, NDArray[Any]]:
    """First row, rows to take out there and rows to put in: between the rows that both begin and end with."""
    shorter = min(len(old), len(new))
    inner = tuple(range(1, old.ndim))
    differs = np.flatnonzero((old[:shorter] != new[:shorter]).any(inner))
    first = int(differs[0]) if len(differs) else shorter
    shorter -= first
    tail = (old[len(old) - shorter :] != new[len(new) - shorter :]).any(inner)
    same = int(np.flatnonzero(tail[::-1])[0]) if tail.any() else shorter
    return first, len(old) - first - same, new[first : len(new) - same]


def _merged(
    name: str,
    arrays: Arrays,
    deleted: NDArray[Any] | None,
    ids: NDArray[Any] | None,
    added: NDArray[Any] | None,
    limits: Limits,
) -> tuple[NDArray[Any], NDArray[Any]]:
    rows, numbers = arrays.get(name), arrays.get(name + IDS)
    if rows is None or numbers is None:
        _refuse("rows for a bank that the base has", repr(name))
    kept, left = rows, numbers
    if deleted is not None:
        found = np.isin(numbers, deleted, assume_unique=True)
        if int(found.sum()) != len(deleted):
            absent = deleted[~np.isin(deleted, numbers)][0]
            _refuse(f"deleted ids that {name!r} has", f"{absent}, which it has not")
        kept, left = rows[~found], numbers[~found]
    if added is not None and ids is not None:
        if added.dtype != rows.dtype or added.shape[1:] != rows.shape[1:]:
            _refuse(f"rows of {rows.dtype} {list(rows.shape[1:])} for {name!r}", f"{added.dtype} {list(added.shape)}")
        used = np.isin(ids, numbers)
        if used.any():
            _refuse(f"new ids for the rows added to {name!r}", f"{ids[used][0]}, which stood for a row already")
        if len(kept) + len(added) > limits.bank_rows:
            _refuse(f"at most {limits.bank_rows} rows in a bank", f"{len(kept) + len(added)} in {name}")
        kept, left = np.concatenate([kept, added]), np.concatenate([left, ids])
        order = np.argsort(left, kind="stable")
        kept, left = kept[order], left[order]
    return kept, left


def _put(name: str, old: NDArray[Any] | None, rows: NDArray[Any] | None, place: tuple[int, ...]) -> NDArray[Any]:
    first, out = place[:2]
    if old is None or old.ndim == 0 or any(row >= len(old) for row in place[2:]) or first + out > len(old):
        _refuse(f"rows that {name!r} has to replace or to repeat", f"{list(place)}")
    if rows is None:
        rows = old[place[2] : place[2] + 1]
    if old.dtype != rows.dtype or old.shape[1:] != rows.shape[1:]:
        _refuse("rows that fit the array of the base", repr(name))
    return np.concatenate([old[:first], rows, old[first + out :]])


def _check_arrays(delta: Delta) -> None:
    """Which arrays stand together, and their dtypes; what they mean for a base is seen when it is applied."""
    for name in delta.arrays:
        kind, _, about = name.partition(".")
        if kind not in _KINDS or not about:
            _refuse(f"arrays named {', '.join(f'{kind}.NAME' for kind in _KINDS)}", repr(name))
    added, ids, deleted, put = (delta.of(kind) for kind in ("add", "ids", "del", "put"))
    if added.keys() != ids.keys() or put.keys() != {name for name, place in delta.splices.items() if len(place) == 2}:
        _refuse("ids for added rows and a place for each splice", "one without the other")
    for name in (*added, *deleted):
        if not is_bank(name):
            _refuse("added and deleted rows of banks only", repr(name))
    for name, array in (*ids.items(), *deleted.items()):
        if array.dtype != np.uint64 or array.ndim != 1 or not len(array) or not (array[1:] > array[:-1]).all():
            _refuse(f"increasing uint64 ids of {name!r}", "others, or the same twice")
    for name, rows in added.items():
        if rows.ndim != 2 or len(rows) != len(ids[name]):
            _refuse(f"one id for each row added to {name!r}", f"{len(ids[name])} for {list(rows.shape)}")
    for name in delta.splices:
        if is_bank(name.removesuffix(IDS)) or (name in put and put[name].ndim == 0):
            _refuse("splices of arrays that are no banks", repr(name))
    changed = [*added, *deleted, *delta.splices, *delta.of("set")]
    twice = {name for name in changed if changed.count(name) > 1} - (added.keys() & deleted.keys())
    if twice or set(delta.removed) & set(changed):
        _refuse("one change for each array", ", ".join(sorted(twice | (set(delta.removed) & set(changed)))))


def _listed(text: str) -> tuple[str, ...]:
    names = _canonical(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
        _refuse("a sorted list of removed arrays", text[:200])
    return tuple(names)


def _spliced(text: str) -> dict[str, tuple[int, ...]]:
    content = _canonical(text)
    places = content.values() if isinstance(content, dict) else [None]
    for place in places:
        if not (
            isinstance(place, list)
            and len(place) in (2, 3)
            and all(isinstance(row, int) and not isinstance(row, bool) and 0 <= row < 2**31 for row in place)
        ):
            _refuse("places of splices as name -> [first row, rows]", text[:200])
    return {name: tuple(place) for name, place in content.items()}


def _canonical(text: str) -> Any:
    try:
        content = json.loads(text)
        if canonical_json(content).decode() != text:
            raise ValueError("another spelling of it")
    except (ValueError, RecursionError) as error:
        _refuse("canonical JSON in its metadata", f"something else ({error})")
    return content


def _too_large(size: int, limits: Limits) -> KnowledgeError:
    return KnowledgeError(
        wanted=f"a delta of at most {limits.delta_bytes} bytes when unpacked",
        got=f"{size}",
        next_step="Publish or fetch the whole pack instead.",
    )


def _refuse(wanted: str, got: str) -> NoReturn:
    raise KnowledgeError(
        wanted=f"a delta with {wanted}", got=got, next_step="Fetch the delta again, or the whole pack in its place."
    )
