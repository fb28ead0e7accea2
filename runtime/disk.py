"""The disk as the store of a device sees it: the only place that writes, syncs, renames and locks there.

`Disk` is a list of single steps, each of which can fail or be the last one before the power goes; `RealDisk` takes
them for real. `put_file` is the order of steps that makes a file appear whole or not at all. Another `Disk` may
count, refuse or forget steps, so that tests reach every point between two of them.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edgead.runtime.errors import StoreBusyError, storage_errors

PART = ".part"
"""What the name of a file ends with until it is whole."""
_CHUNK = 2**20
_PURPOSE = "to update this device"
_PAUSE_S = 0.02
"""Between two looks at a lock that somebody else holds."""


class Disk(abc.ABC):
    """Single steps on a file system. All of them raise `OSError` when it refuses."""

    @abc.abstractmethod
    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it; one that is there is let be."""

    @abc.abstractmethod
    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Create or empty a file and write into it. Nothing is durable yet."""

    @abc.abstractmethod
    def make_private(self, path: Path) -> None:
        """Create or empty a file that only its owner may read; what is then written into it stays private."""

    @abc.abstractmethod
    def sync(self, path: Path) -> None:
        """Make the content of a file durable."""

    @abc.abstractmethod
    def replace(self, source: Path, target: Path) -> None:
        """Rename a file over another in one step. Not durable yet."""

    @abc.abstractmethod
    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""

    @abc.abstractmethod
    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is let be."""

    @abc.abstractmethod
    def read(self, path: Path, limit: int) -> bytes:
        """The first `limit` bytes of a plain file."""

    @abc.abstractmethod
    def chunks(self, path: Path) -> Iterator[bytes]:
        """A plain file in pieces."""

    @abc.abstractmethod
    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted; none if it is not there."""

    @abc.abstractmethod
    def size(self, path: Path) -> int:
        """Bytes of a file."""

    @abc.abstractmethod
    def free_space(self, folder: Path) -> int:
        """Bytes that may still be written there."""

    @abc.abstractmethod
    def try_lock(self, path: Path) -> int | None:
        """Take the lock of that name, which ends with the process at the latest.

        Returns:
            what `unlock` takes; None if somebody else holds it.
        """

    @abc.abstractmethod
    def unlock(self, lock: int) -> None:
        """Give a lock back."""


class RealDisk(Disk):
    """The file system of this machine."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        # A link that lies in the file's place is not followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o644), "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)

    def make_private(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # one that was there may be open to others
        finally:
            os.close(descriptor)

    def sync(self, path: Path) -> None:
        self._sync(path, os.O_RDONLY)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        try:
            self._sync(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            # Some file systems have no such thing; a fault of the device is not let pass.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def read(self, path: Path, limit: int) -> bytes:
        with _plain(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            # Python takes as much memory as it is asked to read; the file may be far below the limit.
            return stream.read(min(limit, os.fstat(descriptor).st_size + 1))

    def chunks(self, path: Path) -> Iterator[bytes]:
        with _plain(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def free_space(self, folder: Path) -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def try_lock(self, path: Path) -> int | None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def unlock(self, lock: int) -> None:
        os.close(lock)

    def _sync(self, path: Path, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[int]:
    """A descriptor of a plain file; a pipe is not waited for, a link not followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def put_file(disk: Disk, path: Path, chunks: Iterable[bytes], *, private: bool = False) -> None:
    """Give `path` this content, durably; a reader or a power cut sees the old content or the new.

    One writer at a time: the file that is being written has a fixed name beside `path`.

    Args:
        disk: takes the steps.
        path: of the file.
        chunks: its content.
        private: only its owner may read it.

    Raises:
        StorageError: no permission, no space, an I/O fault. `path` has its old content, or all of the new one.
    """
    part = path.with_name(path.name + PART)
    with storage_errors(path, "to write a file"):
        try:
            if private:
                disk.make_private(part)
            disk.write(part, chunks)
            disk.sync(part)
            disk.replace(part, path)
        except BaseException:
            # What cannot be removed now is removed when the store is opened the next time.
            with contextlib.suppress(OSError):
                disk.remove(part)
            raise
        disk.sync_folder(path.parent)


@contextlib.contextmanager
def locked(disk: Disk, path: Path, timeout_s: float, purpose: str) -> Iterator[None]:
    """Hold the lock of that name while the block runs; it ends with the process, however that ends.

    Args:
        disk: where the lock is.
        path: the lock's file, which stays.
        timeout_s: how long to wait for another holder.
        purpose: what it is wanted for, as a phrase ("to update this device").

    Raises:
        StoreBusyError: somebody else held it all that time.
        StorageError: the lock's file cannot be made.
    """
    end = time.monotonic() + timeout_s
    with storage_errors(path, f"a lock {purpose}"):
        while (lock := disk.try_lock(path)) is None:
            if time.monotonic() >= end:
                raise _busy(path, timeout_s, purpose, "process")
            time.sleep(_PAUSE_S)
    try:
        yield
    finally:
        disk.unlock(lock)


class UpdateLock:
    """A lock between processes that its holder may take again, and that threads of one process share one by one.

    Args:
        disk: where the lock is.
        path: the lock's file, which stays.
        prepare: called before the lock is taken.
        clean: called when it was taken, before anything else is done under it.
    """

    def __init__(self, disk: Disk, path: Path, prepare: Callable[[], object], clean: Callable[[], object]) -> None:
        self._disk = disk
        self._path = path
        self._prepare = prepare
        self._clean = clean
        self._mutex = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self, timeout_s: float) -> Iterator[None]:
        """Hold it while the block runs.

        Args:
            timeout_s: how long to wait for another holder.

        Raises:
            StoreBusyError: somebody else held it all that time.
            StorageError: the file system refused.
        """
        end = time.monotonic() + timeout_s
        if not self._mutex.acquire(timeout=timeout_s):
            raise _busy(self._path, timeout_s, _PURPOSE, "thread")
        try:
            if self._depth:
                yield
                return
            self._prepare()
            with locked(self._disk, self._path, max(0.0, end - time.monotonic()), _PURPOSE):
                self._depth += 1
                try:
                    self._clean()
                    yield
                finally:
                    self._depth -= 1
        finally:
            self._mutex.release()


def _busy(path: Path, timeout_s: float, purpose: str, other: str) -> StoreBusyError:
    return StoreBusyError(
        wanted=f"{purpose} at {path.parent}",
        got=f"another {other} that does so, and did not end within {timeout_s:.1f} s",
        next_step="Wait for it, or end it; its lock ends with it.",
    )


__all__ = ["PART", "Disk", "RealDisk", "UpdateLock", "locked", "put_file"]
