"""Teaching a memory bank new normal patterns: the few rows that it lacks, and a new threshold with them.

A bank is never changed without its thresholds: `add_normal_rows` wants the scores of held-out normals, and gives
back one pack that holds both, with the false alarms and misses of before and after: a bank that knows more lets
more pass, and whoever releases it should see what. Old rows keep their bytes and their ids. `recalibrated` does this
for any change of a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.knowledge import IDS, Pack, new_pack
from edgead.runtime.spec import Calibration
from edgead.server_side.calibration import calibrate
from edgead.server_side.coreset import farthest_first, nearest_distance

BANK = "bank.normal"
SPACING = 0.9
"""New rows lie closer than what counts as known: the next picture of the pattern differs from those taught."""

Rows = NDArray[np.float32]
HeldOut = Callable[[Pack], tuple[NDArray[np.float32], NDArray[np.float32] | None]]
"""A pack -> image scores [n] and map maxima [n] (None without maps) of held-out normals under that pack."""

Known = Callable[[Pack], NDArray[np.float32]]
"""A pack -> image scores [m] of known defects under that pack."""


@dataclass(frozen=True)
class Change:
    """A share of pictures that was wrongly judged, before and after.

    Attributes:
        pictures: how many were judged.
        before: wrong under the old knowledge, bank and threshold.
        after: wrong under the new knowledge, bank and threshold.
    """

    pictures: int
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} of {self.pictures}"


@dataclass(frozen=True)
class Recalibration:
    """Changed knowledge with the thresholds that belong to it.

    Attributes:
        pack: arrays and thresholds together.
        false_alarms: held-out normals called NG. The new threshold is set on these very pictures: after it there
            are as few as the wanted rate allows, and what that promises is the calibration's to say.
        misses: known defects not called NG; None if none were given.
    """

    pack: Pack
    false_alarms: Change
    misses: Change | None = None

    def summary(self) -> str:
        """What the change does, as a phrase for people."""
        text = f"false alarms {self.false_alarms} held-out normals"
        if self.misses is None:
            return f"{text}; misses unknown: no known defects were given"
        return f"{text}, misses {self.misses} known defects"


@dataclass(frozen=True)
class Enrolment:
    """What teaching changed.

    Attributes:
        pack: the new knowledge: bank and thresholds together.
        added: rows that came in.
        offered: patches that were unlike anything in the old bank, of which `added` stand for all.
        false_alarms, misses: see `Recalibration`.
    """

    pack: Pack
    added: int
    offered: int
    false_alarms: Change
    misses: Change | None = None

    def summary(self) -> str:
        """What the change does, as a sentence for people."""
        return f"{self.added} rows added; {Recalibration(self.pack, self.false_alarms, self.misses).summary()}"


def add_normal_rows(
    pack: Pack,
    patches: Rows,
    held_out: HeldOut,
    *,
    known_defects: Known | None = None,
    novelty: float | None = None,
    most: int = 512,
    first_id: int | None = None,
) -> Enrolment:
    """Add what is new in `patches` to the normal bank and calibrate anew.

    Rows are taken by the greedy rule of the coreset, begun at the bank that is there: always the patch that is
    farthest from everything known, until all lie within `SPACING` times `novelty` of it.

    Args:
        pack: the knowledge so far; it is left as it is.
        patches: float32 [n, D], embeddings of pictures that are normal from now on.
        held_out: scores held-out normals, among them pictures of the new kind that `patches` does not hold. It is
            asked for `pack` first and for the new bank last.
        known_defects: scores pictures of defects that must still alarm; asked in the same order, with the new
            threshold the second time.
        novelty: distance from the bank up to which a patch counts as known; the score of a typical normal
            picture (`Calibration.typical`) if None.
        most: at most so many rows are added.
        first_id: the publisher's next row id; behind the largest of the pack if None.

    Raises:
        InputError: no patches, other dimensions than the bank's, a novelty below zero, or known defects of which
            none or another number is scored.
        KnowledgeError: a patch is not finite.
    """
    bank = np.asarray(pack.arrays[BANK])
    if patches.ndim != 2 or patches.shape[1:] != bank.shape[1:] or not len(patches):
        raise InputError(
            wanted=f"patches as float32 [n, {bank.shape[1]}]",
            got=f"{patches.dtype} {list(patches.shape)}",
            next_step="Make them with Inspector.embed of an engine of the same bundle.",
        )
    level = pack.calibration.typical if novelty is None else novelty
    taken, offered = novel_rows(bank, patches, level, most=most)
    arrays = with_rows(pack, {BANK: patches[taken]}, next_id(pack, first_id))
    done = recalibrated(pack, arrays, held_out, known_defects=known_defects)
    return Enrolment(done.pack, len(taken), offered, false_alarms=done.false_alarms, misses=done.misses)


def novel_rows(bank: Rows, patches: Rows, novelty: float, *, most: int = 512) -> tuple[NDArray[np.int64], int]:
    """Which patches a bank lacks: those taken, and how many there are that nothing in the bank is like.

    Args:
        bank: float32 [N, D].
        patches: float32 [n, D].
        novelty: distance up to which a patch counts as known.
        most: at most so many are taken.

    Raises:
        InputError: a novelty below zero.
    """
    if not novelty >= 0:
        raise InputError(wanted="a novelty of at least 0", got=str(novelty))
    distance = nearest_distance(patches, bank)
    new = np.flatnonzero(distance > novelty)
    taken = farthest_first(patches[new], most, distance=distance[new], within=SPACING * novelty)
    return new[taken], len(new)


def recalibrated(
    pack: Pack, arrays: Mapping[str, NDArray[Any]], held_out: HeldOut, *, known_defects: Known | None = None
) -> Recalibration:
    """A pack of changed arrays, with thresholds that are made for them.

    Args:
        pack: the knowledge so far.
        arrays: of the new knowledge, all of them.
        held_out: scores held-out normals; asked for `pack` first and for the new arrays last.
        known_defects: scores defects that must still alarm; asked in the same order, with the new threshold the
            second time.

    Raises:
        InputError: fewer than 2 held-out normals, or pictures of which none or another number is scored.
        KnowledgeError: an array breaks the rules of a pack.
    """
    normal_before, _ = held_out(pack)
    defects_before = None if known_defects is None else known_defects(pack)
    scores, maxima = held_out(_made(pack, arrays, pack.calibration))
    calibration = calibrate(scores, maxima, false_alarm_rate=pack.calibration.false_alarm_rate or 0.01)
    changed = _made(pack, arrays, calibration)
    before, after = pack.calibration.threshold, calibration.threshold
    misses = None
    if known_defects is not None and defects_before is not None:
        misses = _change(defects_before <= before, known_defects(changed) <= after, "known defects")
    return Recalibration(changed, _change(normal_before > before, scores > after, "held-out normals"), misses)


def next_id(pack: Pack, wanted: int | None = None) -> int:
    """The first row id to give out: `wanted`, or the one behind the largest of the pack where that is larger."""
    return max([wanted or 1, *(int(ids[-1]) + 1 for ids in map(pack.ids, pack.banks) if len(ids))])


def with_rows(pack: Pack, rows: Mapping[str, NDArray[Any]], first_id: int) -> dict[str, NDArray[Any]]:
    """The arrays of a pack with rows [n, D] added to banks, by name; they get ids from `first_id` on."""
    arrays = dict(pack.arrays)
    for bank in sorted(rows):
        added = rows[bank]
        ids = np.arange(first_id, first_id + len(added), dtype=np.uint64)
        dtype = pack.arrays[bank].dtype
        # In 16 bits a small negative number is -0.0, which packs do not have.
        arrays[bank] = np.concatenate([pack.arrays[bank], np.asarray(added, dtype) + dtype.type(0)])
        arrays[bank + IDS] = np.concatenate([pack.ids(bank), ids])
        first_id += len(added)
    return arrays


def _made(pack: Pack, arrays: Mapping[str, NDArray[Any]], calibration: Calibration) -> Pack:
    return new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=calibration, arrays=arrays)


def _change(before: NDArray[np.bool_], after: NDArray[np.bool_], what: str) -> Change:
    if before.shape != after.shape or not before.size:
        raise InputError(
            wanted=f"a score for each of the same {what} under the old and the new knowledge",
            got=f"{before.size} and {after.size}",
            next_step="Score the same pictures each time.",
        )
    return Change(int(after.size), int(before.sum()), int(after.sum()))


__all__: Sequence[str] = (
    "BANK",
    "Change",
    "Enrolment",
    "Recalibration",
    "add_normal_rows",
    "next_id",
    "novel_rows",
    "recalibrated",
    "with_rows",
)
