"""What somebody can and cannot do with stolen online keys, or with a stolen device, against real devices."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")

from tuf.api.metadata import Metadata, MetaFile, Targets

from edgead.runtime.device_folder import init_device
from edgead.runtime.errors import StaleError, UntrustedError
from edgead.server_side.ota.repository import utc_now
from edgead.server_side.ota.rotation import rotate


def in_days(days: float) -> datetime:
    return utc_now() + timedelta(days=days)


def signed(folder: Path, name: str, change: Callable[[Any], None], ring: Any) -> int:
    """Sign a changed copy of the newest timestamp, snapshot or root with these keys and no others; its version."""
    metadata_folder = folder / "metadata"
    paths = [*metadata_folder.glob(f"{name}.json"), *metadata_folder.glob(f"*.{name}.json")]
    newest = max((Metadata.from_bytes(path.read_bytes()) for path in paths), key=lambda found: found.signed.version)
    made: Metadata[Any] = Metadata(newest.signed)
    made.signed.version += 1
    change(made.signed)
    for record in ring.records.values():
        made.sign(ring._open(record), append=True)
    number = "" if name == "timestamp" else f"{made.signed.version}."
    (metadata_folder / f"{number}{name}.json").write_bytes(made.to_bytes())
    return int(made.signed.version)


def stamped(when: datetime, snapshot: int | None = None) -> Callable[[Any], None]:
    """A timestamp made at that time, good for a week, for that snapshot."""

    def change(timestamp: Any) -> None:
        timestamp.unrecognized_fields["x-edgead-made"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
        timestamp.expires = when + timedelta(days=7)
        if snapshot is not None:
            timestamp.snapshot_meta = MetaFile(snapshot)

    return change


# The timestamp key


def test_with_the_timestamp_key_a_mirror_hides_news_until_the_snapshot_expires(
    world: Any, camera: Any, server: Any, tmp_path: Path
) -> None:
    server.folder = tmp_path / "mirror"
    shutil.copytree(world.folder, server.folder)
    stolen = world.keyring("timestamp")
    world.update()
    for days in (6, 13, 20, 27, 29.9):
        signed(server.folder, "timestamp", stamped(in_days(days)), stolen)
        outcome = camera.poll(clock=in_days(days).timestamp)
        assert (outcome.status, outcome.release) == ("current", 1), outcome
        assert camera.store.state().warning == ""
    signed(server.folder, "timestamp", stamped(in_days(30.5)), stolen)
    camera.refused(StaleError, "snapshot", clock=in_days(30.5).timestamp)
    assert camera.store.state().warning.startswith("updates are frozen since ")
    server.folder = world.folder
    world.now = lambda: in_days(31)
    # The thief's numbers are above the publisher's; a new key makes devices forget them.
    with world.opened() as repository:
        rotate(repository, "timestamp", world.keyring())
    world.update()
    outcome = camera.poll(clock=in_days(31).timestamp)
    assert (outcome.status, outcome.release) == ("activated", 3)


def test_a_timestamp_that_is_signed_to_name_an_old_snapshot_is_refused(world: Any, camera: Any) -> None:
    with world.opened() as repository:
        old = repository.snapshot.signed.version
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    signed(world.folder, "timestamp", stamped(utc_now(), old), world.keyring("timestamp"))
    camera.refused(UntrustedError, "BadVersionNumber")


def test_an_old_snapshot_brings_no_old_release_to_a_device_whose_cache_was_wiped(world: Any, camera: Any) -> None:
    with world.opened() as repository:
        old = repository.snapshot.signed.version
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    before = camera.snapshot()
    shutil.rmtree(camera.store.metadata)
    signed(world.folder, "timestamp", stamped(utc_now(), old), world.keyring("timestamp"))
    outcome = camera.poll()
    assert (outcome.status, outcome.release) == ("current", 2), outcome
    assert camera.snapshot() == before


# The snapshot key


@pytest.mark.parametrize("role", ["targets", "engines", "knowledge.part", "releases.part", "rollout.part"])
def test_the_snapshot_key_signs_no_targets(
    worlds: ModuleType, world: Any, server: Any, tmp_path: Path, role: str
) -> None:
    def nothing(targets: Targets) -> None:
        """A copy under a new number would be enough to take over."""

    world.forge(role, nothing, "snapshot")
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    outcome = fresh.poll()
    assert isinstance(outcome.error, UntrustedError), outcome
    assert fresh.store.state().active is None


@pytest.mark.parametrize(
    ("key", "role"),
    [("snapshot", "timestamp"), ("snapshot", "root"), ("timestamp", "snapshot"), ("timestamp", "root")],
)
def test_an_online_key_signs_no_top_role_but_its_own(world: Any, camera: Any, key: str, role: str) -> None:
    world.update()

    def change(content: Any) -> None:
        content.expires = in_days(3000)

    version = signed(world.folder, role, change, world.keyring(key))
    if role == "snapshot":
        signed(world.folder, "timestamp", stamped(utc_now(), version), world.keyring("timestamp"))
    camera.refused(UntrustedError)


# Rotation


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_devices_follow_a_rotation_of_an_online_key_and_the_old_one_counts_no_more(
    worlds: ModuleType, world: Any, camera: Any, server: Any, tmp_path: Path, role: str
) -> None:
    old = world.keyring(role)
    with world.opened() as repository:
        assert not set(rotate(repository, role, world.keyring())) & old.records.keys()
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    fresh.taken(2)
    fresh.updater().confirm()
    new = world.keyring("timestamp")
    new.records = {keyid: record for keyid, record in new.records.items() if keyid not in old.records}
    good = (world.folder / "metadata" / "timestamp.json").read_bytes()
    version = signed(world.folder, role, stamped(utc_now()) if role == "timestamp" else lambda content: None, old)
    if role == "snapshot":
        signed(world.folder, "timestamp", stamped(utc_now(), version), new)
    for one in (camera, fresh):
        one.refused(UntrustedError)
    (world.folder / "metadata" / "timestamp.json").write_bytes(good)
    for path in (world.folder / "metadata").glob(f"{version}.snapshot.json") if role == "snapshot" else ():
        path.unlink()
    world.update()
    # A signature that was refused leaves nothing behind that would keep the next good one out.
    camera.taken(3)
    fresh.taken(3)


# A stolen device


def test_no_key_of_the_publisher_lies_on_a_device(world: Any, camera: Any) -> None:
    init_device(camera.folder, camera.device, force=True)
    world.update()
    camera.taken(2)
    secrets = []
    for record in world.keyring().records.values():
        raw = world.keyring()._open(record)._private_key.private_bytes_raw()
        secrets += [raw, raw.hex().encode(), base64.b64encode(raw).rstrip(b"=")]
    assert len(secrets) >= 3 * 8
    files = [path for path in camera.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        assert b"PRIVATE" not in data, path
        assert not [secret for secret in secrets if secret in data or secret.upper() in data], path


def test_a_device_that_is_set_back_to_an_old_copy_of_its_disk_takes_what_is_current(
    world: Any, camera: Any, tmp_path: Path
) -> None:
    shutil.copytree(camera.folder, tmp_path / "old", symlinks=True)
    for counter in (2, 3):
        world.update()
        camera.taken(counter)
        camera.updater().confirm()
    current = camera.snapshot()
    shutil.rmtree(camera.folder)
    shutil.copytree(tmp_path / "old", camera.folder, symlinks=True)
    assert camera.store.state().counter == 1
    camera.taken(3)
    assert camera.snapshot() == current
