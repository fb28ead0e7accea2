"""The last frames that a device saw, kept for a shadow replay: a ring of PNG files of bounded number."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.disk import PART, Disk, RealDisk
from edgead.runtime.errors import EdgeadError, StorageError
from edgead.runtime.image import decode, encode_png
from edgead.runtime.spec import DEFAULT_LIMITS

_SUFFIX = ".png"


class FrameRing:
    """A ring of frames. One process adds; any may read. Frames are lost rather than a disk worn out by syncing them.

    Args:
        folder: of the frames, such as `Store.frames`.
        keep: most frames.
        every_s: seconds between two frames that are kept.
        disk: takes the steps.
    """

    def __init__(self, folder: Path, *, keep: int = 32, every_s: float = 10.0, disk: Disk | None = None) -> None:
        self._folder = folder
        self._keep = keep
        self._every = every_s
        self._disk = disk or RealDisk()
        self._next: int | None = None
        self._due = float("-inf")

    def due(self, now: float) -> bool:
        """Whether it is time for a frame."""
        return now >= self._due

    def add(self, frame: NDArray[np.uint8], now: float) -> bool:
        """Keep a frame if it is time for one.

        Args:
            frame: uint8 RGB [H, W, 3].
            now: seconds on any clock that does not go back.

        Returns:
            whether it was kept; a disk that refuses is no reason to stop inspecting.
        """
        if not self.due(now):
            return False
        self._due = now + self._every
        try:
            self._disk.make_folder(self._folder)
            if self._next is None:
                self._next = max(self._numbers(), default=-1) + 1
            path = self._folder / f"{self._next:09d}{_SUFFIX}"
            part = path.with_name(path.name + PART)
            self._disk.write(part, [encode_png(frame)])
            self._disk.replace(part, path)
            self._next += 1
            for number in self._numbers()[: -self._keep]:
                self._disk.remove(self._folder / f"{number:09d}{_SUFFIX}")
        except (OSError, EdgeadError):
            return False
        return True

    def read(self, most: int | None = None) -> list[tuple[str, NDArray[np.uint8]]]:
        """The last frames with their names, oldest first; damaged ones are left out.

        Args:
            most: how many; None for all.
        """
        found = []
        for number in self._numbers()[-(most or self._keep) :]:
            path = self._folder / f"{number:09d}{_SUFFIX}"
            with contextlib.suppress(OSError, EdgeadError):
                data = self._disk.read(path, DEFAULT_LIMITS.image_bytes)
                found.append((path.name, decode(data, name=path.name)))
        return found

    def _numbers(self) -> list[int]:
        try:
            names = self._disk.names(self._folder)
        except (OSError, StorageError):
            return []
        stems = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
