"""Candidates as one HTML page: each picture, what was marked on it, and what the camera had said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np

from edgead.runtime.preprocess import Frame
from edgead.server_side import html
from edgead.server_side.ota.candidates import Entry

_SIDE = 640
_SHOWN = 12
_OUTLINE, _SHADOW = (196, 52, 45), (255, 255, 255)


def candidates_page(entries: Sequence[Entry]) -> str:
    """A whole document, with the pictures in it.

    Raises:
        CandidateError: a picture is damaged inside.
    """
    new = sum(entry.decision is None for entry in entries)
    devices = sorted({entry.candidate.mark.device for entry in entries})
    facts = [
        (str(len(entries)), "marked pictures"),
        (str(new), "to decide on"),
        (str(len(devices)), "cameras"),
    ]
    body = html.cards(facts) + "".join(map(_section, entries))
    if not entries:
        body += "<p>Nothing was marked.</p>"
    lead = "What people at the cameras marked. No camera inspects with it before somebody accepts it."
    return html.page("Marked at the cameras", body, lead)


def outlined(frame: Frame, region: Frame | None) -> Frame:
    """A copy of a picture with the marked place outlined, and small pictures enlarged so that one can see them.

    Args:
        frame: uint8 RGB [H, W, 3].
        region: the same size, bright inside; None for no place.

    Returns:
        uint8 RGB, the longer side 640 pixels.
    """
    scale = _SIDE / max(frame.shape[:2])
    size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    picture = np.asarray(cv2.resize(frame, size, interpolation=how), np.uint8)
    if region is None:
        return picture
    # By area, so that a place of a few pixels on a large picture does not vanish.
    share = cv2.resize(region[..., 0], size, interpolation=how)
    inside = (share > 0).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # Red on white: seen on dark and on light parts.
    cv2.drawContours(picture, contours, -1, _SHADOW, 5, cv2.LINE_AA)
    cv2.drawContours(picture, contours, -1, _OUTLINE, 2, cv2.LINE_AA)
    return picture


def _section(entry: Entry) -> str:
    mark = entry.candidate.mark
    frame, region = entry.candidate.frame(), entry.candidate.region()
    kind = "a defect" if mark.kind == "anomalous" else "a good part"
    pictures = html.figure(outlined(frame, None), f"{mark.width} x {mark.height} pixels", side=_SIDE)
    if region is not None:
        how = "mask" if mark.mask is not None else "box"
        pictures += html.figure(outlined(frame, region), f"marked with a {how}", side=_SIDE)
    score = "no score" if mark.score is None else f"score {mark.score:.4g}, threshold {mark.threshold:.4g}"
    rows = [
        ("marked as", kind),
        ("note", mark.note or "none"),
        ("the camera said", f"{mark.verdict} ({score})"),
        ("knowledge then", f"{mark.knowledge}, release {mark.release}"),
        ("when", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(mark.time))),
        ("picture", "made smaller: as the engine sees it" if mark.resized else "as the camera took it"),
        ("decision", _decision(entry)),
    ]
    title = f"{escape(mark.device)}: {escape(mark.product)}, {kind} <code>{entry.id[:_SHOWN]}</code>"
    return f'<h2>{title}</h2><div class="pair">{pictures}</div>' + html.table(("about it", ""), rows)


def _decision(entry: Entry) -> str:
    made = entry.decision
    if made is None:
        return "none yet"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made.when))
    more = f"release {made.release}" if made.release is not None else made.reason
    return f"{made.state} by {made.who or 'somebody'}, {when}" + (f": {more}" if more else "")


__all__ = ["candidates_page", "outlined"]
