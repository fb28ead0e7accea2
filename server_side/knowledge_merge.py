"""Two packs of one product made one, within what a bank may cost in rows, bytes and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError, KnowledgeError
from edgead.runtime.knowledge import IDS, Pack, encode_pack
from edgead.runtime.progress import Progress
from edgead.runtime.provenance import Provenance
from edgead.runtime.spec import Calibration
from edgead.server_side.coreset import coreset_order
from edgead.server_side.enrolment import next_id
from edgead.server_side.knowledge_rows import Judge
from edgead.server_side.knowledge_tools import BankChange, State, changed
from edgead.server_side.sources import Origins, provenance_of

_SEARCH_STEPS = 7
"""Halvings in the search for the number of rows that keeps within a time."""
_FIGURE = -1.2345678901234567e-100
_LONGEST = Calibration(_FIGURE, _FIGURE, _FIGURE, 10**9, -_FIGURE, -_FIGURE)
"""A calibration whose figures are as long as any can be."""


@dataclass(frozen=True)
class Caps:
    """Most that a merged bank may cost; None for no limit.

    Attributes:
        rows: of each bank.
        size: bytes of the pack.
        milliseconds: median time of a whole frame on this machine.
    """

    rows: int | None = None
    size: int | None = None
    milliseconds: float | None = None


def merge_packs(state: State, judge: Judge, other: Pack, records: Sequence[Provenance], caps: Caps) -> BankChange:
    """Add the rows of another pack of the same feature space, and make the banks smaller where they cost too much.

    A row that both have under one id stays once; another row under an id that was ever used here gets a new one.
    Knowledge that is no bank stays that of `state`. Banks over a cap are represented by their coreset; ids stay.

    Raises:
        KnowledgeError: a pack of another feature space or with other banks.
        InputError: a cap that even the smallest bank is over.
        EngineError: a picture was not answered.
    """
    pack = state.pack
    if other.fingerprint != pack.fingerprint or other.banks != pack.banks:
        raise KnowledgeError(
            wanted=f"a pack of feature space {pack.fingerprint[:12]} with the banks {', '.join(pack.banks) or 'none'}",
            got=f"one of {other.fingerprint[:12]} with {', '.join(other.banks) or 'none'}",
            next_step="Merge packs that were made for the same detector.",
        )
    for bank in pack.banks:  # a row is never computed again, and so not converted either
        ours, theirs = pack.arrays[bank], other.arrays[bank]
        if (ours.dtype, ours.shape[1]) != (theirs.dtype, theirs.shape[1]):
            raise KnowledgeError(
                wanted=f"rows of {ours.dtype} and {ours.shape[1]} dimensions in {bank!r}",
                got=f"{theirs.dtype} and {theirs.shape[1]}",
                next_step="Merge packs that were made for the same detector.",
            )
    arrays: dict[str, NDArray[Any]] = dict(pack.arrays)
    origins = provenance_of(other, fingerprint=state.fingerprint, before=records)
    fresh = max(state.next_id, next_id(other), *(record.next_id for record in (*records, *state.records, origins)))
    made: dict[str, tuple[NDArray[np.uint64], Origins]] = {}
    renumbered = 0
    for bank in pack.banks:
        rows, ids = pack.arrays[bank], pack.ids(bank)
        theirs, numbers = other.arrays[bank], other.ids(bank).copy()
        taken = {int(number): row for row, number in enumerate(ids)}
        keep = np.ones(len(numbers), np.bool_)
        for row, number in enumerate(map(int, other.ids(bank))):
            if number in taken and theirs[row].tobytes() == rows[taken[number]].tobytes():
                keep[row] = False
            elif number < state.next_id:  # it stands, or stood, for another row
                numbers[row] = fresh
                fresh += 1
                renumbered += 1
        record = origins.banks[bank]
        known = keep & (record.images >= 0)
        order = np.argsort(numbers[known], kind="stable")
        where = np.flatnonzero(known)[order]
        made[bank] = (
            numbers[where],
            Origins(origins.images, record.images[where].astype(np.int64), record.places[where]),
        )
        merged, places = np.concatenate([rows, theirs[keep]]), np.concatenate([ids, numbers[keep]])
        order = np.argsort(places, kind="stable")
        arrays[bank], arrays[bank + IDS] = merged[order], places[order]
    notes = [f"{renumbered} rows of the other pack got new ids"] if renumbered else []
    differing = [
        name
        for name in sorted({*pack.arrays, *other.arrays})
        if not name.startswith("bank.") and not _same(pack.arrays.get(name), other.arrays.get(name))
    ]
    if differing:
        notes.append(f"kept as the first pack has it: {', '.join(differing)}")
    together = Pack(pack.product, pack.fingerprint, pack.calibration, arrays)
    small = capped(together, caps, judge.milliseconds)
    for bank in pack.banks:
        if len(small.ids(bank)) < len(arrays[bank]):
            notes.append(f"{bank}: a coreset of {len(small.ids(bank))} of {len(arrays[bank])} rows")
        numbers, whose = made[bank]
        left = np.isin(numbers, small.ids(bank))
        made[bank] = numbers[left], whose[left]
    return changed(state, judge, small.arrays, made=made, notes=notes, first_id=fresh)


def capped(pack: Pack, caps: Caps, milliseconds: Callable[[Pack], float]) -> Pack:
    """The pack with its banks within the caps."""
    if caps.rows is not None:
        pack = _shrunk(pack, {bank: min(caps.rows, len(pack.ids(bank))) for bank in pack.banks})
    if caps.size is not None:
        pack = _within_bytes(pack, caps.size)
    if caps.milliseconds is None or (now := milliseconds(pack)) <= caps.milliseconds:
        return pack
    orders = {bank: _order(bank, pack.arrays[bank], len(pack.ids(bank))) for bank in pack.banks}
    low, high = 0.0, 1.0
    with Progress("searching rows within the time", _SEARCH_STEPS) as progress:
        for _ in progress.track(range(_SEARCH_STEPS)):
            middle = (low + high) / 2
            sizes = _shares(pack, middle, "rows", "none")
            fits = milliseconds(_shrunk(pack, sizes, orders)) <= caps.milliseconds
            low, high = (middle, high) if fits else (low, middle)
    wanted, got = f"{caps.milliseconds:g} ms a frame", f"{now:.1f} ms, most of it not for the rows"
    return _shrunk(pack, _shares(pack, low, wanted, got), orders)


def _within_bytes(pack: Pack, most: int) -> Pack:
    # The thresholds come last, and their figures may be longer than those that are there now.
    size = len(encode_pack(Pack(pack.product, pack.fingerprint, _LONGEST, pack.arrays)))
    if size <= most:
        return pack
    rows = sum(pack.arrays[bank].nbytes + pack.ids(bank).nbytes for bank in pack.banks)
    share = (most - (size - rows)) / rows if rows else 0.0
    return _shrunk(pack, _shares(pack, share, f"a pack of {most} bytes", f"{size - rows} without any row"))


def _shares(pack: Pack, share: float, wanted: str, got: str) -> dict[str, int]:
    if share <= 0:
        raise InputError(wanted=wanted, got=got, next_step="Name a larger cap.")
    return {bank: max(1, int(len(pack.ids(bank)) * share)) for bank in pack.banks}


def _shrunk(pack: Pack, sizes: Mapping[str, int], orders: Mapping[str, NDArray[np.int64]] | None = None) -> Pack:
    arrays = dict(pack.arrays)
    for bank, size in sizes.items():
        rows = pack.arrays[bank]
        if size < len(rows):
            order = _order(bank, rows, size) if orders is None else orders[bank]
            chosen = np.sort(order[:size])
            arrays[bank], arrays[bank + IDS] = rows[chosen], pack.ids(bank)[chosen]
    return Pack(pack.product, pack.fingerprint, pack.calibration, arrays)


def _order(bank: str, rows: NDArray[Any], size: int) -> NDArray[np.int64]:
    with Progress(f"coreset of {bank}", size) as progress:
        return coreset_order(np.asarray(rows, np.float32), size, progress=progress)


def _same(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and np.array_equal(one, other)
