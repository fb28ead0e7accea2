"""Image files: decode, list, encode.

The way from a frame to the engine and back is `edgead.runtime.preprocess`, whose names are found here too;
results are drawn by `edgead.runtime.overlay`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError, storage_errors
from edgead.runtime.image_header import Unfit, inspect_header
from edgead.runtime.preprocess import (
    Frame,
    check_frame,
    map_to_frame,
    merge_maps,
    prepare,
    stack,
    tile_boxes,
    tile_count,
    to_frame,
)
from edgead.runtime.spec import DEFAULT_LIMITS, Limits

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_BAND = 2**22
"""Pixels whose channels are put in order in one go: bounds the second copy of a large picture."""


def decode(data: bytes, *, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Decode an image file's bytes: PNG, JPEG, BMP, TIFF or WebP, told by content and not by name.

    16-bit samples keep their upper 8 bits; grey becomes three equal channels; an alpha channel is dropped,
    the colours stay as stored; the Exif orientation is applied. Refused, because they would not decode
    exactly: animations, several pages, CMYK, TIFF with alpha, signed or floating point samples.

    Args:
        data: the whole file.
        name: what messages call it.
        limits: most bytes and pixels.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ImageError: empty, truncated, damaged, over the limits, of a refused kind, or no image at all.
    """
    if len(data) > limits.image_bytes:
        raise _refusal(name, f"more than the limit of {limits.image_bytes} bytes")
    try:
        header = inspect_header(data, limits)
    except Unfit as error:
        raise _refusal(name, str(error)) from error
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if picture is None or picture.shape != (header.height, header.width, 3):
            raise _refusal(name, f"a damaged {header.kind}")
        if picture.dtype not in (np.uint8, np.uint16):
            raise _refusal(name, f"a {header.kind} of {picture.dtype} samples")
        return _upright(_rgb8(picture), header.orientation)
    except (cv2.error, MemoryError) as error:
        raise _refusal(name, f"a {header.kind} that cannot be decoded here ({_brief(error)})") from error


def read_image(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Read and decode an image file: uint8 RGB [H, W, 3].

    Raises:
        ImageError: see `decode`.
        StorageError: the file cannot be read.
    """
    with storage_errors(path, "to read an image"), open(path, "rb") as stream:
        data = stream.read(limits.image_bytes + 1)
    return decode(data, name=str(path), limits=limits)


def encode_png(frame: Frame) -> bytes:
    """A frame, uint8 RGB [H, W, 3], as PNG bytes; the same frame gives the same bytes.

    Raises:
        ImageError: not such a frame.
    """
    return _encoded(frame, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 6])


def encode_jpeg(frame: Frame, quality: int = 88) -> bytes:
    """A frame, uint8 RGB [H, W, 3], as JPEG bytes of quality 1 to 100.

    Raises:
        ImageError: not such a frame, or a side of more than 65535 pixels.
    """
    return _encoded(frame, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def is_image_path(path: Path) -> bool:
    """Whether a path's name ends like an image file's and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: str | Path) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted by path; hidden files and folders are left out.

    Raises:
        InputError: there is no such folder, or no image in it.
        StorageError: the folder cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            wanted=f"a folder of images at {folder}",
            got="a file" if folder.exists() else "nothing there",
            next_step="Check the path.",
        )
    with storage_errors(folder, "to list images"):
        found = sorted(path for path in folder.rglob("*") if _is_listed(path, folder))
    if not found:
        raise InputError(
            wanted=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}",
            got="none",
            next_step="Put photographs there, or name another folder.",
        )
    return found


def _is_listed(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and is_image_path(path) and path.is_file()


def _rgb8(picture: NDArray[Any]) -> Frame:
    """BGR of 8 or 16 bits -> RGB of 8, band by band; 8-bit pictures are changed in place."""
    out: Frame = picture if picture.dtype == np.uint8 else np.empty(picture.shape, np.uint8)
    rows = max(1, _BAND // picture.shape[1])
    for top in range(0, picture.shape[0], rows):
        band = picture[top : top + rows]
        eight: Frame = band if band.dtype == np.uint8 else (band >> 8).astype(np.uint8)
        cv2.cvtColor(eight, cv2.COLOR_BGR2RGB, dst=out[top : top + rows])
    return out


def _upright(frame: Frame, orientation: int) -> Frame:
    """Undo an Exif orientation (Exif 2.32, table 6): where the stored row 0 and column 0 belong."""
    if orientation >= 5:
        frame = np.asarray(cv2.transpose(frame), dtype=np.uint8)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return frame if flip is None else np.asarray(cv2.flip(frame, flip), dtype=np.uint8)


def _encoded(frame: Frame, suffix: str, options: list[int]) -> bytes:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise _not_encodable(frame)
    try:
        done, data = cv2.imencode(suffix, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)
    except cv2.error as error:
        raise _not_encodable(frame) from error
    if not done:
        raise _not_encodable(frame)
    return bytes(data)


def _not_encodable(frame: Frame) -> ImageError:
    return ImageError(
        wanted="a frame as uint8 RGB [H, W, 3] to encode",
        got=f"{frame.dtype} {list(frame.shape)}",
        next_step="Convert it, or make it smaller.",
    )


def _refusal(name: str, got: str) -> ImageError:
    return ImageError(
        wanted=f"a picture in {name}",
        got=got,
        next_step="Replace it by an 8-bit RGB or grey PNG or JPEG, or leave it out.",
    )


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["out of memory"])[0][:160]


__all__ = [
    "IMAGE_SUFFIXES",
    "Frame",
    "check_frame",
    "decode",
    "encode_jpeg",
    "encode_png",
    "is_image_path",
    "list_images",
    "map_to_frame",
    "merge_maps",
    "prepare",
    "read_image",
    "stack",
    "tile_boxes",
    "tile_count",
    "to_frame",
]
