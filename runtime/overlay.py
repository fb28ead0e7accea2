"""The picture that a person looks at: the frame, where it is unlike normal parts, and what was decided."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.preprocess import map_to_frame
from edgead.runtime.spec import Preprocessing

_COLOURS = {Verdict.OK: (26, 127, 90), Verdict.NG: (196, 52, 45), Verdict.NOT_INSPECTED: (110, 120, 130)}
_HEAT = np.array((235, 64, 36), np.float32)
_STRENGTH = 0.5
"""Largest share of heat colour in a pixel: the part must stay visible under it."""
_SHORTEST = 360
"""Pixels; a smaller frame is enlarged, so that the caption can be read."""


def overlay(
    frame: NDArray[np.uint8], inspection: Inspection, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Draw an inspection over its frame.

    Heat begins at half the way from a typical normal score to the threshold, so a good part looks untouched.

    Args:
        frame: uint8 RGB [H, W, 3], the source frame; not changed.
        inspection: what the inspector said of it.
        preprocessing: of the detector, to place the map on the frame.

    Returns:
        uint8 RGB [H', W', 3]; a small frame is enlarged, and a caption strip is added below.
    """
    picture = frame.copy()
    level = inspection.threshold
    if inspection.anomaly_map is not None and level > 0:
        heat = map_to_frame(inspection.anomaly_map, frame.shape, preprocessing)
        share = np.clip((heat / level - 0.75) / 0.5, 0.0, 1.0)[..., None] * _STRENGTH
        picture = (picture * (1.0 - share) + _HEAT * share).astype(np.uint8)
    scale = max(1.0, _SHORTEST / max(1, min(frame.shape[:2])))
    if scale > 1.0:
        size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    thick = max(1, round(min(picture.shape[:2]) / 300))
    for region in inspection.regions:
        box = region.box
        corner = (int(box.x * scale), int(box.y * scale))
        other = (int((box.x + box.width) * scale) - 1, int((box.y + box.height) * scale) - 1)
        cv2.rectangle(picture, corner, other, (255, 255, 255), thick + 2, cv2.LINE_AA)
        cv2.rectangle(picture, corner, other, _COLOURS[Verdict.NG], thick, cv2.LINE_AA)
    return np.vstack([picture, _caption(inspection, picture.shape[1])])


def _caption(inspection: Inspection, width: int) -> NDArray[np.uint8]:
    """A strip in the verdict's colour; its text is as large as the width allows."""
    text = inspection.verdict.value.replace("_", " ")
    if inspection.score is not None:
        text += f"   score {inspection.score:.4g} / {inspection.threshold:.4g}"
    elif inspection.reason:
        text += f"   {inspection.reason}"
    height = max(24, width // 18)
    font, size, thick = cv2.FONT_HERSHEY_SIMPLEX, height / 44, max(1, height // 24)
    (text_width, text_height), _ = cv2.getTextSize(text, font, size, thick)
    if text_width > 0.94 * width:
        size *= 0.94 * width / text_width
        (_, text_height), _ = cv2.getTextSize(text, font, size, thick)
    strip = np.full((height, width, 3), _COLOURS[inspection.verdict], np.uint8)
    at = (max(4, width // 40), (height + text_height) // 2)
    cv2.putText(strip, text, at, font, size, (255, 255, 255), thick, cv2.LINE_AA)
    return strip
