"""The steps of the demo, one after the other, into one folder that appears whole or not at all."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.demo_data import BATCH, PRODUCTS, DataOptions, paint_data
from edgead.demo_live import KINDS as LINE_KINDS
from edgead.demo_live import LiveUpdate, Shown, teach_while_running
from edgead.detector_file import FittedDetector
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import Bundle, open_bundle, write_bundle
from edgead.runtime.engines import available_threads, is_available
from edgead.runtime.errors import FailureError, InputError, ParityError
from edgead.runtime.files import new_folder, refuse_existing, write_file
from edgead.runtime.image import list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import write_pack
from edgead.runtime.spec import EngineRecord, Preprocessing, canonical_json
from edgead.server_side.datasets import test_samples
from edgead.server_side.evaluation import Evaluation, evaluate_bundle
from edgead.server_side.fitting import FitOptions, fit_memory_bank

Frame = NDArray[np.uint8]
Log = Callable[[str], None]
CAPABILITIES = ("8.6", "8.9")
"""GPU generations for which TensorRT plans are built ahead of time."""
STEPS = 6


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for.

    Attributes:
        images: good parts to learn from, for each product.
        size: side of the engine's frame in pixels, a multiple of 32.
        backbone: feature network.
        seed: everything follows from it.
        seconds: how long the line runs before and after the update.
    """

    images: int = 80
    size: int = 256
    backbone: str = "embedded"
    seed: int = 0
    seconds: float = 2.0


@dataclass(frozen=True)
class EngineFigures:
    """One engine of the bundle on this machine.

    Attributes:
        record: of the manifest, with its parity figures.
        size: bytes of its files.
        milliseconds: medians by stage; empty where the engine did not run here.
        frames: frames that were timed.
        changed: verdicts that differ from the first engine's; None where it did not run.
        note: why there are no times, for people.
    """

    record: EngineRecord
    size: int
    milliseconds: dict[str, float] = field(default_factory=dict)
    frames: int = 0
    changed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class DemoResult:
    """All that the report shows."""

    options: DemoOptions
    bundle: Bundle
    evaluations: dict[str, Evaluation]
    engines: tuple[EngineFigures, ...]
    live: LiveUpdate
    seconds: dict[str, float]
    machine: str

    def figures(self) -> dict[str, Any]:
        """The key figures, as JSON holds them."""
        live = self.live
        return {
            "machine": self.machine,
            "seconds": {step: round(value, 2) for step, value in self.seconds.items()},
            "products": {name: evaluation.to_dict() for name, evaluation in self.evaluations.items()},
            "engines": {
                engine.record.name: {
                    "bytes": engine.size,
                    "milliseconds": {stage: round(ms, 3) for stage, ms in engine.milliseconds.items()},
                    "frames": engine.frames,
                    "verdicts_changed": engine.changed,
                    "parity": None
                    if engine.record.parity is None
                    else {"score": engine.record.parity.score, "map": engine.record.parity.map},
                    "note": engine.note,
                }
                for engine in self.engines
            },
            "update": {
                "rows_added": live.added,
                "row_bytes": live.row_bytes,
                "pack_bytes": live.pack_bytes,
                "learn_seconds": round(live.learn_seconds, 4),
                "swap_seconds": round(live.swap_seconds, 4),
                "frames": len(live.seen),
                "frames_during_swap": live.during_swap,
                "frames_lost": live.lost,
                "frames_mixed": live.mixed,
                "alarms": {
                    when: {kind: list(live.alarms(kind, pack.version)) for kind in LINE_KINDS}
                    for when, pack in (("before", live.before), ("after", live.after))
                },
            },
        }


def run_demo(
    output: Path, options: DemoOptions, *, force: bool = False, log: Log = lambda text: None
) -> dict[str, Any]:
    """Run the whole demo and write its folder.

    Args:
        output: the folder; it appears when all is done.
        options: see `DemoOptions`.
        force: replace what is at `output`.
        log: takes a line for people at each step.

    Returns:
        the key figures, JSON-like; also in `figures.json`.

    Raises:
        InputError: a size that engines cannot take.
        OutputExistsError: `output` exists and `force` is false.
        ParityError: an engine disagrees with torch.
        StorageError: the file system refused; nothing is left half-written.
    """
    from edgead.demo_report import html_report

    if options.size % 32:
        raise InputError(
            wanted="an engine frame whose side is a multiple of 32", got=f"--size {options.size}", next_step="Try 256."
        )
    refuse_existing(output, force)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with new_folder(output, force=force) as folder:
        with _step(1, "painting parts of two products", seconds, log) as note:
            data = DataOptions(options.images, round(options.size * 1.25), options.seed)
            paint_data(folder / "data", data)
            note(f"{len(list_images(folder / 'data'))} pictures in data/")
        detectors = {}
        with _step(2, "learning from good parts alone", seconds, log) as note:
            for product in PRODUCTS:
                detectors[product] = _fit(folder, product, options)
                note(_learned(product, detectors[product], options.images))
        with _step(3, "compiling for every engine library of this machine", seconds, log) as note:
            bundle = _export(folder, detectors, note)
        with _step(4, "inspecting the test sets", seconds, log) as note:
            evaluations = _evaluate(folder, bundle, note)
            engines = tuple(_bench(bundle, folder, evaluations, note))
        with _step(5, "teaching a running inspector a new pattern", seconds, log) as note:
            live = _teach(folder, bundle, options.seconds)
            (folder / "knowledge").mkdir()
            write_pack(folder / "knowledge" / f"{BATCH}-new-batch.safetensors", live.after)
            open_bundle(bundle.path)  # every digest again: the update touched no file of the bundle
            _told(live, note)
        with _step(6, "writing the report", seconds, log):
            seconds["total"] = time.perf_counter() - start
            result = DemoResult(options, bundle, evaluations, engines, live, seconds, _machine())
            write_file(folder / "report.html", html_report(result, folder).encode())
            write_file(folder / "figures.json", canonical_json(result.figures()))
    log(f"done in {time.perf_counter() - start:.0f} s. Open {output / 'report.html'}")
    return {**result.figures(), "report": str(output / "report.html")}


@contextmanager
def _step(number: int, title: str, seconds: dict[str, float], log: Log) -> Iterator[Log]:
    log(f"[{number}/{STEPS}] {title}")
    start = time.perf_counter()
    yield lambda text: log(f"      {text}")
    seconds[title] = time.perf_counter() - start
    log(f"      {seconds[title]:.1f} s")


def _fit(folder: Path, product: str, options: DemoOptions) -> FittedDetector:
    return fit_memory_bank(
        folder / "data" / product / "train" / "good",
        folder / f"{product}.detector",
        FitOptions(
            backbone=options.backbone,
            preprocessing=Preprocessing(options.size, options.size),
            product=product,
            seed=options.seed,
        ),
    )


def _learned(product: str, detector: FittedDetector, images: int) -> str:
    rows, dimensions = detector.pack.arrays["bank.normal"].shape
    held = detector.pack.calibration.held_out
    return f"{product}: {images} good parts -> {rows} rows of {dimensions}, threshold from {held} held out"


def _export(folder: Path, detectors: dict[str, FittedDetector], note: Log) -> Bundle:
    """One bundle for both products: they share the trunk, so the second one is a knowledge pack more."""
    targets = ["onnx"]
    targets += ["openvino", "openvino:fp16"] if is_available("openvino") else []
    targets += ["tensorrt:fp16"] if is_available("tensorrt") else []
    scratch = folder / "single.bundle"
    first = detectors[PRODUCTS[0]]
    try:
        single = export_bundle(first, scratch, targets, compute_capabilities=CAPABILITIES)
    except FailureError as error:
        if isinstance(error, ParityError) or "tensorrt:fp16" not in targets:
            raise
        note(f"TensorRT is left out: {error.got}")
        targets.remove("tensorrt:fp16")
        single = export_bundle(first, scratch, targets)
    packs = {product: detector.pack for product, detector in detectors.items()}
    manifest = single.manifest
    bundle = write_bundle(
        folder / "parts.bundle",
        name="parts",
        detector=manifest.detector,
        engines=manifest.engines,
        packs=packs,
        golden=manifest.golden,
        files={name: single.read(name) for name in manifest.files if name not in manifest.packs.values()},
    )
    shutil.rmtree(scratch)
    for record in manifest.engines:
        note(f"{record.name}: {_parity(record)}")
    return bundle


def _parity(record: EngineRecord) -> str:
    if record.parity is not None:
        return f"map within {record.parity.map:.1e} of torch's, {record.parity.decisions_changed} verdicts changed"
    if record.recipe or record.match is None:
        return "to be compiled on the device"
    return f"built here, without a GPU, for compute capability {record.match.compute_capability}; not run here"


def _evaluate(folder: Path, bundle: Bundle, note: Log) -> dict[str, Evaluation]:
    found = {}
    with Inspector(bundle) as inspector:
        for product in PRODUCTS:
            found[product] = evaluate_bundle(inspector, folder / "data" / product, product=product)
            everything, good = found[product].kinds[0], found[product].kinds[-1]
            note(
                f"{product}: image AUROC {everything.auroc or 0:.3f}, pixel AUROC {everything.pixel_auroc or 0:.3f}, "
                f"{everything.wrong} of {everything.images} defects missed, {good.wrong} of {good.images} false alarms"
            )
    return found


def _bench(bundle: Bundle, folder: Path, evaluations: dict[str, Evaluation], note: Log) -> Iterator[EngineFigures]:
    """Each engine over the same test pictures: its time, and whether it comes to the same verdicts."""
    frames = {
        (product, sample.path): read_image(sample.path)
        for product in PRODUCTS
        for sample in test_samples(folder / "data" / product)
    }
    expected = {
        (product, outcome.sample.path): outcome.inspection.verdict
        for product, evaluation in evaluations.items()
        for outcome in evaluation.outcomes
    }
    for record in bundle.manifest.engines:
        place = record.trunk.rsplit("/", 1)[0] + "/"
        size = sum(file.size for name, file in bundle.manifest.files.items() if name.startswith(place))
        if record.parity is None:
            yield EngineFigures(record, size, note=_parity(record))
            continue
        timings: list[dict[str, float]] = []
        changed = 0
        with Inspector(bundle, target=record.name) as inspector:
            for (product, path), frame in frames.items():
                inspection = inspector.inspect(frame, product=product)
                changed += inspection.verdict is not expected[product, path]
                timings.append(dict(inspection.timings))
        medians = {stage: float(np.median([one.get(stage, 0.0) for one in timings])) for stage in timings[0]}
        note(f"{record.name}: {medians['total']:.1f} ms per frame, {changed} of {len(frames)} verdicts differ")
        yield EngineFigures(record, size, medians, len(frames), changed)


def _teach(folder: Path, bundle: Bundle, seconds: float) -> LiveUpdate:
    data, batch = folder / "data" / BATCH, folder / "data" / f"{BATCH}-new-batch"
    shown: list[Shown] = []
    for prefix, samples in (("", test_samples(data)), ("new ", test_samples(batch))):
        for one in samples:
            kind = prefix + ("defect" if one.anomalous else "good")
            shown.append(Shown(one.path, read_image(one.path), kind))
    # Round robin, so that every stretch of time shows every kind.
    order = np.random.default_rng(0).permutation(len(shown))
    new = _read(list_images(batch / "train" / "good"))
    half = len(new) * 2 // 3
    hold_out = _read(list_images(data / "calibration" / "good")) + new[half:]
    with Inspector(bundle) as line, Inspector(bundle, threads=1) as server:
        return teach_while_running(
            line, server, [shown[place] for place in order], new[:half], hold_out, seconds=seconds
        )


def _told(live: LiveUpdate, note: Log) -> None:
    for when, pack in (("before", live.before), ("after", live.after)):
        parts = []
        for kind in LINE_KINDS:
            alarms, count = live.alarms(kind, pack.version)
            parts.append(f"{kind} {alarms} of {count}")
        note(f"NG {when}: {', '.join(parts)}")
    note(
        f"{live.added} rows, {live.row_bytes / 1e3:.0f} kB; learned in {live.learn_seconds:.1f} s, swapped in "
        f"{live.swap_seconds * 1e3:.0f} ms; {len(live.seen)} frames, {live.lost} lost, {live.mixed} mixed"
    )


def _read(paths: Sequence[Path]) -> list[Frame]:
    return [read_image(path) for path in paths]


def _machine() -> str:
    return f"{available_threads()} processor cores, {platform.machine()}, Python {platform.python_version()}"


__all__ = ["DemoOptions", "DemoResult", "EngineFigures", "run_demo"]
