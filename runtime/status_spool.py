"""Statuses that wait to be sent: a bounded spool on disk. Whatever the disk does, nobody who adds to it sees an error.

    NNNNNNNNNNNN.json   a status, by its sequence number in 12 digits or more
    count.a, count.b    how far numbering is; canonical JSON, written in turn
    spool.lock          held for moments by whoever adds

A count is `{"dropped":D,"oldest":O,"sequence":S}`: the last number that was given, the first one that is not dropped,
and how many were dropped. It is written before the status that it numbers, and before files are removed, so that a kill
or power cut at any step costs a number at most and never has one given twice, even when the spool is empty. Where a
copy is lost, numbering goes on far ahead of the other one; where both are, at this device's clock in seconds.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from edgead.runtime.device_status import STATUS_BYTES, decode_status
from edgead.runtime.disk import PART, Disk, RealDisk, locked, put_file
from edgead.runtime.errors import StatusError, StorageError, storage_errors
from edgead.runtime.release import Counter
from edgead.runtime.spec import canonical_json

SPOOL_FILES = 500
SPOOL_BYTES = 4 * 2**20
"""What a spool holds at most; the oldest are dropped."""
_COPIES = ("count.a", "count.b")
_COUNT_BYTES = 4096
_NAME = re.compile(r"([0-9]{12,16})\.json\Z")
_JUMP = 1000
"""Numbers that are left out where a copy of the count is lost: more than were given since the other one."""
_RESERVE = 2**20
"""Bytes that stay free for what a device needs more than to report."""


class _Count(Struct, frozen=True, forbid_unknown_fields=True):
    sequence: Counter = 0
    oldest: Counter = 0
    dropped: Counter = 0


class StatusSpool:
    """The spool of one device. Methods may be called from any thread and process.

    Args:
        folder: of the spool, such as `Store.spool`; made when something is first added.
        disk: takes the steps.
        files, size: most statuses, and most bytes of them.
        lock_timeout_s: how long to wait for another process that adds.
        clock: seconds since 1970 in UTC.

    Attributes:
        lost: statuses that the disk refused since this object was made.
        fault: why it did so the last time; empty if it did not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        disk: Disk | None = None,
        files: int = SPOOL_FILES,
        size: int = SPOOL_BYTES,
        lock_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.lost = 0
        self.fault = ""
        self._uncounted = 0
        self._disk = disk or RealDisk()
        self._files = files
        self._size = size
        self._timeout = lock_timeout_s
        self._clock = clock

    def add(self, make: Callable[[int, int], bytes]) -> int | None:
        """Keep a status.

        Args:
            make: (its number, how many were dropped so far) -> the status as it is sent.

        Returns:
            its number; None if the disk refused, which counts as dropped.

        Raises:
            StatusError: `make` made something else.
        """
        try:
            with storage_errors(self.folder, "to make a folder"):
                if self.folder.name not in self._disk.names(self.folder.parent):
                    self._disk.make_folder(self.folder)
                    self._disk.sync_folder(self.folder.parent)
            with locked(self._disk, self.folder / "spool.lock", self._timeout, "to keep a status"):
                number = self._add(make)
        except StorageError as error:
            self.lost += 1
            self._uncounted += 1
            self.fault = error.got
            return None
        self.fault = ""
        return number

    def waiting(self) -> list[int]:
        """Numbers of the statuses that wait, oldest first; none if the disk cannot say."""
        try:
            oldest = self._read()[0].oldest
            return [number for number in self._numbers() if number >= oldest]
        except OSError:
            return []

    def dropped(self) -> int:
        """How many were dropped before they were sent."""
        return self._read()[0].dropped + self._uncounted

    def read(self, number: int) -> bytes | None:
        """A status; None if it is gone, or was damaged and is removed and counted as dropped now."""
        path = self._path(number)
        try:
            data = self._disk.read(path, STATUS_BYTES + 1)
            # Damaged ones would be refused for ever, and might spoil those that are sent beside them.
            if decode_status(data).status.sequence == number:
                return data
        except FileNotFoundError:
            return None
        except (OSError, StatusError):
            pass
        self._uncounted += 1
        self.remove([number])
        return None

    def remove(self, numbers: list[int]) -> None:
        """Forget statuses, since they were received; one that the disk keeps is sent again, which does no harm."""
        for number in numbers:
            with contextlib.suppress(OSError):
                self._disk.remove(self._path(number))

    def _add(self, make: Callable[[int, int], bytes]) -> int:
        with storage_errors(self.folder, "to keep a status"):
            count, turn = self._read()
            for name in self._disk.names(self.folder):
                if name.endswith(PART):
                    self._disk.remove(self.folder / name)
            numbers = self._numbers()
            number = max([count.sequence, *numbers]) + 1
            data = make(number, count.dropped + self._uncounted)
            for old in [old for old in numbers if old < count.oldest]:  # what a kill left of the last removal
                self._disk.remove(self._path(old))
            numbers = [old for old in numbers if old >= count.oldest]
            drop = self._surplus(numbers, len(data))
            if drop:
                data = make(number, count.dropped + self._uncounted + len(drop))
            if self._disk.free_space(self.folder) < _RESERVE + len(data):
                raise StorageError(
                    wanted=f"{_RESERVE} bytes free at {self.folder}",
                    got="a disk that is full",
                    next_step="Free some space on this device.",
                )
        oldest = drop[-1] + 1 if drop else count.oldest
        changed = _Count(number, oldest, count.dropped + self._uncounted + len(drop))
        for copy in turn:
            put_file(self._disk, self.folder / _COPIES[copy], [canonical_json(changed)])
        self._uncounted = 0
        for old in drop:
            with storage_errors(self.folder, "to remove a status"):
                self._disk.remove(self._path(old))
        put_file(self._disk, self._path(number), [data])
        return number

    def _surplus(self, numbers: list[int], size: int) -> list[int]:
        """Those that have to go before another one of `size` bytes fits."""
        sizes = {}
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):  # it was sent meanwhile
                sizes[number] = self._disk.size(self._path(number))
        total, drop = sum(sizes.values()) + size, []
        for place, number in enumerate(sizes):
            if total <= self._size and len(sizes) - place < self._files:
                break
            total -= sizes[number]
            drop.append(number)
        return drop

    def _read(self) -> tuple[_Count, tuple[int, ...]]:
        """How far numbering is, and which copies are to be written next."""
        found: dict[int, _Count] = {}
        missing = 0
        for place, name in enumerate(_COPIES):
            try:
                found[place] = msgspec.json.decode(self._disk.read(self.folder / name, _COUNT_BYTES), type=_Count)
            except FileNotFoundError:
                missing += 1
            except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
                continue  # as good as lost
        if len(found) == len(_COPIES):
            place = max(found, key=lambda which: found[which].sequence)
            return found[place], (1 - place,)
        if found:
            ((place, held),) = found.items()
            return msgspec.structs.replace(held, sequence=held.sequence + _JUMP), (1 - place,)
        # Without either, this is a new spool.
        return _Count(0 if missing == len(_COPIES) else max(0, int(self._clock()))), (0, 1)

    def _numbers(self) -> list[int]:
        return sorted(int(found[1]) for found in map(_NAME.match, self._disk.names(self.folder)) if found)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}.json"


def batches(spool: StatusSpool, most: int) -> Iterator[tuple[list[int], list[bytes]]]:
    """The statuses that wait, oldest first, in lots of at most `most` bytes with a line's end each.

    Args:
        spool: whose.
        most: bytes, at least those of one status.
    """
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    for number in spool.waiting():
        data = spool.read(number)
        if data is None:
            continue
        if lines and size + len(data) + 1 > most:
            yield numbers, lines
            numbers, lines, size = [], [], 0
        numbers.append(number)
        lines.append(data)
        size += len(data) + 1
    if lines:
        yield numbers, lines


__all__ = ["SPOOL_BYTES", "SPOOL_FILES", "StatusSpool", "batches"]
