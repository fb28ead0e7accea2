"""An inspect-only process with ONNX Runtime: seconds to the first score, peak memory, installed size.

    python -m benchmarks footprint

Builds an environment of its own, installs edgead without extras from this source tree, and starts fresh processes
in it. Peak memory is the kernel's high-water mark of the process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2

from benchmarks.common import median, note, painted, product_bundle, report, table
from edgead.runtime.knowledge import write_pack

ROOT = Path(__file__).parents[1]
BUDGETS = {"first score, s": 1.0, "peak, MB": 160.0, "installed, MB": 300.0}
PEER = {"first score, s": "12-19 (import)", "peak, MB": "1148", "installed, MB": "6400"}
"""anomalib 2.7 with OpenVINO, for comparison, on the machine where its figures were taken."""

PROGRAM = """
import sys
from pathlib import Path
from edgead.runtime.image import read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import read_pack

bundle, pack, picture, threads = sys.argv[1:5]
packs = [] if pack == "-" else [read_pack(pack)]
inspector = Inspector(bundle, target="onnx", threads=int(threads), packs=packs)
result = inspector.inspect(read_image(picture))
assert result.score is not None
import time
first = time.time()
for _ in range(20):
    inspector.inspect(read_image(picture))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
import json
print(json.dumps({"first": first, "peak_kb": int(peak.split()[1]), "modules": len(sys.modules)}))
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks footprint", description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, help="a bare environment to use; made if it is not there")
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgead-footprint-") as scratch:
        folder = Path(scratch)
        python = _environment((options.environment or folder / "environment").absolute())
        installed, packages = _installed(python)
        cases = []
        for rows in options.rows:
            note(f"{rows} rows ...")
            bundle, pack = product_bundle(folder / f"bundle-{rows}", rows, targets=("onnx",))
            write_pack(folder / "pack.safetensors", pack, force=True)
            picture = folder / "part.png"
            cv2.imwrite(str(picture), painted(1, size=512)[0][..., ::-1])
            command = [python, "-c", PROGRAM, bundle.path, folder / "pack.safetensors", picture, "2"]
            starts = [_start([str(part) for part in command], folder) for _ in range(options.starts + 1)][1:]
            cases.append({"rows": rows, "starts": starts})
    figures = {
        "installed_mb": installed,
        "packages": packages,
        "cases": [
            {
                "rows": case["rows"],
                "first_score_s": median([start["seconds"] for start in case["starts"]]),
                "fastest_s": min(start["seconds"] for start in case["starts"]),
                "peak_mb": max(start["peak_mb"] for start in case["starts"]),
            }
            for case in cases
        ],
    }
    good = _show(figures, options.starts)
    report("footprint", {**figures, "within_budgets": good}, options.json)
    return 0 if good else 1


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        note("installing edgead without extras ...")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        with tempfile.TemporaryDirectory(prefix="edgead-source-") as scratch:
            # pip builds in the tree that it is given; this one is to stay as it is.
            tree = Path(scratch) / "edgead"
            left = shutil.ignore_patterns(".*", "build", "*.egg-info", "demo-output", "__pycache__")
            shutil.copytree(ROOT, tree, symlinks=True, ignore=left)
            subprocess.run([python, "-m", "pip", "install", "--quiet", tree], check=True)
    return python


def _installed(python: Path) -> tuple[float, list[str]]:
    """Bytes of all packages but pip and setuptools, as `du` counts them without compiled caches, and names."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    size, names = 0, []
    for top in sorted(place.iterdir()):
        if top.name.split("-")[0] in ("pip", "setuptools", "_distutils_hack", "pkg_resources"):
            continue
        files = [top] if top.is_file() else [file for file in top.rglob("*") if "__pycache__" not in file.parts]
        size += sum(file.stat().st_size for file in files if file.is_file())
        if top.suffix == ".dist-info":
            names.append(top.name.removesuffix(".dist-info"))
    return size / 1e6, names


def _start(command: list[str], folder: Path) -> dict[str, float]:
    """One fresh process, from its start to its first score."""
    start = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={"PATH": "/usr/bin:/bin"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"seconds": answer["first"] - start, "peak_mb": answer["peak_kb"] / 1e3}


def _show(figures: dict[str, Any], starts: int) -> bool:
    lines: list[list[Any]] = []
    good = True

    def line(what: str, key: str, value: float) -> None:
        nonlocal good
        good &= value <= BUDGETS[key]
        verdict = "ok" if value <= BUDGETS[key] else "ABOVE"
        lines.append([what, f"{value:.2f}" if value < 10 else f"{value:.0f}", f"{BUDGETS[key]:g}", verdict, PEER[key]])

    for case in figures["cases"]:
        rows = f"bank of {case['rows']}"
        line(f"first score, s ({rows}, median of {starts})", "first score, s", case["first_score_s"])
        line(f"peak memory, MB ({rows}, 21 frames)", "peak, MB", case["peak_mb"])
    line(f"installed, MB ({len(figures['packages'])} packages)", "installed, MB", figures["installed_mb"])
    print(table(["", "edgead", "budget", "", "anomalib 2.7"], lines))
    return good


if __name__ == "__main__":
    raise SystemExit(main())
