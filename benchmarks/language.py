"""What detectors with sentences cost on the device, and what lazy suppression saves.

    python -m benchmarks language
    python -m benchmarks language --models ViT-B-16-plus-240 --methods winclip

First every method by engine, with towers of two sizes; random weights do for time. Then a memory bank with a
normality trunk beside it, over streams with 0, 1 and 10 % of alarms: the mean of a frame should be the base alone plus
the share of alarms times the second trunk; beside it the 99th percentile and a burst of 20 alarms.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import PAUSE, THREADS, Frame, bank_detector, median, note, painted, product_bundle, report, table
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle
from edgead.runtime.inspection import percentile
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack
from edgead.runtime.notes import NOTE
from edgead.runtime.spec import Calibration
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.normality import NORMAL
from edgead.server_side.detectors.normality import TABLE as NORMALITIES
from edgead.server_side.detectors.projections import default_layers, new_projections, write_projections
from edgead.server_side.detectors.text_heads import TABLE
from edgead.server_side.fit_options import LANGUAGE_METHODS
from edgead.server_side.learned import Learned
from edgead.server_side.vision_language import load_model, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

MODELS = ("MobileCLIP-S1", "ViT-B-16-plus-240")
"""A tower for the edge, and that of WinCLIP and ALFA."""
METHODS = ("winclip", "april-gan", "alfa", "anomalous-few-shot")
ENGINES = ("onnx", "openvino")
SHARES = (0.0, 0.01, 0.1)
"""Of frames that alarm."""
BURST = 20
ALLOWED = 0.03
"""How far the mean may be from the sum, as a share of it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks language", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=200, help="frames of each stream")
    parser.add_argument("--lazy-model", default="MobileCLIP-S1", help="tower of the normality trunk")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"methods": [], "lazy": []}
    with tempfile.TemporaryDirectory(prefix="edgead-language-") as scratch:
        for name in options.models:
            parts = Parts(name, Path(scratch))
            for method in options.methods:
                note(f"{method} over {name} ...")
                bundle = _bundle(method, parts, Path(scratch) / "bundle")
                found = _time_method(bundle, method, name, options.rounds)
                note("  " + ", ".join(f"{line['engine']} {line['total']:.4g} ms" for line in found))
                figures["methods"] += found
        if options.frames:
            parts = Parts(options.lazy_model, Path(scratch))
            for engine in ENGINES:
                note(f"a memory bank with {options.lazy_model} beside it, {engine} ...")
                figures["lazy"] += _lazy(engine, parts, Path(scratch), options.frames)
    _print(figures)
    report("language", figures, options.json)
    return 0 if all(line["off"] <= ALLOWED for line in figures["lazy"]) else 1


class Parts:
    """A model with random weights whose answers depend on the picture, and projections for it, as files.

    Freshly made towers scale their branches to nearly nothing and have seen no pictures: all frames would be
    alike, and the parity gate compares with the range of the maps.
    """

    def __init__(self, model: str, folder: Path) -> None:
        self.model = model
        self.weights = folder / f"{model}.pt"
        self.projections = folder / f"{model}.projections"
        loaded = load_model(model, "random:0")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in loaded.module.state_dict().items():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("gamma"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5)
        torch.save(loaded.module.state_dict(), self.weights)
        loaded = load_model(model, self.weights)
        tower = tower_of(loaded)
        layers = default_layers(tower.depth)
        made = new_projections(layers, [tower.layer_widths[layer - 1] for layer in layers], tower.embed_dim)
        write_projections(self.projections, made, model=loaded.name, weights=loaded.weights_sha256)

    def learned(self, method: str) -> Learned:
        """A zero-shot detector whose sentences are random directions: those of an untrained text tower are alike."""
        options = VisionLanguageOptions(
            model=self.model, weights=self.weights, class_name="carpet", projections=self.projections
        )
        module = importlib.import_module(f"edgead.server_side.detectors.{LANGUAGE_METHODS[method]}")
        learned: Learned = module.learn([], options)
        if TABLE not in learned.pack.arrays:
            return learned
        rows = np.random.default_rng(0).standard_normal(learned.pack.arrays[TABLE].shape, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        pack = learned.pack
        arrays = {**pack.arrays, TABLE: rows}
        return dataclasses.replace(learned, pack=Pack(pack.product, pack.fingerprint, pack.calibration, arrays))


def _bundle(method: str, parts: Parts, path: Path) -> Bundle:
    fitted = parts.learned(method).write(path.with_suffix(".detector"), force=True)
    return export_bundle(fitted, path, list(ENGINES), force=True)


def _time_method(bundle: Bundle, method: str, model: str, rounds: int) -> list[dict[str, Any]]:
    size = bundle.manifest.detector.preprocessing
    frames = painted(4, size=max(size.width, size.height))
    seen: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    inspectors = {engine: Inspector(bundle, target=engine, threads=THREADS) for engine in ENGINES}
    try:
        for turn in range(rounds):
            for engine, inspector in inspectors.items():
                time.sleep(PAUSE)
                for place in range(3):  # the first one finds the other engine's data in the caches
                    result = inspector.inspect(frames[(turn + place) % len(frames)])
                    if place:
                        seen[engine].append(dict(result.timings))
    finally:
        for inspector in inspectors.values():
            inspector.close()
    return [
        {
            "model": model,
            "method": method,
            "engine": engine,
            "frame": f"{size.width}x{size.height}",
            **{stage: median([timings[stage] for timings in times]) for stage in ("trunk", "head", "total")},
        }
        for engine, times in seen.items()
    ]


def _lazy(engine: str, parts: Parts, scratch: Path, count: int) -> list[dict[str, Any]]:
    """Streams through a memory bank: without sentences, lazily and eagerly with one."""
    place = scratch / f"lazy-{engine}"
    place.mkdir(exist_ok=True)
    base, pack = product_bundle(place / "base", 2_000, targets=(engine,))
    normality = parts.learned("normality").write(place / "normality.detector", force=True)
    good, bad = painted(4, seed=21), painted(4, seed=9, defects=True)
    bundle, known = _with_normality(base, pack, normality, place, engine)
    threshold = _between(bundle, known, engine, good, bad)
    calibration = Calibration(threshold=threshold, map_threshold=pack.calibration.threshold)
    plain = Pack(known.product, known.fingerprint, calibration, known.arrays)
    row = np.zeros((1, known.arrays[NORMALITIES].shape[1]), np.float32)
    row[0, 0] = 1.0
    arrays = {**known.arrays, NORMALITIES: row, NORMAL: np.roll(row, 1, axis=1)}
    arrays.pop(NORMALITIES + NOTE, None)
    taught = Pack(known.product, known.fingerprint, calibration, arrays)
    lines = []
    with (
        Inspector(bundle, target=engine, threads=THREADS, packs=[plain]) as alone,
        Inspector(bundle, target=engine, threads=THREADS, packs=[taught]) as lazy,
        Inspector(bundle, target=engine, threads=THREADS, packs=[taught], suppression="eager") as eager,
    ):
        for share in SHARES:
            alarms = _places(count, share)
            frames = [bad[n % 4] if n in alarms else good[n % 4] for n in range(count)]
            times: dict[str, list[float]] = {"alone": [], "lazy": [], "eager": []}
            second: list[float] = []
            for _ in range(3):
                for name, inspector in (("alone", alone), ("lazy", lazy), ("eager", eager)):
                    time.sleep(PAUSE)
                    inspector.inspect(frames[0])
                    for frame in frames if name != "eager" else frames[: count // 4]:
                        result = inspector.inspect(frame)
                        times[name].append(result.timings["total"])
                        if name == "eager":
                            second.append(result.timings["normality"])
            burst = [lazy.inspect(bad[n % 4]).timings["total"] for n in range(BURST)]
            mean, base_mean, dear = _mean(times["lazy"]), _mean(times["alone"]), _mean(second)
            actual = len(alarms) / count
            wanted = base_mean + actual * dear
            lines.append(
                {
                    "engine": engine,
                    "model": parts.model,
                    "alarms": actual,
                    "base": base_mean,
                    "second": dear,
                    "sum": wanted,
                    "lazy": mean,
                    "off": abs(mean - wanted) / wanted,
                    "p99": percentile(times["lazy"], 0.99),
                    "burst": max(burst),
                    "eager": _mean(times["eager"]),
                }
            )
    return lines


def _with_normality(base: Bundle, pack: Pack, normality: Any, place: Path, engine: str) -> tuple[Bundle, Pack]:
    """The base detector and the normality detector in one bundle, and the pack of all rows for it."""
    rows = np.asarray(pack.arrays["bank.normal"])
    fitted = bank_detector(load_backbone("embedded"), rows, painted(2, seed=1, defects=True), threshold=1e9)
    bundle = export_bundle(fitted, place / "both", [engine], normality=normality, force=True)
    return bundle, bundle.pack(bundle.manifest.default)


def _between(bundle: Bundle, pack: Pack, engine: str, good: Frame, bad: Frame) -> float:
    """A threshold that the good frames pass and the bad ones do not."""
    with Inspector(bundle, target=engine, threads=THREADS, packs=[pack]) as inspector:
        calm = [float(inspector.inspect(frame).score or 0.0) for frame in good]
        loud = [float(inspector.inspect(frame).score or 0.0) for frame in bad]
    if max(calm) >= min(loud):
        raise SystemExit(f"painted defects do not stand out: good up to {max(calm)}, bad from {min(loud)}")
    return (max(calm) + min(loud)) / 2


def _places(count: int, share: float) -> set[int]:
    """Evenly spread places of the alarms in a stream."""
    alarms = round(count * share)
    return {round((n + 0.5) * count / alarms) for n in range(alarms)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _print(figures: dict[str, Any]) -> None:
    if figures["methods"]:
        head = ["tower", "method", "engine", "frame", "trunk, ms", "head, ms", "total, ms"]
        rows = [
            [line[key] for key in ("model", "method", "engine", "frame", "trunk", "head", "total")]
            for line in figures["methods"]
        ]
        print(f"medians, {THREADS} threads, random weights")
        print(table(head, rows))
    if figures["lazy"]:
        head = ["engine", "alarms", "base", "second trunk", "sum", "lazy mean", "off", "p99", "burst max", "eager mean"]
        rows = [
            [
                line["engine"],
                f"{line['alarms']:.0%}",
                *(line[key] for key in ("base", "second", "sum", "lazy")),
                f"{line['off']:.1%}",
                *(line[key] for key in ("p99", "burst", "eager")),
            ]
            for line in figures["lazy"]
        ]
        print(f"\nmilliseconds of a frame, memory bank of 2,000 rows and {figures['lazy'][0]['model']} beside it")
        print(table(head, rows))


if __name__ == "__main__":
    raise SystemExit(main())
