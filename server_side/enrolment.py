"""Teaching a memory bank new normal patterns: the few rows that it lacks, and a new threshold with them.

A bank is never changed without its thresholds: `add_normal_rows` wants the scores of held-out normals, and gives
back one pack that holds both, with the false alarms and misses of before and after: a bank that knows more lets
more pass, and whoever releases it should see what. Old rows keep their bytes and their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.knowledge import IDS, Pack, new_pack
from edgead.runtime.spec import Calibration
from edgead.server_side.calibration import calibrate

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
class Enrolment:
    """What teaching changed.

    Attributes:
        pack: the new knowledge: bank and thresholds together.
        added: rows that came in.
        offered: patches that were unlike anything in the old bank, of which `added` stand for all.
        false_alarms: held-out normals called NG. The new threshold is set on these very pictures: after it there
            are as few as the wanted rate allows, and what that promises is the calibration's to say.
        misses: known defects not called NG; None if none were given.
    """

    pack: Pack
    added: int
    offered: int
    false_alarms: Change
    misses: Change | None = None

    def summary(self) -> str:
        """What the change does, as a sentence for people."""
        text = f"{self.added} rows added; false alarms {self.false_alarms} held-out normals"
        if self.misses is None:
            return f"{text}; misses unknown: no known defects were given"
        return f"{text}, misses {self.misses} known defects"


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
    if not level >= 0:
        raise InputError(wanted="a novelty of at least 0", got=str(novelty))
    distance = _distance(patches, bank)
    offered = int((distance > level).sum())
    rows = _cover(patches[distance > level], distance[distance > level], SPACING * level, most)
    normal_before, _ = held_out(pack)
    defects_before = None if known_defects is None else known_defects(pack)
    taught = _with_rows(pack, rows, pack.calibration, first_id)
    scores, maxima = held_out(taught)
    calibration = calibrate(scores, maxima, false_alarm_rate=pack.calibration.false_alarm_rate or 0.01)
    taught = _with_rows(pack, rows, calibration, first_id)
    before, after = pack.calibration.threshold, calibration.threshold
    misses = None
    if known_defects is not None and defects_before is not None:
        misses = _change(defects_before <= before, known_defects(taught) <= after, "known defects")
    return Enrolment(
        taught,
        len(rows),
        offered,
        false_alarms=_change(normal_before > before, scores > after, "held-out normals"),
        misses=misses,
    )


def _change(before: NDArray[np.bool_], after: NDArray[np.bool_], what: str) -> Change:
    if before.shape != after.shape or not before.size:
        raise InputError(
            wanted=f"a score for each of the same {what} under the old and the new knowledge",
            got=f"{before.size} and {after.size}",
            next_step="Score the same pictures each time.",
        )
    return Change(int(after.size), int(before.sum()), int(after.sum()))


def _distance(patches: Rows, bank: Rows, chunk: int = 4096) -> Rows:
    """Euclidean distance of each patch to its nearest row, float32 [n]."""
    half = (bank * bank).sum(1) / 2
    found = []
    for start in range(0, len(patches), chunk):
        part = patches[start : start + chunk]
        # The expansion only chooses the row; the distance is computed from the difference.
        nearest = (half - part @ bank.T).argmin(1)
        found.append(np.sqrt(np.square(part - bank[nearest]).sum(1)))
    return np.concatenate(found)


def _cover(patches: Rows, distance: Rows, level: float, most: int) -> Rows:
    taken: list[int] = []
    distance = distance.copy()
    while len(taken) < min(most, len(patches)) and distance.max() > level:
        place = int(distance.argmax())
        taken.append(place)
        distance = np.minimum(distance, np.sqrt(np.square(patches - patches[place]).sum(1)))
    return patches[taken]


def _with_rows(pack: Pack, rows: Rows, calibration: Calibration, first_id: int | None) -> Pack:
    arrays = dict(pack.arrays)
    known = [int(ids[-1]) + 1 for ids in (pack.ids(bank) for bank in pack.banks) if len(ids)]
    start = max([1, *known] if first_id is None else [first_id, *known])
    arrays[BANK] = np.concatenate([pack.arrays[BANK], rows])
    arrays[BANK + IDS] = np.concatenate([pack.ids(BANK), np.arange(start, start + len(rows), dtype=np.uint64)])
    return new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=calibration, arrays=arrays)


__all__: Sequence[str] = ("BANK", "Change", "Enrolment", "add_normal_rows")
