"""Statuses of a fleet: what counts, what is refused, and a store that several processes write at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from edgead.runtime.device_status import DeviceStatus, encode_status, new_device_key, public_of
from edgead.runtime.errors import InputError, StorageError
from edgead.server_side.ota.devices import DeviceFile, checked, read_list
from edgead.server_side.ota.status_store import StatusStore
from edgead.server_side.ota.statuses import RefusedStatusError, read_statuses

NOW = 1_800_000_000.0
DAY = 86_400


class Camera:
    """A device that signs."""

    def __init__(self, name: str = "cam-1") -> None:
        self.name, self.seed = name, new_device_key()
        self.key = public_of(self.seed).hex()

    def says(self, sequence: int, **fields: Any) -> bytes:
        fields = {"product": "part", "time": int(NOW), "version": "1.0"} | fields
        return encode_status(DeviceStatus(device=self.name, sequence=sequence, **fields), self.seed)

    @property
    def record(self) -> Any:
        return checked(self.name, self.key)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/statuses.db"
    found: str = request.getfixturevalue("postgres").database()
    return found


@pytest.fixture
def store(url: str) -> Iterator[StatusStore]:
    with StatusStore(url, clock=lambda: NOW) as made:
        yield made


@pytest.fixture
def camera(store: StatusStore) -> Camera:
    made = Camera()
    store.devices.add([made.record])
    return made


def numbers(store: StatusStore, device: str = "cam-1") -> list[int]:
    return [one.status.sequence for one in store.history(device)]


def reason_of(store: StatusStore, data: bytes) -> str:
    with pytest.raises(RefusedStatusError) as caught:
        store.add(data)
    return caught.value.reason


# What counts


def test_a_status_of_a_known_device_is_kept_as_it_was_signed(store: StatusStore, camera: Camera) -> None:
    assert store.add(camera.says(1, release=4)) == "accepted"
    (one,) = store.latest()
    assert (one.status.release, one.received, one.key, one.verified, one.note) == (4, NOW, camera.key, True, "")
    assert store.history("cam-1") == [one]
    assert store.releases() == [("part", 4, 1)]


def test_a_replayed_status_is_known_and_never_the_newest_again(store: StatusStore, camera: Camera) -> None:
    old, new = camera.says(1, release=1), camera.says(2, release=2)
    assert [store.add(old), store.add(new), store.add(old), store.add(new)] == [
        "accepted",
        "accepted",
        "known",
        "known",
    ]
    assert [one.status.release for one in store.latest()] == [2]
    assert numbers(store) == [1, 2]


def test_a_status_that_comes_late_goes_into_the_history_alone(store: StatusStore, camera: Camera) -> None:
    assert [store.add(camera.says(n, release=n)) for n in (1, 3, 2)] == ["accepted"] * 3
    assert numbers(store) == [1, 2, 3]
    assert store.latest()[0].status.sequence == 3
    assert store.releases() == [("part", 3, 1)]


def test_an_unknown_device_another_key_and_an_edited_status_are_refused(store: StatusStore, camera: Camera) -> None:
    assert reason_of(store, Camera("cam-2").says(1)) == "unknown device"
    assert reason_of(store, Camera("cam-1").says(1)) == "another key"
    good = camera.says(1, release=4)
    assert reason_of(store, good.replace(b'"release":4', b'"release":5')) == "forged"
    other = Camera("cam-9").says(1)
    swapped = good.replace(camera.key.encode(), Camera().key.encode())
    assert reason_of(store, swapped) == "forged"
    for data in (b"", b"{}", b"[" * 20_000, good + b" ", good[:-1], other * 2, b"\xff\xfe"):
        assert reason_of(store, data) == "malformed"
    assert store.latest() == []


def test_two_statuses_with_one_number_are_told_apart_and_the_first_stays(store: StatusStore, camera: Camera) -> None:
    assert store.add(camera.says(1, release=1)) == "accepted"
    assert reason_of(store, camera.says(1, release=2)) == "sequence"
    assert store.latest()[0].status.release == 1


def test_a_device_that_counts_anew_is_refused_until_it_is_registered_again(store: StatusStore, camera: Camera) -> None:
    store.keep = 2
    for n in range(1, 8):
        store.add(camera.says(n))
    assert reason_of(store, camera.says(1, time=int(NOW) + 5)) == "sequence"
    assert store.devices.add([camera.record], replace=True) == 1
    assert store.add(camera.says(1, time=int(NOW) + 5)) == "accepted"
    assert numbers(store) == [1]


def test_a_clock_far_ahead_is_noted_and_moves_nothing(store: StatusStore, camera: Camera) -> None:
    store.add(camera.says(1, time=int(NOW) + 400 * DAY))
    assert "400 days ahead" in store.latest()[0].note
    store.add(camera.says(2, time=0))
    assert (store.latest()[0].status.sequence, store.latest()[0].note) == (2, "")


def test_one_transaction_takes_many_and_says_of_each_what_became_of_it(store: StatusStore, camera: Camera) -> None:
    other = Camera("cam-2")
    store.devices.add([other.record])
    first = camera.says(1)
    found = store.add_many([first, b"rubbish", other.says(5), first, Camera("cam-3").says(1), camera.says(2)])
    told = [one.reason if isinstance(one, RefusedStatusError) else one for one in found]
    assert told == ["accepted", "malformed", "accepted", "known", "unknown device", "accepted"]
    assert [one.status.device for one in store.latest()] == ["cam-1", "cam-2"]


# Enrolment


def test_an_unknown_device_enrols_by_option_only_and_is_pinned_from_then_on(url: str) -> None:
    first, other = Camera("cam-7"), Camera("cam-7")
    with StatusStore(url, enrol_unknown=True) as store:
        edited = first.says(1, release=4).replace(b'"release":4', b'"release":5')
        assert reason_of(store, edited) == "forged"
        assert store.devices.all() == []
        told = store.add_many([first.says(1), other.says(2), first.says(3)])
        assert [getattr(one, "reason", one) for one in told] == ["accepted", "another key", "accepted"]
        assert [one.key for one in store.devices.all()] == [first.key]
    with StatusStore(url) as store:
        assert store.add(first.says(4)) == "accepted"
        assert reason_of(store, other.says(5)) == "another key"
        assert reason_of(store, Camera("cam-8").says(1)) == "unknown device"


def test_enrolment_ends_at_a_number_of_devices(url: str) -> None:
    with StatusStore(url, enrol_unknown=True) as store:
        store.most_enrolled = 3
        told = store.add_many([Camera(f"cam-{n}").says(1) for n in range(5)])
        assert [getattr(one, "reason", one) for one in told] == ["accepted"] * 3 + ["too many devices"] * 2


# Bounds


def test_the_history_keeps_the_last_statuses_and_no_replay_brings_one_back(store: StatusStore, camera: Camera) -> None:
    store.keep = 3
    said = [camera.says(n) for n in range(1, 9)]
    assert [store.add(data) for data in said] == ["accepted"] * 8
    assert numbers(store) == [6, 7, 8]
    assert store.add_many(said) == ["known"] * 8
    assert numbers(store) == [6, 7, 8]


def test_old_statuses_go_but_the_newest_of_each_device_stays(store: StatusStore, camera: Camera) -> None:
    quiet = Camera("cam-2")
    store.devices.add([quiet.record])
    store.add_many([camera.says(1), camera.says(2), quiet.says(1), quiet.says(2)], NOW - 40 * DAY)
    store.add(camera.says(3))
    assert store.prune() == 3
    assert numbers(store) == [3]
    assert numbers(store, "cam-2") == [2]
    assert store.add(camera.says(1)) == "known"


def test_a_newer_schema_and_a_database_of_something_else_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without them|no file"):
        StatusStore(url, create=False)
    with StatusStore(url) as store:
        from sqlalchemy import update

        from edgead.server_side.ota.status_tables import VERSION, writing

        with writing(store._engine) as connection:
            connection.execute(update(VERSION).values(version=2))
    with pytest.raises(InputError, match="schema 2"):
        StatusStore(url)


# Several at once

_ADD = """
import sys
from edgead.server_side.ota.status_store import StatusStore
lines = open(sys.argv[2], 'rb').read().split(b'\\n')
with StatusStore(sys.argv[1], enrol_unknown=True) as store:
    print('ready', flush=True)
    sys.stdin.readline()
    print(sum(store.add(line) == 'accepted' for line in lines))
"""


def test_processes_that_make_a_database_and_add_the_same_at_once_count_each_status_once(
    url: str, tmp_path: Path
) -> None:
    lines = [Camera(f"cam-{n % 4}-{n}").says(1) for n in range(40)]
    workers = []
    for index in range(3):
        path = tmp_path / f"lines-{index}"
        path.write_bytes(b"\n".join(lines if index % 2 else lines[::-1]))
        command = [sys.executable, "-c", _ADD, url, str(path)]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    counts = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sum(counts) == len(lines)
    with StatusStore(url) as store:
        assert len(store.latest()) == len(lines)


def test_threads_that_add_batches_of_the_same_devices_never_wait_for_each_other_for_ever(
    store: StatusStore, camera: Camera
) -> None:
    cameras = [Camera(f"cam-{n}") for n in range(10, 16)]
    store.devices.add([one.record for one in cameras])
    batches = [[one.says(n) for one in (cameras if n % 2 else cameras[::-1])] for n in range(1, 13)]
    failed: list[BaseException] = []

    def add(batch: list[bytes]) -> None:
        try:
            assert store.add_many(batch) == ["accepted"] * len(batch)
            store.prune()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=add, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert [numbers(store, one.name) for one in cameras] == [list(range(1, 13))] * 6


def test_a_database_that_is_away_is_a_clear_error_and_is_found_again(postgres: Any) -> None:
    camera = Camera()
    with StatusStore(postgres.database(), enrol_unknown=True) as store:
        assert store.add(camera.says(1)) == "accepted"
        postgres.kill()
        try:
            with pytest.raises(StorageError, match="the database"):
                store.add(camera.says(2))
        finally:
            postgres.start()
        store.ping()
        assert store.add(camera.says(2)) == "accepted"
        assert numbers(store) == [1, 2]


def test_errors_of_a_database_name_no_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as caught:
        StatusStore(f"postgresql://me:s3cret@/x?host={tmp_path}")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(InputError) as refused:
        StatusStore("mysql://me:s3cret@host/x")
    assert "s3cret" not in str(refused.value)


# Folders


def write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def test_a_stick_with_statuses_of_many_is_read_and_what_does_not_count_is_listed(tmp_path: Path) -> None:
    one, two = Camera("cam-1"), Camera("cam-2")
    for n in (9, 10):
        write(tmp_path / "line-3" / "cam-1" / "spool", f"{n:012d}.json", one.says(n, release=n))
    write(tmp_path / "cam-2", "000000000001.json", two.says(1))
    write(tmp_path / "cam-2", "000000000002.json", Camera("cam-2").says(2))
    write(tmp_path / "cam-2", "000000000003.json", b"\0" * 700)
    write(tmp_path / "cam-2", ".part.json", b"half")
    (tmp_path / "cam-2" / "loop.json").symlink_to(tmp_path / "cam-2" / "000000000001.json")
    DeviceFile(tmp_path).add([one.record, two.record])
    found = read_statuses(tmp_path)
    assert [(seen.status.device, seen.status.sequence, seen.verified) for seen in found.latest] == [
        ("cam-1", 10, True),
        ("cam-2", 1, True),
    ]
    assert sorted(refused.reason for refused in found.refused) == ["another key", "malformed", "malformed"]
    assert found.devices is not None
    assert len(found.devices) == 2


def test_statuses_without_a_registry_say_that_nobody_vouches_for_them(tmp_path: Path) -> None:
    write(tmp_path, "000000000001.json", Camera("cam-1").says(1))
    write(tmp_path, "000000000002.json", Camera("cam-1").says(2))
    found = read_statuses(str(tmp_path))
    assert [(seen.status.sequence, seen.verified) for seen in found.latest] == [(1, False)]
    assert [refused.reason for refused in found.refused] == ["another key"]
    assert found.devices is None


def test_a_database_is_read_like_a_folder_and_never_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        read_statuses(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(InputError, match="nothing there"):
        read_statuses(tmp_path / "none")
    camera = Camera()
    with StatusStore(str(tmp_path / "fleet.db"), enrol_unknown=True) as store:
        store.add(camera.says(3))
        store.add(Camera("cam-2").says(3))
    found = read_statuses(str(tmp_path / "fleet.db"))
    assert [seen.status.device for seen in found.latest] == ["cam-1", "cam-2"]
    found = read_statuses(f"sqlite:///{tmp_path}/fleet.db", devices=[camera.record])
    assert [seen.status.device for seen in found.latest] == ["cam-1"]
    assert [refused.reason for refused in found.refused] == ["unknown device"]


def test_a_damaged_row_is_listed_and_the_others_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with StatusStore(str(path), enrol_unknown=True) as store:
        store.add_many([Camera("cam-1").says(1), Camera("cam-2").says(1)])
    with sqlite3.connect(path) as raw:
        raw.execute("update edgead_statuses set envelope = x'00' where device = 'cam-1'")
    found = read_statuses(str(path))
    assert [seen.status.device for seen in found.latest] == ["cam-2"]
    assert [refused.where for refused in found.refused] == ["cam-1"]


# Registries


@pytest.fixture(params=["folder", "sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "folder":
        yield DeviceFile(tmp_path / "devices")
        return
    postgresql = request.param == "postgresql"
    url = request.getfixturevalue("postgres").database() if postgresql else str(tmp_path / "fleet.db")
    with StatusStore(url) as store:
        yield store.devices


def test_a_registered_device_keeps_its_key_unless_somebody_replaces_it(registry: Any) -> None:
    one, two, again = Camera("cam-1"), Camera("cam-2"), Camera("cam-1")
    assert registry.add([two.record, one.record]) == 2
    assert registry.add([one.record]) == 0
    with pytest.raises(InputError, match="--replace"):
        registry.add([Camera("cam-3").record, again.record])
    assert [(record.device, record.key) for record in registry.all()] == [("cam-1", one.key), ("cam-2", two.key)]
    assert registry.add([again.record], replace=True) == 1
    registry.remove("cam-2")
    assert [(record.device, record.key) for record in registry.all()] == [("cam-1", again.key)]
    with pytest.raises(InputError, match="cam-2"):
        registry.remove("cam-2")


def test_a_list_of_devices_is_read_or_refused_with_its_line(tmp_path: Path) -> None:
    path, key = tmp_path / "list", Camera().key
    path.write_text(f"# line 3\n\ncam-1 {key.upper()} above the belt\ncam-2 {key}\n")
    assert [(one.device, one.key, one.note) for one in read_list(path)] == [
        ("cam-1", key, "above the belt"),
        ("cam-2", key, ""),
    ]
    other = Camera().key
    wrong = ("cam-1", f"../x {key}", f"cam-1 {key[:-1]}", f"cam-1 {key}\ncam-1 {other}", '{"schema":2,"devices":{}}')
    for text in (*wrong, "{", f"cam-1 {key} {'x' * 301}"):
        path.write_text(text)
        with pytest.raises(InputError):
            read_list(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_list(path)


def test_a_damaged_registry_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    registry = DeviceFile(tmp_path)
    registry.add([Camera().record])
    data = registry.path.read_bytes()[:-5]
    registry.path.write_bytes(data)
    with pytest.raises(InputError, match="registry"):
        registry.add([Camera("cam-2").record])
    assert registry.path.read_bytes() == data
