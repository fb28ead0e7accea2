"""What a device reports of itself: its attempts are right whoever changed its state, and its key stays its own."""

from __future__ import annotations

import errno
import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgead.runtime.device_key import ensure_key, read_key
from edgead.runtime.device_status import STATUS_BYTES, DeviceStatus, decode_status, public_of
from edgead.runtime.errors import SelfTestError
from edgead.runtime.slots import Store
from edgead.runtime.status_report import StatusReporter
from edgead.runtime.update_outcome import Device, Outcome


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
SEED = bytes(range(32))
DEVICE = Device("cam", "http://localhost", "bolt", b"", ("pilot",))


def told(reporter: StatusReporter) -> DeviceStatus:
    """The newest status, with its signature checked."""
    data = reporter.spool.read(reporter.spool.waiting()[-1])
    assert data is not None
    envelope = decode_status(data)
    envelope.verify(public_of(SEED))
    return envelope.status


def attempts(reporter: StatusReporter) -> list[tuple[int, str, str]]:
    reporter.note()
    return [(item.release, item.outcome, item.reason) for item in told(reporter).attempts]


def test_a_device_without_a_release_reports_too(tmp_path: Path) -> None:
    reporter = StatusReporter(Store(tmp_path), DEVICE, SEED)
    reporter.note(Outcome("failed", "no network", error=SelfTestError(wanted="a", got="b")), 3)
    status = told(reporter)
    assert (status.release, status.digest, status.attempts) == (None, "", ())
    assert status.poll is not None
    assert (status.poll.status, status.poll.reason, status.poll.failures) == ("failed", "no network", 3)
    assert status.error is not None
    assert (status.error.kind, status.error.count) == ("SelfTestError", 1)


def test_attempts_follow_confirmation_rollback_and_rejection(tmp_path: Path) -> None:
    store = Store(tmp_path)
    reporter = StatusReporter(store, DEVICE, SEED)
    faults.install(store, faults.OLD, confirmed=False)
    assert attempts(reporter) == [(1, "probation", "")]
    store.confirm(faults.OLD.digest)
    assert attempts(reporter) == [(1, "confirmed", "")]
    faults.install(store, faults.NEW, confirmed=False)
    assert attempts(reporter) == [(1, "confirmed", ""), (2, "probation", "")]
    store.rollback("false alarms")
    wanted = [(1, "confirmed", ""), (2, "rolled back", "false alarms")]
    assert attempts(reporter) == wanted
    faults.stage(store, faults.LATER)
    store.reject("a golden image scored 3")
    wanted.append((9, "rejected", "a golden image scored 3"))
    assert attempts(reporter) == wanted
    # They are remembered over restarts, when their records and the alarm are gone.
    store.garbage()
    assert attempts(StatusReporter(Store(tmp_path), DEVICE, SEED)) == wanted
    status = told(reporter)
    assert (status.release, status.counter, status.confirmed) == (1, 9, True)
    assert len(status.quarantined) == 2


def test_a_crash_loop_is_told_though_the_rollback_was_another_process(tmp_path: Path) -> None:
    store = Store(tmp_path, most_starts=2)
    faults.install(store, faults.OLD)
    faults.install(store, faults.NEW, confirmed=False)
    reporter = StatusReporter(Store(tmp_path), DEVICE, SEED, every_s=3600.0)
    reporter.look()
    reporter.look()
    assert len(reporter.spool.waiting()) == 1  # nothing changed
    for _ in range(3):
        Store(tmp_path, most_starts=2).start()
    reporter.look()
    assert len(reporter.spool.waiting()) == 2
    status = told(reporter)
    assert (status.release, status.confirmed) == (1, True)
    assert [(item.release, item.outcome) for item in status.attempts] == [(1, "confirmed"), (2, "rolled back")]
    assert "starts" in status.attempts[1].reason


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_refuses_costs_a_status_and_raises_nothing(tmp_path: Path, code: int) -> None:
    faults.install(Store(tmp_path), faults.OLD)
    disk = faults.FailingDisk(1, code, lasting=True)
    reporter = StatusReporter(Store(tmp_path), DEVICE, SEED, disk=disk)
    assert reporter.note(Outcome("current")) is None
    assert reporter.trouble
    reporter.look()
    assert StatusReporter(Store(tmp_path), DEVICE, SEED).note() is not None


def test_texts_that_are_too_long_are_cut_and_the_status_is_sent_all_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path)
    faults.install(store, faults.OLD)
    reporter = StatusReporter(store, DEVICE, SEED)
    reporter.fault("Odd", "\x1b[2J" + "\U0001f9f5" * 5000)
    reporter.note(Outcome("failed", "\u202e" + "\U0001f9f5" * 5000))
    assert len(reporter.spool.read(reporter.spool.waiting()[-1]) or b"") <= STATUS_BYTES
    assert told(reporter).error is not None


def test_the_key_is_for_its_owner_alone_and_one_copy_is_enough(tmp_path: Path) -> None:
    seed, made = ensure_key(tmp_path)
    assert made
    assert ensure_key(tmp_path) == (seed, False)
    for name in ("device.key", "device.copy.key"):
        path = tmp_path / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes() == seed.hex().encode()
        for damaged in (b"", b"\0" * 64, seed.hex().encode()[:-1]):
            path.write_bytes(damaged)
            assert read_key(tmp_path) == seed
            assert ensure_key(tmp_path) == (seed, False)
            assert path.read_bytes() == seed.hex().encode()
    for name in ("device.key", "device.copy.key"):
        (tmp_path / name).unlink()
    assert read_key(tmp_path) is None
    again, made = ensure_key(tmp_path)
    assert made
    assert again != seed
