"""Where on a photograph a defect lies: the part that is found there, and what a caption's places mean on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.server_side.kka.grammar import PLACES
from edgead.server_side.kka.seams import Frame
from edgead.server_side.part_finder import find_part

_INSET = 0.05
"""Of the part's deepest point: how far from its outline a place is moved that lay beside the part."""

Place = tuple[float, float]
"""x and y in shares of the picture's width and height, 0 to 1."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part that is smaller than its photograph.

    Attributes:
        mask: bool [H, W], not empty.
    """

    mask: NDArray[np.bool_]

    @functools.cached_property
    def depth(self) -> NDArray[np.float32]:
        """Distance in pixels [H, W] to the part's outline or the picture's border; 0 outside."""
        framed = cv2.copyMakeBorder(self.mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        return np.asarray(cv2.distanceTransform(framed, cv2.DIST_L2, 5)[1:-1, 1:-1], dtype=np.float32)

    @functools.cached_property
    def box(self) -> tuple[int, int, int, int]:
        """First column and row, width and height in pixels of the box around it."""
        x, y, width, height = cv2.boundingRect(self.mask.astype(np.uint8))
        return x, y, width, height

    @functools.cached_property
    def deepest(self) -> Place:
        """The point that is farthest from its outline."""
        row, column = np.unravel_index(int(np.argmax(self.depth)), self.mask.shape)
        return self._shares(int(column), int(row))

    def place(self, shares: Place) -> Place:
        """A place in shares of the part's box, in those of the picture; beside the part, the nearest on it."""
        left, top, width, height = self.box
        x, y = left + shares[0] * (width - 1), top + shares[1] * (height - 1)
        if self.mask[round(y), round(x)]:
            return self._shares(x, y)
        rows, columns = np.nonzero(self.depth >= _INSET * self.depth.max())
        nearest = int(np.argmin((rows - y) ** 2 + (columns - x) ** 2))
        return self._shares(int(columns[nearest]), int(rows[nearest]))

    def somewhere(self, rng: np.random.Generator) -> Place:
        """A place on it at random, not at its very outline."""
        choices = np.flatnonzero(self.depth >= _INSET * self.depth.max())
        row, column = divmod(int(choices[rng.integers(len(choices))]), self.mask.shape[1])
        return self._shares(column, row)

    def _shares(self, x: float, y: float) -> Place:
        height, width = self.mask.shape
        return x / max(width - 1, 1), y / max(height - 1, 1)


def part_of(photograph: Frame, within: Literal["part", "frame"]) -> Part | None:
    """The part on a photograph uint8 RGB [H, W, 3]; None where a defect may lie anywhere on it.

    Args:
        photograph: of a normal part.
        within: "part" looks for it, "frame" does not.
    """
    if within == "frame":
        return None
    found = find_part(photograph)
    return None if found.all() else Part(found)


def place_of(words: str, rng: np.random.Generator) -> Place | None:
    """A centre in shares of width and height from the ranges of a place; None where no place is said."""
    if not words:
        return None
    x, y = PLACES[words]
    return float(rng.uniform(*x)), float(rng.uniform(*y))


__all__ = ["Part", "part_of", "place_of"]
