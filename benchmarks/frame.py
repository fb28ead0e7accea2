"""From a decoded camera frame to verdict, map and regions: what edgead adds to the engine's own time.

    python -m benchmarks frame

The embedded backbone at 256x256 with a bank of 10,000 rows, frames of three cameras, every frame with a defect
that is outlined. "Engine" is trunk and head alone; wanted for 1280x1024 is a total of at most 1.10 times that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.common import PAUSE, THREADS, Frame, median, note, painted, product_bundle, report, table
from edgead.runtime.inspector import Inspector, Verdict

CAMERAS = ((1280, 1024), (2448, 2048), (4096, 3000))
ENGINES = ("onnx", "openvino")
STAGES = ("prepare", "trunk", "head", "regions", "total")
WANTED = 1.10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks frame", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=40, help="frames of each camera and engine")
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgead-frame-") as scratch:
        note("exporting ...")
        bundle, pack = product_bundle(Path(scratch) / "bundle", options.rows, backbone=options.backbone)
        inspectors = {engine: Inspector(bundle, target=engine, threads=THREADS, packs=[pack]) for engine in ENGINES}
        found: dict[tuple[str, tuple[int, int]], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        regions = 0
        for camera in CAMERAS:
            note(f"{camera[0]}x{camera[1]} ...")
            frames = _frames(camera)
            for turn in range(options.frames):
                for engine, inspector in inspectors.items():
                    time.sleep(PAUSE)
                    for place in range(3):  # the first ones find the other engine's data in the caches
                        result = inspector.inspect(frames[(turn + place) % len(frames)])
                    if result.verdict is not Verdict.NG:
                        raise SystemExit(f"a frame came out as {result.verdict.value}: nothing to outline")
                    regions = max(regions, len(result.regions))
                    for stage in STAGES:
                        found[engine, camera][stage].append(result.timings[stage])
        for inspector in inspectors.values():
            inspector.close()
    figures = [_figure(engine, camera, times) for (engine, camera), times in found.items()]
    lines = [
        [f["camera"], f["engine"], *(f["ms"][stage] for stage in STAGES), f["ratio"], f["verdict"]] for f in figures
    ]
    print(f"{options.backbone} backbone at 256x256, {options.rows} rows, {THREADS} threads, medians of")
    print(f"{options.frames} frames with up to {regions} regions; milliseconds")
    print(table(["camera", "engine", *STAGES, "total / engine", f"wanted {WANTED:.2f}"], lines))
    report("frame", {"rows": options.rows, "backbone": options.backbone, "cameras": figures}, options.json)
    return 0


def _frames(camera: tuple[int, int]) -> list[Frame]:
    return [
        np.ascontiguousarray(cv2.resize(part, camera, interpolation=cv2.INTER_CUBIC))
        for part in painted(4, size=512, seed=3, defects=True)
    ]


def _figure(engine: str, camera: tuple[int, int], times: dict[str, list[float]]) -> dict[str, Any]:
    # The ratio within each frame, so that a slow moment of the machine counts on both sides.
    ratios = [
        total / (trunk + head) for total, trunk, head in zip(times["total"], times["trunk"], times["head"], strict=True)
    ]
    ratio = median(ratios)
    wanted = camera == CAMERAS[0]
    return {
        "camera": f"{camera[0]}x{camera[1]}",
        "engine": engine,
        "ms": {stage: median(times[stage]) for stage in STAGES},
        "ratio": ratio,
        "verdict": ("ok" if ratio <= WANTED else "above") if wanted else "-",
    }


if __name__ == "__main__":
    raise SystemExit(main())
