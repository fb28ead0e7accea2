"""The disk: whole files or none, durable in the right order, and locks that end with their process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from edgead.runtime.disk import Disk, RealDisk, UpdateLock, locked, put_file
from edgead.runtime.errors import StorageError, StoreBusyError


class Noting(RealDisk):
    """Takes the steps and notes them."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        self.steps.append(f"write {path.name}")
        super().write(path, chunks)

    def sync(self, path: Path) -> None:
        self.steps.append(f"sync {path.name}")
        super().sync(path)

    def replace(self, source: Path, target: Path) -> None:
        self.steps.append(f"replace {target.name}")
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.steps.append(f"sync_folder {folder.name}")
        super().sync_folder(folder)


def test_a_file_is_written_synced_renamed_and_its_folder_synced(tmp_path: Path) -> None:
    disk = Noting()
    put_file(disk, tmp_path / "f", [b"old"])
    put_file(disk, tmp_path / "f", [b"ne", b"w"])
    assert disk.steps[:4] == ["write f.part", "sync f.part", "replace f", f"sync_folder {tmp_path.name}"]
    assert (tmp_path / "f").read_bytes() == b"new"
    assert disk.names(tmp_path) == ["f"]


def test_chunks_that_fail_leave_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    disk = RealDisk()
    put_file(disk, tmp_path / "f", [b"old"])

    def failing() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put_file(disk, tmp_path / "f", failing())
    assert (tmp_path / "f").read_bytes() == b"old"
    assert disk.names(tmp_path) == ["f"]


def test_a_place_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "x", tmp_path / "nowhere" / "x", Path("/proc/edgead-test")):
        with pytest.raises(StorageError, match=path.name):
            put_file(RealDisk(), path, [b"x"])
    assert RealDisk().names(tmp_path) == ["file"]


def test_links_and_pipes_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    disk = RealDisk()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("secret")
    (tmp_path / "f.part").symlink_to("secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError):
            disk.read(tmp_path / name, 10)
        with pytest.raises(OSError):
            list(disk.chunks(tmp_path / name))
    with pytest.raises(StorageError):
        put_file(disk, tmp_path / "f", [b"x"])
    assert (tmp_path / "secret").read_bytes() == b"secret"
    put_file(disk, tmp_path / "f", [b"x"])  # what lay in the way is gone


def test_reading_is_bounded_and_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    disk = RealDisk()
    (tmp_path / "f").write_bytes(b"0123456789")
    assert disk.read(tmp_path / "f", 4) == b"0123"
    assert disk.read(tmp_path / "f", 2**62) == b"0123456789"
    assert b"".join(disk.chunks(tmp_path / "f")) == b"0123456789"
    assert disk.size(tmp_path / "f") == 10
    assert disk.free_space(tmp_path) > 0
    assert disk.names(tmp_path / "nowhere") == []
    disk.remove(tmp_path / "nowhere")


def test_a_lock_is_held_by_one_and_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = """
    import sys, time
    from pathlib import Path
    from edgead.runtime.disk import RealDisk, locked
    with locked(RealDisk(), Path(sys.argv[1]), 1, "to test"):
        print("held", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreBusyError, match="to test at"), locked(RealDisk(), tmp_path / "lock", 0.05, "to test"):
        pytest.fail("it must not be held")
    holder.kill()
    holder.communicate()
    with locked(RealDisk(), tmp_path / "lock", 0.05, "to test"):
        pass


def test_a_lock_that_is_given_back_in_time_is_waited_for(tmp_path: Path) -> None:
    disk: Disk = RealDisk()
    lock = disk.try_lock(tmp_path / "lock")
    assert lock is not None
    assert disk.try_lock(tmp_path / "lock") is None
    timer = threading.Timer(0.1, disk.unlock, [lock])
    timer.start()
    with locked(disk, tmp_path / "lock", 30, "to test"):
        timer.join()


def test_an_update_lock_is_taken_again_by_its_holder_and_by_no_other_thread(tmp_path: Path) -> None:
    calls: list[str] = []
    disk = RealDisk()
    lock = UpdateLock(disk, tmp_path / "lock", lambda: calls.append("prepare"), lambda: calls.append("clean"))
    busy: list[StoreBusyError] = []

    def other() -> None:
        try:
            with lock.held(0.05):
                calls.append("wrong")
        except StoreBusyError as error:
            busy.append(error)

    with lock.held(1), lock.held(1):
        assert disk.try_lock(tmp_path / "lock") is None
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(busy) == 1
    assert calls == ["prepare", "clean"]
    with lock.held(1):
        assert calls == ["prepare", "clean"] * 2


def test_an_update_lock_whose_cleaning_fails_is_not_held(tmp_path: Path) -> None:
    def fail() -> None:
        raise StorageError(wanted="to clean", got="a fault")

    lock = UpdateLock(RealDisk(), tmp_path / "lock", lambda: None, fail)
    for _ in range(2):
        with pytest.raises(StorageError), lock.held(0.05):
            pytest.fail("it must not be held")
    begin = time.monotonic()
    taken = RealDisk().try_lock(tmp_path / "lock")
    assert taken is not None
    assert time.monotonic() >= begin
    RealDisk().unlock(taken)
