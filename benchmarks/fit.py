"""Fitting from 600 photographs on two cores: seconds by stage, peak memory, rows; the coreset beside a peer's.

    python -m benchmarks fit
    python -m benchmarks fit --peer-python .venv-peer/bin/python

The fit runs in a process of its own, whose high-water mark of memory is the kernel's (VmHWM). The coreset is
compared on the same rows: 100 images through a ResNet-18 (random weights), the first 1,024 rows taken from them.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.common import PeerProcess, embeddings, note, painted, report, table
from edgead.runtime.image import list_images

IMAGES = 600
WANTED_SECONDS = 300.0
CORESET_IMAGES, CORESET_ROWS = 100, 1024
STAGES = {
    "read pictures": "read_image",
    "embed": "embed",
    "coreset of chunks": "_reduce",
    "coreset": "build",
    "calibrate": "held_out",
    "trace and write": "write_detector",
}
"""What is shown -> function whose time it is; stages may hold one another."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks fit", description=__doc__.splitlines()[0])
    parser.add_argument("--normal", type=Path, help="pictures, repeated up to the number; painted ones if none")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rows", type=int, help="rows of the bank; edgead's choice if not given")
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--peer-python", type=Path, help="has anomalib; measures its coreset too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        _child(options.child[0], options.child[1], options.backbone, options.rows)
        return 0
    with tempfile.TemporaryDirectory(prefix="edgead-fit-") as scratch:
        folder = Path(scratch)
        note("painting ...")
        _pictures(folder / "normal", options.normal, options.images)
        note("fitting ...")
        figures = _fit(folder, options.backbone, options.rows)
        figures["images"] = options.images
        if options.peer_python is not None:
            note("comparing coresets ...")
            figures["coreset"] = _coresets(options.peer_python, folder)
    good = _show(figures, options.backbone)
    report("fit", figures, options.json)
    return 0 if good else 1


def _pictures(folder: Path, source: Path | None, count: int) -> None:
    folder.mkdir()
    if source is not None:
        paths = list_images(source)
        for place in range(count):
            path = paths[place % len(paths)].absolute()
            (folder / f"{place:05d}{path.suffix}").symlink_to(path)
        return
    for place in range(0, count, 50):
        for index, frame in enumerate(painted(min(50, count - place), seed=100 + place)):
            cv2.imwrite(str(folder / f"{place + index:05d}.png"), frame[..., ::-1])


def _fit(folder: Path, backbone: str, rows: int | None) -> dict[str, Any]:
    """Fit in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fit", "--child", folder / "normal", folder / "part.detector"]
    command += ["--backbone", backbone, *(["--rows", str(rows)] if rows else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit("the fit failed")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _child(normal: Path, output: Path, backbone: str, rows: int | None) -> None:
    from edgead.server_side.fitting import FitOptions, fit_memory_bank

    profile = cProfile.Profile()
    start = time.perf_counter()
    with profile:
        detector = fit_memory_bank(normal, output, FitOptions(backbone=backbone, rows=rows))
    seconds = time.perf_counter() - start
    spent = {}
    for (_, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        spent[function] = max(spent.get(function, 0.0), cumulative)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    content = {
        "seconds": seconds,
        "stages": {stage: spent.get(function) for stage, function in STAGES.items()},
        "peak_mb": int(peak.split()[1]) / 1e3,
        "rows": detector.card["bank"]["normal_rows"],
        "dimensions": detector.card["bank"]["dimensions"],
    }
    print(json.dumps(content))


def _coresets(python: Path, folder: Path) -> dict[str, Any]:
    """The same rows to both: seconds and the covering radius, which a coreset is to keep small."""
    from edgead.server_side.backbones import load_backbone
    from edgead.server_side.banks import covering_radius, greedy_coreset
    from edgead.server_side.detectors.memory_bank import MemoryBankTrunk

    trunk = MemoryBankTrunk(load_backbone("resnet18:random")).eval()
    rows = embeddings(trunk, painted(CORESET_IMAGES, seed=50)).reshape(-1, 384)
    np.save(folder / "rows.npy", rows)
    start = time.perf_counter()
    ours = greedy_coreset(rows, CORESET_ROWS)
    seconds = time.perf_counter() - start
    with PeerProcess(python, folder / "peer") as peer:
        theirs = peer.ask("coreset", rows=folder / "rows.npy", size=CORESET_ROWS, seed=0)
        versions = peer.versions
    radii = {
        name: covering_radius(rows, rows[np.asarray(chosen)])
        for name, chosen in (("edgead", ours), ("peer", theirs["chosen"]))
    }
    return {
        "images": CORESET_IMAGES,
        "rows": CORESET_ROWS,
        "of": len(rows),
        "edgead": {"seconds": seconds, "covering_radius": radii["edgead"]},
        "peer": {"seconds": theirs["seconds"], "covering_radius": radii["peer"], "versions": versions},
    }


def _show(figures: dict[str, Any], backbone: str) -> bool:
    good = bool(figures["seconds"] <= WANTED_SECONDS)
    print(f"{figures['images']} images, '{backbone}' backbone, {figures['rows']} rows of {figures['dimensions']}")
    lines: list[list[Any]] = [[stage, seconds] for stage, seconds in figures["stages"].items()]
    lines.append(["all", figures["seconds"]])
    print(table(["stage (some hold others)", "s"], lines))
    print(f"wanted {WANTED_SECONDS:g} s: {'ok' if good else 'ABOVE'}; peak memory {figures['peak_mb']:.0f} MB")
    if "coreset" in figures:
        found = figures["coreset"]
        print(f"\nfirst {found['rows']} rows of {found['of']} x 384, from {found['images']} images")
        rows = [[name, found[name]["seconds"], found[name]["covering_radius"]] for name in ("edgead", "peer")]
        print(table(["coreset", "s", "covering radius"], rows))
    return good


if __name__ == "__main__":
    raise SystemExit(main())
