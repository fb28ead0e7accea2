"""Updates on a device that rots, fills up, dies and inspects meanwhile; numbers are the rows of the table of faults."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tuf")

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import RollbackError, StorageError, StoreBusyError
from edgead.runtime.inspection import Verdict
from edgead.runtime.knowledge import Pack
from edgead.runtime.live import LiveInspector
from edgead.runtime.release import encode_release
from edgead.runtime.slots import Store
from edgead.runtime.spec import Calibration
from edgead.runtime.updater import DeviceUpdater


def test_row_27_a_zeroed_or_torn_cache_of_metadata_recovers(world: Any, camera: Any) -> None:
    world.update()
    for path in camera.store.metadata.rglob("*.json"):
        if not path.is_symlink():
            path.write_bytes(b"\0" * path.stat().st_size)
    camera.taken(2)
    camera.updater().confirm()
    world.update()
    for path in camera.store.metadata.rglob("*.json"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:100])
    (camera.store.metadata / "root.json").unlink()
    (camera.store.metadata / "root.json").write_bytes(b"")
    camera.taken(3)


@pytest.mark.parametrize("what", ["packs", "engines", "releases"])
@pytest.mark.parametrize("how", ["rotted", "gone"])
def test_row_28_what_rotted_on_the_disk_is_fetched_again(world: Any, camera: Any, what: str, how: str) -> None:
    good = camera.snapshot()
    active = camera.store.active()
    name = {
        "packs": f"{active.packs['part'].digest}.safetensors",
        "engines": active.engine.name,
        "releases": f"{active.digest}.json",
    }[what]
    path = camera.folder / what / name
    data = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    outcome = camera.poll()
    assert outcome.status == "current", outcome
    assert name in outcome.reason
    assert path.read_bytes() == data
    assert camera.snapshot() == good


def test_row_28_a_base_that_rotted_makes_the_whole_pack(world: Any, camera: Any) -> None:
    updater = camera.updater()
    assert updater.poll().status == "current"  # looked at every byte; the next look is tomorrow
    world.update()
    path = camera.folder / "packs" / f"{world.digests[0]}.safetensors"
    path.write_bytes(b"rotten" + path.read_bytes()[6:])
    outcome = updater.poll()
    assert (outcome.status, outcome.way) == ("activated", "whole")


def test_row_30_of_two_updaters_one_waits(bad: ModuleType, world: Any, camera: Any, server: Any) -> None:
    world.update()
    server.only, server.fault = "/targets/knowledge/", bad.times(1, bad.stalls(10))
    outcomes: list[Any] = []
    threads = [threading.Thread(target=lambda: outcomes.append(camera.poll())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert sorted(outcome.status for outcome in outcomes) == ["activated", "current"]
    with camera.store.updating():
        camera.refused(StoreBusyError, lock_timeout_s=0.1)


def test_row_31_no_frame_is_lost_or_mixed_while_updates_arrive(world: Any, camera: Any, tiny: ModuleType) -> None:
    packs = {pack.version: pack for pack in world.packs}
    results: list[Any] = []
    asked = [0]
    stop = threading.Event()
    frame = tiny.frame(160)
    with LiveInspector(camera.store.active(), threads=1) as inspector:

        def line() -> None:
            while not stop.is_set():
                asked[0] += 1
                results.append(inspector.inspect(frame))

        thread = threading.Thread(target=line)
        thread.start()
        for _ in range(4):
            # Rows that are nearer to the frame: each version has a score of its own.
            base = world.packs[-1]
            ids, rows = base.ids("bank.normal"), base.arrays["bank.normal"]
            row = np.full((1, 3), 100 + 3 * len(packs), np.float32)
            world.publish(
                Pack(
                    "part",
                    base.fingerprint,
                    Calibration(threshold=base.calibration.threshold + 0.25, map_threshold=30.0),
                    {
                        "bank.normal": np.concatenate([rows, row]),
                        "bank.normal.ids": np.concatenate([ids, ids[-1:] + np.uint64(1)]),
                    },
                )
            )
            world.release()
            packs[world.packs[-1].version] = world.packs[-1]
            outcome = camera.poll(inspector=inspector)
            assert outcome.status == "activated"
            camera.updater().confirm(inspector.health)
            time.sleep(0.05)
        stop.set()
        thread.join()
    assert len(results) == asked[0] > 100
    scores: dict[str, set[float]] = {}
    for result in results:
        assert result.verdict is not Verdict.NOT_INSPECTED
        pack = packs[result.knowledge]
        nearest = float(np.linalg.norm(160.0 - pack.arrays["bank.normal"], axis=1).min())
        assert result.score == pytest.approx(nearest, abs=1e-3)
        assert result.threshold == pack.calibration.threshold
        scores.setdefault(result.knowledge, set()).add(result.score)
    order = list(dict.fromkeys(result.knowledge for result in results))
    assert order == [pack.version for pack in world.packs]  # never back
    assert all(len(values) == 1 for values in scores.values())


def test_row_31_a_new_engine_is_opened_beside_the_old_one(
    worlds: ModuleType, world: Any, camera: Any, tiny: ModuleType
) -> None:
    from edgead.server_side.ota.publish import publish_bundle
    from edgead.server_side.ota.releases import make_release

    worlds.bundle(world.home / "new.edgead", tiny, world.packs[0], trunk=tiny.trunk_graph(slow=1))
    with world.opened() as repository:
        published = publish_bundle(repository, world.home / "new.edgead")
        repository.commit(world.keyring())
    digest = next(path for path, _ in published.files if "engines/" in path).split("/")[1].removesuffix(".edgead")
    with world.opened() as repository:
        made = make_release(repository, "part", pack=world.packs[0].digest, engine=digest)
        repository.commit(world.keyring())
    world.put_release(made.counter, encode_release(made))
    results: list[Any] = []
    stop = threading.Event()
    with LiveInspector(camera.store.active(), threads=1) as inspector:

        def line() -> None:
            while not stop.is_set():
                results.append(inspector.inspect(tiny.frame(160)))

        thread = threading.Thread(target=line)
        thread.start()
        outcome = camera.poll(inspector=inspector)
        time.sleep(0.1)
        stop.set()
        thread.join()
        assert (outcome.status, outcome.restart) == ("activated", False)
        assert inspector.active.release.engine == digest
    assert all(result.verdict is Verdict.NG for result in results)


def test_row_33_a_crash_loop_goes_back_and_the_release_is_not_taken_again(world: Any, camera: Any) -> None:
    world.update()
    camera.taken(2)
    bad_one = camera.store.state().active
    for _ in range(3):
        assert camera.store.start().release.counter == 2
    assert camera.store.start().release.counter == 1
    assert bad_one in camera.store.state().quarantined
    again = camera.poll()
    assert (again.status, again.release) == ("current", 1)


def test_row_34_without_a_way_back_the_device_stays_and_alarms(
    worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    only = worlds.camera(tmp_path / "only", server.url, world.root).installed()
    world.stop()
    only.refused(RollbackError)
    assert "no way back" in only.store.state().alarm
    world.update()
    only.taken(2)


def test_row_26_a_disk_that_is_full_costs_a_poll(world: Any, camera: Any) -> None:
    class Full(RealDisk):
        def free_space(self, folder: Path) -> int:
            return 0

    world.update()
    before = camera.snapshot()
    outcome = DeviceUpdater(Store(camera.folder, disk=Full()), camera.device, limits=camera.limits, disk=Full()).poll()
    assert isinstance(outcome.error, StorageError)
    assert camera.snapshot() == before
    camera.taken(2)


class Killed(BaseException):
    """The power goes."""


class Dying(RealDisk):
    """Takes so many steps and no more; a write has one more before each piece."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def make_folder(self, folder: Path) -> None:
        self.step()
        super().make_folder(folder)

    def write(self, path: Path, chunks: Any) -> None:
        self.step()

        def dying() -> Iterator[bytes]:
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                self.step()
                yield chunk[len(chunk) // 2 :]

        super().write(path, dying())

    def sync(self, path: Path) -> None:
        self.step()
        super().sync(path)

    def replace(self, source: Path, target: Path) -> None:
        self.step()
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.step()
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self.step()
        super().remove(path)


def test_row_24_a_poll_that_is_killed_at_any_step_leaves_one_whole_release(
    worlds: ModuleType, world: Any, camera: Any, tmp_path: Path
) -> None:
    world.update()
    shutil.rmtree(camera.store.metadata)
    seen = set()
    for steps in range(500):
        copy = worlds.Camera(tmp_path / "copies" / str(steps), camera.device)
        shutil.copytree(camera.folder, copy.folder)
        disk = Dying(steps)
        try:
            outcome = DeviceUpdater(Store(copy.folder, disk=disk), copy.device, disk=disk).poll()
        except Killed:
            active = Store(copy.folder).start()
            assert active.packs["part"].digest == world.digests[active.release.counter - 1]
            assert active.faults == ()
            seen.add(active.release.counter)
            assert (copy.poll().error, copy.store.active().release.counter) == (None, 2)
        else:
            assert (outcome.status, outcome.release) == ("activated", 2)
            break
        shutil.rmtree(copy.folder)
    assert steps >= 20
    assert seen == {1, 2}
