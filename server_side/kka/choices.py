"""What a round chooses: the anomalies that detectors train on, and the pairs that the author learns from."""

from __future__ import annotations

import numpy as np

from edgead.server_side.kka.records import Caption, Image, Judgement, Member, Normal, Preference, Representative
from edgead.server_side.kka.seams import seed_of
from edgead.server_side.kka.stages import numbered, prompt_of
from edgead.server_side.kka.work import WorkFolder


def collect(work: WorkFolder, number: int) -> list[Member]:
    """The anomalies that detectors train on after a round.

    *add*: those before and all of this round. *rep*: as many as after round 0; hard ones of this round take the places
    of easy ones, the farthest (easiest) first, in multiples of the limit that they were judged by. Faint ones never.

    Raises:
        InputError: a record of another kind.
        StorageError: the file system refused.
    """
    if work.is_done("collect", number):
        return work.records(Member, number)
    before = [(member.parent, member.hard) for member in collect(work, number - 1)] if number else []
    with work.stage("collect", number) as made:
        have = {record.id for record in work.records(Member, number)}
        found = [
            Member(numbered("m", number, at), number, name, hard)
            for at, (name, hard) in enumerate(_after(work, number, before, work.config.mode))
        ]
        left = [member for member in found if member.id not in have]
        work.append_all(left, number)
        made.append(len(left))
    return work.records(Member, number)


def set_of(work: WorkFolder, number: int, mode: str) -> list[tuple[str, bool]]:
    """(image, whether it is hard) of the set that a round would have in a mode, whatever the run's own mode is.

    Where one evaluator judges all rounds (`judge.evaluator = "first"`) rounds do not depend on the mode, and this is
    the set of a run in that mode.

    Args:
        work: a run whose rounds up to `number` are judged.
        number: of the round.
        mode: add or rep.
    """
    found: list[tuple[str, bool]] = []
    for at in range(number + 1):
        found = _after(work, at, found, mode)
    return found


def _after(work: WorkFolder, number: int, before: list[tuple[str, bool]], mode: str) -> list[tuple[str, bool]]:
    """The set after a round, from the one before it."""
    new = [record for record in work.records(Judgement, number) if not record.faint]
    if number == 0 or mode == "add":
        return before + [(record.parent, record.hard) for record in new]
    far = {
        record.parent: record.distance / record.limit
        for earlier in range(number)
        for record in work.records(Judgement, earlier)
    }
    easy = sorted((name for name, hard in before if not hard), key=lambda name: (-far[name], name))
    better = [record.parent for record in sorted(new, key=lambda record: record.id) if record.hard]
    swaps = dict(zip(easy, better, strict=False))
    return [(swaps[name], True) if name in swaps else (name, hard) for name, hard in before]


def preferences(work: WorkFolder, number: int) -> list[Preference]:
    """Pairs of a hard caption, chosen, and an easy one, rejected. None where a round has only one kind.

    With `prefer.reject_faint` captions of too faint anomalies are rejected too. A caption with images of both kinds is
    neither. Pairs are drawn by the run's seed, each hard caption as often as any other; a pair of two captions with the
    same words is left out.

    Raises:
        InputError: a record of another kind, or the configuration's prompt has other places than it may have.
        StorageError: the file system refused.
    """
    if work.is_done("preferences", number):
        return work.records(Preference, number)
    captions = {record.id: record for record in work.records(Caption, number)}
    normals = {record.id: record.caption for record in work.records(Normal)}
    parents = {record.id: record.parent for record in work.records(Representative)}
    images = {record.id: record.parent for record in work.records(Image, number)}
    hard: set[str] = set()
    easy: set[str] = set()
    for record in work.records(Judgement, number):
        if not record.faint or work.config.prefer.reject_faint:
            (hard if record.hard else easy).add(images[record.parent])
    chosen, rejected = sorted(hard - easy), sorted(easy - hard)
    rng = np.random.default_rng(seed_of(work.config.seed, "preferences", number))
    have = {record.id for record in work.records(Preference, number)}
    with work.stage("preferences", number) as made:
        new = []
        for place in range(work.config.prefer.pairs if chosen and rejected else 0):
            if place % len(chosen) == 0:
                order = rng.permutation(len(chosen))
            good, bad = captions[chosen[order[place % len(chosen)]]], captions[rejected[rng.integers(len(rejected))]]
            if good.text == bad.text:
                continue
            pair = Preference(
                numbered("p", number, place),
                number,
                prompt_of(work.config, normals[parents[good.parent]]),
                good.text,
                bad.text,
                good.id,
                bad.id,
            )
            if pair.id not in have:
                new.append(pair)
        work.append_all(new, number)
        made.append(len(new))
    return work.records(Preference, number)


__all__ = ["collect", "preferences", "set_of"]
