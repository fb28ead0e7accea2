"""The parity gate: an engine that does not say what torch says is not shipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.detector_file import FittedDetector
from edgead.runtime.engines import Engine, Session
from edgead.runtime.errors import DetectorError, ParityError
from edgead.runtime.knowledge import Pack, head_feeds
from edgead.runtime.spec import ParityFigures, Port, Precision, Tolerance

TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(score=1e-4, map=1e-4),
    "fp16": Tolerance(score=1e-2, map=1e-2),
}
"""Largest difference from torch, as a share of the reference maps' range over the golden images.

Seen over trunks of 3 to 50 layers, on photographs and on noise: up to 2e-6 in fp32 and 1e-3 in fp16, on
processors, which add up in float32. The tenfold room in fp16 is for GPUs that add up in less; what is off by
1 % of the range is no longer rounding.
"""
COIN_TOSS = 0.1
"""Share of the score tolerance: closer to the threshold than this, a changed verdict is counted, not refused."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """What torch says of the golden frames under the initial pack.

    Attributes:
        features: by port, one array [G, ...] each.
        outputs: by port, one array [G, ...] each.
        anomalous: bool [G].
        scale: range of the maps, by which differences are divided. Without maps, the larger of the range of
            the scores and the way from a typical score to the threshold.
    """

    features: Arrays
    outputs: Arrays
    anomalous: NDArray[np.bool_]
    scale: float

    @property
    def scores(self) -> NDArray[np.float32]:
        """float32 [G]."""
        return self.outputs["score"]

    @property
    def maps(self) -> NDArray[np.float32] | None:
        """float32 [G, H, W], or None for methods without maps."""
        return self.outputs.get("anomaly_map")


@dataclass
class Comparison:
    """How far an engine is from torch over all golden frames.

    Attributes:
        figures: of the whole engine, for its record.
        trunk: by feature, largest difference as a share of that feature's largest value.
        head_score, head_map: differences of the head alone, on torch's features, as shares of the range.
        agreement: by integer output (such as the nearest row), share of equal values.
    """

    figures: ParityFigures
    trunk: dict[str, float] = field(default_factory=dict)
    head_score: float = 0.0
    head_map: float = 0.0
    agreement: dict[str, float] = field(default_factory=dict)


def reference_of(detector: FittedDetector, *, scale: float | None = None) -> Reference:
    """Run the traced graphs in torch on the golden frames, one at a time.

    Args:
        detector: with the knowledge to run under.
        scale: the maps' range, where it is known beforehand.

    Raises:
        DetectorError: torch itself fails on a frame, or answers with NaN or infinity.
    """
    spec = detector.spec
    knowledge = [torch.from_numpy(array.copy()) for array in head_feeds(detector.pack, spec).values()]
    features: list[tuple[torch.Tensor, ...]] = []
    outputs: list[tuple[torch.Tensor, ...]] = []
    try:
        trunk, head = detector.trunk.module(), detector.head.module()
        with torch.inference_mode():
            for frame in detector.golden:
                features.append(tuple(trunk(torch.from_numpy(frame[None].copy()))))
                outputs.append(tuple(head(*features[-1], *knowledge)))
    except Exception as error:  # a stranger's module can raise anything
        raise DetectorError(
            wanted="a detector that runs in torch on its golden frames",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}",
            next_step="Run with --debug for the whole traceback.",
        ) from error
    made = _stack(spec.outputs, outputs)
    scores, maps = made["score"], made.get("anomaly_map")
    for name, array in made.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DetectorError(
                wanted=f"finite numbers in '{name}' on every golden frame",
                got="NaN or infinity from torch itself",
                next_step="Look at the module's divisions, logarithms and square roots.",
            )
    calibration = detector.pack.calibration
    if maps is not None:
        spread = float(maps.max() - maps.min())
    else:
        spread = max(float(np.ptp(scores)), calibration.threshold - calibration.typical)
    return Reference(
        features=_stack(spec.features, features),
        outputs=made,
        anomalous=scores > calibration.threshold,
        scale=max(spread, float(np.abs(scores).max()) * 1e-3, 1e-12) if scale is None else scale,
    )


def _stack(ports: tuple[Port, ...], values: list[tuple[torch.Tensor, ...]]) -> Arrays:
    return {port.name: torch.cat([tensors[place] for tensors in values]).numpy() for place, port in enumerate(ports)}


def check_parity(
    engine: Engine,
    detector: FittedDetector,
    reference: Reference,
    tolerance: Tolerance,
    pack: Pack | None = None,
) -> Comparison:
    """Compare an engine with torch on every golden frame.

    Args:
        engine: with a trunk and a head of the detector.
        detector: has the golden frames and the threshold.
        reference: what torch says.
        tolerance: largest differences.
        pack: the knowledge for the engine, where its bundle's packs hold more than the detector's.

    Raises:
        ParityError: a score, a map or a decision differs by more than the tolerance; names the frame, the
            place in the map, and the stage in which the difference began.
        EngineError: the engine failed.
    """
    with engine.trunk() as trunk, engine.head(detector.pack if pack is None else pack) as head:
        gate = _Gate(engine.record.name, detector, reference, tolerance)
        for index, frame in enumerate(detector.golden):
            features = _copied(trunk, {"image": np.ascontiguousarray(frame[None])})
            outputs = _copied(head, features)
            alone = _copied(head, {name: array[index : index + 1] for name, array in reference.features.items()})
            gate.frame(index, features, outputs, alone)
    return gate.result()


class _Gate:
    """Gathers differences frame by frame; raises on the first that is too large."""

    def __init__(self, engine: str, detector: FittedDetector, reference: Reference, tolerance: Tolerance) -> None:
        self.engine = engine
        self.reference = reference
        self.tolerance = tolerance
        self.threshold = detector.pack.calibration.threshold
        self.score = self.map = 0.0
        self.changed = 0
        self.found = Comparison(ParityFigures(len(detector.golden), 0.0, 0.0, 0))

    def frame(self, index: int, features: Arrays, outputs: Arrays, alone: Arrays) -> None:
        self._look_inside(index, features, alone)
        score, wanted = float(outputs["score"][0]), float(self.reference.scores[index])
        difference = abs(score - wanted) / self.reference.scale
        if not difference <= self.tolerance.score:
            raise self._off(index, "score", difference, self.tolerance.score, score, wanted)
        self.score = max(self.score, difference)
        if self.reference.maps is not None:
            got, maps = outputs["anomaly_map"][0], self.reference.maps[index]
            # NaN is further away than anything.
            gap = np.nan_to_num(np.abs(got - maps) / self.reference.scale, nan=np.inf)
            row, column = (int(at) for at in np.unravel_index(int(gap.argmax()), gap.shape))
            largest = float(gap[row, column])
            if not largest <= self.tolerance.map:
                what = f"map at row {row}, column {column}"
                raise self._off(
                    index, what, largest, self.tolerance.map, float(got[row, column]), float(maps[row, column])
                )
            self.map = max(self.map, largest)
        if (score > self.threshold) != bool(self.reference.anomalous[index]):
            self.changed += 1
            margin = COIN_TOSS * self.tolerance.score
            away = abs(wanted - self.threshold) / self.reference.scale
            if away > margin:
                raise self._off(index, "decision", difference, margin, score, wanted)

    def _look_inside(self, index: int, features: Arrays, alone: Arrays) -> None:
        found, scale = self.found, self.reference.scale
        for name, array in features.items():
            off = _relative(array[0], self.reference.features[name][index])
            found.trunk[name] = max(found.trunk.get(name, 0.0), off)
        for name, array in alone.items():
            wanted = self.reference.outputs[name][index]
            if array.dtype.kind in "iu":
                equal = float((array[0] == wanted).mean())
                found.agreement[name] = found.agreement.get(name, 0.0) + equal / found.figures.images
            elif name == "score":
                found.head_score = max(found.head_score, _largest(array[0] - wanted) / scale)
            elif name == "anomaly_map":
                found.head_map = max(found.head_map, _largest(array[0] - wanted) / scale)

    def result(self) -> Comparison:
        found = self.found
        found.figures = ParityFigures(found.figures.images, rounded(self.score), rounded(self.map), self.changed)
        found.trunk = {name: rounded(value) for name, value in found.trunk.items()}
        found.head_score, found.head_map = rounded(found.head_score), rounded(found.head_map)
        found.agreement = {name: round(value, 4) for name, value in found.agreement.items()}
        return found

    def _off(self, index: int, what: str, difference: float, allowed: float, got: float, wanted: float) -> ParityError:
        head = max(self.found.head_score, self.found.head_map)
        stage = "head" if not head <= 0.5 * allowed else "trunk"
        features = ", ".join(f"{name} {value:.1e} of its range" for name, value in self.found.trunk.items())
        if what == "decision":
            limit = f"as torch's, whose score {wanted:.6g} is not at the threshold {self.threshold:.6g}"
        else:
            limit = f"within {allowed:g} of the reference's range from torch's {wanted:.6g}"
        return ParityError(
            wanted=f"the {what} of '{self.engine}' on golden/{index:03d}.png {limit}",
            got=f"{got:.6g}, off by {difference:.3g}. It begins in the {stage} "
            f"(features off by {features}; the head alone, on torch's features, by {head:.1e})",
            next_step="Export this target with fp32, or see what the engine does differently in that stage.",
        )


def _copied(session: Session, feeds: Arrays) -> Arrays:
    """Outputs that the session's next call does not overwrite."""
    return {name: np.array(array) for name, array in session.infer(feeds).items()}


def _relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    return _largest(got - wanted) / (float(np.abs(wanted).max()) or 1.0)


def _largest(difference: NDArray[Any]) -> float:
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max())


def rounded(value: float) -> float:
    """Three significant digits: the last bits of a difference are noise, and a bundle holds none."""
    return float(f"{value:.2e}")
