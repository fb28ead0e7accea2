"""Which bank row an answer rests on: the row nearest to the patch under a peak of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.inspection import Evidence
from edgead.runtime.knowledge import Pack
from edgead.runtime.preprocess import tile_boxes
from edgead.runtime.regions import point_in_frame
from edgead.runtime.spec import DetectorSpec, Preprocessing

Point = tuple[int, int]
Arrays = Mapping[str, NDArray[Any]]

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
    bank = next((port.name for port in detector.knowledge if port.rows is not None), None)
    if nearest is None or bank is None:
        return ()
    grid = patch_grid(nearest.shape[1], detector.preprocessing) if map_shape is not None else None
    tiles = _Tiles(outputs["anomaly_map"], grid, frame_shape, detector.preprocessing) if grid else None
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


@lru_cache(maxsize=64)
def patch_grid(patches: int, spec: Preprocessing) -> tuple[int, int] | None:
    """Rows and columns of a grid of `patches` over the engine's frame; None if its shape does not tell.

    A convolutional trunk divides both sides alike, so rows / columns is height / width up to rounding.
    """
    ideal = (patches * spec.width / spec.height) ** 0.5
    columns = min((n for n in range(1, patches + 1) if patches % n == 0), key=lambda n: abs(n - ideal), default=0)
    return (patches // columns, columns) if columns and abs(columns - ideal) <= 1 else None


class _Tiles:
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
