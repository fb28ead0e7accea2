"""The procedural defect painter: named defects of given size, place, colour and contrast, with exact masks.

    image, mask = paint_defect(photo, "scratch", size=0.3, contrast=0.6, rng=np.random.default_rng(0))

It works over any photograph of a normal part, real or painted, so that a threshold, a test set or a self-test
can have defects where none were ever collected. Everything is drawn in proportion to the picture, and the
same generator state gives the same defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError
from edgead.server_side.painting_parts import MATERIALS, PaintedPart, paint_part, smooth_noise

Picture = NDArray[np.uint8]
Field = NDArray[np.float32]

_FAINTEST = 0.06
"""Coverage below this is cut to none, so that a mask ends where an eye says that the defect ends."""


ON_TOP = frozenset({"thread"})
"""Kinds that lie on the part and may hang over its holes and edges."""


@dataclass(frozen=True)
class _Canvas:
    """Where one defect is drawn: its centre in pixels, its extent in pixels, the picture's own scale."""

    shape: tuple[int, int]
    x: float
    y: float
    extent: float
    unit: float
    """1/320 of the shorter side in pixels: line widths are multiples of it."""
    contrast: float
    colour: Field | None
    rng: np.random.Generator


Painter = Callable[[Field, _Canvas], tuple[Field, Field]]
"""(scene float32 [H, W, 3] in 0..255, canvas) -> (painted scene, coverage float32 [H, W] in 0..1)."""


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
        InputError: an unknown kind, a value outside its range, or a place with nothing of `within` near it.
        ImageError: `image` is not uint8 RGB, or smaller than 32 pixels.
    """
    _check(image, kind, size, place, colour, contrast, within)
    height, width = image.shape[:2]
    shorter = min(height, width)
    allowed = np.ones((height, width), np.bool_) if within is None else within
    x, y = _place(place, allowed, rng)
    scene = image.astype(np.float32)
    canvas = _Canvas(
        shape=(height, width),
        x=x,
        y=y,
        extent=max(size * shorter, 2.0),
        unit=shorter / 320.0,
        contrast=contrast,
        colour=None if colour is None else np.array(colour, np.float32),
        rng=rng,
    )
    painted, cover = _PAINTERS[kind](scene, canvas)
    mask = cover >= _FAINTEST
    if kind not in ON_TOP:
        mask &= allowed
    if not mask.any():
        raise InputError(
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
    if kind not in _PAINTERS:
        raise InputError(wanted=f"a defect: {', '.join(_PAINTERS)}", got=repr(kind), next_step="Name one of these.")
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


# --- strokes and spots --------------------------------------------------------------------------------------


def _stroke(canvas: _Canvas, points: NDArray[np.float64], thickness: NDArray[np.float64] | float) -> Field:
    """Coverage of a line through `points` [K, 2] (x, y in pixels), anti-aliased, its thickness in pixels."""
    scale = 4
    low = np.floor(points.min(0) - np.max(thickness) - 2).astype(int)
    high = np.ceil(points.max(0) + np.max(thickness) + 3).astype(int)
    low = np.clip(low, 0, [canvas.shape[1] - 1, canvas.shape[0] - 1])
    high = np.clip(high, low + 1, [canvas.shape[1], canvas.shape[0]])
    wide, tall = (high - low) * scale
    sheet = np.zeros((tall, wide), np.uint8)
    at = (points - low + 0.5) * scale
    widths = np.broadcast_to(thickness, len(points))
    for start, end, width in zip(at[:-1], at[1:], widths, strict=False):
        cv2.line(
            sheet,
            (round(start[0] * 16), round(start[1] * 16)),
            (round(end[0] * 16), round(end[1] * 16)),
            255,
            max(1, round(width * scale)),
            cv2.LINE_AA,
            4,
        )
    small = cv2.resize(sheet, (wide // scale, tall // scale), interpolation=cv2.INTER_AREA)
    cover = np.zeros(canvas.shape, np.float32)
    cover[low[1] : high[1], low[0] : high[0]] = small.astype(np.float32) / 255.0
    return cover


def _curve(canvas: _Canvas, bend: float, wobble: float, turns: int = 1) -> NDArray[np.float64]:
    """A smooth path [K, 2] of about `extent` pixels from end to end, centred on the canvas' place.

    Args:
        bend: change of direction over the whole path, in radians (standard deviation).
        wobble: jitter of the direction from step to step, in radians.
        turns: pieces that bend on their own.
    """
    steps = int(np.clip(canvas.extent, 12, 160))
    knots = canvas.rng.normal(0.0, bend, turns + 1)
    turning = np.interp(np.linspace(0, turns, steps), np.arange(turns + 1), knots) / steps * turns
    direction = canvas.rng.uniform(0, 2 * np.pi) + np.cumsum(turning + canvas.rng.normal(0, wobble, steps))
    path = np.cumsum(np.stack([np.cos(direction), np.sin(direction)], 1), axis=0)
    path -= (path.max(0) + path.min(0)) / 2
    reach = np.hypot(*(path.max(0) - path.min(0)))
    return np.asarray(path * (canvas.extent / max(reach, 1e-6)) + [canvas.x, canvas.y], dtype=np.float64)


def _spot(canvas: _Canvas, rough: float, stretch: float = 0.25) -> Field:
    """Signed distance [H, W] in pixels, positive inside, of an irregular spot `extent` across."""
    rows, columns = np.mgrid[0 : canvas.shape[0], 0 : canvas.shape[1]].astype(np.float32)
    tilt = canvas.rng.uniform(0, np.pi)
    longer = 1.0 + canvas.rng.uniform(0, stretch)
    dx, dy = columns - canvas.x, rows - canvas.y
    along = (dx * np.cos(tilt) + dy * np.sin(tilt)) / longer
    beside = (dy * np.cos(tilt) - dx * np.sin(tilt)) * longer
    angle = np.arctan2(beside, along)
    outline = np.zeros(canvas.shape, np.float32)
    for wave in range(2, 9):
        share = canvas.rng.normal(0, rough / wave)
        outline += np.float32(share) * np.cos(wave * angle + canvas.rng.uniform(0, 6.28)).astype(np.float32)
    radius = canvas.extent / 2 * (1.0 + np.clip(outline, -0.6, 0.6))
    return np.asarray(radius - np.hypot(along, beside), dtype=np.float32)


def _local_tone(scene: Field, cover: Field) -> Field:
    """Mean colour [3] of the scene under the defect: what it has to stand out from."""
    weight = cover[..., None] + 1e-6
    return np.asarray((scene * weight).sum((0, 1)) / weight.sum((0, 1)), dtype=np.float32)


def _blend(scene: Field, cover: Field, colour: Field, contrast: float) -> Field:
    share = np.clip(cover * contrast, 0.0, 1.0)[..., None]
    return np.asarray(scene * (1.0 - share) + colour * share, dtype=np.float32)


# --- the defects --------------------------------------------------------------------------------------------


def _scratch(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """A tool's trace: a thin line that swells and fades, bright on its lit flank and dark beside it."""
    path = _curve(canvas, bend=0.35, wobble=0.02)
    swell = 0.55 + 0.45 * np.sin(np.linspace(0.15, np.pi - 0.15, len(path)))
    swell *= canvas.rng.uniform(0.75, 1.25, len(path))
    thickness = canvas.unit * canvas.rng.uniform(1.3, 2.2) * swell
    line = _stroke(canvas, path, thickness)
    burr = _stroke(canvas, path + canvas.unit * 1.1, thickness * 0.8)
    tone = _local_tone(scene, line)
    bright = tone.mean() < 150
    colour = canvas.colour if canvas.colour is not None else np.float32(tone + (135 if bright else -120))
    shadow = tone * np.float32(0.35 if bright else 1.25)
    painted = _blend(scene, burr * (1 - line), shadow, 0.7 * canvas.contrast)
    painted = _blend(painted, line, np.clip(colour, 0, 255), canvas.contrast)
    return painted, np.maximum(line, 0.7 * burr)


def _dent(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """A pressed spot: the surface's own texture, bent and shaded as if lit from the upper left."""
    inside = cv2.GaussianBlur(_spot(canvas, rough=0.10), (0, 0), 0.06 * canvas.extent + 0.5)
    reach = np.clip(inside / (0.5 * canvas.extent), 0.0, 1.0)
    depth = np.asarray(reach * reach * (3.0 - 2.0 * reach), dtype=np.float32)
    down, right = np.gradient(depth)
    steepest = max(float(np.hypot(down, right).max()), 1e-6)
    slope_x = np.asarray(right / steepest, dtype=np.float32)
    slope_y = np.asarray(down / steepest, dtype=np.float32)
    rows, columns = np.mgrid[0 : canvas.shape[0], 0 : canvas.shape[1]].astype(np.float32)
    pull = np.float32(0.12 * canvas.extent * canvas.contrast)
    bent = cv2.remap(
        scene,
        columns + slope_x * pull,
        rows + slope_y * pull,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    shade = -(slope_x + slope_y) / np.sqrt(2)
    lit = bent * (1.0 + canvas.contrast * (0.62 * shade - 0.22 * depth)[..., None])
    if canvas.colour is not None:
        lit = _blend(np.asarray(lit, np.float32), depth, canvas.colour, canvas.contrast)
    return np.asarray(lit, dtype=np.float32), np.clip(inside / canvas.unit, 0.0, 1.0)


def _stain(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """A dried liquid: a tint that lets the texture through, with a darker rim."""
    inside = _spot(canvas, rough=0.35, stretch=0.5)
    edge = max(1.6 * canvas.unit, 0.05 * canvas.extent)
    body = np.clip(inside / edge + 0.3, 0.0, 1.0)
    rim = np.exp(-(((inside - 0.8 * edge) / (0.9 * edge)) ** 2)) * (body > 0)
    patches = smooth_noise(canvas.rng, canvas.shape, (canvas.extent / 3, canvas.extent / 3))
    cover = np.clip(body * (0.68 + 0.14 * patches) + 0.35 * rim, 0.0, 1.0).astype(np.float32)
    usual = np.array([(110, 74, 38), (62, 70, 84), (128, 84, 48)], np.float32)[canvas.rng.integers(3)]
    colour = canvas.colour if canvas.colour is not None else usual
    share = (cover * canvas.contrast)[..., None]
    # Through a tint the texture is seen multiplied; a part of the liquid lies on top and hides it.
    tinted = scene * (colour / 255.0 * 0.55 + 0.45 * colour.mean() / 255.0 + 0.12)
    painted = scene * (1 - share) + (0.72 * tinted + 0.28 * colour) * share
    return np.asarray(painted, dtype=np.float32), np.where(body > 0, cover, 0).astype(np.float32)


def _thread(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """A loose fibre that lies on the part and throws a soft shadow."""
    path = _curve(canvas, bend=5.0, wobble=0.05, turns=4)
    thickness = canvas.unit * canvas.rng.uniform(2.0, 3.0)
    fibre = _stroke(canvas, path, thickness)
    shine = _stroke(canvas, path - 0.22 * thickness, 0.35 * thickness)
    offset = canvas.unit * 2.2
    shadow = cv2.GaussianBlur(_stroke(canvas, path + offset, thickness), (0, 0), 0.9 * canvas.unit)
    usual = np.array([(198, 52, 44), (236, 232, 220), (38, 86, 160), (24, 24, 28)], np.float32)
    tone = _local_tone(scene, fibre)
    visible = usual[np.linalg.norm(usual - tone, axis=1) > 90]
    colour = canvas.colour if canvas.colour is not None else visible[canvas.rng.integers(len(visible))]
    painted = scene * (1.0 - 0.55 * canvas.contrast * shadow * (1 - fibre))[..., None]
    painted = _blend(painted, fibre, colour, canvas.contrast)
    painted = _blend(painted, shine * fibre, np.clip(colour * 1.25 + 30, 0, 255), 0.5 * canvas.contrast)
    return painted, np.maximum(fibre, 0.45 * shadow).astype(np.float32)


def _crack(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """A jagged dark line that tapers and branches, with one lit edge."""
    trunk = _curve(canvas, bend=0.9, wobble=0.42, turns=3)
    taper = np.linspace(1.0, 0.35, len(trunk))
    width = canvas.unit * canvas.rng.uniform(1.6, 2.4)
    line = _stroke(canvas, trunk, width * taper)
    for _ in range(int(canvas.rng.integers(1, 4))):
        start = int(canvas.rng.integers(len(trunk) // 4, 3 * len(trunk) // 4))
        twig = _curve(canvas, bend=0.8, wobble=0.5, turns=2)
        twig = (twig - twig[0]) * canvas.rng.uniform(0.2, 0.4) + trunk[start]
        line = np.maximum(line, _stroke(canvas, twig, 0.55 * width * np.linspace(1, 0.4, len(twig))))
    lit = np.asarray(np.roll(line, 1, (0, 1)) * (1 - line), np.float32)
    tone = _local_tone(scene, line)
    colour = canvas.colour if canvas.colour is not None else tone * np.float32(0.18)
    painted = _blend(scene, lit, np.clip(tone * 1.35 + 15, 0, 255), 0.5 * canvas.contrast)
    return _blend(painted, line, colour, canvas.contrast), np.maximum(line, 0.5 * lit)


def _hole(scene: Field, canvas: _Canvas) -> tuple[Field, Field]:
    """Missing material: a dark inside under a torn edge whose lower right catches the light."""
    inside = _spot(canvas, rough=0.30, stretch=0.35)
    rim = 1.6 * canvas.unit + 0.04 * canvas.extent
    body = np.clip(inside / (0.8 * canvas.unit) + 0.5, 0.0, 1.0)
    edge = np.exp(-((inside / rim) ** 2)) * (inside > -rim)
    down, right = np.gradient(inside)
    facing = np.clip(-(down + right) / np.sqrt(2), -1.0, 1.0)
    tone = _local_tone(scene, body.astype(np.float32))
    colour = canvas.colour if canvas.colour is not None else tone * np.float32(0.10)
    depth = np.clip(inside / (0.25 * canvas.extent), 0.0, 1.0)
    painted = scene * (1.0 + 0.45 * canvas.contrast * edge * facing * (1 - body))[..., None]
    floor = colour * (1.35 - 0.35 * depth)[..., None] + 0.15 * tone * (edge * np.clip(-facing, 0, 1))[..., None]
    share = (body * canvas.contrast)[..., None]
    painted = painted * (1 - share) + floor * share
    return np.asarray(painted, np.float32), np.maximum(body, 0.5 * edge * np.abs(facing)).astype(np.float32)


_PAINTERS: dict[str, Painter] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "thread": _thread,
    "crack": _crack,
    "hole": _hole,
}

DEFECTS: tuple[str, ...] = tuple(_PAINTERS)
"""Kinds of defects that `paint_defect` knows."""

__all__ = ("DEFECTS", "MATERIALS", "ON_TOP", "PaintedPart", "paint_defect", "paint_part")
