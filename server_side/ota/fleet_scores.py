"""Devices whose scores stand out against the others of their product and release. Pure; flagged, never acted upon.

The rule, for the devices of one product with one release that have inspected enough frames:

- the median of score/threshold, as its logarithm x, has the modified z-score (x - m) / s with m the median and
  s = 1.4826 times the median absolute deviation over the devices (Iglewicz and Hoaglin, 1993), s at least 0.02;
- the share p of NG among n inspected frames is compared as y = asin(sqrt(p)), whose own noise 1 / (4 n) does not depend
  on p: z = (y - m) / sqrt(s^2 + 1 / (4 n)). Less than one percentage point of difference is never one.

A device stands out from |z| > 3.5 on, among eight devices or more. That can be a lens out of focus, another lamp or a
worn tool as well as a bad line: a person has to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.device_status import ScoreStatistics
from edgead.server_side.ota.statuses import Seen

Z = 3.5
LEAST_DEVICES = 8
LEAST_FRAMES = 200
"""Frames of a device from which on its median and its share of NG say something."""
_LEAST_SPREAD = 0.02
_LEAST_SHARE = 0.01
_MAD = 1.4826
_BINS = 80
_LEAST_RATIO = 1e-6


@dataclass(frozen=True)
class Outlier:
    """A device that stands out.

    Attributes:
        device: its name.
        frames: that it inspected.
        ratio: median of its score/threshold.
        ratio_z: how far that is from the others.
        ng: share of NG among its inspected frames.
        ng_z: how far that is from the others.
    """

    device: str
    frames: int
    ratio: float
    ratio_z: float
    ng: float
    ng_z: float

    @property
    def told(self) -> str:
        """What stands out, for people."""
        parts = []
        if abs(self.ratio_z) > Z:
            parts.append(f"median score {self.ratio:.2f} of the threshold ({self.ratio_z:+.1f} sigma)")
        if abs(self.ng_z) > Z:
            parts.append(f"{self.ng:.2%} NG ({self.ng_z:+.1f} sigma)")
        return ", ".join(parts)


@dataclass(frozen=True)
class Scores:
    """The scores of the devices of one product with one release.

    Attributes:
        product: its name.
        release: counter.
        devices: with enough frames.
        ratio, ng: medians over the devices, of the median of score/threshold and of the share of NG.
        low, high: ends of `bins` in score/threshold.
        bins: devices by their median of score/threshold.
        compared: whether there are enough devices to find one that stands out.
        outliers: those that stand out, farthest first.
    """

    product: str
    release: int
    devices: int
    ratio: float
    ng: float
    low: float
    high: float
    bins: tuple[int, ...]
    compared: bool
    outliers: tuple[Outlier, ...]


def score_groups(statuses: Iterable[Seen]) -> tuple[Scores, ...]:
    """Scores by product and release, most devices first; devices without enough frames are left out."""
    found: dict[tuple[str, int], list[tuple[str, ScoreStatistics]]] = {}
    for seen in statuses:
        status = seen.status
        for item in status.scores:
            if status.release is not None and item.ok + item.ng >= LEAST_FRAMES and item.ratios:
                found.setdefault((item.product, status.release), []).append((status.device, item))
    groups = [_compared(product, release, items) for (product, release), items in found.items()]
    return tuple(sorted(groups, key=lambda group: (-group.devices, group.product, group.release)))


def _compared(product: str, release: int, items: Sequence[tuple[str, ScoreStatistics]]) -> Scores:
    ratio = np.array([max(item.ratios[1], _LEAST_RATIO) for _, item in items])
    frames = np.array([item.ok + item.ng for _, item in items], np.float64)
    share = np.array([item.ng for _, item in items]) / frames
    logs, angles = np.log(ratio), np.arcsin(np.sqrt(share))
    ratio_z = (logs - np.median(logs)) / max(_spread(logs), _LEAST_SPREAD)
    ng_z = (angles - np.median(angles)) / np.sqrt(_spread(angles) ** 2 + 1 / (4 * frames))
    ng_z[np.abs(share - np.median(share)) < _LEAST_SHARE] = 0.0
    enough = len(items) >= LEAST_DEVICES
    # Zero to the farthest device that is not absurd: one forged status must not squeeze the others into one bin.
    high = float(min(ratio.max(), max(2.0, 4 * float(np.median(ratio))))) * 1.02
    bins, _ = np.histogram(np.clip(ratio, 0.0, high), _BINS, (0.0, high))
    outliers = [
        Outlier(device, int(frames[at]), float(ratio[at]), float(ratio_z[at]), float(share[at]), float(ng_z[at]))
        for at, (device, _) in enumerate(items)
        if enough and max(abs(ratio_z[at]), abs(ng_z[at])) > Z
    ]
    outliers.sort(key=lambda one: (-max(abs(one.ratio_z), abs(one.ng_z)), one.device))
    return Scores(
        product=product,
        release=release,
        devices=len(items),
        ratio=float(np.median(ratio)),
        ng=float(np.median(share)),
        low=0.0,
        high=high if math.isfinite(high) else 2.0,
        bins=tuple(int(number) for number in bins),
        compared=enough,
        outliers=tuple(outliers),
    )


def _spread(values: NDArray[np.float64]) -> float:
    """Standard deviation by the median absolute deviation."""
    return _MAD * float(np.median(np.abs(values - np.median(values))))


__all__ = ["LEAST_DEVICES", "LEAST_FRAMES", "Outlier", "Scores", "Z", "score_groups"]
