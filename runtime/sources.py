"""Where frames come from: a picture, a folder, a video file, a camera or a network stream.

Pictures and video files are finite and give every frame. A camera is live: it gives what it sees now, and goes on
through outages with back-off. What cannot be read becomes a `Capture` without an image, never an exception in
the middle of a stream.
"""

from __future__ import annotations

import abc
import random
import stat
import threading
import time
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError, StorageError
from edgead.runtime.image import is_image_path, list_images, read_image
from edgead.runtime.spec import DEFAULT_LIMITS, Limits

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0
"""Seconds between attempts to reach a camera again: doubled each time, with jitter."""
FROZEN_AFTER = 10.0
"""Seconds of identical pictures after which a camera counts as frozen: a sensor always has some noise."""
_TIMEOUT_MS = 5000
_SAMPLE = 16
"""Every so-many-th pixel of both axes is compared to find a frozen picture."""


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """One frame of a source, or the word that there is none.

    Attributes:
        name: the file's path, or the source and the frame's number: 'line.mp4#000012'.
        slug: a relative path for files about this frame, without '..'.
        image: uint8 RGB [H, W, 3]; None if it could not be had.
        reason: why there is no image.
        time: UTC time of capture in ISO 8601, for live sources.
    """

    name: str
    slug: str
    image: NDArray[np.uint8] | None
    reason: str | None = None
    time: str | None = None


class Source(abc.ABC):
    """A sequence of captures.

    Attributes:
        live: frames that are not taken in time are lost, and it has no end.
        total: number of frames where it is known before.
    """

    live = False
    total: int | None = None

    @abc.abstractmethod
    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        """The captures in order, without those whose name is in `skip`, which are not decoded either."""

    def close(self) -> None:
        """Let go of the device; from any thread. Captures then end soon."""


class PictureSource(Source):
    """Image files, each read when its turn comes."""

    def __init__(self, paths: list[Path], root: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.paths = paths
        self.root = root
        self.total = len(paths)
        self._limits = limits

    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        for path in self.paths:
            if str(path) not in skip:
                yield self._capture(path)

    def _capture(self, path: Path) -> Capture:
        slug = path.relative_to(self.root).as_posix()
        try:
            return Capture(str(path), slug, read_image(path, self._limits))
        except (ImageError, StorageError) as error:
            return Capture(str(path), slug, None, f"image: {error.got}")


class VideoSource(Source):
    """A video file, every frame of it.

    Raises:
        InputError: OpenCV cannot open it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._video = cv2.VideoCapture(str(path))
        if not self._video.isOpened():
            raise InputError(
                wanted=f"a video that OpenCV can read at {path}",
                got="a damaged file or an unknown codec",
                next_step="Convert it, for example with: ffmpeg -i VIDEO -c:v libx264 NEW.mp4",
            )
        count = int(self._video.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = count if count > 0 else None

    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        index = 0
        while self._video.grab():
            name = f"{self.path}#{index:06d}"
            slug = f"{self.path.name}-{index:06d}"
            index += 1
            if name not in skip:
                done, picture = self._video.retrieve()
                image = _rgb(picture) if done else None
                yield Capture(name, slug, image, None if done else "video: a frame that cannot be decoded")

    def close(self) -> None:
        self._video.release()


class Device(Protocol):
    """What a camera is asked for; `cv2.VideoCapture` is one."""

    def read(self) -> tuple[bool, Any]: ...

    def release(self) -> None: ...


class CameraSource(Source):
    """A camera or network stream that is reached again after every outage.

    An outage (unplugged, no answer, or the same picture for too long) gives one capture with its reason for each
    attempt to end it, so the line knows that nobody looks.

    Args:
        label: what captures are called.
        open_device: opens the device, or gives None.
        frozen_after: seconds of identical pictures that count as an outage; None for never.
        first_wait: seconds before the second attempt; see `LONGEST_WAIT`.

    Raises:
        InputError: the device cannot be opened now.
    """

    live = True

    def __init__(
        self,
        label: str,
        open_device: Callable[[], Device | None],
        *,
        frozen_after: float | None = FROZEN_AFTER,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.label = label
        self._open = open_device
        self._frozen_after = frozen_after
        self._first_wait = first_wait
        self._stop = threading.Event()
        self._count = 0
        self._device = open_device()
        if self._device is None:
            raise InputError(
                wanted=f"a camera at {label}",
                got="none that OpenCV can open",
                next_step="Check the cable, the address and the permissions of the device.",
            )

    def captures(self, skip: Container[str] = ()) -> Iterator[Capture]:
        wait = self._first_wait
        try:
            while not self._stop.is_set():
                device, self._device = self._device or self._open(), None
                reason = "camera: it cannot be opened"
                if device is not None:
                    try:
                        before = self._count
                        reason = yield from self._read(device)
                    finally:
                        device.release()
                    if self._count > before:
                        wait = self._first_wait
                if not self._stop.is_set():
                    yield self._capture(None, reason)
                    self._stop.wait(wait * random.uniform(0.75, 1.25))
                    wait = min(2 * wait, LONGEST_WAIT)
        finally:
            if self._device is not None:
                self._device.release()
                self._device = None

    def close(self) -> None:
        self._stop.set()

    def _read(self, device: Device) -> Generator[Capture, None, str]:
        """Captures until the device fails; returns why."""
        sample: NDArray[np.uint8] | None = None
        changed = time.monotonic()
        while not self._stop.is_set():
            done, picture = device.read()
            if not done or picture is None:
                return "camera: no frame"
            now = time.monotonic()
            if self._frozen_after is not None:
                seen = np.array(picture[::_SAMPLE, ::_SAMPLE])
                if sample is None or not np.array_equal(sample, seen):
                    sample, changed = seen, now
                elif now - changed > self._frozen_after:
                    return "camera: frozen"
            yield self._capture(_rgb(picture), None)
        return "camera: closed"

    def _capture(self, image: NDArray[np.uint8] | None, reason: str | None) -> Capture:
        now = datetime.now(timezone.utc)
        name = f"{self.label}#{self._count:06d}"
        self._count += image is not None
        slug = f"camera-{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}"
        return Capture(name, slug, image, reason, now.isoformat(timespec="milliseconds"))


def open_source(text: str, *, limits: Limits = DEFAULT_LIMITS, frozen_after: float | None = FROZEN_AFTER) -> Source:
    """The source that a word of the command line means.

    Args:
        text: a folder; a picture or video file; a camera's number ('0') or device ('/dev/video0'); or an
            address ('rtsp://...', 'http://...').
        limits: of image files.
        frozen_after: see `CameraSource`.

    Raises:
        InputError: nothing is there, the folder holds no image, or the device cannot be opened.
    """
    if text.isascii() and text.isdigit():
        return CameraSource(f"camera{int(text)}", lambda: _local(int(text)), frozen_after=frozen_after)
    if "://" in text:
        return CameraSource(_without_password(text), lambda: _remote(text), frozen_after=frozen_after)
    path = Path(text)
    if path.is_dir():
        return PictureSource(list_images(path), path, limits)
    if not path.exists():
        raise InputError(
            wanted=f"a folder, picture, video or camera at {text}",
            got="nothing there",
            next_step="Check the path; a camera is a number such as 0, or an address such as rtsp://...",
        )
    if stat.S_ISCHR(path.stat().st_mode):
        return CameraSource(text, lambda: _local(text), frozen_after=frozen_after)
    if path.suffix.lower() in VIDEO_SUFFIXES and not is_image_path(path):
        return VideoSource(path)
    return PictureSource([path], path.parent, limits)


def _local(device: int | str) -> Device | None:
    camera = cv2.VideoCapture(device)
    return _opened(camera)


def _remote(address: str) -> Device | None:
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    # Only this back end knows the limits; without them a silent network blocks a read for ever.
    return _opened(cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits))


def _opened(camera: cv2.VideoCapture) -> Device | None:
    if camera.isOpened():
        return camera
    camera.release()
    return None


def _without_password(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def _rgb(picture: Any) -> NDArray[np.uint8]:
    code = cv2.COLOR_GRAY2RGB if picture.ndim == 2 or picture.shape[2] == 1 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(picture, code), np.uint8)
