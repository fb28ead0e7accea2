"""The spool of statuses: bounded, numbered without end, and no trouble to anybody whatever the disk does."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from edgead.runtime.device_status import STATUS_BYTES, DeviceStatus, StatusError, decode_status, encode_status
from edgead.runtime.disk import Disk
from edgead.runtime.status_spool import StatusSpool, batches

SEED = bytes(range(32))


def _helper() -> ModuleType:
    """Tests are no package, so the module beside this one is loaded by its path."""
    path = Path(__file__).with_name("store_faults.py")
    spec = importlib.util.spec_from_file_location("edgead_tests_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Parts"):
        spec.loader.exec_module(module)
    return module


faults = _helper()


def status(number: int, dropped: int = 0, alarm: str = "") -> bytes:
    return encode_status(DeviceStatus("cam", "carpet", number, 1, "1", dropped=dropped, alarm=alarm), SEED)


def opened(folder: Path, disk: Disk | None = None, **options: int) -> StatusSpool:
    return StatusSpool(folder / "spool", disk=disk or faults.QuickDisk(), lock_timeout_s=0.2, **options)


def test_statuses_wait_in_order_until_they_are_removed(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert (spool.waiting(), spool.dropped()) == ([], 0)
    assert [spool.add(status) for _ in range(3)] == [1, 2, 3]
    assert (spool.folder / "000000000002.json").read_bytes() == status(2)
    assert spool.waiting() == [1, 2, 3]
    spool.remove([1, 2])
    assert opened(tmp_path).waiting() == [3]
    assert spool.read(3) == status(3)
    assert spool.read(1) is None


def test_numbers_go_on_after_the_spool_was_emptied_and_the_device_restarted(tmp_path: Path) -> None:
    for wanted in range(1, 6):
        spool = opened(tmp_path)
        assert spool.add(status) == wanted
        spool.remove(spool.waiting())
    assert opened(tmp_path).add(status) == 6


def test_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    spool = opened(tmp_path, files=3)
    for _ in range(5):
        spool.add(status)
    assert (spool.waiting(), spool.dropped()) == ([3, 4, 5], 2)
    # The status that made another one go says so.
    newest = spool.read(5)
    assert newest is not None
    assert decode_status(newest).status.dropped == 2


def test_the_bytes_are_bounded_too(tmp_path: Path) -> None:
    spool = opened(tmp_path, size=5000)
    for number in range(30):
        spool.add(lambda number, dropped: status(number, dropped, "x" * 200))
        held = sum(path.stat().st_size for path in spool.folder.glob("0*.json"))
        assert held <= 5000, number
    assert spool.waiting()[-1] == 30
    assert spool.dropped() + len(spool.waiting()) == 30


def test_a_damaged_status_is_dropped_and_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for _ in range(5):
        spool.add(status)
    (spool.folder / "000000000001.json").write_bytes(b"")
    (spool.folder / "000000000002.json").write_bytes(b"\0" * 500)
    (spool.folder / "000000000003.json").write_bytes(status(4))
    (spool.folder / "000000000004.json").write_bytes(b"x" * (STATUS_BYTES + 5))
    (lot,) = list(batches(spool, 10_000))
    assert lot == ([5], [status(5)])
    assert (spool.waiting(), spool.dropped()) == ([5], 4)
    assert spool.add(status) == 6
    assert opened(tmp_path).dropped() == 4


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"sequence":', b"[" * 4000, None], ids=repr)
@pytest.mark.parametrize("names", [("count.a",), ("count.b",), ("count.a", "count.b")], ids="+".join)
def test_no_number_is_given_twice_when_a_count_is_damaged(
    tmp_path: Path, names: tuple[str, ...], content: bytes | None
) -> None:
    spool = opened(tmp_path)
    for _ in range(7):
        spool.add(status)
    spool.remove(spool.waiting())
    for name in names:
        if content is None and len(names) == 2:
            continue  # a spool without any count is a new one
        if content is None:
            (spool.folder / name).unlink()
        else:
            (spool.folder / name).write_bytes(content)
    given = [opened(tmp_path).add(status) for _ in range(3)]
    assert given == sorted(set(given))
    assert given[0] is not None
    assert given[0] > 7


def test_batches_keep_to_their_size(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    for _ in range(7):
        spool.add(status)
    size = len(status(1)) + 1
    lots = list(batches(spool, 3 * size))
    assert [numbers for numbers, _ in lots] == [[1, 2, 3], [4, 5, 6], [7]]
    assert [len(lines) for _, lines in batches(spool, size - 1)] == [1] * 7


def test_what_is_no_status_is_not_kept(tmp_path: Path) -> None:
    spool = opened(tmp_path)

    def broken(number: int, dropped: int) -> bytes:
        raise StatusError(wanted="a", got="b")

    with pytest.raises(StatusError):
        spool.add(broken)
    assert spool.add(status) == 1


def test_threads_and_processes_share_the_numbers(tmp_path: Path) -> None:
    given: list[int | None] = []
    spools = [StatusSpool(tmp_path / "spool", disk=faults.QuickDisk(), lock_timeout_s=20.0) for _ in range(2)]

    def add(spool: StatusSpool) -> None:
        given.extend(spool.add(status) for _ in range(10))

    threads = [threading.Thread(target=add, args=(spool,)) for spool in (*spools, *spools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number or 0 for number in given) == list(range(1, 41))


def scenario(folder: Path, disk: Disk, given: list[int | None]) -> None:
    """Adds, sends, drops; `given` holds what was promised."""
    spool = opened(folder, disk, files=3)
    for step in range(6):
        given.append(spool.add(status))
        if step == 2:
            spool.remove([1, 2])


def steps_of_scenario(folder: Path) -> int:
    disk = faults.QuickDisk()
    scenario(folder, disk, [])
    return int(disk.steps)


def check(folder: Path, promised: int) -> None:
    """That a spool goes on after a fault: new numbers, whole statuses, within its bounds."""
    spool = opened(folder, files=3)
    before = spool.waiting()
    number = spool.add(status)
    assert number is not None
    assert number > promised
    assert all(spool.read(waiting) is not None for waiting in spool.waiting())
    assert number in spool.waiting()
    assert len(spool.waiting()) <= 3
    assert set(spool.waiting()) <= {*before, number}
    assert not list(spool.folder.glob("*.part"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_a_disk_that_refuses_any_step_costs_statuses_and_raises_nothing(
    tmp_path: Path, code: int, lasting: bool
) -> None:
    for at in range(1, steps_of_scenario(tmp_path / "dry") + 1):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        disk, given = faults.FailingDisk(at, code, lasting=lasting), []
        scenario(folder, disk, given)
        # A spool that cannot even be made refuses all; the rest are refused one by one.
        promised = [number for number in given if number is not None]
        assert promised == sorted(set(promised))
        check(folder, max(promised, default=0))


def test_what_a_full_disk_refused_is_counted_when_there_is_room_again(tmp_path: Path) -> None:
    class Full(faults.QuickDisk):  # type: ignore[misc, name-defined]
        full = False

        def free_space(self, folder: Path) -> int:
            return 0 if self.full else super().free_space(folder)  # type: ignore[no-any-return]

    disk = Full()
    spool = opened(tmp_path, disk)
    assert spool.add(status) == 1
    disk.full = True
    assert [spool.add(status) for _ in range(3)] == [None] * 3
    assert (spool.lost, spool.dropped()) == (3, 3)
    assert "full" in spool.fault
    disk.full = False
    assert spool.add(status) == 2
    newest = spool.read(2)
    assert newest is not None
    assert decode_status(newest).status.dropped == 3
    assert (spool.fault, opened(tmp_path).dropped()) == ("", 3)


def test_a_kill_at_any_step_loses_a_number_at_most(tmp_path: Path) -> None:
    killed = 0
    for at in range(1, steps_of_scenario(tmp_path / "dry") + 1):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        child = os.fork()
        if not child:  # no sync, lock or thread of the parent is held here
            try:
                with open(folder / "given", "ab", 0) as log:
                    spool = opened(folder, faults.KillingDisk(at), files=3)
                    for step in range(6):
                        number = spool.add(status)
                        log.write(b"%d\n" % (number or 0))
                        if step == 2:
                            spool.remove([1, 2])
            finally:
                os._exit(0)
        _, code = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL
        promised = max(map(int, (folder / "given").read_text().split()), default=0)
        check(folder, promised)
    assert killed > 40


def test_a_power_cut_at_any_step_gives_no_number_twice(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    before = faults.snapshot(source) | dict.fromkeys(source.parents)
    disk = faults.RecordingDisk()
    spool = opened(source, disk, files=2)
    promised = {0: 0}
    for step in range(4):
        number = spool.add(status)
        assert number is not None
        promised[len(disk.log)] = number
        if step == 1:
            spool.remove([1])
    images = 0
    for done, image in faults.crash_images(before, disk.log):
        target = tmp_path / "target"
        faults.write_image(image, source, target)
        sure = max(number for steps, number in promised.items() if steps <= done)
        again = opened(target, files=2)
        waiting = again.waiting()
        assert not sure or sure in waiting
        given = again.add(status)
        assert given is not None
        assert given > sure
        assert all(again.read(number) is not None for number in again.waiting() if number in (sure, given))
        images += 1
    assert images > 100


def test_a_process_that_is_killed_lets_the_lock_go(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from edgead.runtime.disk import RealDisk, locked
with locked(RealDisk(), Path(sys.argv[1]), 1.0, "to test"):
    print("held", flush=True)
    time.sleep(60)
"""
    spool = opened(tmp_path)
    spool.add(status)
    command = [sys.executable, "-c", code, str(spool.folder / "spool.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert spool.add(status) is None
        holder.kill()
        holder.wait()
    assert spool.add(status) == 2
    assert spool.dropped() == 1
