"""`edgead bench`: milliseconds by stage for the engines of a bundle on this machine."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.engines import available_threads, is_available
from edgead.runtime.errors import EdgeadError
from edgead.runtime.image import list_images, read_image
from edgead.runtime.inspection import STAGES, percentile
from edgead.runtime.inspector import Inspector


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Which engines; all that run here if left out.")
@click.option("--images", type=click.Path(path_type=Path), help="Pictures to inspect; the golden ones if left out.")
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Time per engine.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads per inference.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(
    bundle: Path, targets: tuple[str, ...], images: Path | None, seconds: float, threads: int | None, as_json: bool
) -> None:
    """Time the engines of BUNDLE, stage by stage; medians, and the time that 95 % of the frames stay within.

    \b
    Example:
      edgead bench part.bundle
      edgead bench part.bundle --target onnx --images photos/ --seconds 10 --json
    """
    opened = open_bundle(bundle)
    frames = (
        [read_image(path) for path in list_images(images)[:64]]
        if images is not None
        else [frame for _, frame in opened.golden_images()]
    )
    names = list(targets) or [r.name for r in opened.manifest.engines if is_available(r.target)]
    results: list[dict[str, Any]] = []
    for name in names:
        try:
            results.append(_timed(opened, name, frames, seconds, threads))
        except EdgeadError as error:
            if targets:
                raise
            results.append({"engine": name, "problem": error.got})
    where = {"processor": _processor(), "threads": threads or available_threads(), "system": platform.platform()}
    if as_json:
        click.echo(json.dumps({**where, "engines": results}, sort_keys=True))
        return
    click.echo(f"{where['processor']}, {where['threads']} threads; medians in milliseconds")
    click.echo(f"{'engine':<16}" + "".join(f"{stage:>9}" for stage in STAGES) + f"{'95 %':>9}{'fps':>8}{'start':>9}")
    for result in results:
        if "problem" in result:
            click.echo(f"{result['engine']:<16}  {result['problem']}")
            continue
        cells = "".join(f"{result['median_ms'][stage]:9.2f}" for stage in STAGES)
        click.echo(
            f"{result['engine']:<16}{cells}{result['p95_ms']:9.2f}{result['fps']:8.1f}{result['start_ms']:9.0f}"
        )


def _timed(
    bundle: Bundle, name: str, frames: list[np.ndarray[Any, Any]], seconds: float, threads: int | None
) -> dict[str, Any]:
    start = time.perf_counter()
    with Inspector(bundle, target=name, threads=threads) as inspector:
        inspector.inspect(frames[0])
        ready = (time.perf_counter() - start) * 1e3
        timings: list[dict[str, float]] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(timings) < 5:
            timings.append(dict(inspector.inspect(frames[len(timings) % len(frames)]).timings))
        totals = [item["total"] for item in timings]
        middle = percentile(totals, 0.5)
        return {
            "engine": inspector.engine,
            "frames": len(timings),
            "median_ms": {stage: percentile([item[stage] for item in timings], 0.5) for stage in STAGES},
            "p95_ms": percentile(totals, 0.95),
            "fps": 1e3 / middle,
            "start_ms": ready,
        }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
