"""Devices against metadata and clocks that lie; numbers are the rows of the table of faults."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")

from tuf.api.metadata import TargetFile, Targets

from edgead.runtime.errors import ReleaseError, StaleError, UntrustedError
from edgead.runtime.rollout import encode_rollout, new_rollout

YEAR = 365.25 * 86400


def test_row_10_an_old_timestamp_is_refused(world: Any, camera: Any, tmp_path: Path) -> None:
    old = (world.folder / "metadata" / "timestamp.json").read_bytes()
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    (world.folder / "metadata" / "timestamp.json").write_bytes(old)
    camera.refused(UntrustedError, "BadVersionNumber")


def test_row_10_an_old_snapshot_under_a_new_timestamp_is_refused(world: Any, camera: Any) -> None:
    snapshots = sorted(
        (world.folder / "metadata").glob("*.snapshot.json"), key=lambda path: int(path.name.split(".")[0])
    )
    world.update()
    newest = max((world.folder / "metadata").glob("*.snapshot.json"), key=lambda path: int(path.name.split(".")[0]))
    newest.write_bytes(snapshots[-1].read_bytes())
    camera.refused(UntrustedError)


def test_row_10_an_old_release_under_a_new_name_is_refused(world: Any, camera: Any) -> None:
    world.put_release(5, world.read("releases/part/1.json"))
    camera.refused(ReleaseError, "release 5")
    assert camera.store.state().counter == 1


def test_row_10_a_role_that_is_dropped_from_the_snapshot_is_refused(world: Any, camera: Any) -> None:
    world.update()
    with world.opened() as repository:
        del repository.snapshot.signed.meta["knowledge.part.json"]
        repository.commit(world.keyring())
    camera.refused(UntrustedError)


def test_rows_11_13_a_frozen_timestamp_alarms_when_it_expires(world: Any, camera: Any) -> None:
    world.update()
    later = time.time() + 8 * 86400
    camera.refused(StaleError, "expired", clock=lambda: later)
    camera.taken(2)


def test_row_12_old_metadata_is_refused_after_the_cache_is_wiped(world: Any, camera: Any, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "old")
    time.sleep(1.1)  # signed times have whole seconds
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    shutil.rmtree(camera.store.metadata)
    shutil.rmtree(world.folder)
    shutil.copytree(tmp_path / "old", world.folder)
    camera.refused(UntrustedError, "the last time seen")
    assert camera.store.state().counter == 2


def test_row_12_the_counter_refuses_an_old_release_whatever_time_is_signed(
    worlds: ModuleType, world: Any, camera: Any, server: Any, tmp_path: Path
) -> None:
    old = worlds.World(tmp_path / "old", world.tiny, list(world.packs))
    shutil.copytree(world.home, old.home)
    world.update()
    world.update()
    camera.taken(3)
    camera.updater().confirm()
    shutil.rmtree(camera.store.metadata)
    old.update(added=5)  # signed later, with a counter that is not above what was seen
    server.folder = old.folder
    before = camera.snapshot()
    assert camera.poll().status == "current"
    assert camera.snapshot() == before


@pytest.mark.parametrize(("clock", "match"), [(0.0, "a clock"), (70 * YEAR, "expired")], ids=["1970", "2040"])
def test_row_13_a_wrong_clock_takes_no_update_and_says_so(
    world: Any, camera: Any, server: Any, clock: float, match: str
) -> None:
    world.update()
    camera.refused(StaleError, match, clock=lambda: clock)
    camera.taken(2)


def test_row_13_a_new_device_whose_clock_is_at_1970_takes_nothing(
    worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    assert isinstance(fresh.poll(clock=lambda: 0.0).error, StaleError)
    assert fresh.store.state().last_seen == 0
    fresh.taken(1)


def test_row_13_time_from_a_forged_future_is_not_believed(world: Any, camera: Any) -> None:
    before = camera.store.state().last_seen
    world.now = lambda: datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=3)
    world.stamp()
    camera.refused(StaleError, "a clock")
    assert camera.store.state().last_seen == before


@pytest.mark.parametrize("signing", ["wrong keys", "one of two keys", "one key twice"])
def test_row_14_a_release_that_too_few_signed_is_refused(world: Any, camera: Any, signing: str) -> None:
    data = world.read("releases/part/1.json")

    def change(targets: Targets) -> None:
        targets.targets["releases/part/7.json"] = TargetFile.from_data("releases/part/7.json", data, ["sha256"])

    with world.opened() as repository:
        repository.add("rollout/part.json", encode_rollout(new_rollout("part", 7, 9, percent=100.0)))
        repository.commit(world.keyring())
    world.forge("releases.part", change, *(["rollout"] if signing == "wrong keys" else ["releases"]))
    if signing != "wrong keys":
        newest = max((world.folder / "metadata").glob("*.releases.part.json"), key=lambda path: path.stat().st_mtime_ns)
        content = json.loads(newest.read_bytes())
        first = content["signatures"][0]
        content["signatures"] = [first] if signing == "one of two keys" else [first, first]
        newest.write_text(json.dumps(content))
    camera.refused(UntrustedError)


@pytest.mark.parametrize(
    "name",
    ["../../../evil", "/tmp/evil", "a\0b", "x" * 5000, "\u202egnp.evil", "..\\evil", "%2e%2e/evil"],
    ids=["up", "absolute", "nul", "long", "bidi", "backslash", "escaped"],
)
def test_row_16_names_of_targets_never_become_places(world: Any, camera: Any, tmp_path: Path, name: str) -> None:
    world.publish(world.pack())

    def add(targets: Targets) -> None:
        for path in (f"knowledge/part/{name}", f"knowledge/part/{world.digests[0]}-{name}.delta"):
            targets.targets[path] = TargetFile.from_data(path, b"evil", ["sha256"])

    with world.opened() as repository:
        add(repository.edit("knowledge.part"))
        repository.commit(world.keyring())
    world.release()
    outside = {path for path in tmp_path.rglob("*") if camera.folder not in path.parents}
    camera.taken(2)
    assert {path for path in tmp_path.rglob("*") if camera.folder not in path.parents} == outside
    assert not [path for path in camera.folder.rglob("*") if "evil" in path.name or len(path.name) > 100]
