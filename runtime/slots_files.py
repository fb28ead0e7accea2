"""The files of a store that never change: packs, engines and release records, each under its SHA-256.

A file appears whole or not at all, and is checked against its name whenever it is read. So a name that two releases
share is one file, and a damaged one can be told from a good one without asking anybody.

Beside them lie the plans that this device compiled from an engine, in `plans/<SHA-256 of the engine>/`. They are
checked by whoever uses them, and go when their engine goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from edgead.runtime.disk import PART, Disk, put_file
from edgead.runtime.errors import BundleError, OutOfMemoryError, StorageError, StoreDamagedError, storage_errors

PACKS, ENGINES, RELEASES = "packs", "engines", "releases"
PLANS = "plans"
_SUFFIX = {PACKS: ".safetensors", ENGINES: ".edgead", RELEASES: ".json"}
_ENGINE = re.compile(r"([0-9a-f]{64})\.edgead\Z")


class StoreFiles:
    """Content-addressed files in a folder. Writing is for one process at a time; reading is for any.

    Args:
        folder: of the store.
        disk: takes the steps.
        reserve_bytes: stay free on the disk whatever is written.
        make_room: frees what nobody needs, called when space is short.
    """

    def __init__(self, folder: Path, disk: Disk, reserve_bytes: int, make_room: Callable[[], object]) -> None:
        self.folder = folder
        self._disk = disk
        self._reserve = reserve_bytes
        self._make_room = make_room

    def path(self, kind: str, digest: str) -> Path:
        """Where a file lies or would lie."""
        return self.folder / kind / (digest + _SUFFIX[kind])

    def damage(self, kind: str, digest: str, size: int | None = None) -> str:
        """What is wrong with a file, as a phrase; empty if nothing is. Reads all of it, holds little of it.

        Args:
            kind: PACKS, ENGINES or RELEASES.
            digest: its SHA-256.
            size: its bytes, if they are known.
        """
        path = self.path(kind, digest)
        try:
            found = self._disk.size(path)
            if size is not None and found != size:
                return f"{found} bytes instead of {size}"
            whole = hashlib.sha256()
            for chunk in self._disk.chunks(path):
                whole.update(chunk)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"unreadable ({error.strerror or error})"
        return "" if whole.hexdigest() == digest else "damaged"

    def read(self, kind: str, digest: str, limit: int) -> bytes:
        """The content of a file, checked against its name.

        Args:
            kind: PACKS, ENGINES or RELEASES.
            digest: its SHA-256.
            limit: most bytes that it may have.

        Raises:
            StoreDamagedError: missing, unreadable, damaged or over the limit; names the file to fetch.
        """
        path = self.path(kind, digest)
        try:
            data = self._disk.read(path, limit + 1)
        except FileNotFoundError:
            raise self.damaged({self.name(kind, digest): "missing"}) from None
        except OSError as error:
            raise self.damaged({self.name(kind, digest): f"unreadable ({error.strerror or error})"}) from error
        if len(data) > limit or hashlib.sha256(data).hexdigest() != digest:
            raise self.damaged({self.name(kind, digest): "damaged"})
        return data

    def put(self, kind: str, digest: str, chunks: Iterable[bytes], size: int) -> None:
        """Have a file; one that is there and sound is let be.

        Raises:
            StorageError: not enough space, or the file system refused. Nothing is left half-written.
        """
        path = self.path(kind, digest)
        if not self.damage(kind, digest, size):
            return
        self.need_space(size)
        put_file(self._disk, path, chunks)

    def adopt(self, kind: str, digest: str, source: Path) -> None:
        """Take a file that lies elsewhere on the same file system, and whose content was checked, by renaming it.

        Raises:
            StorageError: the file system refused.
        """
        target = self.path(kind, digest)
        with storage_errors(target, "to take a file"):
            self._disk.sync(source)
            self._disk.replace(source, target)
            self._disk.sync_folder(target.parent)

    def need_space(self, size: int) -> None:
        """Have room for so many bytes, after removing what nobody needs if it must be.

        Raises:
            StorageError: there is too little even then.
        """
        with storage_errors(self.folder, "to ask for free space"):
            if self._disk.free_space(self.folder) >= size + self._reserve:
                return
            self._make_room()
            free = self._disk.free_space(self.folder)
        if free < size + self._reserve:
            raise StorageError(
                wanted=f"{size} bytes and a reserve of {self._reserve} free at {self.folder}",
                got=f"{free}",
                next_step="Free some space on this device; the active release is as it was.",
            )

    def names(self, kind: str) -> list[str]:
        """Names of all files of a kind, whole or not.

        Raises:
            StorageError: the folder cannot be read.
        """
        with storage_errors(self.folder / kind, "to list a folder"):
            return self._disk.names(self.folder / kind)

    def digests(self, kind: str) -> list[str]:
        """Those whose files are there, sound or not."""
        suffix = _SUFFIX[kind]
        return [name[: -len(suffix)] for name in self.names(kind) if name.endswith(suffix)]

    def remove_parts(self) -> None:
        """Remove what an interrupted write left.

        Raises:
            StorageError: the file system refused.
        """
        self._remove_if(lambda kind, name: name.endswith(PART))

    def remove_but(self, keep: Collection[str]) -> int:
        """Remove every file that is not among these, and the plans of every engine that is not.

        Args:
            keep: paths in the store, as `name` gives them.

        Returns:
            bytes freed.

        Raises:
            StorageError: the file system refused.
        """
        freed = self._remove_if(lambda kind, name: f"{kind}/{name}" not in keep)
        with storage_errors(self.folder / PLANS, "to remove plans"):
            for name in self._disk.names(self.folder / PLANS):
                if f"{ENGINES}/{name}{_SUFFIX[ENGINES]}" not in keep:
                    freed += self._remove_tree(self.folder / PLANS / name)
        return freed

    def _remove_if(self, unwanted: Callable[[str, str], bool]) -> int:
        freed = 0
        for kind in _SUFFIX:
            for name in self.names(kind):
                if unwanted(kind, name):
                    path = self.folder / kind / name
                    with storage_errors(path, "to remove a file"):
                        freed += self._disk.size(path)
                        self._disk.remove(path)
        return freed

    def _remove_tree(self, path: Path) -> int:
        if path.is_symlink() or not path.is_dir():
            size = 0 if path.is_symlink() else self._disk.size(path)
            self._disk.remove(path)
            return size
        freed = sum(self._remove_tree(path / name) for name in self._disk.names(path))
        with contextlib.suppress(OSError):  # somebody compiles right now; an empty folder costs nothing
            path.rmdir()
        return freed

    def name(self, kind: str, digest: str) -> str:
        """The path of a file in its store, as errors and lists have it."""
        return f"{kind}/{digest}{_SUFFIX[kind]}"

    def damaged(self, reasons: dict[str, str]) -> StoreDamagedError:
        """The error for files that are not sound, by their paths in the store."""
        return StoreDamagedError(
            wanted=f"sound files in the store at {self.folder}",
            got=", ".join(f"{name} {reason}" for name, reason in sorted(reasons.items())),
            next_step="Fetch them whole and put them into the store again.",
            fetch=tuple(sorted(reasons)),
        )


def plans_of(engine: Path) -> Path | None:
    """Where a device keeps the plans that it compiled from an engine of its store; None for any other file."""
    place = engine.absolute()
    found = _ENGINE.match(place.name)
    return place.parent.parent / PLANS / found[1] if found and place.parent.name == ENGINES else None


def checked(chunks: Iterable[bytes], digest: str, size: int) -> Iterator[bytes]:
    """The same chunks; an error instead of their end if they are not the file that they ought to be.

    Raises:
        BundleError: another size or SHA-256.
    """
    whole, length = hashlib.sha256(), 0
    for chunk in chunks:
        length += len(chunk)
        if length > size:
            break
        whole.update(chunk)
        yield chunk
    if length != size or whole.hexdigest() != digest:
        raise BundleError(
            wanted=f"the engine {digest[:12]} of {size} bytes",
            got="more bytes" if length > size else f"{length} bytes, {whole.hexdigest()[:12]}",
            next_step="Fetch it again, as a whole.",
        )


@contextlib.contextmanager
def enough_memory(purpose: str) -> Iterator[None]:
    """Turn `MemoryError` from the block into `OutOfMemoryError`.

    Args:
        purpose: what the memory is for, as a phrase.

    Raises:
        OutOfMemoryError: the block ran out of memory.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(
            wanted=f"memory {purpose}",
            got="too little of it",
            next_step="Fetch the whole pack, make the bank smaller with a coreset, or end other programs.",
        ) from error
