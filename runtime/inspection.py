"""What the inspector says of one frame, and how that is spelled as a line of JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edgead.runtime.spec import Region

STAGES = ("prepare", "trunk", "head", "normality", "regions", "total")
"""Stages of one frame, in the order they happen; `total` is what the caller waited. `normality` is 0 on frames
that needed no look at what is normal by a sentence."""


class Verdict(str, Enum):
    """The answer for one frame. A frame without an answer is none of a good part."""

    OK = "OK"
    NG = "NG"
    NOT_INSPECTED = "NOT_INSPECTED"


@dataclass(frozen=True, slots=True)
class DefectRegion:
    """One connected area of an NG frame's anomaly map.

    Attributes:
        box: bounding rectangle in pixels of the source frame, before any rotation.
        area: pixels of the source frame that it covers.
        peak: largest value of the anomaly map in it.
        point: (x, y) of that value in pixels of the source frame.
    """

    box: Region
    area: int
    peak: float
    point: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The bank row that a patch was compared with: its nearest one.

    Attributes:
        bank: name of the memory bank.
        row: index of the row in it.
        row_id: the row's id, by which its source image is traced; None if the pack has no ids.
        point: (x, y) of the patch's centre in pixels of the source frame; None for a detector without maps.
    """

    bank: str
    row: int
    row_id: int | None
    point: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class SuppressedRegion:
    """One area that would have alarmed, had a sentence not said that it is normal.

    Attributes:
        box, area: as in `DefectRegion`.
        peak: largest value of the anomaly map in it before suppression.
        point: (x, y) of that value in pixels of the source frame.
        share: how much of the peak's way down to the frame's floor was suppressed, 0..1.
        sentence: the sentence that explains the peak.
        row: its row in `normality.table`; None if the engine named none.
    """

    box: Region
    area: int
    peak: float
    point: tuple[int, int]
    share: float
    sentence: str
    row: int | None


@dataclass(frozen=True, slots=True)
class Sentence:
    """A row of text that had weight in the decision.

    Attributes:
        text: the sentence, prompt or descriptor; the row's place if the knowledge has no text for it.
        weight: as the head gives it; comparable within one frame.
        array: name of the knowledge array.
        row: the row in it.
    """

    text: str
    weight: float
    array: str
    row: int


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """The result of one frame, made with one version of the knowledge.

    Attributes:
        verdict: NG exactly if the score is greater than the threshold; NOT_INSPECTED has no score.
        score: image score in the detector's own unit.
        normalised: the score on a 0..1 scale, 0.5 at the threshold.
        threshold: the threshold that was applied, from the same knowledge as the score.
        anomaly_map: float32 [h, w] over the region of interest in the engine's resolution; None if the
            detector makes none.
        regions: of an NG frame, by descending peak; empty on OK frames.
        evidence: the nearest bank rows of the patch that made the score, then of the regions' other peaks;
            empty if the head does not name them.
        product: the product that the frame was inspected as.
        knowledge: version of the knowledge, the first 12 digits of its digest.
        timings: milliseconds by stage, see `STAGES`.
        reason: why the frame was not inspected; None if it was.
        map_threshold: map value that regions were outlined at, from the same knowledge; None if it has none.
        suppressed: areas that a sentence explains and that alarm no longer, by descending peak; on NG frames
            they stand beside `regions`. Score, map and regions are those after suppression.
        base_score: the image score before suppression; None where nothing was compared with sentences.
        sentences: the text rows with most weight in the decision, heaviest first; empty if the head weighs none.
    """

    verdict: Verdict
    score: float | None
    normalised: float | None
    threshold: float
    anomaly_map: NDArray[np.float32] | None
    regions: tuple[DefectRegion, ...]
    evidence: tuple[Evidence, ...]
    product: str
    knowledge: str
    timings: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    map_threshold: float | None = None
    suppressed: tuple[SuppressedRegion, ...] = ()
    base_score: float | None = None
    sentences: tuple[Sentence, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether the line may let the part go: only after an OK. A frame without an answer stops it."""
        return self.verdict is Verdict.OK

    def decision(self, unanswered: Verdict = Verdict.NG) -> Verdict:
        """What the line does with the part, OK or NG; `unanswered` is for frames that were not inspected."""
        return unanswered if self.verdict is Verdict.NOT_INSPECTED else self.verdict


def not_inspected(
    reason: str,
    *,
    product: str,
    knowledge: str,
    threshold: float,
    timings: Mapping[str, float] | None = None,
) -> Inspection:
    """The result of a frame that got no answer."""
    return Inspection(
        verdict=Verdict.NOT_INSPECTED,
        score=None,
        normalised=None,
        threshold=threshold,
        anomaly_map=None,
        regions=(),
        evidence=(),
        product=product,
        knowledge=knowledge,
        timings=timings or {},
        reason=reason,
    )


class ResultRegion(Struct, frozen=True):
    """A `DefectRegion` in a result line: pixels of the source frame, `point` as [x, y]."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float
    point: tuple[int, int]


class ResultSuppressed(Struct, frozen=True):
    """A `SuppressedRegion` in a result line."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float
    point: tuple[int, int]
    share: float
    sentence: str
    row: int | None


class ResultSentence(Struct, frozen=True):
    """A `Sentence` in a result line."""

    text: str
    weight: float
    array: str
    row: int


class ResultEvidence(Struct, frozen=True):
    """An `Evidence` in a result line; `id` is the row's id."""

    bank: str
    row: int
    id: int | None
    point: tuple[int, int] | None


class ResultLine(Struct, frozen=True):
    """One line of `edgead run --json`: the same keys on every line, null where there is nothing to say."""

    path: str
    verdict: str
    """OK, NG or NOT_INSPECTED."""
    decision: str
    """OK or NG: what the line does, after the setting for frames that were not inspected."""
    score: float | None
    normalised: float | None
    threshold: float
    regions: tuple[ResultRegion, ...]
    evidence: tuple[ResultEvidence, ...]
    product: str
    knowledge: str
    """Version of the knowledge that made the score."""
    ms: dict[str, float]
    """Milliseconds by stage: prepare, trunk, head, normality, regions, total."""
    reason: str | None
    """Why the frame was not inspected."""
    time: str | None
    """UTC time at which a camera's frame was taken; null for files."""
    # Lines of earlier versions lack these keys.
    suppressed: tuple[ResultSuppressed, ...] = ()
    """Regions that a sentence explains, so that they alarm no longer."""
    base_score: float | None = None
    """The score before suppression; null where no sentence was looked at."""
    sentences: tuple[ResultSentence, ...] = ()
    """The text rows with most weight in the decision."""


def result_line(
    inspection: Inspection, path: str, *, unanswered: Verdict = Verdict.NG, time: str | None = None
) -> ResultLine:
    """The result line of one inspection of the frame that is called `path`."""
    return ResultLine(
        path=path,
        verdict=inspection.verdict.value,
        decision=inspection.decision(unanswered).value,
        score=inspection.score,
        normalised=inspection.normalised,
        threshold=inspection.threshold,
        regions=tuple(
            ResultRegion(
                *(region.box.x, region.box.y, region.box.width, region.box.height),
                area=region.area,
                peak=region.peak,
                point=region.point,
            )
            for region in inspection.regions
        ),
        evidence=tuple(
            ResultEvidence(bank=item.bank, row=item.row, id=item.row_id, point=item.point)
            for item in inspection.evidence
        ),
        product=inspection.product,
        knowledge=inspection.knowledge,
        ms={stage: round(value, 3) for stage, value in inspection.timings.items()},
        reason=inspection.reason,
        time=time,
        suppressed=tuple(
            ResultSuppressed(
                *(item.box.x, item.box.y, item.box.width, item.box.height),
                area=item.area,
                peak=item.peak,
                point=item.point,
                share=round(item.share, 4),
                sentence=item.sentence,
                row=item.row,
            )
            for item in inspection.suppressed
        ),
        base_score=inspection.base_score,
        sentences=tuple(ResultSentence(item.text, item.weight, item.array, item.row) for item in inspection.sentences),
    )


def encode_line(line: ResultLine) -> bytes:
    """One line of UTF-8 JSON, with its line feed."""
    return msgspec.json.encode(line) + b"\n"


def decode_line(data: bytes) -> ResultLine:
    """A result line from its JSON.

    Raises:
        msgspec.DecodeError: not JSON, or not a result line.
    """
    return msgspec.json.decode(data, type=ResultLine)


def percentile(values: Any, share: float) -> float:
    """The smallest of `values` that at least `share` (0..1) of them do not exceed; NaN of no values.

    The nearest-rank definition: the answer is always one of the measurements.
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])
