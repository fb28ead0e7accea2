"""The teacher of a distillation: one or several fitted detectors as one map in units of their thresholds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgead.detector_file import FittedDetector
from edgead.runtime.errors import DetectorError
from edgead.runtime.image import Frame
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.learned import Learned


class Teacher:
    """One or several fitted detectors as one map in units of their thresholds.

    Args:
        detectors: with maps, all of one geometry (region, tiles, rotation); sizes of frames may differ. Read from a
            file, or learned and not yet written.
        names: of their files, for messages and the card.

    Raises:
        DetectorError: a detector without a map, with a threshold that is no unit, or of another geometry.
    """

    def __init__(self, detectors: Sequence[FittedDetector | Learned], names: Sequence[str]) -> None:
        self.detectors, self.names = tuple(detectors), tuple(names)
        self.units = [_unit(detector, name) for detector, name in zip(detectors, names, strict=True)]
        first = self.detectors[0].spec.preprocessing
        for detector, name in zip(detectors, names, strict=True):
            if resized(detector.spec.preprocessing, first) != first:
                raise DetectorError(
                    wanted=f"teachers that look at the same part of a frame as {names[0]}",
                    got=f"another region, rotation or tiles in {name}",
                    next_step="Fit all teachers with the same --roi, --tiles and --rotate.",
                )
        self._graphs = [(_module(each.trunk), _module(each.head)) for each in self.detectors]
        self._knowledge = [
            [torch.from_numpy(array.copy()) for array in head_feeds(each.pack, each.spec).values()]
            for each in self.detectors
        ]

    @property
    def parameters(self) -> int:
        """Numbers in all graphs."""
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def size(self) -> int:
        """Bytes of all graphs' numbers and all knowledge."""
        known = sum(array.nbytes for each in self.detectors for array in each.pack.arrays.values())
        return known + sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self._graphs for graph in pair for tensor in graph.state_dict().values()]

    @property
    def digest(self) -> str:
        """SHA-256 over feature spaces and knowledge."""
        parts = [f"{each.spec.fingerprint} {each.pack.digest}" for each in self.detectors]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def outputs(self, frame: Frame) -> tuple[float, Tensor]:
        """Score, and map float32 [T, H, W] of the first teacher's size, of a source frame; both in thresholds."""
        size = self.detectors[0].spec.preprocessing
        scores, maps = [], []
        for number, (detector, unit) in enumerate(zip(self.detectors, self.units, strict=True)):
            trunk, head = self._graphs[number]
            with torch.inference_mode():
                features = _tuple(trunk(torch.from_numpy(prepare(frame, detector.spec.preprocessing))))
                outputs = _tuple(head(*features, *self._knowledge[number]))
            found = {port.name: tensor for port, tensor in zip(detector.spec.outputs, outputs, strict=True)}
            each = found["anomaly_map"] / unit
            if each.shape[1:] != (size.height, size.width):
                each = F.interpolate(each[:, None], (size.height, size.width), mode="bilinear", antialias=True)[:, 0]
            maps.append(each)
            scores.append(float(found["score"].max()) / detector.pack.calibration.threshold)
        return float(np.mean(scores)), torch.stack(maps).mean(0)

    def targets(self, frame: Frame, grid: tuple[int, int]) -> Tensor:
        """The map at a coarser grid, each cell the mean of its pixels: float32 [T, rows, columns]."""
        return F.adaptive_avg_pool2d(self.outputs(frame)[1][:, None], grid)[:, 0].clone()


def _module(graph: ExportedProgram | nn.Module) -> nn.Module:
    return graph.module() if isinstance(graph, ExportedProgram) else graph


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _unit(detector: FittedDetector | Learned, name: str) -> float:
    if not detector.spec.has_map:
        raise DetectorError(
            wanted="a teacher with an anomaly map",
            got=f"{name}, whose method {detector.spec.method} has none",
            next_step="Name a detector that shows where, such as one of memory-bank, simplenet or recontrast.",
        )
    calibration = detector.pack.calibration
    unit = calibration.map_threshold or calibration.threshold
    if unit <= 0 or calibration.threshold <= 0:
        raise DetectorError(
            wanted=f"a threshold above 0 in {name}",
            got=f"{min(unit, calibration.threshold):g}",
            next_step="Calibrate the teacher on photographs of good parts: fit it with --normal.",
        )
    return unit


def resized(preprocessing: Preprocessing, like: Preprocessing) -> Preprocessing:
    """The same region, tiles and rotation at the frame size of `like`."""
    return msgspec.structs.replace(preprocessing, width=like.width, height=like.height)


__all__ = ["Teacher", "resized"]
