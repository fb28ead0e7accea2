"""A whole run: KKA(0), then rounds in which the author learns to prefer what is hard.

    round 0:  imagine -> paint -> judge -> collect = KKA(0)
              preferences -> tune
    round 1:  imagine with the tuned author -> ...  = KKA(1), and so on

Each stage is complete before the next begins, and a run that was ended anywhere goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgead.runtime.files import write_file
from edgead.server_side.kka.choices import collect, preferences
from edgead.server_side.kka.jobs import OrderedMap
from edgead.server_side.kka.records import Caption, Cost, Image, Judgement, Member, Preference
from edgead.server_side.kka.seams import Author, Embedder, Evaluator, Painter, Tuner, seed_of
from edgead.server_side.kka.stages import imagine, judge, paint, pick_representatives
from edgead.server_side.kka.work import WorkFolder

STAGES = ("describe", "representatives", "imagine", "paint", "judge", "collect", "prefer")
"""In order; the first two once, the others in each round."""


@dataclass(frozen=True)
class Makers:
    """Who does the work of a run; each is made when it is first needed.

    Attributes:
        describe: captions the normals of a run.
        embedder: in whose features clusters are found.
        author: the author with the adapter of the rounds before, or without one.
        painter: paints.
        evaluator: trains the confusion evaluator of a round, or reads the one that was trained.
        tuner: teaches the author.
        mapped: spreads writing, painting, embedding and measuring over machines; `map` for this process.
        measure: compares the sets of rounds on labelled pictures, where there are some.
        say: a line for people.
    """

    describe: Callable[[WorkFolder], object]
    embedder: Callable[[], Embedder]
    author: Callable[[Path | None], Author]
    painter: Callable[[], Painter]
    evaluator: Callable[[WorkFolder, int], Evaluator]
    tuner: Callable[[], Tuner]
    mapped: OrderedMap[Any, Any] = map
    measure: Callable[[WorkFolder, int], object] = lambda work, number: None
    say: Callable[[str], object] = lambda line: None


def run(work: WorkFolder, makers: Makers, *, stage: str | None = None, last_round: int | None = None) -> None:
    """Do what is left of a run: all of it, or up to a stage.

    Args:
        work: the run; the caller holds its lock.
        makers: who does it.
        stage: one of `STAGES`: nothing after it is done in the last round; None for all.
        last_round: which round is the last. None for all that the configuration asks for or, with a stage, for the
            first round in which it is not complete.

    Raises:
        EdgeadError: what a stage could not do; everything that was made is kept, and the run goes on from there.
    """
    until = len(STAGES) if stage is None else STAGES.index(stage)
    rounds = work.config.rounds
    if last_round is not None:
        rounds = min(last_round, rounds)
    elif stage is not None:
        rounds = next((at for at in range(rounds) if not work.is_done(stage, at)), rounds)
    makers.describe(work)
    if until >= 1 and not work.is_done("representatives"):
        pick_representatives(work, makers.embedder(), makers.mapped)
    painter = _once(makers.painter)
    for number in range(rounds + 1 if until >= 2 else 0):
        # Every round but the last is whole, since the next one rests on it.
        _round(work, makers, painter, number, until if number == rounds else len(STAGES))


def _round(work: WorkFolder, makers: Makers, painter: Callable[[], Painter], number: int, until: int) -> None:
    if not work.is_done("imagine", number):
        imagine(work, number, makers.author(adapter_before(work, number)), painter(), makers.mapped)
    if until >= 3 and not work.is_done("paint", number):
        paint(work, number, painter(), makers.mapped)
    if until >= 4 and not work.is_done("judge", number):
        judge(work, number, makers.evaluator(work, number), makers.mapped)
    if until >= 5:
        collect(work, number)
        _measure(work, number, makers)
        makers.measure(work, number)
    if until >= 6 and number < work.config.rounds:
        _prefer(work, number, makers)


def adapter_before(work: WorkFolder, number: int) -> Path | None:
    """The newest adapter of the rounds before `number`, or None."""
    for earlier in range(number - 1, -1, -1):
        folder = work.round_folder(earlier) / "adapter"
        if folder.is_dir():
            return folder
    return None


def facts(work: WorkFolder, number: int) -> dict[str, Any]:
    """What a round came to, as JSON-like content."""
    judged = work.records(Judgement, number)
    captions = work.records(Caption, number)
    members = work.records(Member, number)
    images = {record.id: record for record in work.records(Image, number)}
    counted = [record for record in judged if not record.faint]
    hard = [record for record in counted if record.hard]
    seconds: dict[str, float] = {}
    for cost in work.records(Cost):
        if cost.round == number:
            seconds[cost.stage] = round(seconds.get(cost.stage, 0.0) + cost.seconds, 3)
    return {
        "round": number,
        "captions": len(captions),
        "refused": sum(bool(record.refused) for record in captions),
        "images": len(images),
        "hard": len(hard),
        "easy": len(counted) - len(hard),
        "faint": len(judged) - len(counted),
        "hard_share": round(len(hard) / len(counted), 6) if counted else None,
        "limits": sorted({record.limit for record in judged}),
        "visible": _median([images[record.parent].visible for record in counted if images[record.parent].mask]),
        "visible_hard": _median([images[record.parent].visible for record in hard if images[record.parent].mask]),
        "distances_over_limit": {
            "hard": [record.distance / record.limit for record in hard],
            "easy": [record.distance / record.limit for record in counted if not record.hard],
        },
        "set": len(members),
        "set_hard": sum(member.hard for member in members),
        "preferences": len(work.records(Preference, number)),
        "seconds": seconds,
    }


def _measure(work: WorkFolder, number: int, makers: Makers) -> None:
    found = facts(work, number)
    path = work.round_folder(number) / "metrics.json"
    if path.exists():
        return
    # Times differ from run to run; they stay in costs.jsonl.
    content = {name: value for name, value in found.items() if name not in ("seconds", "preferences")}
    write_file(path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    share = "none that can be judged" if found["hard_share"] is None else f"{100 * found['hard_share']:.0f} % hard"
    makers.say(
        f"KKA({number}): {found['images']} images, {found['hard']} hard, {found['easy']} easy, {found['faint']} too "
        f"faint ({share}); set of {found['set']}, {found['set_hard']} of them hard"
    )


def _prefer(work: WorkFolder, number: int, makers: Makers) -> None:
    """Teach the author, or say why there is nothing to teach and go on with the author as it is."""
    if work.is_done("prefer", number):
        return
    pairs = preferences(work, number)
    if not pairs:
        found = facts(work, number)
        which = "hard" if not found["hard"] else "easy" if not found["easy"] else "different"
        makers.say(
            f"round {number} has no {which} captions, so there is nothing to prefer: the next round goes on with the "
            "author as it is. More captions, or another judge.hard_quantile, may help; "
            "start another work folder for them."
        )
        work.set_done("prefer", number)
        return
    with work.stage("prefer", number) as made:
        folder = work.round_folder(number) / "adapter"
        if not folder.is_dir():
            tuned = makers.tuner().tune(
                pairs, adapter_before(work, number), folder, seed=seed_of(work.config.seed, "prefer", number)
            )
            made.append(len(pairs))
            makers.say(
                f"round {number}: {len(pairs)} preferences, {tuned.steps} steps, loss {tuned.loss[0]:.3f} -> "
                f"{tuned.loss[1]:.3f}, reward margin {tuned.margin[0]:.3f} -> {tuned.margin[1]:.3f}"
            )


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 3) if values else None


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


__all__ = ["STAGES", "Makers", "adapter_before", "facts", "run"]
