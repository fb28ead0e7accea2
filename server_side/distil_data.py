"""The pictures of a distillation: good parts and the same with painted defects, in parts that never mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.image import Frame
from edgead.server_side.detectors.trained import divided
from edgead.server_side.painting import DEFECTS, paint_defect
from edgead.server_side.photographs import enough, read_photograph

PAINTED = 3
"""Pictures with a painted defect for each photograph: what a student has to tell apart is made of them alone."""


@dataclass(frozen=True)
class Parts:
    """Photographs by what they are for.

    Attributes:
        train, stop, calibration: of good parts. The last two are the same where there are few.
        anomalies, stop_anomalies: given pictures of anomalies.
    """

    train: tuple[Path, ...]
    stop: tuple[Path, ...]
    calibration: tuple[Path, ...]
    anomalies: tuple[Path, ...]
    stop_anomalies: tuple[Path, ...]

    def facts(self) -> dict[str, Any]:
        """For the card."""
        return {
            "trained_on": len(self.train),
            "stopped_by": len(self.stop),
            "calibrated_on": len(self.calibration),
            "painted": PAINTED * (len(self.train) + len(self.stop)),
            "anomalies": len(self.anomalies) + len(self.stop_anomalies),
        }


def split_paths(normal: Sequence[Path], anomalous: Sequence[Path], held_out: float, seed: int) -> Parts:
    """Divide photographs by the seed.

    Raises:
        InputError: fewer than 2 normals.
    """
    enough(normal)
    rng = np.random.default_rng(seed)
    learned, stop, calibration = divided(len(normal), held_out, rng)
    apart = rng.permutation(len(anomalous))
    stopping = max(1, round(held_out * len(anomalous))) if len(anomalous) > 1 else 0

    def some(paths: Sequence[Path], places: NDArray[np.intp]) -> tuple[Path, ...]:
        return tuple(paths[place] for place in sorted(places.tolist()))

    return Parts(
        some(normal, learned),
        some(normal, stop),
        some(normal, calibration),
        some(anomalous, apart[stopping:]),
        some(anomalous, apart[:stopping]),
    )


def painted_on(frame: Frame, name: str, seed: int) -> tuple[Frame, NDArray[np.bool_]]:
    """A photograph with a defect of any kind, size and contrast, and where it is; by the photograph's name and seed."""
    rng = np.random.default_rng([seed, *name.encode()])
    kind = DEFECTS[int(rng.integers(len(DEFECTS)))]
    size, contrast = float(rng.uniform(0.08, 0.5)), float(rng.uniform(0.3, 1.0))
    painted, mask = paint_defect(frame, kind, size=size, contrast=contrast, rng=rng)
    return painted, mask > 0


def with_defects(normal: Sequence[Path], anomalous: Sequence[Path], seed: int) -> Iterator[Frame]:
    """Each photograph, each with `PAINTED` painted defects, then the anomalies: (1 + PAINTED) N + M frames."""
    for path in normal:
        frame = read_photograph(path)
        yield frame
        for number in range(PAINTED):
            yield painted_on(frame, f"{path.name} {number}", seed)[0]
    for path in anomalous:
        yield read_photograph(path)


__all__ = ["PAINTED", "Parts", "painted_on", "split_paths", "with_defects"]
