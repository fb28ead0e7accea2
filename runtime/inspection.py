"""What an inspection says: verdict, score, map, regions, evidence, version and timings."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.spec import Region


class Verdict(str, enum.Enum):
    """Three-valued: a frame that nobody looked at is neither good nor bad."""

    OK = "OK"
    NG = "NG"
    NOT_INSPECTED = "NOT_INSPECTED"


@dataclass(frozen=True)
class DefectRegion:
    """One connected place of a frame that is unlike the normal parts.

    Attributes:
        box: in pixels of the source frame.
        area: in pixels of the source frame.
        peak: largest value of the anomaly map inside.
        peak_at: where it is, (x, y) in pixels of the source frame.
    """

    box: Region
    area: float
    peak: float
    peak_at: tuple[int, int]


@dataclass(frozen=True)
class Evidence:
    """Which knowledge decided: the bank row nearest to the most anomalous patch.

    Attributes:
        bank: the bank's name.
        row: index into the bank of that version.
        row_id: the row's id, the same over all versions.
        patch: index of the patch, row by row; with tiles, counted through all tiles.
    """

    bank: str
    row: int
    row_id: int
    patch: int


@dataclass(frozen=True, eq=False)
class Inspection:
    """The answer to one frame.

    Attributes:
        verdict: OK, NG or NOT_INSPECTED.
        product: whose knowledge was asked.
        knowledge: version of that knowledge (first 12 digits of the pack's digest).
        score: image score; None if the frame was not inspected.
        normalised: score on the 0..1 scale of `Calibration.normalise`.
        threshold: the score above which a frame is NG.
        anomaly_map: float32 [h, w] over the region of interest at the engine's resolution; None for
            methods without maps and frames that were not inspected.
        frame_shape: height and width of the source frame.
        regions: of an NG frame, largest peak first.
        evidence: what decided; empty if the head does not say.
        timings: milliseconds by stage: prepare, trunk, head, regions, total.
        reason: why the frame was not inspected.
    """

    verdict: Verdict
    product: str
    knowledge: str
    threshold: float
    score: float | None = None
    normalised: float | None = None
    anomaly_map: NDArray[np.float32] | None = None
    frame_shape: tuple[int, int] = (0, 0)
    regions: tuple[DefectRegion, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def passes(self) -> bool:
        """Whether the part may go on: only an OK. A line that thinks otherwise asks `verdict`."""
        return self.verdict is Verdict.OK

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON-like values, without the map."""
        return {
            "verdict": self.verdict.value,
            "score": self.score,
            "normalised": None if self.normalised is None else round(self.normalised, 4),
            "threshold": self.threshold,
            "product": self.product,
            "knowledge": self.knowledge,
            "regions": [
                {
                    "box": [region.box.x, region.box.y, region.box.width, region.box.height],
                    "area": round(region.area, 1),
                    "peak": region.peak,
                    "peak_at": list(region.peak_at),
                }
                for region in self.regions
            ],
            "evidence": [
                {"bank": item.bank, "row": item.row, "row_id": item.row_id, "patch": item.patch}
                for item in self.evidence
            ],
            "milliseconds": {stage: round(value, 3) for stage, value in self.timings.items()},
            "reason": self.reason,
        }
