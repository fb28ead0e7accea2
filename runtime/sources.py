"""Where frames come from: a picture, a folder, a video file, a camera."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EdgeadError, InputError
from edgead.runtime.image import is_image_path, list_images, read_image

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts to reach a camera that is gone; doubled each time up to the longest."""


@dataclass(frozen=True)
class SourceFrame:
    """One frame, or why there is none.

    Attributes:
        name: path of the picture, or the source with '#' and the number of the frame.
        frame: uint8 RGB [H, W, 3]; None if it could not be had.
        problem: why not.
    """

    name: str
    frame: NDArray[np.uint8] | None
    problem: str | None = None


def open_source(source: str) -> tuple[Iterator[SourceFrame], int | None]:
    """Frames of a source, and how many there will be (None if nobody knows).

    Args:
        source: a picture, a folder of pictures, a video file, a camera's number ('0') or device
            ('/dev/video0'), or a stream's address ('rtsp://...').

    Raises:
        InputError: there is no such source.
    """
    if source.isdecimal() or "://" in source or source.startswith("/dev/"):
        return _camera(source), None
    path = Path(source)
    if path.is_dir():
        paths = list_images(path)
        return _pictures(paths), len(paths)
    if not path.exists():
        raise InputError(
            wanted=f"a picture, folder, video or camera at {source}",
            got="nothing there",
            next_step="Check the path; cameras are 0, /dev/video0 or rtsp://...",
        )
    if is_image_path(path):
        return _pictures([path]), 1
    return _video(path)


def _pictures(paths: list[Path]) -> Iterator[SourceFrame]:
    for path in paths:
        try:
            yield SourceFrame(str(path), read_image(path))
        except EdgeadError as error:
            yield SourceFrame(str(path), None, f"not readable: {error.got}")


def _video(path: Path) -> tuple[Iterator[SourceFrame], int | None]:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise InputError(
            wanted=f"a picture or video in {path}",
            got="a file that is neither",
            next_step="Use PNG, JPEG, BMP, TIFF, WebP, or a video that OpenCV reads.",
        )
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def frames() -> Iterator[SourceFrame]:
        try:
            number = 0
            while True:
                there, picture = capture.read()
                if not there:
                    return
                yield SourceFrame(f"{path}#{number}", _rgb(picture))
                number += 1
        finally:
            capture.release()

    return frames(), count if count > 0 else None


def _camera(source: str) -> Iterator[SourceFrame]:
    """Frames of a camera without end; one that goes away is opened again, with growing pauses."""
    number, pause = 0, FIRST_PAUSE
    capture: cv2.VideoCapture | None = None
    try:
        while True:
            if capture is None:
                capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
            there, picture = capture.read() if capture.isOpened() else (False, None)
            if there and picture is not None:
                pause = FIRST_PAUSE
                yield SourceFrame(f"{source}#{number}", _rgb(picture))
                number += 1
                continue
            capture.release()
            capture = None
            yield SourceFrame(f"{source}#{number}", None, f"camera gave no frame; next attempt in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    finally:
        if capture is not None:
            capture.release()


def _rgb(picture: Any) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
