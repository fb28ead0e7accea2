"""Devices against repositories, servers, clocks and disks that lie; numbers are the rows of the table of faults."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tuf")

import msgspec
from tuf.api.metadata import TargetFile, Targets

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import (
    FetchContentError,
    FetchError,
    KnowledgeError,
    ReleaseError,
    RollbackError,
    SelfTestError,
    StaleError,
    StorageError,
    StoreBusyError,
    UntrustedError,
)
from edgead.runtime.frames import FrameRing
from edgead.runtime.inspection import Verdict
from edgead.runtime.knowledge import Pack
from edgead.runtime.live import LiveInspector
from edgead.runtime.release import decode_release, encode_release
from edgead.runtime.rollout import encode_rollout, new_rollout
from edgead.runtime.slots import Store
from edgead.runtime.spec import Calibration
from edgead.runtime.update_rules import cheapest, decide, judge_watch, next_poll
from edgead.runtime.updater import DeviceUpdater

YEAR = 365.25 * 86400


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    return loaded("edgead_tests_update_world", Path(__file__).with_name("update_world.py"))


@pytest.fixture(scope="session")
def bad() -> ModuleType:
    return loaded("edgead_tests_misbehaving", Path(__file__).parents[1] / "misbehaving_server.py")


@pytest.fixture(scope="session")
def template(worlds: ModuleType, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return worlds.new_world(tmp_path_factory.mktemp("world"), tiny)


@pytest.fixture
def world(template: Any, tmp_path: Path) -> Any:
    return template.copy(tmp_path / "world")


@pytest.fixture
def server(bad: ModuleType, world: Any) -> Iterator[Any]:
    with bad.misbehaving(world.folder) as running:
        yield running


@pytest.fixture
def camera(worlds: ModuleType, world: Any, server: Any, tmp_path: Path) -> Any:
    """A device with release 1, confirmed."""
    return worlds.camera(tmp_path / "camera", server.url, world.root).installed()


def refused(camera: Any, kind: type[Exception], match: str = "", **options: Any) -> Any:
    """A poll that ends with this error and changes nothing of what the device inspects with."""
    before = camera.snapshot()
    outcome = camera.poll(**options)
    assert outcome.status in ("failed", "rejected"), outcome
    assert isinstance(outcome.error, kind), repr(outcome.error)
    assert match in str(outcome.error), str(outcome.error)
    assert camera.snapshot() == before
    return outcome


def taken(camera: Any, counter: int, way: str = "") -> Any:
    outcome = camera.poll()
    assert (outcome.status, outcome.release) == ("activated", counter), outcome
    assert way in outcome.way
    return outcome


def digests(world: Any) -> list[str]:
    return [pack.digest for pack in world.packs]


# How it works when nothing is wrong


def test_a_device_takes_its_first_release_and_the_next_as_a_delta(worlds: ModuleType, world: Any, camera: Any) -> None:
    quiet = camera.poll()
    assert (quiet.status, quiet.release) == ("current", 1)
    assert quiet.received < 1000
    assert world.update() == 2
    outcome = taken(camera, 2, "1 delta")
    assert outcome.received < 10_000
    active = camera.store.active()
    assert active.packs["part"].digest == world.packs[-1].digest
    assert not camera.store.state().confirmed
    camera.updater().confirm()
    assert camera.store.state().confirmed


def test_a_poll_without_news_costs_two_requests(camera: Any, server: Any) -> None:
    updater = camera.updater()
    updater.poll()
    server.log.clear()
    outcome = updater.poll()
    assert (outcome.requests, len(server.log)) == (2, 2)
    assert outcome.received < 600


def test_a_stick_is_trusted_by_the_same_signatures(worlds: ModuleType, world: Any, tmp_path: Path) -> None:
    stick = worlds.camera(tmp_path / "by-stick", world.folder.as_uri(), world.root).installed()
    world.update()
    place = world.file(f"knowledge/part/{digests(world)[0]}-{digests(world)[1]}.delta")
    whole = world.file(f"knowledge/part/{digests(world)[1]}.safetensors")
    good = {path: path.read_bytes() for path in (place, whole)}
    for path, data in good.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(stick, FetchContentError)
    for path, data in good.items():
        path.write_bytes(data)
    taken(stick, 2)


def test_only_devices_that_the_roll_out_reaches_take_a_release(
    worlds: ModuleType, world: Any, server: Any, camera: Any, tmp_path: Path
) -> None:
    pilot = worlds.camera(tmp_path / "pilot", server.url, world.root, device_id="p", groups=["pilot"]).installed()
    world.update(percent=0.0, groups=["pilot"])
    assert camera.poll().status == "current"
    taken(pilot, 2)
    # A camera that is new in the plant takes the release before.
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root, device_id="n")
    taken(fresh, 1)


def test_a_stopped_release_is_given_back_and_not_taken_again(world: Any, camera: Any) -> None:
    world.update()
    taken(camera, 2)
    world.stop()
    outcome = camera.poll()
    assert (outcome.status, outcome.release) == ("rolled back", 1)
    assert "stopped" in outcome.reason
    assert (camera.poll().status, camera.poll().release) == ("current", 1)


def test_a_new_release_may_name_an_old_pack(world: Any, camera: Any) -> None:
    world.update()
    taken(camera, 2)
    camera.updater().confirm()
    world.release(world.packs[0])
    taken(camera, 3)
    assert camera.store.active().packs["part"].digest == digests(world)[0]


# Lines and servers


@pytest.mark.parametrize("fault", ["flipped", "truncated", "oversize"])
@pytest.mark.parametrize("what", ["/targets/knowledge/", "/targets/releases/", "/metadata/", "timestamp"])
def test_rows_1_2_3_what_is_not_as_signed_is_refused(
    bad: ModuleType, world: Any, camera: Any, server: Any, what: str, fault: str
) -> None:
    world.update()
    server.only, server.fault = what, getattr(bad, fault)
    refused(camera, FetchError if "targets" in what else Exception)
    server.fault = None
    taken(camera, 2)


@pytest.mark.parametrize("fault", ["flipped", "truncated", "endless", "oversize"])
def test_rows_1_2_3_an_engine_that_is_not_as_signed_is_refused(
    bad: ModuleType, worlds: ModuleType, world: Any, server: Any, tmp_path: Path, fault: str
) -> None:
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    server.only, server.fault = "/targets/engines/", getattr(bad, fault)
    outcome = fresh.poll()
    assert isinstance(outcome.error, FetchContentError)
    assert fresh.store.state().active is None
    server.fault = None
    taken(fresh, 1)


def test_row_4_an_endless_timestamp_ends_at_16_kilobytes(bad: ModuleType, world: Any, camera: Any, server: Any) -> None:
    world.update()
    server.only, server.fault = "timestamp", bad.endless
    outcome = refused(camera, FetchError, "16384")
    assert outcome.received <= 16384


@pytest.mark.parametrize("fault", ["stalls", "drips"])
def test_rows_5_6_a_line_that_stalls_or_drips_costs_a_poll(
    bad: ModuleType, world: Any, camera: Any, server: Any, fault: str
) -> None:
    world.update()
    server.only = "/targets/"
    server.fault = bad.stalls(0) if fault == "stalls" else bad.drips(0.05)
    begin = time.monotonic()
    refused(camera, FetchError)
    assert time.monotonic() - begin < 5.0
    server.fault = None
    taken(camera, 2)


def test_row_7_an_update_over_a_line_that_is_cut_all_the_time_arrives(
    bad: ModuleType, worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    server.only, server.fault = "/targets/engines/", bad.cut_after(700)
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    taken(fresh, 1)
    assert sum("/engines/" in path for path, _ in server.log) > 5


def test_row_8_an_engine_that_is_swapped_on_the_way_is_never_mixed(
    bad: ModuleType, worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    engine = next((world.folder / "targets" / "engines").iterdir()).read_bytes()
    server.only, server.fault = "/targets/engines/", bad.swaps(1000, engine[::-1], tags=False)
    assert isinstance(fresh.poll().error, FetchContentError)
    assert list((fresh.folder / "engines").iterdir()) == []
    server.fault = None
    taken(fresh, 1)


@pytest.mark.parametrize("code", [403, 404, 429, 500, 503])
@pytest.mark.parametrize("what", ["timestamp", "/targets/"])
def test_row_9_an_error_of_the_server_costs_a_poll(
    bad: ModuleType, world: Any, camera: Any, server: Any, what: str, code: int
) -> None:
    world.update()
    server.only, server.fault = what, bad.status(code, Retry_After="0")
    outcome = refused(camera, FetchError)
    assert outcome.error.status == code
    server.fault = None
    taken(camera, 2)


def test_row_9_a_login_page_or_no_server_at_all_costs_a_poll(
    bad: ModuleType, worlds: ModuleType, world: Any, camera: Any, server: Any
) -> None:
    world.update()
    server.fault = bad.portal
    refused(camera, FetchError, "login page")
    server.fault = bad.status(200, Content_Type="application/json")  # a portal that lies about its kind
    refused(camera, UntrustedError)
    server.fault = None
    gone = worlds.camera(camera.folder, "http://127.0.0.1:1", world.root)
    refused(gone, FetchError)
    refused(worlds.camera(camera.folder, "http://no-such-host.invalid", world.root), FetchError)
    taken(camera, 2)


def test_rows_5_9_polls_that_fail_come_later_and_later_and_never_all_at_once() -> None:
    rngs = [random.Random(seed) for seed in range(200)]
    waits = [[next_poll(60.0, 0.2, failures, None, rng) for failures in range(7)] for rng in rngs]
    for row in waits:
        for failures, wait in enumerate(row):
            middle = 60.0 * 2 ** min(failures, 4)
            assert 0.8 * middle <= wait <= 1.2 * middle
    assert len({round(row[3], 3) for row in waits}) > 190
    assert next_poll(60.0, 0.2, 1, 5000.0, rngs[0]) >= 5000.0


# Metadata


def test_row_10_an_old_timestamp_is_refused(world: Any, camera: Any, tmp_path: Path) -> None:
    old = (world.folder / "metadata" / "timestamp.json").read_bytes()
    world.update()
    taken(camera, 2)
    camera.updater().confirm()
    (world.folder / "metadata" / "timestamp.json").write_bytes(old)
    refused(camera, UntrustedError, "BadVersionNumber")


def test_row_10_an_old_snapshot_under_a_new_timestamp_is_refused(world: Any, camera: Any) -> None:
    snapshots = sorted(
        (world.folder / "metadata").glob("*.snapshot.json"), key=lambda path: int(path.name.split(".")[0])
    )
    world.update()
    newest = max((world.folder / "metadata").glob("*.snapshot.json"), key=lambda path: int(path.name.split(".")[0]))
    newest.write_bytes(snapshots[-1].read_bytes())
    refused(camera, UntrustedError)


def test_row_10_an_old_release_under_a_new_name_is_refused(world: Any, camera: Any) -> None:
    world.put_release(5, world.read("releases/part/1.json"))
    refused(camera, ReleaseError, "release 5")
    assert camera.store.state().counter == 1


def test_row_10_a_role_that_is_dropped_from_the_snapshot_is_refused(world: Any, camera: Any) -> None:
    world.update()
    with world.opened() as repository:
        del repository.snapshot.signed.meta["knowledge.part.json"]
        repository.commit(world.keyring())
    refused(camera, UntrustedError)


def test_rows_11_13_a_frozen_timestamp_alarms_when_it_expires(world: Any, camera: Any) -> None:
    world.update()
    later = time.time() + 8 * 86400
    refused(camera, StaleError, "expired", clock=lambda: later)
    taken(camera, 2)


def test_row_12_old_metadata_is_refused_after_the_cache_is_wiped(world: Any, camera: Any, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "old")
    time.sleep(1.1)  # signed times have whole seconds
    world.update()
    taken(camera, 2)
    camera.updater().confirm()
    shutil.rmtree(camera.store.metadata)
    shutil.rmtree(world.folder)
    shutil.copytree(tmp_path / "old", world.folder)
    refused(camera, UntrustedError, "the last time seen")
    assert camera.store.state().counter == 2


def test_row_12_the_counter_refuses_an_old_release_whatever_time_is_signed(
    worlds: ModuleType, world: Any, camera: Any, server: Any, tmp_path: Path
) -> None:
    old = worlds.World(tmp_path / "old", world.tiny, list(world.packs))
    shutil.copytree(world.home, old.home)
    world.update()
    world.update()
    taken(camera, 3)
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
    refused(camera, StaleError, match, clock=lambda: clock)
    taken(camera, 2)


def test_row_13_a_new_device_whose_clock_is_at_1970_takes_nothing(
    worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    assert isinstance(fresh.poll(clock=lambda: 0.0).error, StaleError)
    assert fresh.store.state().last_seen == 0
    taken(fresh, 1)


def test_row_13_time_from_a_forged_future_is_not_believed(world: Any, camera: Any) -> None:
    before = camera.store.state().last_seen
    world.now = lambda: datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=3)
    world.stamp()
    refused(camera, StaleError, "a clock")
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
    refused(camera, UntrustedError)


@pytest.mark.parametrize(
    "name",
    ["../../../evil", "/tmp/evil", "a\0b", "x" * 5000, "\u202egnp.evil", "..\\evil", "%2e%2e/evil"],
    ids=["up", "absolute", "nul", "long", "bidi", "backslash", "escaped"],
)
def test_row_16_names_of_targets_never_become_places(world: Any, camera: Any, tmp_path: Path, name: str) -> None:
    world.publish(world.pack())

    def add(targets: Targets) -> None:
        for path in (f"knowledge/part/{name}", f"knowledge/part/{digests(world)[0]}-{name}.delta"):
            targets.targets[path] = TargetFile.from_data(path, b"evil", ["sha256"])

    with world.opened() as repository:
        add(repository.edit("knowledge.part"))
        repository.commit(world.keyring())
    world.release()
    outside = {path for path in tmp_path.rglob("*") if camera.folder not in path.parents}
    taken(camera, 2)
    assert {path for path in tmp_path.rglob("*") if camera.folder not in path.parents} == outside
    assert not [path for path in camera.folder.rglob("*") if "evil" in path.name or len(path.name) > 100]


# Deltas


def test_row_17_a_device_that_missed_releases_takes_one_delta(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    taken(camera, 3, "1 delta")


def test_row_17_a_chain_is_taken_where_the_direct_delta_is_not_signed(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    first, _, last = digests(world)
    with world.opened() as repository:
        repository.drop(f"knowledge/part/{first}-{last}.delta")
        repository.commit(world.keyring())
    taken(camera, 3, "2 deltas")
    assert camera.store.active().packs["part"].digest == last


def test_row_17_a_delta_that_is_missing_on_the_server_makes_the_whole_pack(world: Any, camera: Any) -> None:
    world.update()
    world.file("knowledge/part/{}-{}.delta".format(*digests(world))).unlink()
    taken(camera, 2, "whole")


def test_row_17_deltas_on_the_wrong_base_make_the_whole_pack(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    first, second, third = digests(world)
    path = f"knowledge/part/{first}-{third}.delta"
    with world.opened() as repository:
        repository.add(path, repository.read(f"knowledge/part/{second}-{third}.delta"))
        repository.commit(world.keyring())
    taken(camera, 3, "whole")
    assert camera.store.active().packs["part"].digest == third


def test_row_17_the_cheapest_chain_wins_and_the_whole_pack_if_it_is_cheaper() -> None:
    deltas = {("a", "b"): 10, ("b", "c"): 10, ("a", "c"): 30, ("x", "c"): 1, ("c", "a"): 1}
    assert cheapest(["a"], deltas, "c", 100) == (("a", "b"), ("b", "c"))
    assert cheapest(["b", "a"], deltas, "c", 100) == (("b", "c"),)
    assert cheapest(["a"], deltas, "c", 20) == ()
    assert cheapest([], deltas, "c", 100) == ()
    assert cheapest(["q"], deltas, "c", 100) == ()


def test_row_18_an_update_that_is_done_again_does_nothing(world: Any, camera: Any) -> None:
    world.update()
    taken(camera, 2)
    before = camera.store.state()
    assert camera.poll().status == "current"
    assert camera.store.state() == before
    first, second = digests(world)
    delta = world.read(f"knowledge/part/{first}-{second}.delta")
    files = camera.snapshot()
    assert camera.store.apply_delta(delta) == second
    assert camera.snapshot() == files


# Releases


def test_row_22_a_pack_for_another_engine_is_refused_before_activation(world: Any, camera: Any) -> None:
    world.publish(world.pack())
    counter = world.release(out=False)
    release = decode_release(world.read(f"releases/part/{counter}.json"))
    foreign = Pack("part", "f" * 64, Calibration(threshold=1.0), dict(world.packs[-1].arrays))
    from edgead.runtime.knowledge import encode_pack

    data = encode_pack(foreign)
    with world.opened() as repository:
        repository.add(f"knowledge/part/{foreign.digest}.safetensors", data)
        repository.commit(world.keyring())
    made = msgspec.structs.replace(
        release,
        counter=9,
        product_packs={"part": foreign.digest},
        sizes={release.engine: release.sizes[release.engine], foreign.digest: len(data)},
    )
    world.put_release(9, encode_release(made))
    refused(camera, (ReleaseError, KnowledgeError))
    assert camera.store.state().candidate is None
    world.put_release(10, encode_release(msgspec.structs.replace(made, counter=10, fingerprint="f" * 64)))
    refused(camera, ReleaseError, "feature space")


def changed_release(world: Any, change: Callable[[Any], Any]) -> None:
    """Sign release 2 with something in it that its publisher's test would not have let through."""
    world.publish(world.pack())
    world.release(out=False)
    release = decode_release(world.read("releases/part/2.json"))
    world.put_release(2, encode_release(change(release)))


def test_row_23_a_new_threshold_and_its_bank_become_active_together(world: Any, camera: Any, tiny: ModuleType) -> None:
    thresholds = {pack.digest[:12]: pack.calibration.threshold for pack in world.packs}
    with LiveInspector(camera.store.active()) as inspector:
        for _ in range(3):
            world.update()
            thresholds[world.packs[-1].version] = world.packs[-1].calibration.threshold
            assert camera.poll(inspector=inspector).status == "activated"
            result = inspector.inspect(tiny.frame())
            assert result.knowledge == world.packs[-1].version
            assert result.threshold == thresholds[result.knowledge]
            active = camera.store.active().packs["part"]
            assert thresholds[active.version] == active.calibration.threshold
    # A release names a pack; there is no field for a threshold beside it.
    assert "threshold" not in decode_release(world.read("releases/part/4.json")).__struct_fields__


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda r: msgspec.structs.replace(r, scores={"part": {p: s + 50 for p, s in r.scores["part"].items()}}),
            "score",
        ),
        (lambda r: msgspec.structs.replace(r, must_alarm={"part": tuple(r.scores["part"])}), "to alarm"),
        (lambda r: msgspec.structs.replace(r, scores={}), "scores of golden images"),
    ],
    ids=["scores off", "a defect that passes", "no scores"],
)
def test_row_32_a_release_that_fails_its_test_is_quarantined(
    world: Any, camera: Any, change: Callable[[Any], Any], match: str
) -> None:
    changed_release(world, change)
    outcome = refused(camera, SelfTestError, match)
    assert outcome.status == "rejected"
    assert len(camera.store.state().quarantined) == 1
    assert "rejected" in camera.store.state().alarm
    again = camera.poll()
    assert (again.status, again.release) == ("current", 1)
    assert "quarantined" in again.reason


def test_row_32_an_intact_pack_on_a_broken_engine_is_quarantined(
    worlds: ModuleType, world: Any, camera: Any, tiny: ModuleType
) -> None:
    from edgead.server_side.ota.publish import publish_bundle

    # It gives scores, and other ones than when the bundle was made.
    worlds.bundle(world.home / "broken.edgead", tiny, world.packs[0], off=40.0)
    with world.opened() as repository:
        published = publish_bundle(repository, world.home / "broken.edgead")
        repository.commit(world.keyring())
    digest = next(path for path, _ in published.files if "engines/" in path).split("/")[1].removesuffix(".edgead")
    world.publish(world.pack())
    from edgead.server_side.ota.releases import make_release

    with world.opened() as repository:
        made = make_release(repository, "part", pack=world.packs[-1].digest, engine=digest)
        repository.commit(world.keyring())
    world.put_release(made.counter, encode_release(made))
    outcome = refused(camera, SelfTestError, "engine test")
    assert outcome.status == "rejected"
    assert camera.store.state().quarantined


# The device


def test_row_27_a_zeroed_or_torn_cache_of_metadata_recovers(world: Any, camera: Any) -> None:
    world.update()
    for path in camera.store.metadata.rglob("*.json"):
        if not path.is_symlink():
            path.write_bytes(b"\0" * path.stat().st_size)
    taken(camera, 2)
    camera.updater().confirm()
    world.update()
    for path in camera.store.metadata.rglob("*.json"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:100])
    (camera.store.metadata / "root.json").unlink()
    (camera.store.metadata / "root.json").write_bytes(b"")
    taken(camera, 3)


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
    path = camera.folder / "packs" / f"{digests(world)[0]}.safetensors"
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
        refused(camera, StoreBusyError, lock_timeout_s=0.1)


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
    taken(camera, 2)
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
    refused(only, RollbackError)
    assert "no way back" in only.store.state().alarm
    world.update()
    taken(only, 2)


def test_row_26_a_disk_that_is_full_costs_a_poll(world: Any, camera: Any) -> None:
    class Full(RealDisk):
        def free_space(self, folder: Path) -> int:
            return 0

    world.update()
    before = camera.snapshot()
    outcome = DeviceUpdater(Store(camera.folder, disk=Full()), camera.device, limits=camera.limits, disk=Full()).poll()
    assert isinstance(outcome.error, StorageError)
    assert camera.snapshot() == before
    taken(camera, 2)


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
            assert active.packs["part"].digest == digests(world)[active.release.counter - 1]
            assert active.faults == ()
            seen.add(active.release.counter)
            assert (copy.poll().error, copy.store.active().release.counter) == (None, 2)
        else:
            assert (outcome.status, outcome.release) == ("activated", 2)
            break
        shutil.rmtree(copy.folder)
    assert steps >= 20
    assert seen == {1, 2}


# Watching, and the loop


def test_a_release_that_answers_frames_is_confirmed_after_its_window(world: Any, camera: Any, tiny: ModuleType) -> None:
    with LiveInspector(camera.store.active()) as inspector:
        updater = camera.updater(inspector)
        world.update(window=0)
        assert updater.poll().status == "activated"
        assert updater.watch() is None  # no frame yet
        inspector.inspect(tiny.frame())
        outcome = updater.watch()
        assert outcome is not None
        assert (outcome.status, outcome.release) == ("confirmed", 2)
        assert updater.watch() is None


def test_a_release_under_which_frames_fail_is_rolled_back(world: Any, camera: Any, tiny: ModuleType) -> None:
    with LiveInspector(camera.store.active()) as inspector:
        updater = camera.updater(inspector)
        world.update(window=3600)
        assert updater.poll().status == "activated"
        poisoned = tiny.frame()
        poisoned[0, 0, 0] = tiny.POISON
        for _ in range(12):
            assert inspector.inspect(poisoned).verdict is Verdict.NOT_INSPECTED
        outcome = updater.watch()
        assert outcome is not None
        assert (outcome.status, outcome.release) == ("rolled back", 1)
        assert inspector.active.release.counter == 1
        assert inspector.inspect(tiny.frame()).knowledge == world.packs[0].version


def test_the_last_frames_say_which_verdicts_change(world: Any, camera: Any, tiny: ModuleType) -> None:
    ring = FrameRing(camera.store.frames, every_s=0.0)
    for level in (100, 117, 119, 200):
        assert ring.add(tiny.frame(level), time.monotonic())
    base = world.packs[0]
    ids, rows = base.ids("bank.normal"), base.arrays["bank.normal"]
    # 117 and 119 lie 24 and 28 from the bank: over a threshold of 15, under the old one of 30.
    world.publish(
        Pack(
            "part",
            base.fingerprint,
            Calibration(threshold=15.0, map_threshold=15.0),
            {
                "bank.normal": np.concatenate([rows, rows[-1:]]),
                "bank.normal.ids": np.concatenate([ids, ids[-1:] + np.uint64(1)]),
            },
        )
    )
    world.release()
    shadow = taken(camera, 2).shadow
    assert shadow.frames == 4
    assert [(item.frame, item.before, item.after) for item in shadow.changed] == [
        ("000000001.png", Verdict.OK, Verdict.NG),
        ("000000002.png", Verdict.OK, Verdict.NG),
    ]


def test_what_another_process_does_reaches_the_running_inspector(world: Any, camera: Any, tiny: ModuleType) -> None:
    ring = FrameRing(camera.store.frames, every_s=0.0)
    with LiveInspector(camera.store.active(), frames=ring) as inspector:
        updater = camera.updater(inspector)
        world.update()
        taken(camera, 2)  # by another updater, such as `edgead device update`
        outcome = updater.watch()
        assert outcome is not None
        assert (outcome.status, outcome.release) == ("activated", 2)
        assert inspector.inspect(tiny.frame()).knowledge == world.packs[1].version
        camera.store.rollback("by hand")
        outcome = updater.watch()
        assert outcome is not None
        assert outcome.release == 1
        assert inspector.inspect(tiny.frame()).knowledge == world.packs[0].version
        assert updater.watch() is None
    assert 1 <= len(ring.read()) <= 2


def test_the_loop_takes_watches_and_confirms_by_itself(world: Any, camera: Any, tiny: ModuleType) -> None:
    seen: list[Any] = []
    stop = threading.Event()
    with LiveInspector(camera.store.active()) as inspector:
        thread = camera.updater(inspector).start(0.2, 0.1, stop, seen.append)
        world.update()
        end = time.monotonic() + 10.0
        while time.monotonic() < end and not any(outcome.status == "confirmed" for outcome in seen):
            inspector.inspect(tiny.frame())
            time.sleep(0.01)
        stop.set()
        thread.join(5.0)
    assert [outcome.status for outcome in seen if outcome.status != "current"] == ["activated", "confirmed"]
    assert camera.store.state().confirmed


def test_row_35_a_flood_of_pokes_costs_one_poll_more(camera: Any) -> None:
    seen: list[Any] = []
    stop = threading.Event()
    updater = camera.updater()
    thread = updater.start(30.0, 0.0, stop, seen.append)
    time.sleep(0.3)
    for _ in range(100):
        updater.poke()
        time.sleep(0.002)
    time.sleep(1.2)
    stop.set()
    thread.join(5.0)
    assert len(seen) == 2


def test_decisions_about_releases_and_probation() -> None:
    record = new_rollout("part", 5, 1, percent=100.0, previous=4)

    def decided(active: int | None, highest: int, one: Any = record) -> tuple[str, int | None]:
        found = decide(one, device_id="x", groups=(), active=active, highest=highest)
        return found.action, found.counter

    assert decided(None, -1) == ("install", 5)
    assert decided(4, 4) == ("install", 5)
    assert decided(5, 5) == ("stay", None)
    assert decided(6, 6) == ("stay", None)
    assert decided(3, 5) == ("install", 5)  # staged, and killed before it became active
    assert decided(3, 6) == ("stay", None)
    assert decided(5, 5, new_rollout("part", 5, 1, stopped=True)) == ("go back", None)
    assert decided(3, 3, None) == ("stay", None)
    assert judge_watch(0, 0, 1e9, 1.0, 0.1) == "wait"
    assert judge_watch(9, 9, 0.5, 1.0, 0.1) == "wait"
    assert judge_watch(10, 2, 0.5, 1.0, 0.1) == "go back"
    assert judge_watch(10, 1, 1.5, 1.0, 0.1) == "confirm"
