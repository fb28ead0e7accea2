"""Frames: decode files, and the ONE way from a frame to what a trunk sees, and back.

Fitting, exporting and running all call `prepare`; so a bank that was built on a server and a frame that a
camera sees cannot differ in preprocessing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError, storage_errors
from edgead.runtime.spec import DEFAULT_LIMITS, Limits, Preprocessing, Region

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Frame = NDArray[np.uint8]
Shape = tuple[int, ...]

_ROTATION = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


def decode(data: bytes, *, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Decode an image file's bytes: PNG, JPEG, BMP, TIFF or WebP, told by content and not by name.

    16-bit images keep their upper 8 bits; grey becomes three equal channels; an alpha channel is dropped;
    an EXIF orientation is applied; CMYK is converted; of an animation the first picture counts.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ImageError: empty, truncated, damaged, over the limits, floating point, or no image at all.
    """
    if not data:
        raise _refusal(name, "an empty file")
    if len(data) > limits.image_bytes:
        raise _refusal(name, f"{len(data)} bytes, more than the limit of {limits.image_bytes}")
    size = _declared_size(data)
    if size is None:
        raise _refusal(name, "content that is none of PNG, JPEG, BMP, TIFF, WebP")
    if size[0] * size[1] > limits.image_pixels or max(size) > 65536:
        raise _refusal(name, f"{size[0]} x {size[1]} pixels, more than the limit of {limits.image_pixels}")
    if not _is_whole(data):
        raise _refusal(name, "a truncated file")
    buffer = np.frombuffer(data, np.uint8)
    try:
        picture = cv2.imdecode(buffer, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except (cv2.error, MemoryError) as error:
        raise _refusal(name, f"content that cannot be decoded ({str(error).strip()[:120]})") from error
    if picture is None or picture.size == 0:
        raise _refusal(name, "content that cannot be decoded")
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.dtype != np.uint8:
        raise _refusal(name, f"{picture.dtype} samples")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_image(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Read and decode an image file.

    Raises:
        ImageError: see `decode`.
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "to read an image"), open(path, "rb") as stream:
        data = stream.read(limits.image_bytes + 1)
    return decode(data, name=str(path), limits=limits)


def encode_png(frame: Frame) -> bytes:
    """A frame, uint8 RGB [H, W, 3], as PNG bytes; the same frame gives the same bytes."""
    done, data = cv2.imencode(
        ".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 6]
    )
    if not done:
        raise ImageError(wanted="a frame to encode as PNG", got=f"{frame.dtype} {list(frame.shape)}")
    return data.tobytes()


def encode_jpeg(frame: Frame, quality: int = 88) -> bytes:
    """A frame, uint8 RGB [H, W, 3], as JPEG bytes."""
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not done:
        raise ImageError(wanted="a frame to encode as JPEG", got=f"{frame.dtype} {list(frame.shape)}")
    return data.tobytes()


def is_image_path(path: Path) -> bool:
    """Whether a path's name ends like an image file's and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: str | Path) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted by path; hidden ones are left out.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            wanted=f"a folder of images at {folder}",
            got="a file" if folder.exists() else "nothing there",
            next_step="Check the path.",
        )
    found = sorted(path for path in folder.rglob("*") if is_image_path(path) and path.is_file())
    if not found:
        raise InputError(
            wanted=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}",
            got="none",
            next_step="Put photographs there, or name another folder.",
        )
    return found


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
        raise ImageError(
            wanted="a frame with pixels", got=f"{list(frame.shape)}", next_step="Check the camera."
        )
    roi = spec.roi
    if roi is not None and (roi.x + roi.width > width or roi.y + roi.height > height):
        raise ImageError(
            wanted=f"a frame that holds the region of interest {roi.x},{roi.y},{roi.width},{roi.height}",
            got=f"{width} x {height} pixels after rotation",
            next_step="Use the camera resolution that the detector was fitted for.",
        )


def prepare(frame: Frame, spec: Preprocessing) -> Frame:
    """Rotate, crop, tile and resize a frame as declared: the only such code in edgead.

    A side that shrinks is averaged by area, which keeps small defects from aliasing away; one that grows is
    interpolated bilinearly.

    Args:
        frame: uint8 RGB [H, W, 3]; not changed.
        spec: the detector's declared preprocessing.

    Returns:
        uint8 RGB [T, height, width, 3], one for each tile (T = 1 without tiling), C-contiguous.

    Raises:
        ImageError: see `check_frame`.
    """
    check_frame(frame, spec)
    turned = cv2.rotate(frame, _ROTATION[spec.rotate]) if spec.rotate else frame
    boxes = tile_boxes(frame.shape, spec)
    out = np.empty((len(boxes), spec.height, spec.width, 3), np.uint8)
    for place, box in enumerate(boxes):
        part = turned[box.y : box.y + box.height, box.x : box.x + box.width]
        if part.shape[:2] == (spec.height, spec.width):
            out[place] = part
        else:
            shrinks = box.width >= spec.width and box.height >= spec.height
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            cv2.resize(part, (spec.width, spec.height), dst=out[place], interpolation=how)
    return out


def tile_count(spec: Preprocessing) -> int:
    """How many tiles a frame becomes."""
    return spec.tiles.columns * spec.tiles.rows if spec.tiles is not None else 1


def tile_boxes(frame_shape: Shape, spec: Preprocessing) -> list[Region]:
    """Tiles in pixels of the rotated frame, row by row; together they cover the region of interest."""
    roi = _roi(frame_shape, spec)
    if spec.tiles is None:
        return [roi]
    columns = _spans(roi.x, roi.width, spec.tiles.columns, spec.tiles.overlap)
    rows = _spans(roi.y, roi.height, spec.tiles.rows, spec.tiles.overlap)
    return [Region(x, y, width, height) for y, height in rows for x, width in columns]


def _spans(start: int, length: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """`count` equal spans that cover `length` pixels, neighbours sharing `overlap` of a span."""
    side = min(length, int(np.ceil(length / (count - (count - 1) * overlap))))
    step = (length - side) / max(count - 1, 1)
    return [(start + round(place * step), side) for place in range(count)]


def merge_maps(maps: NDArray[np.float32], frame_shape: Shape, spec: Preprocessing) -> NDArray[np.float32]:
    """Maps of tiles -> one map over the region of interest; where tiles overlap the larger value counts.

    Args:
        maps: float32 [T, h, w], one for each tile.
        frame_shape: (H, W, ...) of the source frame.
        spec: the detector's declared preprocessing.

    Returns:
        float32 [h2, w2]; a tile keeps about its resolution. Without tiles, a view of `maps[0]`.
    """
    boxes = tile_boxes(frame_shape, spec)
    if len(boxes) == 1:
        return np.asarray(maps[0])
    roi = _roi(frame_shape, spec)
    scale_x, scale_y = maps.shape[2] / boxes[0].width, maps.shape[1] / boxes[0].height
    width, height = max(1, round(roi.width * scale_x)), max(1, round(roi.height * scale_y))
    merged = np.full((height, width), -np.inf, np.float32)
    for box, tile in zip(boxes, maps, strict=True):
        left, top = round((box.x - roi.x) * scale_x), round((box.y - roi.y) * scale_y)
        right = min(width, round((box.x + box.width - roi.x) * scale_x))
        bottom = min(height, round((box.y + box.height - roi.y) * scale_y))
        if (bottom - top, right - left) != tile.shape:
            tile = cv2.resize(tile, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
        window = merged[top:bottom, left:right]
        np.maximum(window, tile, out=window)
    return merged


def to_frame(box: Region, map_shape: Shape, frame_shape: Shape, spec: Preprocessing) -> Region:
    """A rectangle in pixels of the (merged) map -> the pixels of the source frame that it touches."""
    roi = _roi(frame_shape, spec)
    scale_x, scale_y = roi.width / map_shape[1], roi.height / map_shape[0]
    left, top = int(box.x * scale_x), int(box.y * scale_y)
    right = max(left + 1, min(roi.width, int(np.ceil((box.x + box.width) * scale_x))))
    bottom = max(top + 1, min(roi.height, int(np.ceil((box.y + box.height) * scale_y))))
    x, y, width, height = roi.x + left, roi.y + top, right - left, bottom - top
    full_height, full_width = frame_shape[0], frame_shape[1]
    if spec.rotate == 90:
        return Region(y, full_height - x - width, height, width)
    if spec.rotate == 180:
        return Region(full_width - x - width, full_height - y - height, width, height)
    if spec.rotate == 270:
        return Region(full_width - y - height, x, height, width)
    return Region(x, y, width, height)


def map_to_frame(
    anomaly_map: NDArray[np.float32], frame_shape: Shape, spec: Preprocessing
) -> NDArray[np.float32]:
    """The map in the resolution and orientation of the source frame: float32 [H, W].

    Outside the region of interest it is the map's minimum: nothing was looked at there.
    """
    roi = _roi(frame_shape, spec)
    rotated = _rotated_shape(frame_shape, spec)
    scaled = cv2.resize(anomaly_map, (roi.width, roi.height), interpolation=cv2.INTER_LINEAR)
    if (roi.height, roi.width) == rotated:
        full = scaled
    else:
        full = np.full(rotated, anomaly_map.min(), np.float32)
        full[roi.y : roi.y + roi.height, roi.x : roi.x + roi.width] = scaled
    if spec.rotate:
        full = cv2.rotate(full, _ROTATION[360 - spec.rotate])
    return np.asarray(full, dtype=np.float32)


def _rotated_shape(frame_shape: Shape, spec: Preprocessing) -> tuple[int, int]:
    height, width = frame_shape[0], frame_shape[1]
    return (width, height) if spec.rotate in (90, 270) else (height, width)


def _roi(frame_shape: Shape, spec: Preprocessing) -> Region:
    if spec.roi is not None:
        return spec.roi
    height, width = _rotated_shape(frame_shape, spec)
    return Region(0, 0, width, height)


def _refusal(name: str, got: str) -> ImageError:
    return ImageError(
        wanted=f"an image in {name}", got=got, next_step="Replace the file, or leave it out of the folder."
    )


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them, before anything is decoded; None for unknown formats."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack(">II", data[16:24])
            return width, height
        if data.startswith(b"\xff\xd8"):
            return _jpeg_size(data)
        if data.startswith(b"BM"):
            width, height = struct.unpack("<ii", data[18:26])
            return abs(width), abs(height)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_size(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_size(data)
    except (struct.error, IndexError):
        return None
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    position = 2
    while position + 9 < len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        else:
            position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    return None


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:2] == b"II" else ">"
    (offset,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[offset : offset + 2])
    found: dict[int, int] = {}
    for entry in range(count):
        start = offset + 2 + 12 * entry
        tag, kind = struct.unpack(order + "HH", data[start : start + 4])
        if tag in (256, 257):
            value = data[start + 8 : start + 12]
            found[tag] = struct.unpack(order + ("H" if kind == 3 else "I"), value[: 2 if kind == 3 else 4])[0]
    return (found[256], found[257]) if len(found) == 2 else None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _is_whole(data: bytes) -> bool:
    """Whether the file has its end. Decoders fill what is missing with grey and say nothing."""
    if data.startswith(b"\x89PNG"):
        return _png_is_whole(data)
    if data.startswith(b"\xff\xd8"):
        # Cameras pad behind the end marker; entropy-coded data never holds it.
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") >= 0
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") <= len(data)
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return True


def _png_is_whole(data: bytes) -> bool:
    import zlib

    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if end > len(data):
            return False
        kind = data[position + 4 : position + 8]
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack(">I", data[end - 4 : end])[0]:
            return False
        if kind == b"IEND":
            return True
        position = end
    return False


def stack(frames: Iterable[Frame]) -> Frame:
    """Prepared frames, each [T, h, w, 3], as one batch."""
    return np.concatenate(list(frames))
