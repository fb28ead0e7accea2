"""Anomaly map -> regions: connected places above a level, in pixels of the source frame."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import DefectRegion
from edgead.runtime.spec import Region

PEAK_SHARE = 0.9
"""An NG frame whose map stays below the level is outlined at this share of its peak instead."""
MAX_REGIONS = 32
MIN_AREA = 4
"""Map pixels; smaller specks are noise of the interpolation unless they hold the frame's peak."""

ToFrame = Callable[[Region], Region]


def find_regions(
    anomaly_map: NDArray[np.float32],
    level: float,
    to_frame: ToFrame,
    *,
    max_regions: int = MAX_REGIONS,
    min_area: int = MIN_AREA,
) -> tuple[DefectRegion, ...]:
    """Outline what is anomalous in the map of an NG frame.

    There is always at least one region: if nothing is above `level`, the surroundings of the peak.

    Args:
        anomaly_map: float32 [h, w].
        level: map values above it belong to a region.
        to_frame: turns a rectangle in map pixels into one in source-frame pixels.
        max_regions: keep at most so many, those with the largest peaks.
        min_area: in map pixels; the region with the largest peak is kept whatever its size.

    Returns:
        regions, largest peak first; 8-connected.
    """
    peak = float(anomaly_map.max())
    if peak <= level:
        floor = float(anomaly_map.min())
        level = floor + PEAK_SHARE * (peak - floor)
    mask = (anomaly_map > level).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    found: list[tuple[float, int, int, int]] = []
    for label in range(1, count):
        x, y, width, height, _ = (int(value) for value in stats[label])
        window = anomaly_map[y : y + height, x : x + width]
        inside = np.where(labels[y : y + height, x : x + width] == label, window, -np.inf)
        best = int(inside.argmax())
        found.append((float(inside.flat[best]), label, x + best % width, y + best // width))
    if not found:  # a map without any slope has no outline; its first pixel stands for it
        row, column = divmod(int(anomaly_map.argmax()), anomaly_map.shape[1])
        box = to_frame(Region(column, row, 1, 1))
        return (DefectRegion(box, float(box.width * box.height), peak, (box.x, box.y)),)
    found.sort(key=lambda item: (-item[0], item[1]))
    kept = [
        item
        for place, item in enumerate(found)
        if place == 0 or stats[item[1], cv2.CC_STAT_AREA] >= min_area
    ]
    regions = []
    for value, label, peak_x, peak_y in kept[:max_regions]:
        x, y, width, height, area = (int(number) for number in stats[label])
        box = to_frame(Region(x, y, width, height))
        point = to_frame(Region(peak_x, peak_y, 1, 1))
        scale = box.width * box.height / (width * height)
        at = (point.x + point.width // 2, point.y + point.height // 2)
        regions.append(DefectRegion(box, area * scale, value, at))
    return tuple(regions)
