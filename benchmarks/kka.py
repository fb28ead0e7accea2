"""Does key knowledge augmentation do what it promises? A whole loop on two cores, by seed and as a mean.

    python -m benchmarks kka --work kka-loop
    python -m benchmarks kka --work kka-loop --part DATA_SET --seed 0 --mode add
    python -m benchmarks kka --work other --evaluator first --folds 1

Painted or photographed normals; a language model of 10^5 parameters that is taught a caption grammar from scratch; the
procedural painter; Deep SAD as evaluator; preference training with `trl`. It asks, and answers with yes or NO:

- does the hard share rise in every round, and by half again from the first to the last, above a floor of visibility?
- are Deep SAD and SimpleNet better on hard anomalies that were made apart, with KKA(last) than with KKA(0), and than
  with none?
- are hard anomalies worth more than easy ones at equal numbers?

Hard shares are those of the run's own evaluators, and of a reference that is the same for all rounds
(`benchmarks.kka_measure`). Everything is kept in the work folder: start again and it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import note, report, table
from benchmarks.kka_loop import LoopSettings, changed, run_loop
from benchmarks.kka_measure import METHODS, Measures, kept
from edgead.server_side.kka.report import write_report
from edgead.server_side.kka.rounds import facts
from edgead.server_side.kka.work import WorkFolder

MODES = ("add", "rep")
AT_LEAST = 1.5
"""Hard share of the last round as a multiple of the first one's."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks kka", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, action="append", help="one for each run; 0, 1 and 2 if none")
    parser.add_argument("--mode", choices=MODES, action="append", help="both if none")
    parser.add_argument("--work", type=Path, default=Path("kka-loop"), help="where everything is kept")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(
        "--without-training", action="store_true", help="hard shares only, nothing of what sets are worth"
    )
    for field in dataclasses.fields(LoopSettings):
        if field.name != "mode":
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=type(field.default), help=f"{field.default} if not given")
    options = vars(parser.parse_args(arguments))
    given = {field.name: options[field.name] for field in dataclasses.fields(LoopSettings) if field.name != "mode"}
    settings = changed(LoopSettings(), given)
    seeds = options["seed"] or [0, 1, 2]
    found = {
        str(seed): measured(
            settings, options["work"], seed, options["mode"] or list(MODES), options["without_training"]
        )
        for seed in seeds
    }
    show(found, settings)
    answers = claims(found, settings.rounds)
    for claim, answer in answers.items():
        print(f"{'yes' if answer['mean'] else 'NO':<4} {claim}  (seeds: {answer['seeds']} of {len(seeds)})")
    content = {"settings": dataclasses.asdict(settings), "seeds": found, "claims": answers}
    report("kka", content, options["json"])
    return 0 if all(answer["mean"] for answer in answers.values()) else 1


def measured(settings: LoopSettings, work: Path, seed: int, modes: list[str], without_training: bool) -> dict[str, Any]:
    """The runs of a seed and what they are worth."""
    folder = work / f"seed-{seed}"
    runs: dict[str, WorkFolder] = {}
    for mode in modes:
        note(f"seed {seed}, {mode}")
        runs[mode] = run_loop(changed(settings, {"mode": mode}), folder, seed)
        write_report(runs[mode])
    measures: list[Measures] = []

    def with_measures() -> Measures:
        if not measures:
            measures.append(Measures(settings, folder, seed))
        return measures[0]

    found: dict[str, Any] = {"rounds": {}}
    for mode, run in runs.items():
        found["rounds"][mode] = [facts(run, number) for number in range(settings.rounds + 1)]
        for each in found["rounds"][mode]:
            del each["distances_over_limit"]
        if not without_training:
            shares = kept(
                folder / f"reference-{mode}.json",
                lambda run=run: [
                    with_measures().hard_by_reference(run, number) for number in range(settings.rounds + 1)
                ],
            )
            for each, share in zip(found["rounds"][mode], shares, strict=True):
                each["hard_share_by_reference"] = share
    if not without_training:
        # Each set's worth is kept by itself, for a work that takes minutes to be ended without loss.
        found["worth"] = kept(folder / f"worth-{'-'.join(modes)}.json", lambda: with_measures().worth(runs))
        found["tests"] = kept(folder / "tests.json", lambda: with_measures().counts)
    return found


def claims(found: dict[str, Any], last: int) -> dict[str, Any]:
    """What was promised -> whether the mean over the seeds says so, and how many seeds do."""
    answers: dict[str, Any] = {}

    def ask(claim: str, values: Sequence[tuple[float, ...]], holds: Any) -> None:
        if values and all(value is not None for each in values for value in each):
            mean = tuple(statistics.fmean(each) for each in zip(*values, strict=True))
            answers[claim] = {"mean": bool(holds(mean)), "seeds": sum(bool(holds(each)) for each in values)}

    def rises(shares: tuple[float, ...]) -> bool:
        return all(before < after for before, after in itertools.pairwise(shares))

    for mode in MODES:
        runs = [seed["rounds"][mode] for seed in found.values() if mode in seed["rounds"]]
        for name, words in (("hard_share", "its own evaluators"), ("hard_share_by_reference", "the reference")):
            shares = [tuple(each[name] for each in run) for run in runs if all(name in each for each in run)]
            ask(f"{mode}: the hard share rises every round, by {words}", shares, rises)
            ask(
                f"{mode}: the last hard share is {AT_LEAST:g} times the first or more, by {words}",
                shares,
                lambda shares: shares[-1] >= AT_LEAST * shares[0],
            )
    worth = [seed["worth"] for seed in found.values() if "worth" in seed]
    for better, worse in (
        (f"KKA({last}) add", "KKA(0)"),
        (f"KKA({last}) rep", "KKA(0)"),
        (f"KKA({last}) add", "no anomalies"),
        (f"KKA({last}) add", f"uniform, as many as KKA({last}) add"),
        ("hard only, at equal number", "easy only, at equal number"),
    ):
        for ending, method in METHODS.items():
            figure = f"auroc_hard{ending}"
            pairs = [
                (each[better][figure], each[worse][figure])
                for each in worth
                if better in each and worse in each and figure in each[better]
            ]
            ask(f"{method}: on hard anomalies {better} beats {worse}", pairs, lambda pair: pair[0] > pair[1])
    return answers


def show(found: dict[str, Any], settings: LoopSettings) -> None:
    """Tables for people: rounds, then worth."""
    figures = ("hard", "easy", "faint", "hard_share", "hard_share_by_reference", "visible", "visible_hard")
    rows = []
    for mode in MODES:
        for number in range(settings.rounds + 1):
            each = {seed: one["rounds"][mode][number] for seed, one in found.items() if mode in one["rounds"]}
            for seed, values in each.items():
                rows.append([mode, f"KKA({number})", seed, *(_shown(values.get(name)) for name in figures)])
            if len(each) > 1:
                means = [
                    _mean([values[name] for values in each.values() if values.get(name) is not None])
                    for name in figures
                ]
                rows.append([mode, f"KKA({number})", "mean", *map(_shown, means)])
    print(f"visible: median change of colour in the mask, of 255; below {settings.floor:g} is neither hard nor easy")
    head = ["mode", "round", "seed", "hard", "easy", "faint", "hard share", "by reference", "visible", "hard ones"]
    print(table(head, rows))
    worth = {seed: one["worth"] for seed, one in found.items() if "worth" in one}
    if worth:
        print("\nDetectors trained with each set, tried on anomalies made apart; of these hard: ", end="")
        print(", ".join(f"{one['tests']['hard']} of {one['tests']['painted']}" for one in found.values()))
        for ending, method in METHODS.items():
            lines = []
            for name in next(iter(worth.values())):
                cells = [one[name] for one in worth.values() if name in one]
                by_seed = [_shown(cell.get(f"auroc_hard{ending}")) for cell in cells]
                figures = ("images", f"auroc_hard{ending}", f"auroc_all{ending}")
                means = [_mean([cell[key] for cell in cells if key in cell]) for key in figures]
                lines.append([name, *map(_shown, means), " ".join(by_seed)])
            print(table([f"{method} with", "images", "AUROC hard", "AUROC all", "hard, by seed"], lines))
    print()


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if float(value).is_integer() and value > 1 else f"{value:.3f}" if value < 2 else f"{value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
