"""Where the part is on a photograph: what the quiet of the background, coming from the rim, does not reach.

    part = find_part(photo)

No model and no colour is set: a background lies along the rim of the picture, changes slowly and ends at an outline.
A colour of its own it need not have, as grey metal on grey board has none. Where no such thing is to be seen (a
texture, a close-up, a tile that fills the picture) the whole picture is the part.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Field = NDArray[np.float32]

_SIDE = 200
"""Longer side in pixels at which is looked: an outline is seen there, and most of the grain is not."""
_SHORTEST = 24
"""Pixels of the shorter side at that size below which there is no room for a part and a background."""
_RIM = 3
"""Width of the rim in pixels of that size."""
_RIM_QUIET = 0.70
"""Least share of the rim that is background: a part may be cut by the picture's border, but not all around."""
_LEAST, _MOST = 0.10, 0.90
"""Of the picture's area: less is something that lies on the part, more leaves no background to keep away from."""
_FAINTEST = 4.0
"""Change of colour from one pixel to the next, of 255, below which nothing is an outline."""
_OVER_RIM = 2.5
"""How much steeper an outline is than seven tenths of the rim: what is grain there is no outline elsewhere."""
_STRONG = 2.0
"""How much steeper than that an outline is beside which a soft shadow is none."""
_STRONG_HULL = 0.7
"""Least share of all outlines' hull that the strong ones' has, for them to be the part's."""
_GAP = 9
"""Pixels of that size over which an outline may be lost."""
_CORE = 0.20
"""Depth, as a share of the deepest, from which a pixel is the part's without a doubt."""
_SMOOTH = 0.05
"""Width of bays and capes that are smoothed away, as a share of the root of the area."""
_CLEAR = 0.75
"""Least share of the final outline that is steep: a part ends all around."""
_SHARP = 2.5
"""How much steeper than the faintest outline half of the final one is: a vein of a texture is hardly so at all."""
_COMPACT = 0.80
"""Least share of its convex hull that a part fills: what is less is a net of marks on a surface."""


def find_part(image: NDArray[np.uint8]) -> Mask:
    """The part of a photograph, with its holes; the whole picture where no background is certain.

    Quiet pixels that the rim reaches are background, over gaps of the outline too narrow for a disc. Between that
    and the middle of what is left, the watershed of the picture finds the outline, so that a soft shadow stays
    outside. It counts only if it is steep nearly all around and encloses one compact thing.

    Args:
        image: uint8 RGB [H, W, 3].

    Returns:
        bool [H, W], never empty; depends on the pixels alone.
    """
    height, width = image.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    found = None
    if min(size) >= _SHORTEST:
        small = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        found = _outlined(small)
    if found is None:
        return np.ones((height, width), np.bool_)
    # Softened first, so that the outline has no steps of the small picture.
    soft = cv2.GaussianBlur(found.astype(np.uint8) * np.uint8(255), (0, 0), 0.7)
    return np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR) > 127, dtype=np.bool_)


def _outlined(small: NDArray[np.uint8]) -> Mask | None:
    """The part [h, w] of a small picture [h, w, 3], or None."""
    steep = _steepness(small)
    rim = np.ones(steep.shape, np.bool_)
    rim[_RIM:-_RIM, _RIM:-_RIM] = False
    edge = max(_FAINTEST, _OVER_RIM * float(np.quantile(steep[rim], 0.7)))
    rough = _enclosed(steep < edge, rim)
    if rough is None:
        return None
    strong = _enclosed(steep < _STRONG * edge, rim)
    part = _snapped(small, rough, rough if strong is None else strong, rim)
    if part is None or not _LEAST <= part.mean() <= _MOST:
        return None
    return part if _certain(part, steep, edge, rim) else None


def _steepness(small: NDArray[np.uint8]) -> Field:
    """Change per pixel [h, w] in the channel where it is largest, 0 to 255."""
    soft = cv2.GaussianBlur(small, (0, 0), 0.8).astype(np.float32)
    across = cv2.Scharr(soft, cv2.CV_32F, 1, 0)
    down = cv2.Scharr(soft, cv2.CV_32F, 0, 1)
    return np.asarray(np.sqrt((across * across + down * down).max(axis=2)) / 16.0, dtype=np.float32)


def _enclosed(quiet: Mask, rim: Mask) -> Mask | None:
    """What the quiet does not reach from the rim [h, w]; None where the rim itself is not quiet, or all is reached."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (_GAP, _GAP))
    walls = cv2.morphologyEx((~quiet).astype(np.uint8), cv2.MORPH_CLOSE, disc)
    _, labels = cv2.connectedComponents(1 - walls, connectivity=4)
    outside = np.isin(labels, np.unique(labels[rim & (walls == 0)])) & (walls == 0)
    if outside[rim].mean() < _RIM_QUIET:
        return None
    # Specks are dust on the background.
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    inside = np.asarray(cv2.morphologyEx((~outside).astype(np.uint8), cv2.MORPH_OPEN, kernel) > 0, dtype=np.bool_)
    return inside if inside.any() else None


def _snapped(small: NDArray[np.uint8], rough: Mask, strong: Mask, rim: Mask) -> Mask | None:
    """The same thing [h, w], its outline where the picture changes most: not that of its shadow, nor of a leak.

    Beyond the hull of all outlines is background, deep inside is the part, and the watershed decides between them.
    """
    hull, strong_hull = _hull(rough), _hull(strong)
    if strong_hull.sum() >= _STRONG_HULL * hull.sum():
        hull = strong_hull
    deep = _depth(hull)
    marks = np.zeros(rough.shape, np.int32)
    marks[_depth(1 - hull) > 2] = 1
    marks[rim & ~strong] = 1
    marks[(deep >= _CORE * deep.max()) & (_depth(rough.astype(np.uint8)) > 3)] = 2
    if not ((marks == 1).any() and (marks == 2).any()):
        return None
    cv2.watershed(small, marks)
    part = (marks == 2).astype(np.float32)
    soft = cv2.GaussianBlur(part, (0, 0), max(_SMOOTH * float(np.sqrt(part.sum())), 0.5))
    return _largest((soft > 0.5).astype(np.uint8))


def _hull(inside: Mask) -> NDArray[np.uint8]:
    thing = inside.astype(np.uint8)
    # Of the outlines alone: the hull of every pixel is the same and takes ten times as long.
    outlines, _ = cv2.findContours(thing, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = np.zeros(inside.shape, np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(outlines)), 1)
    return hull


def _depth(inside: NDArray[np.uint8]) -> Field:
    """Distance in pixels [h, w] to what is not inside; what lies beyond the picture is not."""
    framed = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return np.asarray(cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1], dtype=np.float32)


def _largest(inside: NDArray[np.uint8]) -> Mask | None:
    """The largest connected thing [h, w] with its holes filled."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
    if count < 2:
        return None
    part = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    outlines, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(part, outlines, -1, 1, cv2.FILLED)
    return np.asarray(part > 0, dtype=np.bool_)


def _certain(part: Mask, steep: Field, edge: float, rim: Mask) -> bool:
    """Whether it ends at a steep outline nearly all around, and is one compact thing."""
    inner = cv2.erode(part.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    outline = part & ~inner & ~rim
    near = cv2.dilate(steep, np.ones((5, 5), np.uint8))
    if not outline.any() or (near[outline] >= edge).mean() < _CLEAR or np.median(near[outline]) < _SHARP * edge:
        return False
    return bool(part.sum() >= _COMPACT * _hull(part).sum())


__all__ = ["find_part"]
