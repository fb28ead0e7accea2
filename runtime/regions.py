"""From an anomaly map to the regions that are shown on an NG frame."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import DefectRegion
from edgead.runtime.preprocess import to_frame
from edgead.runtime.spec import Preprocessing, Region

LIMIT = 16
"""Most regions of one frame; the strongest are kept."""
MIN_AREA = 4
"""Pixels of the anomaly map below which a region is taken for noise."""
PEAK_SHARE = 0.6
"""Where no map threshold applies: outline what is at or above this share of the way from the map's least to its
largest value."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One connected area in pixels of the anomaly map.

    Attributes:
        box: bounding rectangle.
        area: pixels in it.
        peak: largest value.
        point: (x, y) of that value.
    """

    box: Region
    area: int
    peak: float
    point: tuple[int, int]


def find_regions(
    anomaly_map: NDArray[np.float32],
    frame_shape: tuple[int, ...],
    spec: Preprocessing,
    *,
    threshold: float | None,
    limit: int = LIMIT,
    min_area: int = MIN_AREA,
) -> tuple[DefectRegion, ...]:
    """The regions of an NG frame in pixels of the source frame: `outline`, then `to_regions`.

    Args:
        anomaly_map: float32 [h, w] over the region of interest, finite.
        frame_shape: of the source frame, (H, W, ...).
        spec: preprocessing that the map was made under.
        threshold, limit, min_area: see `outline`.

    Returns:
        at least one region, by descending peak.
    """
    outlines = outline(anomaly_map, threshold=threshold, limit=limit, min_area=min_area)
    return to_regions(outlines, anomaly_map.shape, frame_shape, spec)


def outline(
    anomaly_map: NDArray[np.float32], *, threshold: float | None, limit: int = LIMIT, min_area: int = MIN_AREA
) -> tuple[Outline, ...]:
    """The 8-connected areas of the map above `threshold`, strongest first; never none.

    Meant for NG frames: where the map nowhere exceeds the threshold (image score and map can disagree), or
    there is no threshold, the surroundings of the peak are outlined, so the frame still shows where.

    Args:
        anomaly_map: float32 [h, w], finite.
        threshold: map value above which a pixel belongs to an area; None if the knowledge has none.
        limit: most areas to give.
        min_area: fewest pixels in an area; if none has so many, the one with the largest peak is given alone.
    """
    bits = exceeds(anomaly_map, anomaly_map, threshold).view(np.uint8)
    # Defects are small and labelling is the dearest step here, so it sees only their surroundings.
    left, upper, width, height = cv2.boundingRect(bits)
    window = anomaly_map[upper : upper + height, left : left + width]
    bits = bits[upper : upper + height, left : left + width]
    count, found_labels, stats, _ = cv2.connectedComponentsWithStats(bits, connectivity=8)
    labels: NDArray[np.int32] = np.asarray(found_labels, np.int32)
    peaks = np.full(count, -np.inf, np.float32)
    inside = bits.view(np.bool_)
    np.maximum.at(peaks, labels[inside], window[inside])
    order = np.argsort(-peaks[1:], kind="stable") + 1
    large = order[stats[order, cv2.CC_STAT_AREA] >= min_area]

    found = []
    for label in large[:limit] if len(large) else order[:1]:
        x, y, box_width, box_height, area = (int(value) for value in stats[label])
        crop = slice(y, y + box_height), slice(x, x + box_width)
        _, _, _, (peak_x, peak_y) = cv2.minMaxLoc(window[crop], (labels[crop] == label).view(np.uint8))
        box = Region(left + x, upper + y, box_width, box_height)
        found.append(Outline(box, area, float(peaks[label]), (box.x + peak_x, box.y + peak_y)))
    return tuple(found)


def exceeds(
    values: NDArray[np.float32], anomaly_map: NDArray[np.float32], threshold: float | None
) -> NDArray[np.bool_]:
    """Which of `values` are above the level that `anomaly_map` is outlined at; its own peak always is."""
    low, top, _, _ = cv2.minMaxLoc(anomaly_map)
    if threshold is None or not np.float32(top) > np.float32(threshold):
        # The product is rounded to float32 and may pass the peak itself.
        return np.asarray(values >= min(np.float32(low + PEAK_SHARE * (top - low)), np.float32(top)))
    return np.asarray(values > np.float32(threshold))


def own_pixels(outlined: Outline, mask: NDArray[np.bool_]) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The window of an outline's box, and its own pixels in it: not those of others that reach into the box.

    Args:
        outlined: made from the map that `mask` was.
        mask: bool [h, w], the pixels of that map that `exceeds` names.
    """
    box = outlined.box
    window = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
    _, labels = cv2.connectedComponents(mask[window].view(np.uint8), connectivity=8)
    own = labels[outlined.point[1] - box.y, outlined.point[0] - box.x]
    return window, np.asarray(labels == own)


def to_regions(
    outlines: tuple[Outline, ...],
    map_shape: tuple[int, ...],
    frame_shape: tuple[int, ...],
    spec: Preprocessing,
) -> tuple[DefectRegion, ...]:
    """Outlines of a map [h, w] in pixels of the source frame (H, W, ...)."""
    whole = to_frame(Region(0, 0, map_shape[1], map_shape[0]), map_shape, frame_shape, spec)
    scale = whole.width * whole.height / (map_shape[0] * map_shape[1])
    return tuple(
        DefectRegion(
            box=to_frame(item.box, map_shape, frame_shape, spec),
            area=max(1, round(item.area * scale)),
            peak=item.peak,
            point=point_in_frame(item.point, map_shape, frame_shape, spec),
        )
        for item in outlines
    )


def point_in_frame(
    point: tuple[int, int], map_shape: tuple[int, ...], frame_shape: tuple[int, ...], spec: Preprocessing
) -> tuple[int, int]:
    """The centre, (x, y) in pixels of the source frame, of a map pixel (x, y)."""
    pixel = to_frame(Region(point[0], point[1], 1, 1), map_shape, frame_shape, spec)
    return pixel.x + pixel.width // 2, pixel.y + pixel.height // 2
