"""The parity gate: an engine that does not say what torch says is not shipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.detector_file import FittedDetector
from edgead.runtime.engines import Engine
from edgead.runtime.errors import ParityError
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.spec import ParityFigures, Precision, Tolerance

TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(score=1e-4, map=1e-4),
    "fp16": Tolerance(score=2e-2, map=2e-2),
}
"""Largest difference from torch, as a share of the reference map's range over the golden images.

float16 keeps 11 significant bits, and a distance is a small difference of two large rows: 2 % of the range is
what a trunk of some 50 layers leaves of them.
"""


@dataclass(frozen=True)
class Reference:
    """What torch says of the golden frames under the initial pack.

    Attributes:
        features: by port, one array [G, ...] each.
        scores: float32 [G].
        maps: float32 [G, H, W], or None for methods without maps.
        anomalous: bool [G].
        scale: range of the maps (of the scores where there is no map), by which differences are divided.
    """

    features: dict[str, NDArray[Any]]
    scores: NDArray[np.float32]
    maps: NDArray[np.float32] | None
    anomalous: NDArray[np.bool_]
    scale: float


def reference_of(detector: FittedDetector) -> Reference:
    """Run the traced graphs in torch on the golden frames, one at a time."""
    trunk, head = detector.trunk.module(), detector.head.module()
    knowledge = [
        torch.from_numpy(array.copy()) for array in head_feeds(detector.pack, detector.spec).values()
    ]
    features: list[tuple[torch.Tensor, ...]] = []
    outputs: list[tuple[torch.Tensor, ...]] = []
    with torch.inference_mode():
        for frame in detector.golden:
            features.append(tuple(trunk(torch.from_numpy(frame[None].copy()))))
            outputs.append(tuple(head(*features[-1], *knowledge)))
    names = [port.name for port in detector.spec.outputs]
    scores = torch.cat([values[names.index("score")] for values in outputs]).numpy()
    maps = None
    if detector.spec.has_map:
        maps = torch.cat([values[names.index("anomaly_map")] for values in outputs]).numpy()
    spread = scores if maps is None else maps
    return Reference(
        features={
            port.name: torch.cat([values[place] for values in features]).numpy()
            for place, port in enumerate(detector.spec.features)
        },
        scores=scores,
        maps=maps,
        anomalous=scores > detector.pack.calibration.threshold,
        scale=max(float(spread.max() - spread.min()), float(np.abs(scores).max()) * 1e-3, 1e-12),
    )


def check_parity(
    engine: Engine, detector: FittedDetector, reference: Reference, tolerance: Tolerance
) -> ParityFigures:
    """Compare an engine with torch on every golden frame.

    Returns:
        the largest differences seen.

    Raises:
        ParityError: a score, a map or a decision differs by more than the tolerance; says on which frame,
            where in the map, and in which stage the difference began.
        EngineError: the engine failed.
    """
    worst_score = worst_map = 0.0
    threshold = detector.pack.calibration.threshold
    with engine.trunk() as trunk, engine.head(detector.pack) as head:
        for index, frame in enumerate(detector.golden):
            features = {name: np.array(array) for name, array in trunk.infer({"image": frame[None]}).items()}
            outputs = head.infer(features)
            score = float(outputs["score"][0])
            where = f"golden frame {index} of {engine.record.name}"
            difference = abs(score - float(reference.scores[index])) / reference.scale
            worst_score = max(worst_score, difference)
            stage = _stage(features, reference, index)
            if not difference <= tolerance.score:
                raise _off(where, "score", difference, tolerance.score, stage, score, reference.scores[index])
            if reference.maps is not None:
                gap = np.abs(outputs["anomaly_map"][0] - reference.maps[index]) / reference.scale
                place = np.unravel_index(int(gap.argmax()), gap.shape)
                largest = float(gap[place])
                worst_map = max(worst_map, largest)
                if not largest <= tolerance.map:
                    got, wanted = outputs["anomaly_map"][0][place], reference.maps[index][place]
                    what = f"map at row {place[0]}, column {place[1]}"
                    raise _off(where, what, largest, tolerance.map, stage, float(got), float(wanted))
            # A score on the threshold may fall to either side within the tolerance; that is no defect.
            near = abs(float(reference.scores[index]) - threshold) <= tolerance.score * reference.scale
            if (score > threshold) != bool(reference.anomalous[index]) and not near:
                raise _off(where, "decision", difference, 0.0, stage, score, reference.scores[index])
    return ParityFigures(len(detector.golden), worst_score, worst_map, 0)


def _stage(features: dict[str, NDArray[Any]], reference: Reference, index: int) -> str:
    """In words: how far the trunk's features already are from torch's on this frame."""
    parts = []
    for name, array in features.items():
        wanted = reference.features[name][index]
        scale = float(np.abs(wanted).max()) or 1.0
        parts.append(f"{name} off by {float(np.abs(array[0] - wanted).max()) / scale:.1e} of their range")
    return "; ".join(parts)


def _off(
    where: str, what: str, difference: float, allowed: float, stage: str, got: float, wanted: float
) -> ParityError:
    return ParityError(
        wanted=f"the {what} on {where} within {allowed:g} of the map's range from torch's {wanted:.6g}",
        got=f"{got:.6g}, off by {difference:.3g} (trunk: {stage})",
        next_step="Export that target with fp32, or look at what the engine does differently; "
        "a bundle is only written if every engine agrees.",
    )
