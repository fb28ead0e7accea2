"""The procedural painter, which obeys the caption grammar on real photographs, and the author that speaks it.

Both need no model: they make KKA(0) on any machine, and are what the loop is tested with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

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
    Grammar,
    chosen,
    describe,
    parse,
    sample,
)
from edgead.server_side.kka.seams import Frame, Painted
from edgead.server_side.painting import DEFECTS, paint_defect

_RULES = 1
"""Raised whenever the same caption and seed give other pixels."""


class ProceduralPainter:
    """Paints the defect of a caption on a photograph of a normal part, with its mask.

    A photograph without colour stays without: on a grey camera's picture a red stain is grey.
    """

    kind = "procedural"
    name = f"rules-{_RULES}"
    needs_normal = True

    @property
    def digest(self) -> str:
        """SHA-256 over the rules' versions and the grammar's words and numbers."""
        rules = [_RULES, VERSION, DEFECTS, SIZES, COLOURS, PLACES, CONTRASTS, KIND_WORDS]
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
            UndrawableCaptionError: it names no defect.
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
        image, mask = normal, np.zeros(normal.shape[:2], np.uint8)
        for _ in range(defect.number):
            image, more = paint_defect(
                image,
                defect.kind,
                size=size,
                place=place_of(defect.place, rng),
                colour=COLOURS.get(defect.colour),
                contrast=contrast,
                rng=rng,
            )
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


def place_of(words: str, rng: np.random.Generator) -> tuple[float, float] | None:
    """A centre in shares of width and height from the ranges of a place; None where no place is said."""
    if not words:
        return None
    x, y = PLACES[words]
    return float(rng.uniform(*x)), float(rng.uniform(*y))


def as_grey_as(normal: Frame, image: Frame, mask: NDArray[np.uint8]) -> Frame:
    """The painted picture, without colour inside the mask if the photograph [H, W, 3] has none anywhere.

    Else a detector on a grey camera would learn that colour is the anomaly.
    """
    if (normal != normal[..., :1]).any():
        return image
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.where(mask[..., None] > 0, grey[..., None], image)


__all__ = ["GrammarAuthor", "ProceduralPainter", "as_grey_as", "place_of"]
