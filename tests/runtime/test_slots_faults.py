"""A store under every fault, enumerated: killed, without power or refused by the disk at each step; rotted; beset.

After each fault the device must start with the old release or the new one, whole, with nothing half-written left, and
must take the next update (`store_faults.recover`).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import (
    EdgeadError,
    ReleaseError,
    RollbackError,
    StorageError,
    StoreBusyError,
    StoreDamagedError,
)
from edgead.runtime.knowledge import encode_pack
from edgead.runtime.release import decode_release
from edgead.runtime.slots import Store

HELPER = Path(__file__).with_name("store_faults.py")


def _helper() -> ModuleType:
    """Tests are no package, so the module beside this one is loaded by its path."""
    spec = importlib.util.spec_from_file_location("edgead_tests_store", HELPER)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Parts"):
        spec.loader.exec_module(module)
    return module


faults = _helper()
OLDER, OLD, NEW, LATER = faults.release(0), faults.OLD, faults.NEW, faults.LATER


def run(task: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-B", str(HELPER), task, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    return said


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that runs the old release, and could go back to one before it."""
    folder: Path = tmp_path_factory.mktemp("base") / "store"
    store = Store(folder, disk=faults.QuickDisk())
    faults.install(store, OLDER)
    faults.install(store, OLD)
    return folder


@pytest.fixture
def store_folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(base, tmp_path / "store"))


@pytest.fixture
def store(store_folder: Path) -> Store:
    return Store(store_folder, disk=faults.QuickDisk(), lock_timeout_s=5)


class Marker(list[str]):
    """Notes after how many steps of a disk each phase of an update began."""

    def __init__(self, disk: RealDisk) -> None:
        super().__init__()
        self.disk = disk
        self.begun: dict[str, int] = {}

    def append(self, phase: str) -> None:
        self.begun[phase] = self.disk.steps


def phases(base: Path, folder: Path, disk: RealDisk) -> dict[str, int]:
    """The steps of a whole update of a copy of the store, with this disk."""
    shutil.copytree(base, folder)
    marker = Marker(disk)
    faults.update(Store(folder, disk=disk), marker)
    return marker.begun


def may_be_active(begun: dict[str, int], done: int) -> list[object]:
    """What may be active after so many whole steps: both only while the state is being exchanged."""
    allowed = [OLD] if done <= begun["confirm"] or done > begun["rollback"] else []
    return allowed + ([NEW] if begun["activate"] < done <= begun["end"] else [])


def test_a_kill_at_every_step_of_an_update_leaves_the_old_release_or_the_new_one(base: Path, tmp_path: Path) -> None:
    begun = phases(base, tmp_path / "counted", faults.KillingDisk(0))
    home = tmp_path / "killed"
    home.mkdir()
    shutil.copytree(base, home / "base")
    code, last = finish(run("kill", home)).split()
    assert (int(code), int(last)) == (0, begun["end"] + 1)
    found = [
        faults.recover(home / f"{at:04d}", may_be_active(begun, at - 1)).version for at in range(1, begun["end"] + 1)
    ]
    assert begun["end"] > 50
    assert found == sorted(found[: begun["rollback"]]) + sorted(found[begun["rollback"] :], reverse=True)
    assert set(found) == {1, 2}


def power_cuts(
    base: Path, tmp_path: Path, *, forget: str = "", since: str = "put"
) -> Iterator[tuple[Path, list[object]]]:
    """The store after each power cut that an update can meet from a phase on, and what may be active then."""
    folder = tmp_path / "recorded"
    before = {
        folder / path.relative_to(base) if path != base else folder: data
        for path, data in faults.snapshot(base).items()
    }
    disk = faults.RecordingDisk(forget=forget)

    class Counted(Marker):
        def append(self, phase: str) -> None:
            self.begun[phase] = len(disk.log)

    marker = Counted(disk)
    shutil.copytree(base, folder)
    faults.update(Store(folder, disk=disk), marker)
    for done, image in faults.crash_images(before, disk.log):
        if done < marker.begun[since]:
            continue
        faults.write_image(image, folder, tmp_path / "cut")
        yield tmp_path / "cut", may_be_active(marker.begun, done)


def test_a_power_cut_at_every_step_of_an_update_leaves_the_old_release_or_the_new_one(
    base: Path, tmp_path: Path
) -> None:
    found = [faults.recover(folder, allowed).version for folder, allowed in power_cuts(base, tmp_path)]
    assert len(found) > 100
    assert set(found) == {1, 2}


@pytest.mark.parametrize("forget", ["sync", "sync_folder"])
def test_a_store_that_forgot_a_sync_would_not_survive_these_power_cuts(base: Path, tmp_path: Path, forget: str) -> None:
    """The faults are real ones: the same enumeration fails for a careless store."""

    def survive() -> None:
        for folder, allowed in power_cuts(base, tmp_path, forget=forget, since="confirm"):
            faults.recover(folder, allowed, retry=False)

    with pytest.raises((AssertionError, EdgeadError)):
        survive()


def test_a_power_cut_at_every_step_of_the_first_install_leaves_a_store_that_can_be_installed(tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    disk = faults.RecordingDisk()
    faults.install(Store(folder, disk=disk), OLD)
    for _, image in faults.crash_images({tmp_path: None}, disk.log):
        cut = tmp_path / "cut"
        faults.write_image(image, folder, cut)
        store = Store(cut, disk=faults.QuickDisk())
        try:
            faults.check_whole(store.start(), [OLD])
        except StoreDamagedError:
            assert store.state().active is None
        assert not faults.leftovers(cut)
        faults.check_whole(faults.install(store, LATER), [LATER])


def outcome(action: Callable[[], object]) -> str:
    """What a refusal of the disk said; empty if there was none."""
    try:
        action()
    except StorageError as error:
        return str(error)
    return ""


REFUSALS = [errno.ENOSPC, errno.EIO, errno.EROFS]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", REFUSALS, ids=[errno.errorcode[code] for code in REFUSALS])
def test_a_disk_that_refuses_at_every_step_of_an_update_costs_nothing(
    base: Path, tmp_path: Path, code: int, lasting: bool
) -> None:
    begun = phases(base, tmp_path / "counted", faults.FailingDisk(0, code))
    refused = 0
    for at in range(1, begun["end"] + 1):
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        disk = faults.FailingDisk(at, code, lasting=lasting)
        store = Store(folder, disk=disk)
        said = outcome(lambda store=store: faults.update(store))
        refused += bool(said)
        assert not said or os.strerror(code) in said
        # Some refusals cost nothing at all, such as those to remove what is removed later.
        allowed = may_be_active(begun, at - 1) + may_be_active(begun, at) if said else [OLD]
        # The same process goes on, with the disk as it is.
        faults.check_whole(store.active(), allowed)
        if not lasting and disk.failed != "remove":
            assert not faults.leftovers(folder)
        # The process starts anew while the disk still refuses: it inspects, and says what is wrong.
        active = Store(folder, disk=disk).start()
        faults.check_whole(active, allowed)
        faults.recover(folder, allowed, retry=False)
    assert refused >= begun["end"] - 8  # what only cleans up need not fail


def test_a_file_that_the_system_really_refuses_to_let_grow_is_no_update(store_folder: Path) -> None:
    before = faults.snapshot(store_folder)
    said = finish(run("file-limit", store_folder, 600))
    assert "StorageError" in said
    assert not faults.leftovers(store_folder)
    after = faults.snapshot(store_folder)
    assert {path: data for path, data in after.items() if path in before} == before
    faults.recover(store_folder, [OLD])


def may_mount(folder: Path) -> bool:
    """Whether this machine lets a test have a file system of its own."""
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_file_systems_that_are_really_full_or_read_only_cost_nothing(base: Path, tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("mounting a file system needs rights that this user does not have here")
    shutil.copytree(base, tmp_path / "base")
    words = ["unshare", "-m", sys.executable, "-B", str(HELPER), "mount", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *full, read_only, kept = done.stdout.splitlines()
    assert len(full) >= 3
    assert any("No space left" in line for line in full)
    assert "Read-only file system" in read_only
    assert "Read-only file system" in kept


def test_a_full_disk_is_seen_before_anything_is_written(store_folder: Path) -> None:
    before = faults.snapshot(store_folder)
    with pytest.raises(StorageError, match="Free some space"):
        faults.update(Store(store_folder, reserve_bytes=2**60))
    after = faults.snapshot(store_folder)
    assert {path for path in after if path.suffix in {".edgead", ".safetensors", ".part"}} <= set(before)
    faults.recover(store_folder, [OLD])


def test_what_no_release_needs_makes_room_for_an_update(store_folder: Path) -> None:
    def used() -> int:
        return sum(path.stat().st_size for path in store_folder.glob("*/*"))

    store = Store(store_folder, disk=faults.QuickDisk())
    orphan = store.put_pack(encode_pack(faults.pack("bolt", 77, rows=400)))
    size = used() + 1000

    class SmallDisk(faults.QuickDisk):  # type: ignore[misc, name-defined]
        def free_space(self, folder: Path) -> int:
            return size - used()

    small = Store(store_folder, disk=SmallDisk(), reserve_bytes=0)
    faults.check_whole(faults.install(small, NEW), [NEW])
    assert not any(orphan in path.name for path in store_folder.glob("packs/*"))


def zero(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [zero, tear, rot, empty, Path.unlink]
damaged_how = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@damaged_how
@pytest.mark.parametrize("copy", ["state.a", "state.b"])
def test_a_lost_copy_of_the_pointer_costs_nothing_or_one_step(
    store: Store, store_folder: Path, damage: Callable[[Path], None], copy: str
) -> None:
    active = faults.install(store, NEW, confirmed=False)
    damage(store_folder / copy)
    # The last step but one was to stage the new release.
    faults.check_whole(Store(store_folder).start(), [OLD, NEW])
    assert store.state().counter == 2
    store.confirm(store.state().active)
    damage(store_folder / copy)
    faults.check_whole(Store(store_folder).start(), [OLD, NEW])
    assert faults.recover(store_folder, [OLD, NEW])
    assert active.digest == NEW.digest


@damaged_how
def test_without_any_pointer_the_last_confirmed_release_is_found(
    store: Store, store_folder: Path, damage: Callable[[Path], None]
) -> None:
    faults.install(store, NEW)
    faults.stage(store, LATER)
    for copy in ("state.a", "state.b"):
        damage(store_folder / copy)
    active = Store(store_folder).start()
    faults.check_whole(active, [NEW])
    state = Store(store_folder).state()
    assert (state.previous, state.confirmed, state.counter) == (OLD.digest, True, 9)
    assert "lost" in state.alarm
    with pytest.raises(ReleaseError, match="counter above 9"):
        faults.stage(store, faults.release(5))
    assert faults.recover(store_folder, [NEW])


@damaged_how
def test_without_any_pointer_a_quarantined_release_does_not_return(
    store: Store, store_folder: Path, damage: Callable[[Path], None]
) -> None:
    faults.install(store, NEW)
    store.rollback("a trial")
    for copy in ("state.a", "state.b"):
        damage(store_folder / copy)
    faults.check_whole(Store(store_folder).start(), [OLD])


def test_a_pointer_that_is_a_folder_or_unreadable_is_lost_too(store: Store, store_folder: Path) -> None:
    faults.install(store, NEW)
    replaced_by_a_folder(store_folder / "state.a")
    faults.check_whole(Store(store_folder).start(), [OLD, NEW])


@damaged_how
@pytest.mark.parametrize("kind", ["bolt", "nut", "engine", "record"])
def test_a_damaged_part_of_the_active_release_is_named_and_the_previous_one_inspects(
    store: Store, store_folder: Path, damage: Callable[[Path], None], kind: str
) -> None:
    faults.install(store, NEW)
    name = {
        "bolt": f"packs/{NEW.pack_digest('bolt')}.safetensors",
        "nut": f"packs/{NEW.pack_digest('nut')}.safetensors",
        "engine": f"engines/{NEW.engine_digest}.edgead",
        "record": f"releases/{NEW.digest}.json",
    }[kind]
    damage(store_folder / name)
    with pytest.raises(StoreDamagedError) as caught:
        store.active()
    assert caught.value.fetch == (name,)
    active = store.start()
    faults.check_whole(active, [OLD])
    assert [fault.fetch for fault in active.faults if isinstance(fault, StoreDamagedError)] == [(name,)]
    if kind != "record":
        assert store.missing(decode_release(NEW.record)) == (name,)
    # Fetched whole and put again, it is the active one as before: the pointer never moved.
    store.stage(NEW.record) if kind == "record" else faults.stage(store, NEW)
    active = store.start()
    faults.check_whole(active, [NEW])
    assert not active.faults


def test_with_every_release_damaged_the_error_names_what_to_fetch(store: Store, store_folder: Path) -> None:
    faults.install(store, NEW)
    for path in store_folder.glob("packs/*"):
        zero(path)
    with pytest.raises(StoreDamagedError) as caught:
        store.start()
    assert caught.value.fetch == tuple(sorted(f"packs/{NEW.pack_digest(name)}.safetensors" for name in ("bolt", "nut")))
    for data in NEW.packs.values():
        store.put_pack(data)
    faults.check_whole(store.start(), [NEW])


@damaged_how
def test_a_delta_on_a_rotted_base_is_refused_and_the_whole_pack_mends_it(
    store: Store, store_folder: Path, damage: Callable[[Path], None]
) -> None:
    name = f"packs/{OLD.pack_digest('bolt')}.safetensors"
    damage(store_folder / name)
    with pytest.raises(StoreDamagedError) as caught:
        store.apply_delta(faults.delta())
    assert caught.value.fetch == (name,)
    with pytest.raises(StoreDamagedError):
        store.active()
    store.put_pack(OLD.packs["bolt"])
    faults.check_whole(store.active(), [OLD])
    assert store.apply_delta(faults.delta()) == NEW.pack_digest("bolt")


def test_a_release_that_crashes_the_device_is_rolled_back_and_never_taken_again(
    store: Store, store_folder: Path
) -> None:
    faults.install(store, NEW, confirmed=False)
    for _ in range(3):  # each of these starts crashes
        faults.check_whole(Store(store_folder).start(), [NEW])
    active = Store(store_folder).start()
    faults.check_whole(active, [OLD])
    assert [type(fault) for fault in active.faults] == [ReleaseError]
    state = store.state()
    assert (state.active, state.previous, state.confirmed) == (OLD.digest, None, True)
    assert state.quarantined == (NEW.digest,)
    assert "3 starts" in state.alarm
    with pytest.raises(ReleaseError, match="quarantined"):
        faults.stage(store, NEW)
    assert not Store(store_folder).start().faults
    faults.check_whole(faults.install(store, LATER), [LATER])


def test_a_confirmed_release_may_be_started_for_ever(store: Store, store_folder: Path) -> None:
    faults.install(store, NEW, confirmed=False)
    store.start()
    store.start()
    store.confirm(NEW.digest)
    for _ in range(9):
        faults.check_whole(Store(store_folder).start(), [NEW])
    assert store.state().starts == 0


@damaged_how
def test_a_crash_loop_without_a_way_back_stays_and_raises_the_alarm(
    store: Store, store_folder: Path, damage: Callable[[Path], None]
) -> None:
    faults.install(store, NEW, confirmed=False)
    damage(store_folder / f"packs/{OLD.pack_digest('nut')}.safetensors")
    for _ in range(3):
        assert not Store(store_folder).start().faults
    for _ in range(2):
        active = Store(store_folder).start()
        faults.check_whole(active, [NEW])
        assert [type(fault) for fault in active.faults] == [RollbackError]
    assert "no way back" in store.state().alarm
    assert store.state().quarantined == ()
    with pytest.raises(RollbackError):
        store.rollback("by hand")
    faults.check_whole(store.active(), [NEW])
    faults.check_whole(faults.install(store, LATER), [LATER])
    assert store.state().alarm == ""


def test_a_first_release_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", disk=faults.QuickDisk())
    faults.install(store, OLD)
    with pytest.raises(RollbackError, match="previous"):
        store.rollback("by hand")
    faults.check_whole(store.start(), [OLD])
    assert "no way back" in store.state().alarm


def test_two_updaters_in_two_processes_go_one_after_the_other(store_folder: Path) -> None:
    pair = [run("update", store_folder, version, 0.4, 60) for version in (2, 3)]
    said = [finish(process).splitlines() for process in pair]
    spans = []
    for lines in said:
        assert lines[0].startswith("holds"), lines
        # The second one to come may have the older release, which is then refused.
        assert lines[1].startswith(("done", "ReleaseError")), lines
        spans.append(float(lines[0].split()[1]))
    assert abs(spans[0] - spans[1]) >= 0.4
    faults.check_whole(Store(store_folder).start(), [faults.release(3)])


def test_an_updater_that_waits_too_long_gives_up_and_nothing_else_waits_for_an_update(
    store: Store, store_folder: Path
) -> None:
    holder = run("update", store_folder, 2, 3, 60)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("holds")
    with pytest.raises(StoreBusyError, match=r"within 0\.1 s"), store.updating(0.1):
        pytest.fail("it must not be held")
    with pytest.raises(StoreBusyError):
        Store(store_folder, lock_timeout_s=0.1).garbage()
    # The inspecting process starts, confirms and looks while the update goes on.
    faults.check_whole(store.start(), [OLD])
    store.confirm(OLD.digest)
    assert store.see(1_900_000_000) == 1_900_000_000
    assert holder.poll() is None
    finish(holder)
    faults.check_whole(store.active(), [NEW])
    assert store.state().last_seen == 1_900_000_000


def test_a_killed_updater_leaves_no_lock(store: Store, store_folder: Path) -> None:
    holder = run("update", store_folder, 2, 60, 60)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    faults.check_whole(faults.install(store, NEW), [NEW])


def test_too_little_memory_for_a_delta_keeps_all_as_it_was(store_folder: Path) -> None:
    store = Store(store_folder, disk=faults.QuickDisk())
    rows = 100_000
    base, result = faults.pack("bolt", 30, rows=rows), faults.pack("bolt", 31, rows=rows)
    store.put_pack(encode_pack(base))
    (store_folder.parent / "large.delta").write_bytes(faults.make_delta(base, result))
    before = faults.snapshot(store_folder)
    *refused, last = finish(run("memory", store_folder)).splitlines()
    assert len(refused) > 3
    assert set(refused) == {"3 0"}
    assert last == "0 0"
    after = faults.snapshot(store_folder)
    assert [path.name for path in after.keys() - before.keys()] == [f"{result.digest}.safetensors"]
    assert {path: after[path] for path in before} == before
    faults.recover(store_folder, [OLD])
