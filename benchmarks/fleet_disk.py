"""A disk in memory for each of many devices: names and contents that are there, and those that a power cut leaves.

Contents of any size to speak of are kept once, whoever has them, so that 10,000 stores share their bytes. What a
library opens by its path, which is bundles alone, also lies on the real file system as a link to one file per content.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgead.runtime.disk import Disk

REAL = "engines"
"""Folder whose files also lie on the real file system."""
_CHUNK = 2**20
_SHARED = 256
_FREE = 2**40


class PowerCutError(BaseException):
    """The power went: no code of the device runs on from here."""


class Pool:
    """Contents that are kept once.

    Args:
        folder: for those that also lie on the real file system.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[bytes, bytes] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def one(self, data: bytes) -> bytes:
        """The object that stands for these bytes."""
        return data if len(data) < _SHARED else self._kept.setdefault(data, data)

    def link(self, data: bytes, path: Path) -> None:
        """Have a real file of this content."""
        source = self._folder / hashlib.sha256(data).hexdigest()
        if not source.exists():
            source.write_bytes(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source, path)


class _File:
    __slots__ = ("data", "synced")

    def __init__(self, data: bytes = b"", synced: bytes | None = None) -> None:
        self.data = data
        self.synced = synced


class MemoryDisk(Disk):
    """One device's disk.

    Args:
        folder: of its store; nothing outside of it is known.
        pool: keeps the contents.
        rng: what a power cut leaves of that which was not synced.

    Attributes:
        steps: taken so far that change something.
        cut_at: step before which the power goes; 0 for none.
    """

    def __init__(self, folder: Path, pool: Pool, rng: random.Random) -> None:
        self.steps = 0
        self.cut_at = 0
        self._folder = str(folder)
        self._pool = pool
        self._rng = rng
        self._off = False
        self._folders = {self._folder}
        self._names: dict[str, _File] = {}
        self._platter: dict[str, _File] = {}
        self._locked: set[str] = set()

    def like(self, other: MemoryDisk) -> None:
        """Take the content of another device's disk, all of it durable: as devices are imaged in a factory."""

        def mine(path: str) -> str:
            return self._folder + path.removeprefix(other._folder)

        self._folders = {mine(path) for path in other._folders}
        self._names = {mine(path): _File(file.data, file.data) for path, file in other._names.items()}
        self._platter = dict(self._names)
        self._mirror()

    def content(self, path: Path) -> bytes | None:
        """What a file holds, whatever the device's own code makes of it; None if there is none."""
        file = self._names.get(str(path))
        return None if file is None else file.data

    def restart(self) -> None:
        """The power is back: what was synced is there, and chance decides about the rest."""
        for path in {*self._names, *self._platter}:
            now, then = self._names.get(path), self._platter.get(path)
            if now is not then and self._rng.random() < 0.5:
                if now is None:
                    self._platter.pop(path)
                else:
                    self._platter[path] = now
        for file in {id(file): file for file in self._platter.values()}.values():
            if file.data != file.synced:
                self._lose(file)
        self._names = dict(self._platter)
        self._locked.clear()
        self._off, self.cut_at = False, 0
        self._mirror()

    def make_folder(self, folder: Path) -> None:
        self._step()
        place = str(folder)
        while place.startswith(self._folder) and place not in self._folders:
            self._folders.add(place)
            place = os.path.dirname(place)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        self._step()
        file = self._names.setdefault(str(path), _File())
        file.data = b""
        pieces: list[bytes] = []
        try:
            for piece in chunks:
                self._alive()
                pieces.append(piece)
        finally:
            file.data = self._pool.one(b"".join(pieces))

    def make_private(self, path: Path) -> None:
        self.write(path, ())

    def sync(self, path: Path) -> None:
        self._step()
        file = self._file(path)
        file.synced = file.data

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        file = self._file(source)
        del self._names[str(source)]
        self._names[str(target)] = file
        self._show(target, file)

    def sync_folder(self, folder: Path) -> None:
        self._step()
        start = f"{folder}{os.sep}"
        for path in [*self._names, *self._platter]:
            if path.startswith(start) and os.sep not in path[len(start) :]:
                if path in self._names:
                    self._platter[path] = self._names[path]
                else:
                    self._platter.pop(path, None)

    def remove(self, path: Path) -> None:
        self._step()
        if self._names.pop(str(path), None) is not None and path.parent.name == REAL:
            path.unlink(missing_ok=True)

    def read(self, path: Path, limit: int) -> bytes:
        self._alive()
        data = self._file(path).data
        return data if len(data) <= limit else data[:limit]

    def chunks(self, path: Path) -> Iterator[bytes]:
        self._alive()
        data = self._file(path).data
        if len(data) <= _CHUNK:
            yield data
        else:
            for start in range(0, len(data), _CHUNK):
                yield data[start : start + _CHUNK]

    def names(self, folder: Path) -> list[str]:
        self._alive()
        start = f"{folder}{os.sep}"
        found = {path[len(start) :] for path in (*self._names, *self._folders) if path.startswith(start)}
        return sorted(name for name in found if os.sep not in name)

    def size(self, path: Path) -> int:
        self._alive()
        return len(self._file(path).data)

    def free_space(self, folder: Path) -> int:
        self._alive()
        return _FREE

    def try_lock(self, path: Path) -> int | None:
        self._alive()
        if str(path) in self._locked:
            return None
        self._locked.add(str(path))
        return hash(str(path))

    def unlock(self, lock: int) -> None:
        # A lock ends with its process, so that there is nothing to refuse without power.
        self._locked = {path for path in self._locked if hash(path) != lock}

    def _step(self) -> None:
        self._alive()
        self.steps += 1
        if self.steps == self.cut_at:
            self._off = True
            raise PowerCutError

    def _alive(self) -> None:
        if self._off:
            raise PowerCutError

    def _file(self, path: Path) -> _File:
        file = self._names.get(str(path))
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return file

    def _lose(self, file: _File) -> None:
        """What is on the platter of a file whose last content was not synced."""
        torn = file.data[: self._rng.randrange(len(file.data) + 1)]
        file.data = self._rng.choice((file.synced or b"", torn, bytes(len(file.data))))
        file.synced = file.data

    def _show(self, path: Path, file: _File) -> None:
        if path.parent.name == REAL:
            self._pool.link(file.data, path)

    def _mirror(self) -> None:
        folder = Path(self._folder) / REAL
        if folder.is_dir():
            for path in folder.iterdir():
                path.unlink()
        for name, file in self._names.items():
            self._show(Path(name), file)


class MixingDisk(MemoryDisk):
    """A disk that is broken on purpose: a second pack never reaches the platter, which has the first one under its
    name, while everybody reads the right one from the cache. Shows that a mixed device is noticed."""

    def __init__(self, folder: Path, pool: Pool, rng: random.Random) -> None:
        super().__init__(folder, pool, rng)
        self._cached: dict[str, _File] = {}

    def replace(self, source: Path, target: Path) -> None:
        others = [name for name in self.names(target.parent) if name.endswith(target.suffix) and name != target.name]
        super().replace(source, target)
        if target.parent.name == "packs" and others:
            right = self._names[str(target)]
            self._cached[str(target)] = right
            wrong = self._names[str(target.parent / others[0])].data
            self._names[str(target)] = _File(wrong, wrong)

    def restart(self) -> None:
        self._cached.clear()
        super().restart()

    def _file(self, path: Path) -> _File:
        return self._cached.get(str(path)) or super()._file(path)


__all__ = ["MemoryDisk", "MixingDisk", "Pool", "PowerCutError"]
