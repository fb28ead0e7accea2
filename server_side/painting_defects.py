"""How each kind of defect is drawn: strokes and spots, and what they do to the light of a scene.

A kind is one function (scene, canvas) -> (painted scene, coverage); `edgead.server_side.painting` checks what
comes in and cuts the mask. Everything is drawn in proportion to the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.server_side.painting_parts import smooth_noise

Field = NDArray[np.float32]


@dataclass(frozen=True)
class Canvas:
    """Where one defect is drawn: its centre in pixels, its extent in pixels, the picture's own scale."""

    shape: tuple[int, int]
    x: float
    y: float
    extent: float
    unit: float
    """1/320 of the shorter side in pixels: line widths are multiples of it."""
    contrast: float
    surroundings: Field
    """Colour [3] of what lies around the part, 0 to 255."""
    colour: Field | None
    rng: np.random.Generator


Painter = Callable[[Field, Canvas], tuple[Field, Field]]
"""(scene float32 [H, W, 3] in 0..255, canvas) -> (painted scene, coverage float32 [H, W] in 0..1)."""


_TELLS_APART = 40.0
"""Mean difference of colour, of 255, from which surroundings count as another thing than the part."""


# --- strokes and spots --------------------------------------------------------------------------------------


def stroke(canvas: Canvas, points: NDArray[np.float64], thickness: NDArray[np.float64] | float) -> Field:
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


def curve(canvas: Canvas, bend: float, wobble: float, turns: int = 1) -> NDArray[np.float64]:
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


def spot(canvas: Canvas, rough: float, stretch: float = 0.25) -> Field:
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


def _scratch(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A tool's trace: a thin line that swells and fades, bright on its lit flank and dark beside it."""
    path = curve(canvas, bend=0.35, wobble=0.02)
    swell = 0.55 + 0.45 * np.sin(np.linspace(0.15, np.pi - 0.15, len(path)))
    swell *= canvas.rng.uniform(0.75, 1.25, len(path))
    thickness = canvas.unit * canvas.rng.uniform(1.3, 2.2) * swell
    line = stroke(canvas, path, thickness)
    burr = stroke(canvas, path + canvas.unit * 1.1, thickness * 0.8)
    tone = _local_tone(scene, line)
    bright = tone.mean() < 150
    colour = canvas.colour if canvas.colour is not None else np.float32(tone + (135 if bright else -120))
    shadow = tone * np.float32(0.35 if bright else 1.25)
    painted = _blend(scene, burr * (1 - line), shadow, 0.7 * canvas.contrast)
    painted = _blend(painted, line, np.clip(colour, 0, 255), canvas.contrast)
    return painted, np.maximum(line, 0.7 * burr)


def _dent(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A pressed spot: the surface's own texture, bent and shaded as if lit from the upper left."""
    inside = cv2.GaussianBlur(spot(canvas, rough=0.10), (0, 0), 0.06 * canvas.extent + 0.5)
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


def _stain(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A dried liquid: a tint that lets the texture through, with a darker rim."""
    inside = spot(canvas, rough=0.35, stretch=0.5)
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


def _thread(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A loose fibre that lies on the part and throws a soft shadow."""
    path = curve(canvas, bend=5.0, wobble=0.05, turns=4)
    thickness = canvas.unit * canvas.rng.uniform(2.0, 3.0)
    fibre = stroke(canvas, path, thickness)
    shine = stroke(canvas, path - 0.22 * thickness, 0.35 * thickness)
    offset = canvas.unit * 2.2
    shadow = cv2.GaussianBlur(stroke(canvas, path + offset, thickness), (0, 0), 0.9 * canvas.unit)
    usual = np.array([(198, 52, 44), (236, 232, 220), (38, 86, 160), (24, 24, 28)], np.float32)
    tone = _local_tone(scene, fibre)
    visible = usual[np.linalg.norm(usual - tone, axis=1) > 90]
    colour = canvas.colour if canvas.colour is not None else visible[canvas.rng.integers(len(visible))]
    painted = scene * (1.0 - 0.55 * canvas.contrast * shadow * (1 - fibre))[..., None]
    painted = _blend(painted, fibre, colour, canvas.contrast)
    painted = _blend(painted, shine * fibre, np.clip(colour * 1.25 + 30, 0, 255), 0.5 * canvas.contrast)
    return painted, np.maximum(fibre, 0.45 * shadow).astype(np.float32)


def _crack(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A jagged dark line that tapers and branches, with one lit edge."""
    trunk = curve(canvas, bend=0.9, wobble=0.42, turns=3)
    taper = np.linspace(1.0, 0.35, len(trunk))
    width = canvas.unit * canvas.rng.uniform(1.6, 2.4)
    line = stroke(canvas, trunk, width * taper)
    for _ in range(int(canvas.rng.integers(1, 4))):
        start = int(canvas.rng.integers(len(trunk) // 4, 3 * len(trunk) // 4))
        twig = curve(canvas, bend=0.8, wobble=0.5, turns=2)
        twig = (twig - twig[0]) * canvas.rng.uniform(0.2, 0.4) + trunk[start]
        line = np.maximum(line, stroke(canvas, twig, 0.55 * width * np.linspace(1, 0.4, len(twig))))
    lit = np.asarray(np.roll(line, 1, (0, 1)) * (1 - line), np.float32)
    tone = _local_tone(scene, line)
    colour = canvas.colour if canvas.colour is not None else tone * np.float32(0.18)
    painted = _blend(scene, lit, np.clip(tone * 1.35 + 15, 0, 255), 0.5 * canvas.contrast)
    return _blend(painted, line, colour, canvas.contrast), np.maximum(line, 0.5 * lit)


def _hole(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """Missing material: a dark inside under a torn edge whose lower right catches the light."""
    inside = spot(canvas, rough=0.30, stretch=0.35)
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


def _missing_part(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A piece that broke off: what lies around the part shows through, under a broken edge that throws a shadow."""
    inside = fragment(canvas)
    body = np.clip(inside / canvas.unit + 0.5, 0.0, 1.0)
    tone = _local_tone(scene, body)
    colour = canvas.surroundings
    if np.abs(colour - tone).mean() < _TELLS_APART:
        # Where the part fills the picture nothing of its surroundings is to be seen; they are darker as a rule.
        colour = np.asarray(0.25 * tone if tone.mean() > 60 else tone + 110, dtype=np.float32)
    colour = colour if canvas.colour is None else canvas.colour
    grain = smooth_noise(canvas.rng, canvas.shape, (2.0 * canvas.unit + 1, 2.0 * canvas.unit + 1))
    # The part is thick: light from the upper left leaves the ground dark along the upper and left edges.
    reach = max(2, round(0.06 * canvas.extent + 1.5 * canvas.unit))
    moved = np.full_like(inside, -1.0)
    moved[reach:, reach:] = inside[:-reach, :-reach]
    shadow = cv2.GaussianBlur(np.clip(0.5 - moved / canvas.unit, 0.0, 1.0), (0, 0), 0.4 * reach + 0.3)
    ground = (colour + 3.0 * grain[..., None]) * (1.0 - 0.45 * shadow)[..., None]
    # The broken face is seen along the lower right edge, as a thin bright band.
    down, right = np.gradient(inside)
    facing = np.clip(-(down + right) / np.sqrt(2), 0.0, 1.0)
    face = np.exp(-(((inside - 1.2 * canvas.unit) / (1.3 * canvas.unit)) ** 2)) * facing
    ground = ground * (1 - 0.7 * face)[..., None] + 0.7 * face[..., None] * np.minimum(tone * 1.25 + 12, 255)
    return _blend(scene, body, np.asarray(ground, np.float32), canvas.contrast), body


def fragment(canvas: Canvas) -> Field:
    """Signed distance [H, W] in pixels, positive inside, of a broken-off piece `extent` across: straight, jagged sides.

    A break runs along few straight lines with small steps, where an etched hole is round.
    """
    corners = int(canvas.rng.integers(5, 8))
    turns = np.sort((np.arange(corners) + canvas.rng.uniform(-0.28, 0.28, corners)) / corners * 2 * np.pi)
    turns = turns + canvas.rng.uniform(0, 2 * np.pi)
    radii = canvas.rng.uniform(0.68, 1.0, corners)
    ring = np.stack([np.cos(turns), np.sin(turns)], 1) * radii[:, None]
    outline: list[NDArray[np.float64]] = []
    for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        steps = np.linspace(0.0, 1.0, 7)[:-1, None]
        points = start + (end - start) * steps
        across = np.array([end[1] - start[1], start[0] - end[0]]) / max(np.hypot(*(end - start)), 1e-6)
        # The corners stay, the line between them wanders.
        outline.append(points + across * canvas.rng.normal(0, 0.022, (6, 1)) * np.sin(np.pi * steps))
    path = np.concatenate(outline)
    path = path - (path.max(0) + path.min(0)) / 2
    path = path / np.ptp(path, axis=0).max() * canvas.extent + [canvas.x, canvas.y]
    scale = 4
    sheet = np.zeros((canvas.shape[0] * scale, canvas.shape[1] * scale), np.uint8)
    cv2.fillPoly(sheet, [np.round((path + 0.5) * scale * 16).astype(np.int32)], 1, shift=4)
    within = cv2.distanceTransform(sheet, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    beyond = cv2.distanceTransform(1 - sheet, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    distance = cv2.resize(within - beyond, canvas.shape[::-1], interpolation=cv2.INTER_AREA) / scale
    return np.asarray(distance, dtype=np.float32)


def _discolouration(scene: Field, canvas: Canvas) -> tuple[Field, Field]:
    """A soft area of another tone, such as heat or light leaves: the surface's texture is all there."""
    inside = spot(canvas, rough=0.22, stretch=0.4)
    clouds = smooth_noise(canvas.rng, canvas.shape, (canvas.extent / 2.5, canvas.extent / 2.5))
    reach = np.clip((inside / (0.5 * canvas.extent) + 0.10 * clouds) / 0.55, 0.0, 1.0)
    cover = np.asarray(reach * reach * (3.0 - 2.0 * reach) * (inside > 0), dtype=np.float32)
    tone = _local_tone(scene, cover)
    # Straw, blue, scorched, bleached, browned: colours relative to the surface's own.
    tints = np.array(
        [(1.22, 1.0, 0.62), (0.60, 0.76, 1.08), (0.50, 0.48, 0.46), (1.45, 1.45, 1.42), (0.92, 0.68, 0.48)]
    )
    usual = np.clip(tints * (tone + 12.0), 0, 255).astype(np.float32)
    order = np.argsort(-np.abs(usual - tone).mean(1), kind="stable")
    colour = canvas.colour if canvas.colour is not None else usual[order[canvas.rng.integers(3)]]
    # Shifted, not covered: bright and dark of the texture stay apart, each channel at its own gain.
    gain = np.clip((colour + 12.0) / (tone + 12.0), 0.5, 1.6)
    target = np.clip(colour + (scene - tone) * gain, 0, 255)
    return _blend(scene, cover, np.asarray(target, np.float32), canvas.contrast), cover


PAINTERS: dict[str, Painter] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "thread": _thread,
    "crack": _crack,
    "hole": _hole,
    "missing part": _missing_part,
    "discolouration": _discolouration,
}
"""Name of a kind -> how it is drawn."""

DEFECTS: tuple[str, ...] = tuple(PAINTERS)
"""Kinds of defects that `paint_defect` knows."""
