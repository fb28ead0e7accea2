"""Where a pipeline shall paint anew: the outline of a caption's defect, with the procedural painter's shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgead.server_side.kka.grammar import SIZES, Defect, chosen, parse
from edgead.server_side.kka.places import Part, place_of
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.painting import DEFECTS
from edgead.server_side.painting_defects import Canvas, curve, fragment, spot, stroke

_LINES = frozenset({"scratch", "crack", "thread"})
_SLIMMEST = 0.07
"""Thickness of a line's mask as a share of its length: a pipeline needs room to draw a line in."""
_MARGIN = 0.12
"""Of the picture's sides, in which no random centre lies."""


def drawn_mask(
    shape: tuple[int, int], caption: str, rng: np.random.Generator, *, least: float, part: Part | None = None
) -> NDArray[np.uint8]:
    """An irregular mask for what a caption describes: strokes for lines, blobs for spots, a fragment for missing parts.

    Size, place and number follow the caption where it says them in words that the grammar understands; what it does
    not say, the generator decides.

    Args:
        shape: height and width of the photograph in pixels.
        caption: in any words.
        rng: advanced.
        least: pixels below which neither a line's thickness nor a spot's diameter goes.
        part: places are places on it, and the mask ends at its border; None allows the whole picture.

    Returns:
        uint8 [H, W] of 0 and 255, never empty.
    """
    height, width = shape
    defect = _read(caption, rng)
    extent = max(chosen(SIZES, defect.size, rng) * min(shape), 2.0 * least)
    mask = np.zeros(shape, np.bool_)
    for _ in range(defect.number):
        x, y = _place(defect.place, part, rng)
        canvas = Canvas(
            shape=shape,
            x=x * (width - 1),
            y=y * (height - 1),
            extent=extent,
            unit=min(shape) / 320.0,
            contrast=1.0,
            surroundings=np.zeros(3, np.float32),
            colour=None,
            rng=rng,
        )
        if defect.kind in _LINES:
            bend = 5.0 if defect.kind == "thread" else 0.6
            path = curve(canvas, bend=bend, wobble=0.05, turns=4 if defect.kind == "thread" else 2)
            mask |= stroke(canvas, path, max(least, _SLIMMEST * extent) * rng.uniform(0.8, 1.2, len(path))) > 0.5
        elif defect.kind == "missing part":
            mask |= fragment(canvas) > 0
        else:
            mask |= spot(canvas, rough=0.35, stretch=0.5) > 0
        if part is not None:
            mask &= part.mask
        # The centre of a bent line may lie beside it, the line itself outside the picture or the part.
        mask[round(canvas.y), round(canvas.x)] |= not mask.any()
    return mask.astype(np.uint8) * np.uint8(255)


def _place(words: str, part: Part | None, rng: np.random.Generator) -> tuple[float, float]:
    """A centre in shares of the picture."""
    free = (float(rng.uniform(_MARGIN, 1 - _MARGIN)), float(rng.uniform(_MARGIN, 1 - _MARGIN)))
    said = place_of(words, rng)
    if part is None:
        return said or free
    return part.place(said) if said else part.somewhere(rng)


def _read(caption: str, rng: np.random.Generator) -> Defect:
    try:
        return parse(caption)
    except UndrawableCaptionError:
        # A pipeline may know the word; a shape is drawn at random.
        return Defect(DEFECTS[int(rng.integers(len(DEFECTS)))])


__all__ = ["drawn_mask"]
