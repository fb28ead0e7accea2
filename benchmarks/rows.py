"""One row in a hundred of a large bank replaced: what travels as a delta, as a whole pack, and beside it on the server.

    python -m benchmarks rows
    python -m benchmarks rows --rows 10000 --dimensions 384 --json rows.json

The rows are half-normal noise, as features after a ReLU are: nothing that a compressor could guess. The delta is made,
read and applied, and its result must be the pack to the byte; the record of the rows' sources is made and checked.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.common import report, table
from edgead.runtime.deltas import apply_delta, make_delta
from edgead.runtime.knowledge import IDS, Pack, encode_pack, new_pack
from edgead.runtime.provenance import SourceImage, check_provenance, encode_provenance
from edgead.runtime.spec import Calibration
from edgead.runtime.tables import bytes_text
from edgead.server_side.sources import Origins, patch_places, provenance_of

BANK = "bank.normal"
DTYPES = ("float32", "float16")
PHOTOGRAPHS = 200

Result = TypeVar("Result")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--replaced", type=float, default=0.01, help="share of the rows")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    count = max(1, round(options.rows * options.replaced))
    figures: dict[str, Any] = {"rows": options.rows, "dimensions": options.dimensions, "replaced": count}
    lines = [["rows as", "delta", "whole, zlib", "whole", "provenance", "make s", "apply s", "check s"]]
    for dtype in DTYPES:
        found = figures[dtype] = measured(options.rows, options.dimensions, count, dtype)
        sizes = [bytes_text(found[name]) for name in ("delta", "whole_zlib", "whole", "provenance")]
        lines.append([dtype, *sizes, *(f"{found[name]:.3f}" for name in ("make_s", "apply_s", "check_s"))])
    print(f"{count} of {options.rows} x {options.dimensions} rows replaced")
    print(table(lines[0], lines[1:]))
    report("rows", figures, options.json)
    return 0


def measured(rows: int, dimensions: int, count: int, dtype: str) -> dict[str, float]:
    """Bytes and seconds for `count` of `rows` replaced."""
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal((rows + count, dimensions))).astype(dtype)
    fingerprint, calibration = "a" * 64, Calibration(1.0)
    arrays = {BANK: values[:rows]}
    before = new_pack(product="part", fingerprint=fingerprint, calibration=calibration, arrays=arrays)
    kept = np.ones(rows, np.bool_)
    kept[rng.choice(rows, count, replace=False)] = False
    ids = np.arange(rows + 1, rows + 1 + count, dtype=np.uint64)
    changed = {
        BANK: np.concatenate([before.arrays[BANK][kept], values[rows:]]),
        BANK + IDS: np.concatenate([before.ids(BANK)[kept], ids]),
    }
    after = Pack("part", fingerprint, Calibration(1.1), changed)
    after.digest  # noqa: B018  # made once, and not part of the time to apply
    make_s, delta = _timed(lambda: make_delta(before, after))
    apply_s, result = _timed(lambda: apply_delta(before, delta))
    assert encode_pack(result) == encode_pack(after)
    images = [SourceImage(f"{number:064x}", f"{number}.png") for number in range(PHOTOGRAPHS)]
    side = int(rows**0.5) + 1
    origins = Origins(images, rng.integers(0, PHOTOGRAPHS, rows), patch_places(1, (side, side))[:rows])
    record = provenance_of(before, fingerprint=fingerprint, made={BANK: (before.ids(BANK), origins)})
    check_s, _ = _timed(lambda: check_provenance(before, record))
    whole = encode_pack(after)
    return {
        "delta": len(delta),
        "whole": len(whole),
        "whole_zlib": len(zlib.compress(whole, 9)),
        "provenance": len(encode_provenance(record)),
        "make_s": make_s,
        "apply_s": apply_s,
        "check_s": check_s,
    }


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    raise SystemExit(main())
