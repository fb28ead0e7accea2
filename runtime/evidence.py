"""What an answer rests on: the bank row nearest to the patch under a peak of the map; the sentences that weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import Evidence, Sentence
from edgead.runtime.knowledge import Pack, is_bank
from edgead.runtime.notes import read_note
from edgead.runtime.preprocess import tile_boxes
from edgead.runtime.regions import point_in_frame
from edgead.runtime.spec import DetectorSpec, Preprocessing

Point = tuple[int, int]
Arrays = Mapping[str, NDArray[Any]]

SENTENCES = 5
"""Most sentences that are named for one frame."""
_SAME_PEAK = 2
"""Patches."""


def find_evidence(
    outputs: Arrays,
    peaks: Sequence[Point],
    pack: Pack,
    detector: DetectorSpec,
    map_shape: tuple[int, ...] | None,
    frame_shape: tuple[int, ...],
) -> tuple[Evidence, ...]:
    """The nearest rows of the deciding patch and of the peaks; empty if the head does not name rows.

    The patch that made the image score comes first where the head says which it was (`worst_patch`).

    Args:
        outputs: of the head, one entry for each tile.
        peaks: (x, y) in the merged map.
        pack: the knowledge that the head compared with.
        detector: its first bank is the one whose rows `nearest_row` counts.
        map_shape: of the merged map; None if the detector has no map.
        frame_shape: of the source frame.
    """
    nearest = outputs.get("nearest_row")
    rows = [port.name for port in detector.knowledge if port.rows is not None]
    bank = next((name for name in rows if is_bank(name)), rows[0] if rows else None)
    if nearest is None or bank is None:
        return ()
    grid = patch_grid(nearest.shape[1], detector.preprocessing) if map_shape is not None else None
    tiles = Tiles(outputs["anomaly_map"], grid, frame_shape, detector.preprocessing) if grid else None
    worst = outputs.get("worst_patch")
    tile = int(outputs["score"].argmax())
    places: list[tuple[int, int]] = []
    if worst is not None:
        places.append((tile, int(worst[tile])))
    elif nearest.shape[1] == 1:
        places.append((tile, 0))
    if tiles is not None:
        for peak in peaks:
            place = tiles.patch_at(peak)
            if not any(tiles.are_close(place, other) for other in places):
                places.append(place)
    ids = pack.arrays.get(f"{bank}.ids")
    found = []
    for place in places:
        row = int(nearest[place]) if 0 <= place[1] < nearest.shape[1] else -1
        if 0 <= row < len(pack.arrays[bank]):
            point = None
            if tiles is not None and map_shape is not None:
                centre = tiles.centre(place)
                point = point_in_frame(centre, map_shape, frame_shape, detector.preprocessing)
            found.append(Evidence(bank, row, None if ids is None else int(ids[row]), point))
    return tuple(found)


def find_sentences(outputs: Arrays, pack: Pack, detector: DetectorSpec, texts: Texts) -> tuple[Sentence, ...]:
    """The text rows with most weight in the decision, heaviest first: at most `SENTENCES`.

    Rows of the tile that made the score count; padded rows, and rows of weight 0 or -1 (a
    cosine's least value, by which heads say that they dropped a row), had no part.

    Args:
        outputs: of the head, one entry for each tile.
        pack: the knowledge that the head compared with.
        detector: says which array `evidence` weighs: the one whose row symbol is that output's.
        texts: of the pack.
    """
    weights = outputs.get("evidence")
    name = weighed(detector)
    if weights is None or name is None:
        return ()
    found = weights[int(outputs["score"].argmax()), : len(pack.arrays[name])]
    had_part = np.flatnonzero(np.isfinite(found) & (found > -1) & (found != 0))
    order = had_part[np.argsort(-found[had_part], kind="stable")][:SENTENCES]
    return tuple(Sentence(texts(name, int(row)), float(found[row]), name, int(row)) for row in order)


@lru_cache(maxsize=64)
def weighed(detector: DetectorSpec) -> str | None:
    """Name of the knowledge array whose rows the output `evidence` weighs."""
    port = next((port for port in detector.outputs if port.name == "evidence"), None)
    if port is None:
        return None
    symbol = port.shape[-1]
    return next((taken.name for taken in detector.knowledge if taken.shape and taken.shape[0] == symbol), None)


class Texts:
    """The sentences of a pack's rows, each note read once: called with an array's name and a row."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._read: dict[str, list[str]] = {}

    def __call__(self, array: str, row: int) -> str:
        if array not in self._read:
            rows = read_note(self._pack, array)["rows"] if array in self._pack.arrays else []
            self._read[array] = [str(entry["text"]) for entry in rows]
        known = self._read[array]
        return known[row] if 0 <= row < len(known) else f"row {row} of {array}"


@lru_cache(maxsize=64)
def patch_grid(patches: int, spec: Preprocessing) -> tuple[int, int] | None:
    """Rows and columns of a grid of `patches` over the engine's frame; None if its shape does not tell.

    A convolutional trunk divides both sides alike, so rows / columns is height / width up to rounding.
    """
    ideal = (patches * spec.width / spec.height) ** 0.5
    columns = min((n for n in range(1, patches + 1) if patches % n == 0), key=lambda n: abs(n - ideal), default=0)
    return (patches // columns, columns) if columns and abs(columns - ideal) <= 1 else None


class Tiles:
    """Where patches lie in the merged map. A patch is (tile, index in the tile's grid)."""

    def __init__(
        self, maps: NDArray[Any], grid: tuple[int, int], frame_shape: tuple[int, ...], spec: Preprocessing
    ) -> None:
        self.maps, self.grid = maps, grid
        boxes = tile_boxes(frame_shape, spec)
        first = boxes[0]
        # As `preprocess.merge_maps` places them.
        self.offsets = [
            (
                (2 * (box.x - first.x) * maps.shape[2] + first.width) // (2 * first.width),
                (2 * (box.y - first.y) * maps.shape[1] + first.height) // (2 * first.height),
            )
            for box in boxes
        ]

    def patch_at(self, peak: Point) -> tuple[int, int]:
        """The patch under a point of the merged map; where tiles overlap, of the tile whose value counted."""
        height, width = self.maps.shape[1:]
        best, place = -np.inf, (0, 0)
        for tile, (left, top) in enumerate(self.offsets):
            x, y = peak[0] - left, peak[1] - top
            if 0 <= x < width and 0 <= y < height and self.maps[tile, y, x] > best:
                best = self.maps[tile, y, x]
                place = tile, (y * self.grid[0] // height) * self.grid[1] + x * self.grid[1] // width
        return place

    def centre(self, place: tuple[int, int]) -> Point:
        """The middle of a patch in pixels of the merged map."""
        tile, patch = place
        row, column = divmod(patch, self.grid[1])
        height, width = self.maps.shape[1:]
        left, top = self.offsets[tile]
        x = left + (2 * column + 1) * width // (2 * self.grid[1])
        return x, top + (2 * row + 1) * height // (2 * self.grid[0])

    def are_close(self, one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether two patches belong to one peak: the map's smoothing moves a peak by a patch or two."""
        (row, column), (row2, column2) = divmod(one[1], self.grid[1]), divmod(other[1], self.grid[1])
        return one[0] == other[0] and abs(row - row2) <= _SAME_PEAK and abs(column - column2) <= _SAME_PEAK
