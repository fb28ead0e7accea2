"""Row 37 from end to end: a release fails on pilot devices, and nobody but the guard does anything about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")
pytest.importorskip("sqlalchemy")

from click.testing import CliRunner

from edgead.runtime.device_status import Attempt, DeviceStatus, encode_status, new_device_key, public_of
from edgead.runtime.live import LiveInspector
from edgead.runtime.status_report import StatusReporter
from edgead.server_side.ota.devices import DeviceFile, DeviceKey, checked
from edgead.server_side.ota.guard import ENROLLED, witnesses
from edgead.server_side.ota.guard_cli import guard
from edgead.server_side.ota.rollouts import rollout_of
from edgead.server_side.ota.serve import RepositoryServer, serving
from edgead.server_side.ota.status_store import StatusStore
from edgead.server_side.ota.statuses import read_statuses
from tests.runtime import update_world

PHRASE = "correct horse battery staple"


class Reporting:
    """A real device that signs what became of its updates."""

    def __init__(self, folder: Path, url: str, root: bytes, *groups: str) -> None:
        self.name, self.seed = folder.name, new_device_key()
        self.camera = update_world.camera(folder, url, root, device_id=self.name, groups=groups).installed()
        self.reporter = StatusReporter(self.camera.store, self.camera.device, self.seed)
        self.reporter.note()

    @property
    def record(self) -> DeviceKey:
        return checked(self.name, public_of(self.seed).hex())

    @property
    def release(self) -> int:
        release: int = self.camera.store.active().release.counter
        return release

    def take(self, frame: Any) -> Any:
        """Poll, inspect under the new release, and look at how that went."""
        with LiveInspector(self.camera.store.active()) as inspector:
            updater = self.camera.updater(inspector)
            polled = updater.poll()
            if polled.status != "activated":
                return polled
            for _ in range(12):
                inspector.inspect(frame)
            watched = updater.watch()
            if watched is None:
                updater.confirm()
            return watched or polled

    def status(self) -> bytes:
        """What the device itself writes about its store, for its sender to send."""
        number = self.reporter.note()
        assert number is not None, self.reporter.trouble
        return (self.camera.store.spool / f"{number:012d}.json").read_bytes()


@pytest.fixture(scope="module")
def made(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return update_world.new_world(tmp_path_factory.mktemp("guarded"), tiny)


@pytest.fixture
def world(made: Any, tmp_path: Path) -> Any:
    return made.copy(tmp_path / "world")


@pytest.fixture
def server(world: Any) -> Iterator[RepositoryServer]:
    with serving(world.folder) as running:
        yield running


@pytest.fixture
def online(world: Any, tmp_path: Path) -> Path:
    """A key folder with the online keys and the trusted root: nothing in it can make a release."""
    keys = world.home / "keys"
    folder = tmp_path / "online"
    shutil.copytree(keys, folder)
    ring = world.keyring("rollout", "snapshot", "timestamp")
    for path in folder.iterdir():
        if path.name not in ("keyring.json", "root.json") and not any(keyid in path.name for keyid in ring.records):
            path.unlink()
    return folder


def look(world: Any, online: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    monkeypatch.setenv("GUARD_KEYS", PHRASE)
    words = [str(world.folder), "--statuses", str(source), "--once", "--json", "--keys", str(online)]
    words += ["--passphrase-env", "GUARD_KEYS", *more]
    done = CliRunner().invoke(guard, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


def test_row_37_a_release_that_fails_on_pilots_is_stopped_by_their_reports_alone(
    world: Any,
    server: RepositoryServer,
    online: Path,
    tiny: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pilots = [Reporting(tmp_path / f"pilot-{number}", server.url, world.root, "pilot") for number in range(5)]
    other = Reporting(tmp_path / "other", server.url, world.root)
    world.update(window=3600, percent=0.0, groups=["pilot"], error_threshold=0.2)
    good, bad = tiny.frame(), tiny.frame()
    bad[0, 0, 0] = tiny.POISON
    assert other.take(good).status == "current"

    database = tmp_path / "fleet.db"
    with StatusStore(str(database)) as store:
        store.devices.add([device.record for device in (*pilots, other)])
        # Somebody without a key of the plant says that it fails everywhere.
        for number in range(20):
            stranger = encode_status(
                DeviceStatus(
                    device=f"stranger-{number}",
                    product="part",
                    groups=("pilot",),
                    sequence=1,
                    time=1_700_000_000,
                    version="1.4.0",
                    release=1,
                    attempts=(Attempt(2, "rejected", "believe me"),),
                ),
                seed := new_device_key(),
            )
            store.devices.add([DeviceKey(f"stranger-{number}", public_of(seed).hex(), 0.0, ENROLLED)])
            assert store.add(stranger) == "accepted"
        for pilot in pilots[:3]:
            assert pilot.take(good).status == "activated"
            store.add(pilot.status())
    calm = look(world, online, database, monkeypatch)
    assert (calm["action"], calm["confirmed"], calm["reported"], calm["ignored"]) == ("none", 3, 3, 20)

    # On two of them the same release meets frames that it cannot judge: they go back by themselves.
    with StatusStore(str(database)) as store:
        for pilot in pilots[3:]:
            assert pilot.take(bad).status == "rolled back"
            assert pilot.release == 1
            store.add(pilot.status())
        store.add(other.status())
    assert [pilot.release for pilot in pilots] == [2, 2, 2, 1, 1]

    said = look(world, online, database, monkeypatch, "--dry-run")
    assert (said["action"], said["failed"], said["reported"]) == ("stop", 2, 5)
    assert not _stopped(world)
    said = look(world, online, database, monkeypatch)
    assert (said["action"], said["failed"], said["reported"]) == ("stop", 2, 5)
    assert _stopped(world)
    assert look(world, online, database, monkeypatch)["action"] == "none"

    for pilot in pilots[:3]:
        pilot.take(good)
    assert other.take(good).status == "current"
    assert [device.release for device in (*pilots, other)] == [1] * 6
    log = [json.loads(line) for line in (online / "guard.jsonl").read_text().splitlines()]
    assert [line["action"] for line in log][-2:] == ["stop", "none"]


def test_devices_that_enrolled_themselves_are_seen_and_do_not_count(tmp_path: Path) -> None:
    database = tmp_path / "fleet.db"
    with StatusStore(str(database), enrol_unknown=True) as store:
        for number in range(9):
            status = DeviceStatus(
                device=f"cam-{number}",
                product="part",
                sequence=1,
                time=1,
                version="1",
                attempts=(Attempt(2, "rejected"),),
            )
            assert store.add(encode_status(status, new_device_key())) == "accepted"
    found = read_statuses(database)
    assert len(found.latest) == 9
    those = witnesses(found)
    assert (list(those.seen), those.ignored) == ([], {"part": 9})


def test_two_guards_at_once_stop_it_once(
    world: Any, online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.update(percent=100.0)
    database = tmp_path / "fleet.db"
    with StatusStore(str(database)) as store:
        for number in range(6):
            seed = new_device_key()
            store.devices.add([checked(f"cam-{number}", public_of(seed).hex())])
            status = DeviceStatus(
                device=f"cam-{number}",
                product="part",
                sequence=1,
                time=1_700_000_000,
                version="1.4.0",
                release=1,
                attempts=(Attempt(2, "rejected", "scores are off"),),
            )
            store.add(encode_status(status, seed))
    with world.opened() as repository:
        before = rollout_of(repository, "part")
    words = [sys.executable, "-m", "edgead", "ota", "guard", str(world.folder), "--statuses", str(database), "--once"]
    words += ["--json", "--keys", str(online), "--passphrase-env", "GUARD_KEYS"]
    environment = {**os.environ, "GUARD_KEYS": PHRASE}
    running = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    actions = sorted(json.loads(output)["action"] for output, _ in outputs)
    assert actions == ["none", "stop"]
    with world.opened() as repository:
        after = rollout_of(repository, "part")
    assert before is not None
    assert after is not None
    assert (after.stopped, after.sequence) == (True, before.sequence + 1)


def _stopped(world: Any) -> bool:
    with world.opened() as repository:
        record = rollout_of(repository, "part")
        assert record is not None
        return record.stopped


def test_a_source_that_is_away_ends_no_guard_and_a_signal_does(world: Any, online: Path, tmp_path: Path) -> None:
    source = tmp_path / "statuses"
    source.mkdir()
    DeviceFile(source).add([checked("cam-1", public_of(new_device_key()).hex())])
    words = [
        sys.executable,
        "-m",
        "edgead",
        "ota",
        "guard",
        str(world.folder),
        "--statuses",
        str(source),
        "--every",
        "1",
    ]
    words += ["--keys", str(online), "--passphrase-env", "GUARD_KEYS"]
    # Both streams in one, as a service manager keeps them.
    running = subprocess.Popen(
        words,
        env={**os.environ, "GUARD_KEYS": PHRASE, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert running.stdout is not None
        assert "no registered device is reached yet" in running.stdout.readline()
        source.rename(tmp_path / "away")
        assert any("not looked" in line for line in running.stdout)
        (tmp_path / "away").rename(source)
        assert any("no registered device is reached yet" in line for line in running.stdout)
        running.terminate()
        assert running.wait(timeout=60) == 0
    finally:
        running.kill()
        running.communicate()
