"""How fast the engines of a bundle are on this machine.

Each engine is measured in a process of its own, so that the cold start is that of a camera that is switched on, the
memory is its own, and no engine's threads disturb another's.
"""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from edgead.runtime.errors import EdgeadError, EngineError
from edgead.runtime.inspection import STAGES
from edgead.runtime.tables import table

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle
    from edgead.runtime.preprocess import Frame

CAMERA = (1280, 1024)
"""Width and height in pixels of the frames that are made where no images are given."""
_IMAGES = 8
"""Most frames held in memory."""
_WARM_UP = 3
_FEWEST = 5


class Task(Struct, frozen=True):
    """What one process measures."""

    bundle: str
    target: str
    threads: int | None
    images: str | None
    seconds: float


class Timing(Struct, frozen=True, tag="timing", tag_field="kind"):
    """One engine as measured; times in milliseconds, of whole frames from decoded picture to regions."""

    engine: str
    threads: int
    frames: int
    ng: int
    """Frames that were NG: regions are looked for on these only."""
    frame: tuple[int, int]
    """Width and height of the source frames in pixels."""
    median: dict[str, float]
    p90: dict[str, float]
    frames_per_second: float
    overhead: float
    """Median of the whole frame over the median of trunk and head together."""
    resident_mb: float
    """Resident memory at the end of the measurement, in 10^6 bytes."""
    peak_mb: float | None
    """Largest resident memory, where the system tells."""
    cold_start_s: float = 0.0
    """From the start of the process to its first verdict."""


class Failure(Struct, frozen=True, tag="failure", tag_field="kind"):
    """An engine that could not be measured, and why."""

    engine: str
    reason: str
    next_step: str = ""


def measure(task: Task) -> Timing | Failure:
    """Measure one engine in a fresh process.

    Args:
        task: `threads` None means as many as the process may use; `images` a folder or file, or None for
            golden frames scaled to the size of a camera's.
    """
    command = [sys.executable, "-m", "edgead.runtime.bench", msgspec.json.encode(task).decode()]
    start = time.perf_counter()
    # Unbuffered: `communicate` reads the pipe itself and would miss what a buffered `readline` took beyond its line.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        cold_start = time.perf_counter() - start
        rest, errors = process.communicate()
    try:
        answer = rest if first.strip() == b"ready" else first
        result: Timing | Failure = msgspec.json.decode(answer, type=Timing | Failure)
        if isinstance(result, Timing):
            result = msgspec.structs.replace(result, cold_start_s=round(cold_start, 3))
        return result
    except msgspec.DecodeError:
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no message"
        return Failure(task.target, f"the process ended with code {process.returncode}: {reason}")


def run_task(task: Task) -> Timing:
    """Measure one engine in this process; prints 'ready' after the first verdict.

    Raises:
        EdgeadError: the bundle, the engine or the images.
        EngineError: a frame was not inspected.
    """
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.inspection import Inspection, Verdict, percentile
    from edgead.runtime.inspector import Inspector

    bundle = open_bundle(task.bundle, verify=False)
    product = bundle.manifest.default
    with Inspector(bundle, target=task.target, threads=task.threads, products=[product]) as inspector:
        frames = _frames(task, bundle)
        inspector.inspect(frames[0])
        print("ready", flush=True)
        for place in range(_WARM_UP):
            inspector.inspect(frames[place % len(frames)])
        results: list[Inspection] = []
        start = time.perf_counter()
        while len(results) < _FEWEST or time.perf_counter() - start < task.seconds:
            result = inspector.inspect(frames[len(results) % len(frames)])
            if result.reason is not None:
                raise EngineError(
                    wanted="an answer on every frame",
                    got=result.reason,
                    next_step="Name other images, or check the engine with: edgead show BUNDLE",
                )
            # Maps are not needed, and a minute of them would count as the engine's memory.
            results.append(dataclasses.replace(result, anomaly_map=None))
        wall = time.perf_counter() - start
        times = {stage: [result.timings[stage] for result in results] for stage in STAGES}
        median = {stage: percentile(times[stage], 0.5) for stage in STAGES}
        engine = percentile([result.timings["trunk"] + result.timings["head"] for result in results], 0.5)
        resident, peak = memory()
        return Timing(
            engine=inspector.engine,
            threads=inspector.threads,
            frames=len(results),
            ng=sum(result.verdict is Verdict.NG for result in results),
            frame=(frames[0].shape[1], frames[0].shape[0]),
            median={stage: round(value, 3) for stage, value in median.items()},
            p90={stage: round(percentile(times[stage], 0.9), 3) for stage in STAGES},
            frames_per_second=round(len(results) / wall, 2),
            overhead=round(median["total"] / engine, 4),
            resident_mb=resident,
            peak_mb=peak,
        )


def _frames(task: Task, bundle: Bundle) -> list[Frame]:
    """Decoded frames to measure with."""
    if task.images is not None:
        from edgead.runtime.image import list_images, read_image

        path = Path(task.images)
        return [read_image(image) for image in (list_images(path) if path.is_dir() else [path])[:_IMAGES]]
    import cv2
    import numpy as np

    spec = bundle.manifest.detector.preprocessing
    width, height = CAMERA
    if spec.roi is not None:  # declared in the rotated frame
        least = spec.roi.x + spec.roi.width, spec.roi.y + spec.roi.height
        if spec.rotate in (90, 270):
            least = least[1], least[0]
        width, height = max(width, least[0]), max(height, least[1])
    golden = [image for _, image in bundle.golden_images()[:_IMAGES]]
    if not golden:
        golden = [np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)]
    return [np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)) for image in golden]


def memory() -> tuple[float, float | None]:
    """Resident memory of this process now and at most so far, in 10^6 bytes; the latter where it is known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        # kB on Linux, bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    resident, peak = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return round(resident, 1), round(peak, 1)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from edgead.runtime.engines import available_threads

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "processor": name,
        "threads_available": available_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def as_text(host: dict[str, Any], results: Sequence[Timing | Failure]) -> str:
    """The table of `edgead bench`."""
    timings = [result for result in results if isinstance(result, Timing)]
    parts = [f"{host['processor']}, {host['threads_available']} threads available, {host['system']}"]
    if timings:
        threads = ", ".join(str(count) for count in sorted({timing.threads for timing in timings}))
        sizes = ", ".join(sorted({f"{timing.frame[0]} x {timing.frame[1]}" for timing in timings}))
        parts.append(
            f"{threads} threads per inference, frames of {sizes}; median milliseconds, 90th percentile in total"
        )
        compared = any(timing.p90["normality"] >= 0.05 for timing in timings)
        stages = [stage for stage in STAGES if compared or stage != "normality"]
        head = ["engine", *stages, "p90", "frames/s", "overhead", "cold start", "memory"]
        rows = [
            [
                timing.engine,
                *(f"{timing.median[stage]:.2f}" for stage in stages),
                f"{timing.p90['total']:.2f}",
                f"{timing.frames_per_second:.1f}",
                f"{timing.overhead:.3f}x",
                f"{timing.cold_start_s:.2f} s",
                f"{timing.resident_mb:.0f} MB",
            ]
            for timing in timings
        ]
        parts.append("\n" + table([head, *rows]))
        if not any(timing.ng for timing in timings):
            parts.append("no frame was NG: regions were never looked for")
    for result in results:
        if isinstance(result, Failure):
            parts.append(f"{result.engine}: not measured: {result.reason}. {result.next_step}".rstrip())
    return "\n".join(parts)


def main() -> None:
    """The measuring process: a task as JSON in, 'ready' and a `Timing`, or a `Failure`, out."""
    task = msgspec.json.decode(sys.argv[1], type=Task)
    try:
        result: Timing | Failure = run_task(task)
    except EdgeadError as error:
        result = Failure(task.target, f"wanted {error.wanted}, got {error.got}", error.next_step)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


if __name__ == "__main__":
    main()
