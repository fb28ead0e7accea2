"""Changes of a product's memory banks: rows added, forgotten or merged, always with the thresholds that follow.

Each change is made on what the cameras have, judged by the bundle's own engine on held-out pictures under the old and
the new bank, and comes with the record of where its rows are from. Rows are copied, never computed again; ids are
given out here, upwards, and never twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.errors import InputError
from edgead.runtime.image import read_image
from edgead.runtime.knowledge import IDS, Pack, check_fits
from edgead.runtime.provenance import Provenance
from edgead.runtime.provenance_file import provenance_beside
from edgead.server_side.coreset import farthest_first, nearest_distance
from edgead.server_side.enrolment import Recalibration, next_id, novel_rows, recalibrated, with_rows
from edgead.server_side.knowledge_rows import (
    Judge,
    Offered,
    feature_of,
    masked_patches,
    normal_of,
    patches_of,
)
from edgead.server_side.normalities import current
from edgead.server_side.photographs import defect_mask
from edgead.server_side.sources import Origins, provenance_of, source_image

Made = Mapping[str, tuple[NDArray[np.uint64], Origins]]

LIKE_ROWS = 16
"""Rows that are forgotten for being like a picture, if nobody says how many."""


@dataclass(frozen=True, eq=False)
class State:
    """What the cameras of a product have.

    Attributes:
        bundle: with the engines.
        pack: the knowledge now.
        records: provenance of it and of what it came from, the newest first.
        next_id: the first row id that was never used, as far as these tell.
    """

    bundle: Bundle
    pack: Pack
    records: tuple[Provenance, ...]
    next_id: int

    @property
    def fingerprint(self) -> str:
        """Feature space of the rows."""
        return self.bundle.manifest.detector.fingerprint


@dataclass(frozen=True, eq=False)
class BankChange:
    """A change that was made and judged.

    Attributes:
        before, after: knowledge of the product.
        provenance: of `after`.
        judged: false alarms and misses under both.
        added, removed: rows by bank.
        notes: for people: what else is to be known about it.
    """

    before: Pack
    after: Pack
    provenance: Provenance
    judged: Recalibration
    added: Mapping[str, int]
    removed: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())


def open_state(
    path: Path, knowledge: Sequence[Path] = (), product: str | None = None, first_id: int | None = None
) -> State:
    """What the cameras have: the bundle's pack with packs and deltas upon it in their order.

    Args:
        path: the bundle.
        knowledge: packs and deltas.
        product: whose; the bundle's default if None.
        first_id: the publisher's next row id, where it is known better than from these files.

    Raises:
        BundleError, KnowledgeError, StorageError: a file is damaged or does not fit.
    """
    bundle = open_bundle(path, verify=False)
    pack = current(bundle, knowledge, product)
    beside = (provenance_beside(file) for file in reversed((path, *knowledge)))
    records = tuple(record for record in beside if record is not None and record.product == pack.product)
    ids = [next_id(pack, first_id), *(record.next_id for record in records)]
    if pack.product in bundle.products:
        ids.append(next_id(bundle.pack(pack.product)))
    return State(bundle, pack, records, max(ids))


def refuse_seen(held_out: Sequence[Path], state: State, taught: Iterable[Path] = ()) -> None:
    """Check that the held-out pictures are unknown to the banks, by content.

    Raises:
        InputError: one of them is a source of rows, or among those to be taught: it would score too low, and a
            threshold set on it would alarm too often.
    """
    known = {image.sha256 for record in state.records for image in record.images}
    known |= {source_image(path).sha256 for path in taught}
    for path in held_out:
        if source_image(path).sha256 in known:
            raise InputError(
                wanted="held-out pictures that no row of a bank comes from",
                got=f"{path}, which is one that the bank knows",
                next_step="Hold out pictures that were never taught; split the folder.",
            )


def novelties(state: State, judge: Judge, banks: Sequence[str], novelty: float | None = None) -> dict[str, float]:
    """For each normal bank, the distance up to which a patch counts as known.

    That is `novelty` if given; else the score of a typical normal picture where scores are distances to the one bank,
    and the median over held-out normals of their farthest patch where there are several banks.
    """
    if novelty is not None:
        return dict.fromkeys(banks, novelty)
    typical = state.pack.calibration.typical
    if len(banks) == 1 and banks[0] == "bank.normal" and typical > 0:
        return {banks[0]: typical}
    return {
        bank: float(np.median(judge.farthest(state.pack, bank))) if len(state.pack.arrays[bank]) else 0.0
        for bank in banks
    }


def farthest_known(state: State, judge: Judge, banks: Sequence[str]) -> dict[str, float]:
    """For each bank of defects, how far patches of held-out normals come to lie from its normal rows at most."""
    return {bank: float(judge.farthest(state.pack, normal_of(state.pack, bank), bank).max()) for bank in banks}


def add_rows(
    state: State, judge: Judge, offered: Mapping[str, Offered], *, levels: Mapping[str, float] | None, most: int
) -> BankChange:
    """Add rows to banks.

    Args:
        state: what is there.
        judge: with the held-out pictures.
        offered: by bank. Of rows for normal banks, those that the bank lacks are taken; of defects, those that stand
            for all; and every row if `levels` is None.
        levels: novelty by normal bank.
        most: at most so many rows for each bank.

    Raises:
        InputError: nothing new among the rows.
        KnowledgeError: no room in an engine.
        EngineError: a picture was not answered.
    """
    chosen, notes = {}, []
    for bank, rows in offered.items():
        there = np.asarray(state.pack.arrays[bank], np.float32)
        if levels is None:
            taken, new = np.arange(len(rows.rows)), len(rows.rows)
        elif bank in levels:
            taken, new = novel_rows(there, rows.rows, levels[bank], most=most)
        else:
            distance = nearest_distance(rows.rows, there)
            new = int((distance > 0).sum())
            taken = farthest_first(rows.rows, most, distance=distance)
        notes.append(f"{bank}: {new} of {len(rows.rows)} patches are new, {len(taken)} rows stand for them")
        chosen[bank] = np.sort(taken)
    if not any(map(len, chosen.values())):
        raise InputError(
            wanted="patches that the bank does not know yet",
            got=f"{sum(len(rows.rows) for rows in offered.values())} patches like those it has",
            next_step="Nothing has to be taught; or set a lower --novelty.",
        )
    new_rows = {bank: offered[bank].rows[taken] for bank, taken in chosen.items()}
    arrays = with_rows(state.pack, new_rows, state.next_id)
    made = {}
    for bank, taken in chosen.items():
        ids = arrays[bank + IDS][len(arrays[bank + IDS]) - len(taken) :]
        made[bank] = ids, offered[bank].origins[taken]
    return changed(state, judge, arrays, made=made, notes=notes)


def rows_named(pack: Pack, ids: Iterable[int], bank: str | None = None) -> dict[str, set[int]]:
    """Rows by bank, from their ids.

    Raises:
        InputError: an id that no bank has, or that several have.
    """
    found: dict[str, set[int]] = {}
    for number in ids:
        having = [name for name in pack.banks if bank in (None, name) and np.uint64(number) in pack.ids(name)]
        if len(having) != 1:
            raise InputError(
                wanted=f"a row id of the banks {', '.join(pack.banks)}",
                got=f"{number}, which {'none has' if not having else ' and '.join(having) + ' have'}",
                next_step="Look them up with: edgead run --json, or edgead knowledge show"
                if not having
                else "Say which with --bank.",
            )
        found.setdefault(having[0], set()).add(number)
    return found


def rows_from(state: State, source: str) -> tuple[dict[str, set[int]], set[str]]:
    """Rows that came from a picture: a file, or a name or digest of the provenance. And the digests meant.

    Raises:
        InputError: no provenance, or no row from there.
    """
    record = provenance_of(state.pack, fingerprint=state.fingerprint, before=state.records)
    path = Path(source)
    wanted = {source_image(path).sha256} if path.is_file() else set()
    if not wanted:
        wanted = {image.sha256 for image in record.images if source in (image.name, image.sha256)}
    places = {place for place, image in enumerate(record.images) if image.sha256 in wanted}
    found = {}
    for name, bank in record.banks.items():
        ids = bank.ids[np.isin(bank.images, list(places))] if places else bank.ids[:0]
        if len(ids):
            found[name] = {int(number) for number in ids}
    if not found:
        known = len(record.images)
        raise InputError(
            wanted=f"rows that came from {source}",
            got=f"none among the {known} pictures that the provenance knows" if known else "no provenance",
            next_step="Forget by likeness instead: --like IMAGE.",
        )
    return found, wanted


def rows_like(
    state: State,
    judge: Judge,
    image: Path,
    banks: Sequence[str],
    *,
    count: int | None = None,
    radius: float | None = None,
    mask: Path | None = None,
) -> dict[str, set[int]]:
    """Rows nearest to any patch of a picture: the `count` nearest of all banks together, or all within `radius`.

    Raises:
        InputError: no row lies within the radius, or a mask that does not fit.
    """
    frame = read_image(image)
    marked = None if mask is None else defect_mask(read_image(mask), mask, image, frame)
    near: list[tuple[float, str, int]] = []
    for bank in banks:
        patches = patches_of(judge.inspector, frame, feature_of(judge.inspector.spec, bank))
        patches = patches.reshape(-1, patches.shape[-1])
        if marked is not None:
            patches = patches[masked_patches(judge.inspector, marked, bank)]
        distance = nearest_distance(np.asarray(state.pack.arrays[bank], np.float32), patches)
        near += [(float(far), bank, int(number)) for far, number in zip(distance, state.pack.ids(bank), strict=True)]
    near.sort()
    chosen = near[: count or LIKE_ROWS] if radius is None else [item for item in near if item[0] <= radius]
    if not chosen:
        raise InputError(
            wanted=f"rows within {radius} of the patches of {image}",
            got=f"the nearest one {near[0][0]:.4g} away" if near else "empty banks",
            next_step="Name a larger --radius, or --count.",
        )
    found: dict[str, set[int]] = {}
    for _, bank, number in chosen:
        found.setdefault(bank, set()).add(number)
    return found


def remove_rows(
    state: State, judge: Judge, rows: Mapping[str, set[int]], *, forgotten: Iterable[str] = ()
) -> BankChange:
    """Take rows out of banks.

    Args:
        state: what is there.
        judge: with the held-out pictures.
        rows: ids by bank.
        forgotten: digests of images that the provenance is not to name any more.

    Raises:
        KnowledgeError: a bank would be left with fewer rows than the head needs.
        EngineError: a picture was not answered.
    """
    arrays = dict(state.pack.arrays)
    for bank, ids in rows.items():
        kept = ~np.isin(state.pack.ids(bank), np.array(sorted(ids), np.uint64))
        arrays[bank], arrays[bank + IDS] = state.pack.arrays[bank][kept], state.pack.ids(bank)[kept]
    return changed(state, judge, arrays, forgotten=forgotten)


def changed(
    state: State,
    judge: Judge,
    arrays: Mapping[str, NDArray[Any]],
    *,
    made: Made | None = None,
    forgotten: Iterable[str] = (),
    notes: Sequence[str] = (),
    first_id: int = 1,
) -> BankChange:
    """The change to `arrays`: checked against every engine, judged on the held-out pictures, and recorded.

    Args:
        state: what is there.
        judge: with the held-out pictures.
        arrays: of the new knowledge, all of them.
        made: by bank, ids and origins of new rows.
        forgotten: digests of images that the provenance is not to name any more.
        notes: for people.
        first_id: the first row id that was never used, as far as the caller knows.

    Raises:
        KnowledgeError: an array breaks the rules of a pack, or an engine has no room.
        InputError: fewer than 2 held-out pictures.
        EngineError: a picture was not answered.
    """
    rough = Pack(state.pack.product, state.pack.fingerprint, state.pack.calibration, arrays)
    for engine in state.bundle.manifest.engines:  # all of them: it goes to cameras of every kind
        check_fits(rough, state.bundle.manifest.knowing, engine.capacity)
    judged = recalibrated(state.pack, arrays, judge.held_out, known_defects=judge.known if len(judge.defects) else None)
    record = provenance_of(
        judged.pack,
        fingerprint=state.fingerprint,
        made=made,
        before=state.records,
        forgotten=forgotten,
        next_id=max(state.next_id, first_id),
    )
    counts: dict[str, dict[str, int]] = {"added": {}, "removed": {}}
    for bank in state.pack.banks:
        old, new = state.pack.ids(bank), judged.pack.ids(bank)
        for what, number in (("added", np.setdiff1d(new, old).size), ("removed", np.setdiff1d(old, new).size)):
            if number:
                counts[what][bank] = int(number)
    return BankChange(state.pack, judged.pack, record, judged, counts["added"], counts["removed"], tuple(notes))


__all__: Sequence[str] = (
    "BankChange",
    "State",
    "add_rows",
    "changed",
    "farthest_known",
    "novelties",
    "open_state",
    "refuse_seen",
    "remove_rows",
    "rows_from",
    "rows_like",
    "rows_named",
)
