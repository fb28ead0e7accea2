"""Which bank row an answer rests on: the row nearest to the patch under a peak of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    spec = detector.preprocessing
    grid = patch_grid(nearest.shape[1], spec)
    places: dict[tuple[int, int], Point | None] = {}
    worst = outputs.get("worst_patch")
    if worst is not None:
        tile = int(outputs["score"].argmax())
        places[tile, int(worst[tile])] = _near_peak(tile, int(worst[tile]), peaks, grid, frame_shape, spec)
    if grid is not None and map_shape is not None:
        for peak in peaks:
            places.setdefault(_patch_at(peak, outputs["anomaly_map"], grid, frame_shape, spec), peak)
    elif worst is None and nearest.shape[1] == 1:
        places[int(outputs["score"].argmax()), 0] = None
    found = []
    for (tile, patch), peak_point in places.items():
        row = int(nearest[tile, patch]) if 0 <= patch < nearest.shape[1] else -1
        if 0 <= row < len(pack.arrays[bank]):
            ids = pack.arrays.get(f"{bank}.ids")
            point = None
            if peak_point is not None and map_shape is not None:
                point = point_in_frame(peak_point, map_shape, frame_shape, spec)
            found.append(Evidence(bank, row, None if ids is None else int(ids[row]), point))
    return tuple(found)


def patch_grid(patches: int, spec: Preprocessing) -> tuple[int, int] | None:
    """Rows and columns of a grid of `patches` over the engine's frame; None if its shape does not tell.

    A convolutional trunk divides both sides alike, so rows / columns is height / width up to rounding.
    """
    ideal = (patches * spec.width / spec.height) ** 0.5
    columns = min((n for n in range(1, patches + 1) if patches % n == 0), key=lambda n: abs(n - ideal), default=0)
    return (patches // columns, columns) if columns and abs(columns - ideal) <= 1 else None


def _tile_offsets(map_shape: tuple[int, ...], frame_shape: tuple[int, ...], spec: Preprocessing) -> list[Point]:
    """Where each tile's map [h, w] begins in the merged one, as `preprocess.merge_maps` places it."""
    boxes = tile_boxes(frame_shape, spec)
    first = boxes[0]
    return [
        (
            (2 * (box.x - first.x) * map_shape[1] + first.width) // (2 * first.width),
            (2 * (box.y - first.y) * map_shape[0] + first.height) // (2 * first.height),
        )
        for box in boxes
    ]


def _patch_at(
    peak: Point, maps: NDArray[Any], grid: tuple[int, int], frame_shape: tuple[int, ...], spec: Preprocessing
) -> tuple[int, int]:
    """The tile and patch under a point of the merged map; where tiles overlap, the tile whose value counted."""
    height, width = maps.shape[1:]
    best, place = -np.inf, (0, 0)
    for tile, (left, top) in enumerate(_tile_offsets((height, width), frame_shape, spec)):
        x, y = peak[0] - left, peak[1] - top
        if 0 <= x < width and 0 <= y < height and maps[tile, y, x] > best:
            best = maps[tile, y, x]
            place = tile, (y * grid[0] // height) * grid[1] + x * grid[1] // width
    return place


def _near_peak(
    tile: int,
    patch: int,
    peaks: Sequence[Point],
    grid: tuple[int, int] | None,
    frame_shape: tuple[int, ...],
    spec: Preprocessing,
) -> Point | None:
    """The peak that a patch belongs to: the nearest one to its centre."""
    if grid is None or not peaks:
        return None
    left, top = _tile_offsets((spec.height, spec.width), frame_shape, spec)[tile]
    x = left + (patch % grid[1] + 0.5) * spec.width / grid[1]
    y = top + (patch // grid[1] + 0.5) * spec.height / grid[0]
    return min(peaks, key=lambda peak: (peak[0] - x) ** 2 + (peak[1] - y) ** 2)
