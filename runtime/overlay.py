"""The picture of a result: the frame, where it is unusual, and a caption. For people, not for measuring."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.preprocess import Frame, map_to_frame
from edgead.runtime.regions import PEAK_SHARE
from edgead.runtime.spec import Preprocessing, Region

SMALLEST, LARGEST = 320, 1600
"""Pixels of a picture's longer side: smaller frames are enlarged, so that a caption can be read; larger ones
are reduced, so that a folder of results stays small."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_BADGES = {Verdict.OK: (38, 132, 72), Verdict.NG: (196, 40, 40), Verdict.NOT_INSPECTED: (176, 118, 16)}
_STRIP, _TEXT = (28, 30, 34), (226, 228, 232)
_OUTLINE, _BOX = (255, 48, 48), (255, 176, 168)
_EXPLAINED = (36, 92, 214)
_WARM, _HOT = np.array((255, 190, 40), np.float32), np.array((235, 24, 24), np.float32)

_HEAT_FROM, _HEAT_FULL = 0.75, 1.5
"""Shares of the way from the map's median to the threshold at which heat begins and is strongest."""
_HEAT_OPACITY = 0.5


def overlay(frame: Frame, inspection: Inspection, preprocessing: Preprocessing) -> Frame:
    """Draw an inspection onto a copy of its frame.

    Heat tints only what comes near the map's threshold (the image's, where there is none), so a good part
    looks like its photograph. Regions get a red contour and a thin box; what a sentence explains gets a blue box
    with the sentence at it; a strip below carries the verdict, the score and the knowledge's version.

    Args:
        frame: uint8 RGB [H, W, 3], the source frame; not changed.
        inspection: what the inspector said of it.
        preprocessing: of the detector, to place the map on the frame.

    Returns:
        uint8 RGB [H2, W2, 3]: the frame scaled so that its longer side has `SMALLEST` to `LARGEST` pixels,
        and the strip below.
    """
    height, width = frame.shape[:2]
    scale = min(max(1.0, SMALLEST / max(height, width)), LARGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = frame.copy() if scale == 1 else np.asarray(cv2.resize(frame, size, interpolation=how), np.uint8)
    line = max(1, round(max(size) / 500))
    boxes = [_scaled(region.box, scale, size) for region in inspection.regions]
    if inspection.anomaly_map is not None:
        level = inspection.threshold if inspection.map_threshold is None else inspection.map_threshold
        full = map_to_frame(inspection.anomaly_map, frame.shape, preprocessing)
        values = np.asarray(cv2.resize(full, size, interpolation=cv2.INTER_LINEAR), np.float32)
        low, top = float(inspection.anomaly_map.min()), float(inspection.anomaly_map.max())
        if boxes and top <= level:
            level = low + PEAK_SHARE * (top - low)  # where `find_regions` outlined then
        _tint(picture, values, float(np.median(inspection.anomaly_map)), level)
        _outline(picture, values > level, boxes, line)
    for left, top_edge, right, bottom in boxes:
        cv2.rectangle(picture, (left, top_edge), (right, bottom), _BOX, line, cv2.LINE_AA)
    for item in inspection.suppressed:
        _explain(picture, _scaled(item.box, scale, size), item.sentence, line)
    return np.concatenate([picture, _strip(size[0], max(size), inspection.verdict, _caption(inspection))])


def _caption(inspection: Inspection) -> str:
    if inspection.score is None:
        return inspection.reason or ""
    return (
        f"score {inspection.score:.4g}, threshold {inspection.threshold:.4g}"
        f"   {inspection.product}   {inspection.knowledge}"
    )


def _scaled(box: Region, scale: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom on the picture, with a little air around the defect."""
    air = max(2, round(max(size) / 150))
    left, top = round(box.x * scale) - air, round(box.y * scale) - air
    right, bottom = round((box.x + box.width) * scale) + air, round((box.y + box.height) * scale) + air
    return max(left, 0), max(top, 0), min(right, size[0] - 1), min(bottom, size[1] - 1)


def _tint(picture: Frame, values: NDArray[np.float32], typical: float, threshold: float) -> None:
    """Blend heat into `picture` where `values` come near the threshold; nothing elsewhere changes."""
    reach = max(threshold - typical, 1e-12)
    level = (values - typical) / reach
    rows, columns = np.nonzero(level > _HEAT_FROM)
    heat = np.clip((level[rows, columns] - _HEAT_FROM) / (_HEAT_FULL - _HEAT_FROM), 0.0, 1.0)[:, None]
    colour = _WARM + heat * (_HOT - _WARM)
    opacity = _HEAT_OPACITY * np.sqrt(heat)
    picture[rows, columns] = ((1 - opacity) * picture[rows, columns] + opacity * colour).astype(np.uint8)


def _outline(picture: Frame, above: NDArray[np.bool_], boxes: Sequence[tuple[int, int, int, int]], line: int) -> None:
    """Contours of what is above the threshold inside the boxes; noise that is no region gets none."""
    inside = np.zeros(above.shape, np.uint8)
    for left, top, right, bottom in boxes:
        inside[top : bottom + 1, left : right + 1] = above[top : bottom + 1, left : right + 1]
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, _OUTLINE, line, cv2.LINE_AA)


def _explain(picture: Frame, box: tuple[int, int, int, int], sentence: str, line: int) -> None:
    """A box in the colour of explained regions, and the sentence on a ground of that colour below or above it."""
    left, top, right, bottom = box
    cv2.rectangle(picture, (left, top), (right, bottom), _EXPLAINED, line, cv2.LINE_AA)
    height, width = picture.shape[:2]
    scale, pad = max(0.35, max(height, width) / 1300), 2 * line
    # The font has no other letters.
    text = sentence.encode("ascii", "replace").decode()
    while text and cv2.getTextSize(text, _FONT, scale, _weight(scale))[0][0] > width - 2 * pad:
        text = text[:-1]
    (extent, rise), below = cv2.getTextSize(text, _FONT, scale, _weight(scale))
    room = rise + below + 2 * pad
    upper = bottom if bottom + room < height else max(0, top - room)
    start = min(left, max(0, width - extent - 2 * pad))
    cv2.rectangle(picture, (start, upper), (start + extent + 2 * pad, upper + room), _EXPLAINED, cv2.FILLED)
    place = (start + pad, upper + pad + rise)
    cv2.putText(picture, text, place, _FONT, scale, (255, 255, 255), _weight(scale), cv2.LINE_AA)


def _strip(width: int, longer: int, verdict: Verdict, caption: str) -> Frame:
    """The caption strip: a coloured badge with the verdict, then text as large as fits."""
    height = min(64, max(24, round(longer / 22)))
    strip = np.full((height, width, 3), _STRIP, np.uint8)
    pad = height // 3
    scale, label = _fit(verdict.value.replace("_", " "), height * 0.42, width - 2 * pad)
    (extent, _), _ = cv2.getTextSize(label, _FONT, scale, _weight(scale) + 1)
    cv2.rectangle(strip, (0, 0), (extent + 2 * pad, height), _BADGES[verdict], cv2.FILLED)
    _write(strip, label, pad, scale, (255, 255, 255), _weight(scale) + 1)
    start = extent + 3 * pad
    scale, text = _fit(caption, height * 0.36, width - start - pad)
    if text:
        _write(strip, text, start, scale, _TEXT, _weight(scale))
    return strip


def _fit(text: str, height: float, room: int) -> tuple[float, str]:
    """Font scale for a cap height in pixels, and the text cut to the room that it has."""
    for share in (1.0, 0.85, 0.7):
        scale = share * height / 21  # capitals of this font are 21 pixels high at scale 1
        if cv2.getTextSize(text, _FONT, scale, _weight(scale))[0][0] <= room:
            return scale, text
    while text and cv2.getTextSize(text + "..", _FONT, scale, _weight(scale))[0][0] > room:
        text = text[:-1]
    return scale, text + ".." if text else ""


def _weight(scale: float) -> int:
    return max(1, round(scale * 1.6))


def _write(strip: Frame, text: str, left: int, scale: float, colour: tuple[int, int, int], weight: int) -> None:
    baseline = round((strip.shape[0] + 21 * scale) / 2)
    cv2.putText(strip, text, (left, baseline), _FONT, scale, colour, weight, cv2.LINE_AA)
