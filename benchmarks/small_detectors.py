"""Trained detectors on real photographs, each without and with anomalies that nobody photographed: mean of seeds.

    python -m benchmarks small-detectors --data DATA_SET --data OTHER_SET
    python -m benchmarks small-detectors --data DATA_SET --seed 0 --normals 200 --limit 60 --method simplenet

For each data set (MVTec layout) and seed: draw photographs of `train/good`; run key knowledge augmentation on them,
with a language model of few words that is trained from scratch, the procedural painter, Deep SAD as evaluator and
preference training; then train each detector on the same photographs alone, with the set of *add* and with that of
*rep*, export it, and evaluate it on `test`. As the evaluator of round 0 judges all rounds, they do not depend on the
mode, and both sets are of one run. Labelled pictures play no part before that last step. EfficientAD's teacher is
distilled once, from pictures of anything, and serves every cell, as the paper's does; `--generic` is where it and the
student's penalty find them. Each cell is kept in the work folder as soon as it is there: start again and it goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import note, report, table
from benchmarks.kka_loop import LoopSettings, run_loop
from edgead.runtime.image import list_images
from edgead.runtime.spec import Preprocessing
from edgead.server_side.kka.choices import set_of
from edgead.server_side.kka.records import Image
from edgead.server_side.kka.work import WorkFolder

METHODS = {
    "deep-sad": "deep_sad",
    "simplenet": "simplenet",
    "recontrast": "recontrast",
    "efficientad": "efficientad",
}
SETS = ("none", "add", "rep")
FIGURES = ("auroc", "pixel_auroc")
GENERIC = 160
"""Generic pictures for EfficientAD: its teacher's closed form looks at as many crops."""
_HELD = 8
"""Of them, to see how much its teacher has not learned."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks small-detectors", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, action="append", required=True, help="data set; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="one for each run; 0, 1 and 2 if none")
    parser.add_argument("--method", choices=METHODS, action="append", help="all if none")
    parser.add_argument("--set", choices=SETS, action="append", dest="sets", help="all if none")
    parser.add_argument("--normals", type=int, help="photographs to train on; all of train/good if not given")
    parser.add_argument("--limit", type=int, help="test pictures of each type, the first by name; all if not given")
    parser.add_argument("--size", type=int, default=256, help="side of the detectors' input")
    parser.add_argument("--generic", type=Path, help="EfficientAD: pictures of anything; painted ones if not given")
    parser.add_argument("--steps", type=int, help="of each detector; its own number if not given")
    parser.add_argument("--captions", type=int, default=LoopSettings.captions, help="of each round")
    parser.add_argument("--rounds", type=int, default=LoopSettings.rounds, help="after round 0")
    parser.add_argument("--work", type=Path, default=Path("small-detectors"), help="where everything is kept")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    seeds, sets = options.seed or [0, 1, 2], options.sets or list(SETS)
    found: dict[str, Any] = {}
    for seed in seeds:
        for data in options.data:
            # What decides a cell is in the folder's name: other options begin anew.
            name = f"{data.name}-{options.normals or 'all'}-{options.limit or 'all'}-{options.size}"
            name += f"-{options.steps or 'own'}-{options.captions}-{options.rounds}"
            folder = options.work / name / f"seed-{seed}"
            for method in options.method or METHODS:
                for which in sets:
                    source = f"-{_source(options)}" if method == "efficientad" else ""
                    path = folder / f"{method}{source}-{which}.json"
                    if not path.exists():
                        note(f"{data.name}, seed {seed}: {method}, {which}")
                        cell = _cell(data, folder, method, which, seed, options)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(cell, indent=1, sort_keys=True) + "\n")
                    found.setdefault(data.name, {}).setdefault(method, {}).setdefault(which, {})[str(seed)] = (
                        json.loads(path.read_text())
                    )
    show(found)
    report("small-detectors", {"data": found}, options.json)
    return 0


def _cell(data: Path, folder: Path, method: str, which: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One detector: fitted, exported, evaluated."""
    from edgead.exporter.export import export_bundle
    from edgead.server_side.detectors.trained import TrainedOptions
    from edgead.server_side.evaluation import evaluate_bundle

    there = len(list_images(data / "train" / "good"))
    settings = LoopSettings(
        part=str(data.resolve()),
        normals=min(there, options.normals or there),
        held_out=0,
        reference=0,
        captions=options.captions,
        rounds=options.rounds,
    )
    work = run_loop(settings, folder, seed)
    anomalous = _samples(work, which) if which != "none" else []
    more: dict[str, Any] = {}
    if method == "efficientad":
        from edgead.server_side.detectors.efficientad import EfficientAdExtras

        generic = None if options.generic is None else _some_pictures(options.generic)
        more["extras"] = EfficientAdExtras(penalty=generic, teacher=_teacher(generic, options))
    learn = importlib.import_module(f"edgead.server_side.detectors.{METHODS[method]}").learn
    trained = TrainedOptions(preprocessing=Preprocessing(options.size, options.size), steps=options.steps, seed=seed)
    checkpoint = folder / f"{method}-{which}.training"
    start = time.perf_counter()
    learned = learn(list_images(work.normals), trained, anomalous, checkpoint=checkpoint, **more)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        detector = learned.write(Path(scratch) / "x.detector")
        export_bundle(detector, Path(scratch) / "x.bundle", ["onnx"])
        result = evaluate_bundle(Path(scratch) / "x.bundle", data, target="onnx", limit=options.limit)
    checkpoint.unlink(missing_ok=True)
    kinds = {kind.kind: kind for kind in result.kinds}
    return {
        "normals": settings.normals,
        "anomalies": len(anomalous),
        "rounds": settings.rounds,
        "tested": len(result.outcomes),
        "fit_seconds": seconds,
        "student_unlearned": learned.card.get("student_unlearned"),
        **{figure: getattr(kinds["all"], figure) for figure in FIGURES},
        "auroc_by_type": {name: kind.auroc for name, kind in kinds.items() if name not in ("all", "good")},
        "milliseconds": result.milliseconds,
    }


def _some_pictures(folder: Path) -> tuple[Path, ...]:
    """Up to `GENERIC` pictures below a folder, drawn from all."""
    there = list_images(folder)
    if len(there) <= 2 * _HELD:
        raise SystemExit(f"--generic: wanted more than {2 * _HELD} pictures in {folder}, got {len(there)}")
    # In random order, since the first ones are held out.
    return tuple(there[place] for place in np.random.default_rng(0).permutation(len(there))[:GENERIC].tolist())


def _source(options: argparse.Namespace) -> str:
    """Of generic pictures, for names."""
    return "painted" if options.generic is None else str(options.generic.resolve().name)


def _teacher(generic: tuple[Path, ...] | None, options: argparse.Namespace) -> Path:
    """EfficientAD's teacher, distilled from generic pictures alone if it is not there yet."""
    from edgead.server_side.backbones import load_backbone
    from edgead.server_side.detectors import efficientad_teacher as teaching
    from edgead.server_side.detectors.efficientad_teacher_file import write_teacher
    from edgead.server_side.detectors.trained import TrainedOptions

    path: Path = options.work / f"efficientad-{options.size}-{_source(options)}.teacher"
    if path.exists():
        return path
    size = Preprocessing(options.size, options.size)
    frames = teaching.generic_frames(size) if generic is None else teaching.picture_frames(generic, size)
    plain = TrainedOptions()
    backbone = load_backbone(plain.backbone, weights=plain.backbone_weights, layers=plain.layers).eval()
    none = frames[:0]
    teacher, history = teaching.distil_teacher(backbone, frames[_HELD:], none, frames[:_HELD])
    note(f"EfficientAD's teacher leaves {history.best:.3f} of the backbone's variance on other pictures unexplained")
    write_teacher(path, teacher, {"distilled_from": plain.backbone, "unexplained": round(history.best, 6)})
    return path


def _samples(work: WorkFolder, mode: str) -> list[tuple[Path, Path | None]]:
    """Pictures and masks of the set after the last round of a run, in a mode."""
    rounds = work.config.rounds
    images = {record.id: record for number in range(rounds + 1) for record in work.records(Image, number)}
    chosen = [images[name] for name, _ in set_of(work, rounds, mode)]
    return [(work.path / image.file, work.path / image.mask if image.mask else None) for image in chosen]


def show(found: dict[str, Any]) -> None:
    """A table for each data set: figure without anomalies, and with each set."""
    for data, methods in found.items():
        rows = []
        for method, sets in methods.items():
            row: list[Any] = [method, max(len(cells) for cells in sets.values())]
            for figure in FIGURES:
                for which in SETS:
                    values = [cell[figure] for cell in sets.get(which, {}).values() if cell[figure] is not None]
                    row.append(f"{statistics.fmean(values):.3f}" if values else "-")
            rows.append(row)
        head = [
            "method",
            "seeds",
            *(f"{'image' if f == 'auroc' else 'pixel'} {which}" for f in FIGURES for which in SETS),
        ]
        print(f"\n{data}: AUROC without generated anomalies, with KKA add, with KKA rep")
        print(table(head, rows))


if __name__ == "__main__":
    raise SystemExit(main())
