"""How much of the machine's matrix-multiply rate does the bank search reach?

    python -m benchmarks bank-search

The exported head alone (exact search, distances, map and score included) with banks of several sizes, against a
plain matrix product of the same shapes in the same run: the best of numpy's and OpenVINO's.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import (
    THREADS,
    Rows,
    bank_detector,
    bank_pack,
    exported,
    interleave,
    median,
    note,
    report,
    table,
)
from edgead.runtime.bundle import Bundle
from edgead.runtime.engines import open_engine
from edgead.server_side.backbones import Backbone

ROWS = (1_000, 5_000, 10_000, 50_000)
DIMENSIONS = 384
SIDE = 32
WANTED = {1_000: 0.55}
"""Share of the matrix-multiply rate; 0.7 for the others."""


class Stub(Backbone):
    """The cheapest trunk whose patches have the shape of a ResNet-18's second and third stage."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.strides, self.channels = "stub", (8,), (DIMENSIONS,)
        self.layer = nn.Conv2d(3, DIMENSIONS, 8, stride=8)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(image)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks bank-search", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgead-search-") as scratch:
        torch.manual_seed(0)
        golden = np.random.default_rng(0).integers(0, 256, (1, 8 * SIDE, 8 * SIDE, 3), np.uint8)
        few = np.random.default_rng(1).standard_normal((64, DIMENSIONS), np.float32)
        detector = bank_detector(Stub().eval(), few, golden, threshold=1e9)
        bundle = exported(detector, Path(scratch) / "bundle", ("onnx", "openvino"))
        figures = [_measure(bundle, rows, options.rounds) for rows in options.rows]
    lines = []
    for found in figures:
        for engine in ("onnx", "openvino"):
            share, wanted = found["share"][engine], found["wanted"]
            verdict = "ok" if share >= wanted else "below"
            lines.append(
                [
                    found["rows"],
                    engine,
                    found["ms"][engine],
                    found["ms"]["numpy product"],
                    found["ms"]["openvino product"],
                    found["gflops"],
                    f"{share:.0%}",
                    f"{wanted:.0%} {verdict}",
                ]
            )
    head = ["rows", "engine", "head, ms", "numpy product", "openvino product", "GFLOP/s", "reached", "wanted"]
    print(f"{SIDE * SIDE} patches x {DIMENSIONS} dimensions, {THREADS} threads, medians of {options.rounds}")
    print(table(head, lines))
    report("bank-search", {"sizes": figures}, options.json)
    return 0


def _measure(bundle: Bundle, rows: int, rounds: int) -> dict[str, Any]:
    note(f"{rows} rows ...")
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((SIDE * SIDE, DIMENSIONS), np.float32)
    bank = rng.standard_normal((rows, DIMENSIONS), np.float32)
    pack = bank_pack(bundle.manifest.detector.fingerprint, bank, threshold=1e9)
    contenders: dict[str, Callable[[], Any]] = {}
    for target in ("onnx", "openvino"):
        head = open_engine(bundle, target, threads=THREADS).head(pack)
        contenders[target] = functools.partial(head.infer, {"patches": patches[None]})
    columns = np.ascontiguousarray(bank.T)
    out = np.empty((len(patches), rows), np.float32)
    contenders["numpy product"] = lambda: np.matmul(patches, columns, out=out)
    contenders["openvino product"] = _openvino_product(patches, columns)
    found = interleave(contenders, rounds=rounds)
    milliseconds = {name: median(values) for name, values in found.items()}
    best = min(milliseconds["numpy product"], milliseconds["openvino product"])
    return {
        "rows": rows,
        "ms": milliseconds,
        "gflops": round(2 * len(patches) * DIMENSIONS * rows / best / 1e6, 1),
        "share": {engine: best / milliseconds[engine] for engine in ("onnx", "openvino")},
        "wanted": WANTED.get(rows, 0.7),
    }


def _openvino_product(patches: Rows, columns: Rows) -> Callable[[], Any]:
    import openvino as ov
    from openvino import opset13 as ops

    parameter = ops.parameter(list(patches.shape), np.float32, name="patches")
    model = ov.Model([ops.matmul(parameter, ops.constant(columns), False, False)], [parameter], "product")
    config = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    return lambda: request.infer([patches], share_inputs=True, share_outputs=True)


if __name__ == "__main__":
    raise SystemExit(main())
