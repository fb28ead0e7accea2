"""Normality by a sentence: a suppression map lowers the anomaly map where something is normal after all.

With A the detector's anomaly map and A_sup, 0 to 1, the map of the normality detector (the strongest of all
sentences at each place), NAND composes A * (1 - A_sup) and takes its maximum for the image score. A detector's score
need not be the maximum of its map, so here the score falls by the same share as the map's maximum does. With
m = min(0, min A), the frame's floor, and s the score:

    A' = m + (A - m) (1 - A_sup)
    s' = m + (s - m) (max A' - m) / (max A - m)     where s > m and max A > m, else s

Maps of distances and probabilities are never negative: there m = 0, A' is NAND's, and s' = max A' where s = max A. A
map of another kind (logits) can be negative, and multiplying a negative value would raise it; with the floor,
suppression lowers towards the most ordinary place of the frame instead. Cutting such a map off at 0 would lose what
it says of the rest.

**Lazy mode.** The normality trunk is dear, and only frames whose score s exceeds the threshold t need it:

1. 0 <= A_sup <= 1 and A >= m give m <= A' <= A at every pixel, so m <= max A' <= max A.
2. So the share r = (max A' - m) / (max A - m) lies in 0..1, and for s > m: s' = m + (s - m) r <= s. Elsewhere s' = s.
3. If s <= t then s' <= s <= t: the frame passes with and without suppression. If s > t, lazy computes the same s' as
   eager. So the decision is the same for every frame, every score, map, threshold and set of sentences.

It holds in floating point too: step 1 takes the smaller of A' and A, step 2 that of s' and s, and comparing is exact.
What lazy does not give is the lowered score and map of frames that pass anyway; whoever ranks scores (AUROC), as
every evaluation protocol does, wants eager mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.bundle_manifest import NORMALITY_TABLE
from edgead.runtime.errors import EngineError
from edgead.runtime.evidence import Texts, Tiles, patch_grid
from edgead.runtime.inspection import SuppressedRegion
from edgead.runtime.knowledge import Pack
from edgead.runtime.preprocess import merge_maps
from edgead.runtime.regions import Outline, exceeds, outline, own_pixels, to_regions
from edgead.runtime.spec import DetectorSpec, Preprocessing

Mode = Literal["lazy", "eager"]
Map = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]

_ROOM = 0.01
"""How far a suppression map may leave 0..1 by the rounding of 16 bits; what is further off is no such map."""


def normalities(pack: Pack) -> int:
    """How many sentences a pack holds that say what is normal."""
    table = pack.arrays.get(NORMALITY_TABLE)
    return 0 if table is None else len(table)


def is_due(mode: Mode, score: float, threshold: float) -> bool:
    """Whether a frame must be compared with the sentences."""
    return mode == "eager" or score > threshold


def suppression_map(outputs: Arrays, shape: tuple[int, ...], frame_shape: tuple[int, ...], spec: Preprocessing) -> Map:
    """The share of the anomaly map to take away at each of its pixels.

    Args:
        outputs: of the normality head: `anomaly_map` float32 [T, h, w], one for each tile. Where tiles overlap
            the larger suppression counts.
        shape: (h2, w2) of the base detector's merged map.
        frame_shape: (H, W, ...) of the source frame.
        spec: of the normality detector.

    Returns:
        float32 [h2, w2] in 0..1, interpolated bilinearly.

    Raises:
        EngineError: the map is not a number somewhere, or leaves 0..1: such a frame must not pass.
    """
    found = merge_maps(outputs["anomaly_map"], frame_shape, spec)
    low, top = float(found.min()), float(found.max())
    if not (low >= -_ROOM and top <= 1 + _ROOM):  # false for NaN too
        raise EngineError(
            wanted="a suppression map of 0 to 1",
            got="a normality map that is not a number or not of 0 to 1",
            next_step="Check the engine with: edgead show BUNDLE",
        )
    resized = found if found.shape == shape else cv2.resize(found, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.clip(resized, 0.0, 1.0), np.float32)


def suppress_map(anomaly_map: Map, suppression: Map) -> Map:
    """A' of the module's docstring; nowhere above `anomaly_map`.

    Args:
        anomaly_map: float32 [h, w], finite.
        suppression: float32 [h, w] in 0..1.
    """
    floor = np.float32(min(0.0, float(anomaly_map.min())))
    lowered = (anomaly_map - floor) * (np.float32(1) - suppression) + floor
    return np.minimum(lowered, anomaly_map)


def suppress_score(score: float, anomaly_map: Map, suppressed: Map) -> float:
    """s' of the module's docstring; never above `score`.

    Args:
        score: image score before suppression.
        anomaly_map: float32 [h, w] before suppression.
        suppressed: of `suppress_map`.
    """
    floor = min(0.0, float(anomaly_map.min()))
    top = float(anomaly_map.max())
    if score <= floor or top <= floor:
        return score
    share = max(0.0, (float(suppressed.max()) - floor) / (top - floor))
    return min(score, floor + (score - floor) * share)


def explained_regions(
    before: Map,
    after: Map,
    remaining: tuple[Outline, ...],
    *,
    passes: bool,
    map_threshold: float | None,
    outputs: Arrays,
    pack: Pack,
    texts: Texts,
    normality: DetectorSpec,
    base: Preprocessing,
    frame_shape: tuple[int, ...],
) -> tuple[SuppressedRegion, ...]:
    """The areas of an alarm that alarm no longer, with the sentence that explains each.

    Args:
        before: the map of a frame whose score exceeded the threshold.
        after: the same after suppression.
        remaining: outlines of `after` that the frame still shows; none if it passes.
        passes: whether the frame passes now; then no area of it alarms.
        map_threshold: what areas are outlined at.
        outputs: of the normality head.
        pack: the knowledge; `texts` are its sentences.
        normality: the detector of that head.
        base: preprocessing of the detector that made the map.
        frame_shape: of the source frame.
    """
    outlines = outline(before, threshold=map_threshold)
    mask, still = exceeds(before, before, map_threshold), exceeds(after, before, map_threshold)
    gone: list[tuple[Outline, float]] = []
    for item in outlines:
        window, own = own_pixels(item, mask)
        left = float(after[window][own].max())
        shown = any(_within(other.point, item, own) for other in remaining)
        if passes or not (shown or still[window][own].any()):
            gone.append((item, left))
    if not gone:
        return ()
    floor = min(0.0, float(before.min()))
    rows = _Rows(outputs, pack, normality, frame_shape)
    found = []
    regions = to_regions(tuple(item for item, _ in gone), before.shape, frame_shape, base)
    for (item, left), region in zip(gone, regions, strict=True):
        row = rows.at(item.point, before.shape)
        reach = item.peak - floor
        found.append(
            SuppressedRegion(
                box=region.box,
                area=region.area,
                peak=region.peak,
                point=region.point,
                share=min(1.0, max(0.0, (item.peak - left) / reach)) if reach > 0 else 0.0,
                sentence=f"one of {normalities(pack)} sentences" if row is None else texts(NORMALITY_TABLE, row),
                row=row,
            )
        )
    return tuple(found)


class _Rows:
    """Which sentence is the strongest where."""

    def __init__(self, outputs: Arrays, pack: Pack, spec: DetectorSpec, frame_shape: tuple[int, ...]) -> None:
        self._nearest = outputs["nearest_row"]
        self._count = normalities(pack)
        self._shape = merge_maps(outputs["anomaly_map"], frame_shape, spec.preprocessing).shape
        grid = patch_grid(self._nearest.shape[1], spec.preprocessing)
        self._tiles = None if grid is None else Tiles(outputs["anomaly_map"], grid, frame_shape, spec.preprocessing)

    def at(self, point: tuple[int, int], shape: tuple[int, ...]) -> int | None:
        """The row at a point (x, y) of a map of `shape`; None if the patches' grid does not tell."""
        if self._count == 1:
            return 0
        if self._tiles is None:
            return None
        # The middle of the pixel, in the other map's resolution.
        x = (2 * point[0] + 1) * self._shape[1] // (2 * shape[1])
        y = (2 * point[1] + 1) * self._shape[0] // (2 * shape[0])
        row = int(self._nearest[self._tiles.patch_at((x, y))])
        return row if 0 <= row < self._count else None


def _within(point: tuple[int, int], item: Outline, own: NDArray[np.bool_]) -> bool:
    x, y = point[0] - item.box.x, point[1] - item.box.y
    return 0 <= x < item.box.width and 0 <= y < item.box.height and bool(own[y, x])
