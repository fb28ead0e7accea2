"""Photographs of good parts to a verdict.

python quick_start.py photos/good new-photo.png
"""

import sys
from pathlib import Path

from edgead.exporter import export_bundle
from edgead.runtime import Inspector, read_image
from edgead.server_side import FitOptions, fit_memory_bank


def main(good: Path, photo: Path, out: Path = Path("part.bundle"), options: FitOptions | None = None) -> str:
    detector = fit_memory_bank(good, out.with_suffix(".detector"), options, force=True)
    bundle = export_bundle(detector, out, ["onnx"], force=True)
    with Inspector(bundle) as inspector:
        inspection = inspector.inspect(read_image(photo))
    print(inspection.verdict.value, f"score {inspection.score:.3g}, NG above {inspection.threshold:.3g}")
    return inspection.verdict.value


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
