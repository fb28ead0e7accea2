"""From an anomaly map to the regions that are shown on an NG frame."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.image import to_frame
from edgead.runtime.inspection import DefectRegion
from edgead.runtime.spec import Preprocessing, Region

LIMIT = 16
"""Most regions of one frame; the strongest are kept."""
MIN_AREA = 4
"""Pixels of the anomaly map below which a region is taken for noise."""
PEAK_SHARE = 0.6
"""Where no map threshold applies: outline what is above this share of the way from the map's least to its
largest value."""


def find_regions(
    anomaly_map: NDArray[np.float32],
    frame_shape: tuple[int, ...],
    spec: Preprocessing,
    *,
    threshold: float | None,
    limit: int = LIMIT,
    min_area: int = MIN_AREA,
) -> tuple[DefectRegion, ...]:
    """The connected areas of the map above `threshold`, strongest first; never none.

    Meant for NG frames: where the map nowhere exceeds the threshold (image score and map can disagree),
    or there is no threshold, the surroundings of the peak are outlined, so the frame still shows where.

    Args:
        anomaly_map: float32 [h, w] over the region of interest, finite.
        frame_shape: of the source frame, [H, W, ...].
        spec: preprocessing that the map was made under.
        threshold: map value above which a pixel belongs to a region.
        limit: most regions to give.
        min_area: fewest pixels of the map in a region; if no region has that many, the strongest one is
            given alone.

    Returns:
        regions in pixels of the source frame, by descending peak.
    """
    low, top, _, _ = cv2.minMaxLoc(anomaly_map)
    if threshold is None or top <= threshold:
        mask = anomaly_map >= np.float32(low + PEAK_SHARE * (top - low))
    else:
        mask = anomaly_map > threshold
    bits = mask.view(np.uint8)
    # Defects are small and labelling is the dearest step here, so it sees only their surroundings.
    left, upper, width, height = cv2.boundingRect(bits)
    window = anomaly_map[upper : upper + height, left : left + width]
    bits = bits[upper : upper + height, left : left + width]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bits, connectivity=8)
    peaks = _peaks(window, labels, bits, count)
    chosen = _strongest(peaks, stats[:, cv2.CC_STAT_AREA], limit, min_area)

    whole = to_frame(
        Region(0, 0, anomaly_map.shape[1], anomaly_map.shape[0]), anomaly_map.shape, frame_shape, spec
    )
    scale = whole.width * whole.height / anomaly_map.size
    regions = []
    for label in chosen:
        x, y, box_width, box_height, area = (int(value) for value in stats[label])
        crop = slice(y, y + box_height), slice(x, x + box_width)
        _, _, _, (peak_x, peak_y) = cv2.minMaxLoc(window[crop], (labels[crop] == label).view(np.uint8))
        box = Region(left + x, upper + y, box_width, box_height)
        point = Region(box.x + peak_x, box.y + peak_y, 1, 1)
        regions.append(
            DefectRegion(
                box=to_frame(box, anomaly_map.shape, frame_shape, spec),
                area=max(1, round(area * scale)),
                peak=float(peaks[label]),
                point=_centre(to_frame(point, anomaly_map.shape, frame_shape, spec)),
            )
        )
    return tuple(regions)


def _peaks(
    values: NDArray[np.float32], labels: NDArray[np.int32], bits: NDArray[np.uint8], count: int
) -> NDArray[np.float32]:
    """Largest value by label, float32 [count]; the background's is -inf."""
    peaks = np.full(count, -np.inf, np.float32)
    inside = bits.view(np.bool_)
    np.maximum.at(peaks, labels[inside], values[inside])
    return peaks


def _strongest(
    peaks: NDArray[np.float32], areas: NDArray[np.int32], limit: int, min_area: int
) -> NDArray[np.intp]:
    order = np.argsort(-peaks[1:], kind="stable") + 1
    large = order[areas[order] >= min_area]
    return large[:limit] if len(large) else order[:1]


def _centre(pixel: Region) -> tuple[int, int]:
    return pixel.x + pixel.width // 2, pixel.y + pixel.height // 2
