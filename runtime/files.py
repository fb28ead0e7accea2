"""Whole files or none: every file that edgead writes goes through here.

A write lands in a temporary neighbour, is synced, and takes its name by `os.replace`; a folder is built
beside its place and renamed into it. A reader, or a power cut, sees the old content or the new, never a half.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgead.runtime.errors import OutputExistsError, storage_errors


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically and durably.

    Raises:
        StorageError: no permission, no space, or an I/O fault; `path` is then as it was.
    """
    with new_file(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Build a file beside `path` and give it that name only if the block succeeds; replaces an old one.

    Yields:
        the stream to write to (seekable).

    Raises:
        StorageError: no permission, no space, or an I/O fault; `path` is then as it was.
    """
    with storage_errors(path, "to write a file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(descriptor, "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.chmod(0o644)
            os.replace(part, path)
            sync_folder(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. File systems without folder sync are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to overwrite `path` unless `force`.

    Raises:
        OutputExistsError: `path` exists and `force` is false.
    """
    if not force and os.path.lexists(path):
        raise OutputExistsError(
            wanted=f"a new output at {path}",
            got="something that is already there",
            next_step="Name another output, or pass --force to replace it.",
        )


@contextlib.contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Build a folder beside `path` and give it that name only if the block succeeds.

    Yields:
        the empty working folder.

    Raises:
        OutputExistsError: `path` exists and `force` is false.
        StorageError: the file system refused; what was at `path` is still there.
    """
    refuse_existing(path, force)
    with storage_errors(path, "to write a folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".part", dir=path.parent))
    try:
        with storage_errors(path, "to write a folder"):
            yield work
            for name in work.rglob("*"):
                if name.is_file():
                    with name.open("rb") as stream:
                        os.fsync(stream.fileno())
                else:
                    sync_folder(name)
            work.chmod(0o755)
            sync_folder(work)
            _take_place(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _take_place(work: Path, path: Path) -> None:
    """Rename `work` to `path`; what is there steps aside first and comes back if that fails."""
    if not os.path.lexists(path):
        os.replace(work, path)
    else:
        aside = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".old", dir=path.parent))
        try:
            os.replace(path, aside / "old")
            try:
                os.replace(work, path)
            except OSError:
                os.replace(aside / "old", path)
                raise
        except OSError:
            # Not removed with its content: if what was there could not go back, it is kept here.
            with contextlib.suppress(OSError):
                aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(path.parent)


def _prefix(path: Path) -> str:
    """Hidden, and short enough for any file system whatever the length of the name."""
    return f".{path.name[:32]}."
