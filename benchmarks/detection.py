"""Detection on labelled data sets: backbones side by side in the same pipeline, mean of several seeds.

    python -m benchmarks.detection --data DATA_SET --data OTHER_SET
    python -m benchmarks.detection --data DATA_SET --teacher mobilenet_v2_1.0_224_quant.tflite --json out.json

For each data set (MVTec layout), backbone and seed: fit on `train/good`, export, evaluate on `test`. The seed
decides which normals are held out for the threshold and where the coreset begins. Nothing is chosen here: every
setting is the default of `edgead fit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgead.exporter.export import export_bundle
from edgead.server_side.evaluation import evaluate_bundle
from edgead.server_side.fitting import FitOptions, fit_memory_bank

FIGURES = ("auroc", "aupr", "f1_max", "pixel_auroc", "pixel_f1_max", "pro")


def measure(data: Path, backbone: str, weights: Path | None, seed: int, engines: list[str]) -> dict[str, Any]:
    """One fit and its evaluation; the first engine gives the metrics, the others their milliseconds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        detector = fit_memory_bank(
            data / "train" / "good",
            folder / "x.detector",
            FitOptions(backbone=backbone, backbone_weights=weights, seed=seed),
        )
        fitted = time.perf_counter() - start
        bundle = folder / "x.bundle"
        export_bundle(detector, bundle, engines)
        result = evaluate_bundle(bundle, data, target=engines[0])
        times = {result.engine: result.milliseconds["total"]}
        for engine in engines[1:]:
            other = evaluate_bundle(bundle, data, target=engine, limit=20)
            times[other.engine] = other.milliseconds["total"]
    kinds = {kind.kind: kind for kind in result.kinds}
    return {
        "seed": seed,
        "fit_seconds": fitted,
        "rows": detector.card["bank"]["normal_rows"],
        "dimensions": detector.card["bank"]["dimensions"],
        **{name: getattr(kinds["all"], name) for name in FIGURES},
        "auroc_by_type": {name: kind.auroc for name, kind in kinds.items() if name not in ("all", "good")},
        "false_alarms": kinds["good"].wrong / max(1, kinds["good"].images),
        "misses": kinds["all"].wrong / max(1, kinds["all"].images),
        "milliseconds": times,
    }


def mean(runs: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the seeds; None where the figure is not defined."""
    values = [run[name] for run in runs if run[name] is not None]
    return statistics.fmean(values) if values else None


def show(value: float | None, width: int = 8) -> str:
    """A figure for the table."""
    return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="data set, may be repeated")
    parser.add_argument("--teacher", type=Path, help="also measure the MobileNetV2 teacher of this file")
    parser.add_argument("--backbone", action="append", help="other backbones beside the embedded one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engine", action="append", help="engines, the first gives the metrics")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    words = parser.parse_args()
    engines = words.engine or ["onnx", "openvino"]
    backbones: list[tuple[str, Path | None]] = [("embedded", None)]
    backbones += [(name, None) for name in words.backbone or []]
    if words.teacher is not None:
        backbones.append(("mobilenet_v2_tflite", words.teacher))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    head = f"{'data':<16}{'backbone':<22}{'AUROC':>8}{'AUPR':>8}{'F1':>8}{'px AUR':>8}"
    head += f"{'PRO':>8}{'alarms':>8}{'misses':>8}"
    print(head + f"{'rows':>8}{'fit s':>8}  ms per frame", flush=True)
    for data in words.data:
        for name, weights in backbones:
            runs = [measure(data, name, weights, seed, engines) for seed in range(words.seeds)]
            found.setdefault(data.name, {})[name] = runs
            cells = "".join(
                show(mean(runs, figure))
                for figure in ("auroc", "aupr", "f1_max", "pixel_auroc", "pro", "false_alarms", "misses")
            )
            times = ", ".join(
                f"{engine} {statistics.median(run['milliseconds'][engine] for run in runs):.1f}"
                for engine in runs[0]["milliseconds"]
            )
            rows, seconds = runs[0]["rows"], mean(runs, "fit_seconds")
            print(f"{data.name:<16}{name:<22}{cells}{rows:8d}{seconds:8.0f}  {times}", flush=True)
            for kind in runs[0]["auroc_by_type"]:
                values = [run["auroc_by_type"][kind] for run in runs]
                print(f"{'':<16}  {kind:<20}{statistics.fmean(values):8.3f}", flush=True)
            if words.json is not None:
                words.json.write_text(json.dumps(found, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
