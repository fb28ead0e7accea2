"""Whole normal parts, painted: a turned steel flange and a woven upholstery fabric.

They stand in for photographs where none may be shipped: each picture has its own pose, exposure, lighting,
surface grain and sensor noise, so that "normal" is a spread and not one image. All randomness comes from the
generator that is passed in: the same generator state gives the same picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError

Picture = NDArray[np.uint8]
Field = NDArray[np.float32]

SMALLEST = 32
"""Pixels: below this a part has no detail left."""


@dataclass(frozen=True)
class PaintedPart:
    """One painted part.

    Attributes:
        image: uint8 RGB [S, S, 3].
        surface: bool [S, S], the part itself without its holes and the background: where defects may be.
        pattern: bool [S, S], the pixels of the new normal pattern; all false where it was not asked for.
    """

    image: Picture
    surface: NDArray[np.bool_]
    pattern: NDArray[np.bool_]


def paint_part(material: str, *, rng: np.random.Generator, size: int = 320, new_pattern: bool = False) -> PaintedPart:
    """Paint one normal part.

    Args:
        material: one of `MATERIALS`.
        rng: decides pose, light, grain and noise; it is advanced.
        size: side of the picture in pixels, at least 32.
        new_pattern: paint the pattern that a later batch carries: a laser-engraved code on the flange, a
            woven stripe in the fabric.

    Raises:
        InputError: an unknown material, or a picture too small to show one.
    """
    if material not in MATERIALS:
        raise InputError(
            wanted=f"a material: {', '.join(MATERIALS)}", got=repr(material), next_step="Name one of these."
        )
    if size < SMALLEST:
        raise InputError(
            wanted=f"a picture of at least {SMALLEST} pixels",
            got=str(size),
            next_step="Ask for a larger one.",
        )
    return MATERIALS[material](rng, size, new_pattern)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: tuple[float, float]) -> Field:
    """Smooth random field, float32 [H, W] with mean about 0 and standard deviation about 1.

    Args:
        rng: advanced by the number of cells.
        shape: H, W.
        cell: height and width in pixels of one bump; long in one direction gives a brushed look.
    """
    grid = [max(2, round(side / length) + 1) for side, length in zip(shape, cell, strict=True)]
    values = rng.standard_normal(grid, dtype=np.float32)
    field = np.asarray(cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC), dtype=np.float32)
    return field / max(float(field.std()), 1e-6)


def _cover(distance: Field) -> Field:
    """Signed distance in pixels (positive inside) -> coverage 0..1 with a one-pixel soft edge."""
    return np.asarray(np.clip(distance + 0.5, 0.0, 1.0), dtype=np.float32)


def _develop(linear: Field, rng: np.random.Generator) -> Picture:
    """Scene [S, S, 3] in 0..1 -> photograph: lens blur, vignette, exposure, white balance, sensor noise."""
    size = linear.shape[0]
    across = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    vignette = 1.0 - 0.10 * (across[:, None] ** 2 + across[None, :] ** 2)
    exposure = rng.normal(1.0, 0.025)
    balance = rng.normal(1.0, 0.006, 3).astype(np.float32)
    scene = cv2.GaussianBlur(linear, (0, 0), 0.45 + size / 1600.0) * vignette[..., None] * exposure * balance
    # Shot noise grows with the root of the light; the constant part is the sensor's own.
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    scene = scene + noise * (0.006 + 0.012 * np.sqrt(np.clip(scene, 0.0, 1.0)))
    return np.asarray(np.clip(scene * 255.0 + 0.5, 0, 255), dtype=np.uint8)


# --- turned steel flange ------------------------------------------------------------------------------------

_OUTER, _HUB, _BORE = 0.435, 0.205, 0.125
_BOLT_CIRCLE, _BOLT, _BOLTS = 0.318, 0.043, 6


def _flange(rng: np.random.Generator, size: int, new_pattern: bool) -> PaintedPart:
    turn = np.deg2rad(rng.normal(0.0, 1.2))
    shift = rng.normal(0.0, 0.006, 2) * size
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    x = columns - np.float32(size / 2 + shift[0])
    y = rows - np.float32(size / 2 + shift[1])
    radius = np.hypot(x, y)
    angle = np.arctan2(y, x)

    light = np.deg2rad(-52.0 + rng.normal(0.0, 2.0))
    face = _turned_face(rng, radius / size, angle, light)
    colour = np.array([0.985, 1.0, 1.02], np.float32)
    scene = _belt(rng, size, x, y)

    outer = np.float32(_OUTER * size) - radius
    bore = radius - np.float32(_BORE * size)
    hub = np.float32(_HUB * size) - radius
    bolts = np.full_like(radius, np.inf)
    bolt_light = np.zeros_like(radius)
    for number in range(_BOLTS):
        at = turn + 2 * np.pi * number / _BOLTS
        dx, dy = x - np.cos(at) * _BOLT_CIRCLE * size, y - np.sin(at) * _BOLT_CIRCLE * size
        distance = np.hypot(dx, dy) - np.float32(_BOLT * size)
        nearer = distance < bolts
        bolts = np.where(nearer, distance, bolts)
        bolt_light = np.where(nearer, np.cos(np.arctan2(dy, dx) - light), bolt_light)
    # The keyway says which way up the part lies.
    along, beside = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    key = np.maximum(np.abs(along) - 0.028 * size, np.abs(beside + (_BORE + 0.012) * size) - 0.03 * size)
    bore = np.minimum(bore, key)

    towards = np.cos(angle - light)
    bevel = np.float32(0.013 * size)
    face = face * (1.0 + 0.10 * _cover(hub))
    face = face + 0.30 * towards * np.exp(-((hub / (0.35 * bevel)) ** 2))
    face = _bevelled(face, outer, bevel, 0.50 + 0.38 * towards)
    face = _bevelled(face, bore, bevel, 0.46 - 0.36 * towards)
    face = _bevelled(face, bolts, bevel, 0.46 - 0.38 * bolt_light)
    inside = np.minimum(bore, bolts)
    wall = 0.05 + 0.14 * np.clip(np.where(bore < bolts, towards, bolt_light), 0, 1) * np.exp(inside / (0.02 * size))
    surface = np.minimum(np.minimum(outer, bore), bolts)
    pattern = np.zeros((size, size), np.float32)
    if new_pattern:
        pattern = _engraving(rng, size, along, beside)
        burnt = 0.22 + 0.04 * smooth_noise(rng, (size, size), (1.5, 1.5))
        face = face * (1.0 - pattern) + burnt * pattern
    part = face[..., None] * colour
    part = np.where(pattern[..., None] > 0, part * np.array([1.10, 1.0, 0.86], np.float32), part)
    hole = np.repeat(wall[..., None], 3, axis=2)
    disc = _cover(outer)[..., None]
    solid = _cover(inside)[..., None]
    scene = np.asarray(scene * (1 - disc) + (part * solid + hole * (1 - solid)) * disc, dtype=np.float32)
    return PaintedPart(_develop(scene, rng), surface > 0.02 * size, pattern > 0.05)


def _turned_face(rng: np.random.Generator, radius: Field, angle: Field, light: float) -> Field:
    """Concentric tool marks under one light: bright wedges along the light, each groove a little its own.

    A groove reflects where its tangent is square to the light, which makes the bow tie that every turned
    surface shows; `radius` is in shares of the picture's side.
    """
    samples = 1400
    place = np.linspace(0, samples - 1, samples, dtype=np.float32)
    fine = rng.standard_normal(samples).astype(np.float32)
    coarse = np.interp(place, place[::12], rng.standard_normal(len(place[::12]))).astype(np.float32)
    feed = np.sin(place * 0.9 + rng.uniform(0, 6.28)).astype(np.float32)
    groove = 0.45 * fine + 0.5 * coarse + 0.35 * feed
    index = np.clip(radius * 1.4 * samples, 0, samples - 1).astype(np.float32)
    zero = np.zeros_like(index)
    here = cv2.remap(groove[None, :], index, zero, cv2.INTER_LINEAR)
    lean = angle - light + 0.035 * here
    wedge = np.exp(-((np.sin(lean) / (0.42 + 0.03 * here)) ** 2))
    second = np.exp(-((np.sin(lean - 1.45) / 0.25) ** 2))
    grain = smooth_noise(rng, (radius.shape[0], radius.shape[1]), (1.6, 1.6))
    cloud = smooth_noise(rng, (radius.shape[0], radius.shape[1]), (60.0, 60.0))
    face = 0.46 + 0.40 * wedge + 0.12 * second + 0.035 * here * (0.5 + wedge) + 0.008 * grain + 0.008 * cloud
    return np.asarray(face, dtype=np.float32)


def _bevelled(face: Field, inwards: Field, width: np.float32, tone: Field) -> Field:
    """A chamfer of `width` pixels along the edge from which `inwards` is measured."""
    share = _cover(width - inwards)
    return face * (1 - share) + tone * share


def _belt(rng: np.random.Generator, size: int, x: Field, y: Field) -> Field:
    """The dark rubber belt under the part, with the part's soft shadow. [S, S, 3]."""
    weave = smooth_noise(rng, (size, size), (2.2, 2.2)) * 0.008 + smooth_noise(rng, (size, size), (90, 90)) * 0.005
    shadow_x, shadow_y = x - 0.022 * size, y - 0.03 * size
    shadow = np.clip((_OUTER * size - np.hypot(shadow_x, shadow_y)) / (0.05 * size) + 0.8, 0.0, 1.0)
    tone = (0.19 + weave) * (1.0 - 0.65 * shadow)
    return np.asarray(tone[..., None] * np.array([0.94, 1.0, 1.10], np.float32), dtype=np.float32)


_DIGITS = (
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)
"""The digits 0-9 as 5 x 7 dots, row by row: an engraving that looks the same under every OpenCV."""


def _engraving(rng: np.random.Generator, size: int, along: Field, beside: Field) -> Field:
    """A laser-engraved matrix code and batch number, and below it the part's own number: coverage [S, S]."""
    dots = np.zeros((16, 46), np.float32)
    batch = np.random.default_rng(2291)
    code = batch.integers(0, 2, (14, 14)).astype(np.float32)
    code[:, 0] = code[-1, :] = 1.0
    code[0, :] = np.arange(14) % 2 == 0
    code[:, -1] = np.arange(14) % 2 == 1
    dots[1:15, 1:15] = code
    for line, digits in ((0, (2, 2, 9, 1)), (8, rng.integers(0, 10, 4))):
        for number, digit in enumerate(digits):
            glyph = np.array([int(dot) for dot in _DIGITS[digit]], np.float32).reshape(7, 5)
            dots[line + 1 : line + 8, 18 + 7 * number : 23 + 7 * number] = glyph
    scale = 8
    plate = cv2.resize(dots, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    width = 0.185 * size
    step = plate.shape[1] / width
    plate = cv2.GaussianBlur(plate, (0, 0), max(step / 3, 0.1))
    map_x = (along / width + 0.5) * plate.shape[1]
    map_y = (beside - _BOLT_CIRCLE * size) * step + plate.shape[0] / 2
    engraved = cv2.remap(
        plate,
        map_x.astype(np.float32),
        map_y.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    )
    return np.asarray(np.clip(engraved, 0, 1), dtype=np.float32)


# --- woven fabric -------------------------------------------------------------------------------------------

_YARNS = 32
"""Yarns across the picture, in each direction."""
_WARP = np.array([0.235, 0.33, 0.415], np.float32)
_WEFT = np.array([0.60, 0.585, 0.53], np.float32)
_STRIPE = np.array([0.66, 0.33, 0.16], np.float32)


def _fabric(rng: np.random.Generator, size: int, new_pattern: bool) -> PaintedPart:
    turn = np.deg2rad(rng.normal(0.0, 0.8))
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size) * _YARNS
    sway = smooth_noise(rng, (size, size), (size / 3, size / 3)) * 0.16
    slack = smooth_noise(rng, (size, size), (size / 3, size / 3)) * 0.16
    u = columns * np.cos(turn) - rows * np.sin(turn) + sway + rng.uniform(0, 4)
    v = columns * np.sin(turn) + rows * np.cos(turn) + slack + rng.uniform(0, 4)
    u, v = u + 8.0, v + 8.0  # no negative yarn numbers at the border
    yarns = _YARNS + 32
    # A yarn wanders a little to both sides and has a thickness and a dye of its own.
    u = u + 0.05 * _along_yarn(rng, u, v, yarns)
    v = v + 0.05 * _along_yarn(rng, v, u, yarns)
    warp, weft = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    warp_top = ((warp + weft) % 4) < 2  # a two-by-two twill: its diagonal is what the eye sees

    warp_lit, warp_height = _yarn(u - warp, v, warp, phase=weft, rng=rng, size=size, upright=True)
    weft_lit, weft_height = _yarn(v - weft, u, weft, phase=warp, rng=rng, size=size, upright=False)
    dye = rng.normal(1.0, 0.035, (2, yarns)).astype(np.float32)
    warp_colour = _WARP * dye[0][warp % yarns][..., None]
    weft_colour = _WEFT * dye[1][weft % yarns][..., None]
    pattern = np.zeros((size, size), np.bool_)
    if new_pattern:
        middle = round(float(np.median(warp)))
        striped = (np.abs(warp - middle) <= 2) & (np.abs(warp - middle) != 1)
        warp_colour = np.where(striped[..., None], _STRIPE * dye[0][warp % yarns][..., None], warp_colour)
        pattern = striped & warp_top
    top = warp_top[..., None]
    colour = np.where(top, warp_colour * warp_lit[..., None], weft_colour * weft_lit[..., None])
    height = np.where(warp_top, warp_height, weft_height)
    # Light from the upper left: a slope that falls to the right or down lies in shade.
    slope = np.gradient(cv2.GaussianBlur(height, (0, 0), 0.7))
    shade = 1.0 - 0.55 * (slope[0] + slope[1]) * (size / 320.0)
    depth = 0.50 + 0.50 * np.clip(height, 0, 1)
    across = np.linspace(-1, 1, size, dtype=np.float32)
    lamp = 1.06 + 0.07 * (-across[:, None] * 0.6 - across[None, :])
    uneven = 1.0 + 0.022 * smooth_noise(rng, (size, size), (size / 5, size / 5))
    scene = colour * (np.clip(shade, 0.45, 1.5) * depth * lamp * uneven)[..., None]
    return PaintedPart(_develop(scene.astype(np.float32), rng), np.ones((size, size), np.bool_), pattern)


def _along_yarn(rng: np.random.Generator, across: Field, along: Field, yarns: int) -> Field:
    """Smooth noise that is constant across one yarn and wanders along it. [S, S]."""
    table = rng.standard_normal((yarns, yarns // 3)).astype(np.float32)
    steps = (along / 3.0).astype(np.float32)
    return np.asarray(
        cv2.remap(table, steps, np.floor(across).astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP),
        dtype=np.float32,
    )


def _yarn(
    across: Field,
    along: Field,
    number: NDArray[np.int32],
    *,
    phase: NDArray[np.int32],
    rng: np.random.Generator,
    size: int,
    upright: bool,
) -> tuple[Field, Field]:
    """Brightness and height of one direction of yarns, both [S, S].

    `across` runs 0..1 over a yarn; a float lasts two crossings of the twill and dips at both ends.
    """
    round_profile = np.sqrt(np.clip(1.0 - (2.0 * across - 1.0) ** 2, 0.0, 1.0))
    offset = number if upright else number + 2
    place = (along + (offset % 4)) % 4.0
    place = place if upright else (place + 0.0) % 4.0
    float_over = np.sin(np.pi * np.clip(place / 2.0, 0.0, 1.0))
    height = round_profile * (0.45 + 0.55 * float_over)
    cell = (size / 40.0, 1.2) if upright else (1.2, size / 40.0)
    fibres = smooth_noise(rng, (size, size), cell)
    # The twist of the yarn: faint diagonal lines that run round it.
    twist = np.sin(2 * np.pi * (along * 1.7 + across * (0.9 if upright else -0.9)) + phase)
    lit = 1.0 + 0.075 * fibres + 0.045 * twist
    return np.asarray(lit, dtype=np.float32), np.asarray(height, dtype=np.float32)


MATERIALS: dict[str, Callable[[np.random.Generator, int, bool], PaintedPart]] = {
    "flange": _flange,
    "fabric": _fabric,
}
"""Name of a material -> its painter."""
