"""What the benchmarks share: timing, tables, painted images, bundles with a given bank, the peer's process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.detector_file import FittedDetector, detector_spec, export_programs
from edgead.exporter import export_bundle
from edgead.runtime.bundle import Bundle
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.spec import Calibration, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.memory_bank import (
    METHOD,
    MemoryBankHead,
    MemoryBankTrunk,
    memory_bank_ports,
    patch_grid,
    receptive_sigma,
)
from edgead.server_side.painting import DEFECTS, paint_defect
from edgead.server_side.painting_parts import paint_part

THREADS = 2
"""Every contender gets so many: the small industrial computer that the figures stand for."""
PAUSE = 0.05
"""Seconds before a turn: the last contender's threads spin on for a while, numpy's for some 20 ms."""
PEER = Path(__file__).parent / "peer"
LIBRARIES = ("numpy", "opencv-python-headless", "onnxruntime", "openvino", "torch")

Frame = NDArray[np.uint8]
Rows = NDArray[np.float32]


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def interleave(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 2, warm: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each call, the contenders taking turns so that a slow minute hits all of them.

    Args:
        contenders: by name.
        rounds: turns of each contender.
        repeats: timed calls in a turn.
        warm: calls at the start of a turn that are not counted: caches are another contender's then.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            for repeat in range(warm + repeats):
                start = time.perf_counter()
                call()
                if repeat >= warm:
                    found[name].append((time.perf_counter() - start) * 1e3)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for people; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[place]) for line in [list(head), *cells]) for place in range(len(head))]
    right = [all(not isinstance(row[place], str) for row in rows) for place in range(len(head))]

    def line(values: Sequence[str]) -> str:
        parts = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(head)), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"
    return "-" if value is None else str(value)


def machine() -> dict[str, Any]:
    """What a figure has to be read with: processor, cores, versions."""
    model = platform.processor() or platform.machine()
    flags: list[str] = []
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = text.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags" and not flags:
                flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in value]
    except OSError:
        pass
    return {
        "processor": model,
        "instructions": flags,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def report(name: str, figures: Mapping[str, Any], json_path: Path | None) -> None:
    """Write the figures as JSON where asked for."""
    if json_path is not None:
        content = {"benchmark": name, "machine": machine(), **figures}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def painted(count: int, *, size: int = 256, seed: int = 0, defects: bool = False) -> Frame:
    """Painted parts of both materials, uint8 RGB [count, size, size, 3]; with defects if wanted."""
    rng = np.random.default_rng(seed)
    frames = []
    for place in range(count):
        image = paint_part("flange" if place % 2 == 0 else "fabric", rng=rng, size=size).image
        if defects:
            kinds = sorted(DEFECTS)
            image, _ = paint_defect(image, kinds[place % len(kinds)], contrast=0.9, rng=rng)
        frames.append(image)
    return np.stack(frames)


def embeddings(trunk: MemoryBankTrunk, frames: Frame) -> Rows:
    """Patches [G, P, D] of engine-sized frames, by torch."""
    import torch

    with torch.inference_mode():
        found = [np.asarray(trunk(torch.from_numpy(frame[None].copy())).numpy()) for frame in frames]
    return np.concatenate(found)


def spread_rows(rows: Rows, count: int, seed: int = 0) -> Rows:
    """`count` rows [count, D] like those of `rows`: drawn from them, moved a little where there are too few.

    A bank for timing needs the size of a real one, not its wisdom.
    """
    rng = np.random.default_rng(seed)
    if count <= len(rows):
        return rows[np.sort(rng.permutation(len(rows))[:count])]
    drawn = rows[rng.integers(0, len(rows), count)]
    noise = rng.standard_normal(drawn.shape, np.float32) * (0.1 * rows.std())
    return np.asarray(drawn + noise, np.float32)


def bank_detector(
    backbone: Backbone,
    rows: Rows,
    golden: Frame,
    *,
    threshold: float = 0.0,
    neighbours: int = 0,
    smooth: bool = True,
) -> FittedDetector:
    """A memory-bank detector with a given bank; without `smooth` its map is the patch scores themselves.

    Args:
        backbone: of the trunk.
        rows: float32 [N, D].
        golden: engine-sized frames, uint8 [G, H, W, 3].
        threshold: of the image score.
        neighbours: see `MemoryBankHead`.
        smooth: upsample and blur the map as a fitted detector does.
    """
    size = Preprocessing(width=golden.shape[2], height=golden.shape[1])
    trunk = MemoryBankTrunk(backbone).eval()
    grid, dimensions = patch_grid(trunk, size)
    features, knowledge, outputs = memory_bank_ports(size, grid, dimensions, neighbours)
    if smooth:
        sigma = receptive_sigma(min(size.height, size.width))
        head = MemoryBankHead(grid, (size.height, size.width), sigma, neighbours).eval()
    else:
        head = MemoryBankHead(grid, grid, 0.0, neighbours).eval()
        shape = ("B", *grid)
        outputs = tuple(Port(port.name, port.dtype, shape) if port.name == "anomaly_map" else port for port in outputs)
    spec = detector_spec(
        trunk,
        method=METHOD,
        preprocessing=size,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )
    pack = bank_pack(spec.fingerprint, rows, threshold=threshold)
    trunk_program, head_program = export_programs(trunk, head, spec)
    return FittedDetector(spec, trunk_program, head_program, pack, golden, {"method": METHOD})


def bank_pack(fingerprint: str, rows: Rows, *, threshold: float = 0.0, product: str = "part") -> Pack:
    """A pack with these normal rows and no anomalous ones."""
    return new_pack(
        product=product,
        fingerprint=fingerprint,
        calibration=Calibration(threshold=threshold, typical=threshold / 2),
        arrays={
            "bank.normal": rows,
            "bank.anomalous": np.zeros((0, rows.shape[1]), np.float32),
            "anomalous.weight": np.ones(1, np.float32),
        },
    )


def exported(detector: FittedDetector, path: Path, targets: Sequence[str]) -> Bundle:
    """Export (parity gate included), replacing what is at `path`."""
    return export_bundle(detector, path, list(targets), name=path.name, force=True)


def product_bundle(
    path: Path, rows: int, *, targets: Sequence[str] = ("onnx", "openvino"), backbone: str = "embedded"
) -> tuple[Bundle, Pack]:
    """A bundle of the embedded backbone with a bank of `rows` painted rows.

    Returns:
        the bundle, whose own bank has 64 rows only, and the pack of all rows.
    """
    network = load_backbone(backbone)
    trunk = MemoryBankTrunk(network).eval()
    normals = painted(16)
    patches = embeddings(trunk, normals)
    known = patches.reshape(-1, patches.shape[-1])
    bank = spread_rows(known, rows)
    detector = bank_detector(network, bank[:64], painted(2, seed=1, defects=True), threshold=1e9)
    bundle = exported(detector, path, targets)
    # Nothing is to be learned from the threshold here; this one outlines the painted defects.
    threshold = 0.5 * float(np.linalg.norm(known - known.mean(0), axis=1).mean())
    return bundle, bank_pack(bundle.manifest.detector.fingerprint, bank, threshold=threshold)


class PeerProcess:
    """The peer's side as a process of its own that answers JSON lines; see `peer/server.py`.

    Args:
        python: interpreter of the environment that has the peer.
        folder: its working folder.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [python.absolute(), str(PEER / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "peer.log").open("w"),
            cwd=folder,
            env=peer_environment(),
            text=True,
        )
        self.log = folder / "peer.log"
        self.versions: dict[str, str] = self.ask("versions")["versions"]
        self.import_seconds = time.perf_counter() - start

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            RuntimeError: the peer failed; its log says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"do": operation, **arguments}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer failed at '{operation}': {answer['error']}; see {self.log}")
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peer_environment() -> dict[str, str]:
    """The environment of the peer's process: its own packages only, the same threads as ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


def note(text: str) -> None:
    """Progress for people, apart from the figures."""
    print(text, file=sys.stderr, flush=True)
