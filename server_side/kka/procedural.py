"""The procedural painter, which obeys the caption grammar on real photographs, and the author that speaks it.

Both need no model: they make KKA(0) on any machine, and are what the loop is tested with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.server_side.kka.caption_words import KIND_WORDS
from edgead.server_side.kka.grammar import (
    COLOURS,
    CONTRASTS,
    GRAMMAR,
    PLACES,
    SIZES,
    VERSION,
    Defect,
    Grammar,
    chosen,
    describe,
    parse,
    sample,
)
from edgead.server_side.kka.places import Part, part_of, place_of
from edgead.server_side.kka.seams import Frame, Painted, UndrawableCaptionError
from edgead.server_side.painting import DEFECTS, NothingToSeeError, paint_defect

_RULES = 2
"""Raised whenever the same caption and seed give other pixels."""

_ATTEMPTS = 5
"""Places that are tried for a defect of which nothing lies on the part; the last is the part's middle."""


@dataclass(frozen=True)
class ProceduralPainter:
    """Paints the defect of a caption on a photograph of a normal part, with its mask.

    A photograph without colour stays without: on a grey camera's picture a red stain is grey.

    Attributes:
        within: "part": a defect lies on the part that is found on the photograph, its place is a place on it, and
            no pixel of the background changes; "frame": it may lie anywhere.
    """

    within: Literal["part", "frame"] = "part"
    kind = "procedural"
    name = f"rules-{_RULES}"
    needs_normal = True

    @property
    def digest(self) -> str:
        """SHA-256 over the rules' versions, where they paint, and the grammar's words and numbers."""
        rules = [_RULES, self.within, VERSION, DEFECTS, SIZES, COLOURS, PLACES, CONTRASTS, KIND_WORDS]
        return hashlib.sha256(json.dumps(rules, default=dict).encode()).hexdigest()

    def check(self, caption: str) -> None:
        """Refuse a caption that names no defect.

        Raises:
            UndrawableCaptionError: it cannot be drawn; says what can.
        """
        parse(caption)

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        """Paint one anomaly.

        Args:
            caption: names a defect; see `edgead.server_side.kka.grammar`.
            normal: uint8 RGB [H, W, 3] to paint on.
            seed: decides what the caption leaves open, and the shape.

        Raises:
            UndrawableCaptionError: it names no defect, or nothing of that defect would lie on the part.
            InputError: no photograph.
            ImageError: one that is too small.
        """
        defect = parse(caption)
        if normal is None:
            raise InputError(wanted="a photograph of a normal part to paint on", got="none")
        rng = np.random.default_rng(seed)
        # One size and one contrast for all that the caption counts, a place for each.
        size = chosen(SIZES, defect.size, rng)
        contrast = chosen(CONTRASTS, defect.contrast, rng)
        part = part_of(normal, self.within)
        image, mask = normal, np.zeros(normal.shape[:2], np.uint8)
        for _ in range(defect.number):
            image, more = _with_one(image, defect, size, contrast, part, rng)
            mask |= more
        return Painted(as_grey_as(normal, image, mask), mask)


@dataclass(frozen=True)
class GrammarAuthor:
    """Writes sentences of the grammar at random: the author of KKA(0) without any model.

    Attributes:
        grammar: the words that it draws from.
    """

    grammar: Grammar = GRAMMAR
    kind: str = "grammar"
    name: str = f"sentences-{VERSION}"

    @property
    def digest(self) -> str:
        """SHA-256 over the words that it draws from."""
        words = [VERSION, vars(self.grammar)]
        return hashlib.sha256(json.dumps(words, default=list).encode()).hexdigest()

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """One sentence for each seed; the prompts say nothing to it."""
        return [
            describe(sample(np.random.default_rng(seed), self.grammar)) for _, seed in zip(prompts, seeds, strict=True)
        ]


def _with_one(
    image: Frame, defect: Defect, size: float, contrast: float, part: Part | None, rng: np.random.Generator
) -> tuple[Frame, NDArray[np.uint8]]:
    """The picture with one defect more, and the mask of that one."""
    within = None if part is None else part.mask
    for attempt in range(_ATTEMPTS):
        place = place_of(defect.place, rng)
        if part is not None and attempt == _ATTEMPTS - 1:
            place = part.deepest
        elif part is not None and place is not None:
            place = part.place(place)
        try:
            painted, mask = paint_defect(
                image,
                defect.kind,
                size=size,
                place=place,
                colour=COLOURS.get(defect.colour),
                contrast=contrast,
                rng=rng,
                within=within,
            )
        except NothingToSeeError:
            continue
        if within is None:
            return painted, mask
        # A thread may hang over the part's edge; here it ends with it.
        mask[~within] = 0
        if mask.any():
            return np.where(mask[..., None] > 0, painted, image), mask
    raise UndrawableCaptionError(
        wanted=f"a place on the part where a {defect.kind} of {size:.2f} of the picture can be seen",
        got=f"none in {_ATTEMPTS} attempts",
        next_step="Say a larger size, or set paint.within = 'frame'.",
    )


def as_grey_as(normal: Frame, image: Frame, mask: NDArray[np.uint8]) -> Frame:
    """The painted picture, without colour inside the mask if the photograph [H, W, 3] has none anywhere.

    Else a detector on a grey camera would learn that colour is the anomaly.
    """
    if (normal != normal[..., :1]).any():
        return image
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.where(mask[..., None] > 0, grey[..., None], image)


__all__ = ["GrammarAuthor", "ProceduralPainter", "as_grey_as"]
