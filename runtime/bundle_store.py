"""The two places a bundle can lie in: a folder, or one zip file whose members are stored, not compressed.

A store knows names, sizes and bytes; what they ought to be is the manifest's business. The zip form is
narrow on purpose: no compression, no zip64, no comments, no flags, so that nothing in it can swell or hide.
"""

from __future__ import annotations

import abc
import contextlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from edgead.runtime.bundle_manifest import COMPILED, check_member, refuse
from edgead.runtime.errors import BundleError, storage_errors
from edgead.runtime.spec import Limits

SUFFIX = ".edgead"

_NO_TIME = (1980, 1, 1, 0, 0, 0)
_END_RECORD, _ZIP64_LOCATOR = 22, 20
_LARGEST_ENTRY = 46 + 255
"""Bytes of one entry in a zip's table: its fixed part and the longest name that we allow."""
_LARGEST_ZIP = 2**32 - 2**24
_UTF8_NAME = 0x800


class Store(abc.ABC):
    """Where a bundle's files lie."""

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name; those in `compiled/` are left out.

        Raises:
            BundleError: something that is no plain file, too many of them, or a zip that edgead would not
                write.
            StorageError: the file system refused.
        """

    @abc.abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A stream of one file.

        Raises:
            BundleError: there is no such file, or it is no plain one.
            StorageError: the file system refused.
        """


class FolderStore(Store):
    """A bundle as a folder."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root = root
        self._limits = limits

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with storage_errors(self.root, "to list a bundle"):
            self._walk(self.root, "", found)
        return found

    def _walk(self, folder: Path, prefix: str, found: dict[str, int]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False) and name == COMPILED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    check_member(name)
                    self._walk(Path(entry.path), name + "/", found)
                elif entry.is_file(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    kind = "symbolic link" if entry.is_symlink() else "special file"
                    refuse("plain files and folders only", f"the {kind} {name[:300]!r}")
                if len(found) > self._limits.bundle_files:
                    refuse(f"at most {self._limits.bundle_files} files", "more")

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        # A link or pipe that took the file's place since the listing is neither followed nor waited for.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with storage_errors(self.root / name, "to read a file of a bundle"):
            descriptor = os.open(self.root / name, flags)
            with os.fdopen(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    refuse("plain files and folders only", f"a special file {name!r}")
                yield stream


class ZipStore(Store):
    """A bundle as one zip file of stored members."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self._limits = limits

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._archive() as archive:
            for entry in archive.infolist():
                check_member(entry.filename)
                if entry.filename in found:
                    refuse("every member once", f"{entry.filename!r} twice")
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    refuse("stored members", f"{entry.filename!r} compressed")
                if entry.flag_bits & ~_UTF8_NAME or entry.extra:
                    refuse("plain members", f"{entry.filename!r} encrypted, streamed or with extra fields")
                found[entry.filename] = entry.file_size
        with storage_errors(self.path, "to read a bundle"):
            if sum(found.values()) > self.path.stat().st_size:
                refuse("members side by side", "members that overlap")
        return found

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with self._archive() as archive:
            try:
                stream = archive.open(name)
            except KeyError:
                refuse(f"the file {name!r}", "none of that name")
            with stream:
                yield stream

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with storage_errors(self.path, "to read a bundle"), self.path.open("rb") as stream:
            self._check_end(stream)
            try:
                with zipfile.ZipFile(stream) as archive:
                    yield archive
            # zipfile answers broken headers with all of these.
            except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, struct.error, zlib.error) as error:
                refuse("a sound zip structure", f"a damaged one ({error})")

    def _check_end(self, stream: BinaryIO) -> None:
        """Look at the last record before the library reads a table of whatever size that claims."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - _END_RECORD - _ZIP64_LOCATOR, 0))
        before, end = stream.read(_ZIP64_LOCATOR), stream.read(_END_RECORD)
        if len(end) != _END_RECORD or end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
            refuse("its end in place", "a file that is cut off, has something appended, or is no bundle")
        count, table, start = struct.unpack("<10xHII2x", end)
        if before[:4] == b"PK\6\7" or start + table + _END_RECORD != size:
            refuse("one table of contents at its end", "another structure")
        if count > self._limits.bundle_files or table > count * _LARGEST_ENTRY:
            refuse(f"at most {self._limits.bundle_files} files", f"a table of {count} in {table} bytes")
        stream.seek(0)


def write_zip(stream: BinaryIO, members: Iterable[tuple[str, bytes]]) -> None:
    """Write `members` in their order as a zip without times or compression: one content, one encoding.

    Raises:
        BundleError: more than about 4 GiB, the most that a zip without zip64 can address.
    """
    total = 0
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, data in members:
            total += len(data) + 512
            if total > _LARGEST_ZIP:
                raise BundleError(
                    wanted="a bundle of less than 4 GiB in one file",
                    got="a larger one",
                    next_step=f"Write it as a folder: leave '{SUFFIX}' off the output's name.",
                )
            entry = zipfile.ZipInfo(name, _NO_TIME)
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, data)
