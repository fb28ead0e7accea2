"""The procedural defect painter: named defects of given size, place, colour and contrast, with exact masks.

    image, mask = paint_defect(photo, "scratch", size=0.3, contrast=0.6, rng=np.random.default_rng(0))

It works over any photograph of a normal part, real or painted, so that a threshold, a test set or a self-test
can have defects where none were ever collected. Everything is drawn in proportion to the picture, and the
same generator state gives the same defect.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError
from edgead.server_side.painting_defects import DEFECTS, PAINTERS, Canvas, Field
from edgead.server_side.painting_parts import MATERIALS, PaintedPart, paint_part

Picture = NDArray[np.uint8]

_FAINTEST = 0.06
"""Coverage below this is cut to none, so that a mask ends where an eye says that the defect ends."""

ON_TOP = frozenset({"thread"})
"""Kinds that lie on the part and may hang over its holes and edges."""

_AT_THE_EDGE = frozenset({"missing part"})
"""Kinds whose random place is at the border of `within`: a piece breaks off at an edge."""


class NothingToSeeError(InputError):
    """Nothing of a defect would lie on the allowed pixels."""


def paint_defect(
    image: Picture,
    kind: str,
    *,
    size: float = 0.2,
    place: tuple[float, float] | None = None,
    colour: tuple[int, int, int] | None = None,
    contrast: float = 0.6,
    rng: np.random.Generator,
    within: NDArray[np.bool_] | None = None,
) -> tuple[Picture, Picture]:
    """Paint one defect on a photograph of a normal part.

    Args:
        image: uint8 RGB [H, W, 3], at least 32 pixels on its shorter side; it is left as it is.
        kind: one of `DEFECTS`.
        size: extent of the defect (length of a line, diameter of a spot) as a share of the shorter side,
            0.01 to 1.
        place: centre as (x, y) in shares of width and height, 0 to 1; None chooses one at random.
        colour: RGB of what is painted, 0 to 255; None gives what the kind usually has (a scratch is bright
            metal on a dark part and dark on a bright one).
        contrast: 0.02 (hardly to be seen) to 1 (cannot be missed): opacity of the defect.
        rng: decides shape, and place if there is none; it is advanced.
        within: bool [H, W], the pixels where defects may be, such as the part without its background: a
            random place lies inside, and what changes the material (all but `ON_TOP`) ends at its border.
            None allows the whole picture.

    Returns:
        the painted picture, uint8 RGB [H, W, 3], and its mask, uint8 [H, W] of 0 and 255. Outside the mask
        no pixel differs from `image`.

    Raises:
        InputError: an unknown kind, or a value outside its range.
        NothingToSeeError: a place with nothing of `within` near it.
        ImageError: `image` is not uint8 RGB, or smaller than 32 pixels.
    """
    _check(image, kind, size, place, colour, contrast, within)
    height, width = image.shape[:2]
    shorter = min(height, width)
    allowed = np.ones((height, width), np.bool_) if within is None else within
    x, y = _place(place, _border(allowed) if kind in _AT_THE_EDGE else allowed, rng)
    scene = image.astype(np.float32)
    canvas = Canvas(
        shape=(height, width),
        x=x,
        y=y,
        extent=max(size * shorter, 2.0),
        unit=shorter / 320.0,
        contrast=contrast,
        surroundings=_surroundings(scene, allowed),
        colour=None if colour is None else np.array(colour, np.float32),
        rng=rng,
    )
    painted, cover = PAINTERS[kind](scene, canvas)
    mask = cover >= _FAINTEST
    if kind not in ON_TOP:
        mask &= allowed
    if not mask.any():
        raise NothingToSeeError(
            wanted=f"a place where a {kind} can be seen",
            got=f"none of the allowed pixels at ({x / width:.2f}, {y / height:.2f})",
            next_step="Name a place on the part, or a larger size.",
        )
    result = np.where(mask[..., None], np.clip(painted + 0.5, 0, 255), scene)
    return result.astype(np.uint8), mask.astype(np.uint8) * np.uint8(255)


def _check(
    image: Picture,
    kind: str,
    size: float,
    place: tuple[float, float] | None,
    colour: tuple[int, int, int] | None,
    contrast: float,
    within: NDArray[np.bool_] | None,
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ImageError(
            wanted="a picture as uint8 RGB [H, W, 3] of at least 32 x 32 pixels",
            got=f"{image.dtype} {list(image.shape)}",
            next_step="Read it with edgead.runtime.image.read_image.",
        )
    if kind not in PAINTERS:
        raise InputError(wanted=f"a defect: {', '.join(PAINTERS)}", got=repr(kind), next_step="Name one of these.")
    ranges = [("size", size, 0.01, 1.0), ("contrast", contrast, 0.02, 1.0)]
    ranges += [(f"place {axis}", share, 0.0, 1.0) for axis, share in zip("xy", place or (), strict=False)]
    ranges += [(f"colour {name}", level, 0, 255) for name, level in zip("RGB", colour or (), strict=False)]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise InputError(wanted=f"{name} from {low} to {high}", got=str(value))
    if within is not None and (within.shape != image.shape[:2] or within.dtype != np.bool_):
        raise InputError(wanted=f"`within` as bool {list(image.shape[:2])}", got=f"{within.dtype} {list(within.shape)}")
    if within is not None and not within.any():
        raise InputError(wanted="`within` with at least one allowed pixel", got="none")


def _border(allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of `allowed` beside one that is not; all of it where there is none such."""
    inner = cv2.erode(allowed.astype(np.uint8), np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE) > 0
    border = np.asarray(allowed & ~inner, dtype=np.bool_)
    return border if border.any() else allowed


def _surroundings(scene: Field, allowed: NDArray[np.bool_]) -> Field:
    """What lies around the part [3]: the median colour outside `allowed`, or along the picture's border."""
    outside = ~allowed
    if not outside.any():
        frame = max(1, min(allowed.shape) // 40)
        outside = np.ones_like(allowed)
        outside[frame:-frame, frame:-frame] = False
    return np.asarray(np.median(scene[outside][::5], axis=0), dtype=np.float32)


def _place(
    place: tuple[float, float] | None, allowed: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[float, float]:
    height, width = allowed.shape
    if place is not None:
        return place[0] * (width - 1), place[1] * (height - 1)
    # Not on the very border, where half of the defect would lie outside.
    inner = allowed.copy()
    edge_y, edge_x = height // 12, width // 12
    inner[:edge_y] = inner[height - edge_y :] = False
    inner[:, :edge_x] = inner[:, width - edge_x :] = False
    choices = np.flatnonzero(inner if inner.any() else allowed)
    index = int(choices[rng.integers(len(choices))])
    return float(index % width), float(index // width)


__all__ = ("DEFECTS", "MATERIALS", "ON_TOP", "NothingToSeeError", "PaintedPart", "paint_defect", "paint_part")
