"""The ONE way from a frame to what a trunk sees, and from its map back to the frame.

Fitting, exporting and running all call `prepare`; so a bank that was built on a server and a frame that a
camera sees cannot differ in preprocessing. Four coordinate systems meet here: the source frame; the frame
rotated clockwise by `Preprocessing.rotate`, in which the region of interest and the tiles are declared; the
engine's frame; and the anomaly map over the region of interest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError
from edgead.runtime.spec import Preprocessing, Region

Frame = NDArray[np.uint8]
Shape = tuple[int, ...]

_ROTATION = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


def check_frame(frame: NDArray[np.generic], spec: Preprocessing) -> None:
    """Check that `prepare` can take a frame.

    Raises:
        ImageError: not uint8 RGB [H, W, 3], empty, or the region of interest reaches outside it.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ImageError(
            wanted="a frame as uint8 RGB [H, W, 3]",
            got=got,
            next_step="Convert it first, for example with cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).",
        )
    height, width = _rotated_shape(frame.shape, spec)
    if not height or not width:
        raise ImageError(wanted="a frame with pixels", got=f"{list(frame.shape)}", next_step="Check the camera.")
    roi = spec.roi
    if roi is not None and (roi.x + roi.width > width or roi.y + roi.height > height):
        raise ImageError(
            wanted=f"a frame that holds the region of interest {roi.x},{roi.y},{roi.width},{roi.height}",
            got=f"{width} x {height} pixels after rotation",
            next_step="Use the camera resolution that the detector was fitted for.",
        )


def prepare(frame: Frame, spec: Preprocessing) -> Frame:
    """Rotate, crop, tile and resize a frame as declared: the only such code in edgead.

    A frame that shrinks is averaged by area, which keeps small defects from aliasing away; one of which a
    side grows is interpolated bilinearly.

    Args:
        frame: uint8 RGB [H, W, 3] in any memory order; not changed.
        spec: the detector's declared preprocessing.

    Returns:
        uint8 RGB [T, height, width, 3], one for each tile (T = 1 without tiling), C-contiguous. It never
        shares memory with `frame`.

    Raises:
        ImageError: see `check_frame`.
    """
    check_frame(frame, spec)
    boxes = tile_boxes(frame.shape, spec)
    out = np.empty((len(boxes), spec.height, spec.width, 3), np.uint8)
    for place, box in enumerate(boxes):
        # Cropping before the rotation moves the same pixels, and far fewer of them.
        source = _unrotated(box, frame.shape, spec)
        part = frame[source.y : source.y + source.height, source.x : source.x + source.width]
        if spec.rotate:
            part = np.asarray(cv2.rotate(part, _ROTATION[spec.rotate]), dtype=np.uint8)
        if part.shape[:2] == (spec.height, spec.width):
            out[place] = part
        else:
            shrinks = box.width >= spec.width and box.height >= spec.height
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            cv2.resize(part, (spec.width, spec.height), dst=out[place], interpolation=how)
    return out


def stack(frames: Iterable[Frame]) -> Frame:
    """Prepared frames, each [T, h, w, 3], as one batch."""
    return np.concatenate(list(frames))


def tile_count(spec: Preprocessing) -> int:
    """How many tiles a frame becomes."""
    return spec.tiles.columns * spec.tiles.rows if spec.tiles is not None else 1


def tile_boxes(frame_shape: Shape, spec: Preprocessing) -> list[Region]:
    """Tiles in pixels of the rotated frame, row by row: equal in size, together exactly the region of
    interest, neighbours sharing at least about `overlap` of a side."""
    roi = _roi(frame_shape, spec)
    if spec.tiles is None:
        return [roi]
    columns = _spans(roi.x, roi.width, spec.tiles.columns, spec.tiles.overlap)
    rows = _spans(roi.y, roi.height, spec.tiles.rows, spec.tiles.overlap)
    return [Region(x, y, width, height) for y, height in rows for x, width in columns]


def merge_maps(maps: NDArray[np.float32], frame_shape: Shape, spec: Preprocessing) -> NDArray[np.float32]:
    """Maps of tiles -> one map over the region of interest; where tiles overlap the larger value counts.

    Args:
        maps: float32 [T, h, w], one for each tile.
        frame_shape: (H, W, ...) of the source frame.
        spec: the detector's declared preprocessing.

    Returns:
        float32 [h2, w2] in the resolution of the tiles' maps; their values are placed, never resampled.
        Without tiles, a view of `maps[0]`.
    """
    boxes = tile_boxes(frame_shape, spec)
    if len(boxes) == 1:
        return np.asarray(maps[0])
    first, last = boxes[0], boxes[-1]
    height, width = maps.shape[1:]
    merged = np.full(
        (
            _scaled(last.y - first.y, height, first.height) + height,
            _scaled(last.x - first.x, width, first.width) + width,
        ),
        -np.inf,
        np.float32,
    )
    for box, tile in zip(boxes, maps, strict=True):
        top = _scaled(box.y - first.y, height, first.height)
        left = _scaled(box.x - first.x, width, first.width)
        window = merged[top : top + height, left : left + width]
        np.maximum(window, tile, out=window)
    return merged


def to_frame(box: Region, map_shape: Shape, frame_shape: Shape, spec: Preprocessing) -> Region:
    """A rectangle in pixels of the (merged) map -> the pixels of the source frame that it touches."""
    roi = _roi(frame_shape, spec)
    left = min(box.x * roi.width // map_shape[1], roi.width - 1)
    top = min(box.y * roi.height // map_shape[0], roi.height - 1)
    right = min(-(-(box.x + box.width) * roi.width // map_shape[1]), roi.width)
    bottom = min(-(-(box.y + box.height) * roi.height // map_shape[0]), roi.height)
    inside = Region(roi.x + left, roi.y + top, max(right - left, 1), max(bottom - top, 1))
    return _unrotated(inside, frame_shape, spec)


def map_to_frame(anomaly_map: NDArray[np.float32], frame_shape: Shape, spec: Preprocessing) -> NDArray[np.float32]:
    """The map in the resolution and orientation of the source frame: float32 [H, W].

    Outside the region of interest it is the map's minimum: nothing was looked at there.
    """
    roi = _roi(frame_shape, spec)
    scaled = cv2.resize(anomaly_map, (roi.width, roi.height), interpolation=cv2.INTER_LINEAR)
    if spec.rotate:
        scaled = cv2.rotate(scaled, _ROTATION[360 - spec.rotate])
    place = _unrotated(roi, frame_shape, spec)
    if (place.height, place.width) == tuple(frame_shape[:2]):
        return np.asarray(scaled, dtype=np.float32)
    full = np.full(frame_shape[:2], anomaly_map.min(), np.float32)
    full[place.y : place.y + place.height, place.x : place.x + place.width] = scaled
    return full


def _spans(start: int, length: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """`count` equal spans that cover `length` pixels, neighbours sharing `overlap` of a span."""
    side = min(length, math.ceil(length / (count - (count - 1) * overlap)))
    return [(start + _scaled(place, length - side, max(count - 1, 1)), side) for place in range(count)]


def _scaled(value: int, numerator: int, denominator: int) -> int:
    """`value * numerator / denominator`, halves rounded up.

    Rounding to even could leave a gap of one pixel between two neighbours; this cannot.
    """
    return (2 * value * numerator + denominator) // (2 * denominator)


def _rotated_shape(frame_shape: Shape, spec: Preprocessing) -> tuple[int, int]:
    height, width = frame_shape[0], frame_shape[1]
    return (width, height) if spec.rotate in (90, 270) else (height, width)


def _roi(frame_shape: Shape, spec: Preprocessing) -> Region:
    if spec.roi is not None:
        return spec.roi
    height, width = _rotated_shape(frame_shape, spec)
    return Region(0, 0, width, height)


def _unrotated(box: Region, frame_shape: Shape, spec: Preprocessing) -> Region:
    """A rectangle of the rotated frame in pixels of the source frame."""
    height, width = frame_shape[0], frame_shape[1]
    if spec.rotate == 90:
        return Region(box.y, height - box.x - box.width, box.height, box.width)
    if spec.rotate == 180:
        return Region(width - box.x - box.width, height - box.y - box.height, box.width, box.height)
    if spec.rotate == 270:
        return Region(width - box.y - box.height, box.x, box.height, box.width)
    return box
