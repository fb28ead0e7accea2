"""Devices that update themselves, by deltas where they can; numbers are the rows of the table of faults."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")

from edgead.runtime.errors import FetchContentError
from edgead.runtime.update_rules import cheapest

# How it works when nothing is wrong


def test_a_device_takes_its_first_release_and_the_next_as_a_delta(worlds: ModuleType, world: Any, camera: Any) -> None:
    quiet = camera.poll()
    assert (quiet.status, quiet.release) == ("current", 1)
    assert quiet.received < 1000
    assert world.update() == 2
    outcome = camera.taken(2, "1 delta")
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
    place = world.file(f"knowledge/part/{world.digests[0]}-{world.digests[1]}.delta")
    whole = world.file(f"knowledge/part/{world.digests[1]}.safetensors")
    good = {path: path.read_bytes() for path in (place, whole)}
    for path, data in good.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    stick.refused(FetchContentError)
    for path, data in good.items():
        path.write_bytes(data)
    stick.taken(2)


def test_only_devices_that_the_roll_out_reaches_take_a_release(
    worlds: ModuleType, world: Any, server: Any, camera: Any, tmp_path: Path
) -> None:
    pilot = worlds.camera(tmp_path / "pilot", server.url, world.root, device_id="p", groups=["pilot"]).installed()
    world.update(percent=0.0, groups=["pilot"])
    assert camera.poll().status == "current"
    pilot.taken(2)
    # A camera that is new in the plant takes the release before.
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root, device_id="n")
    fresh.taken(1)


def test_a_stopped_release_is_given_back_and_not_taken_again(world: Any, camera: Any) -> None:
    world.update()
    camera.taken(2)
    world.stop()
    outcome = camera.poll()
    assert (outcome.status, outcome.release) == ("rolled back", 1)
    assert "stopped" in outcome.reason
    assert (camera.poll().status, camera.poll().release) == ("current", 1)


def test_a_new_release_may_name_an_old_pack(world: Any, camera: Any) -> None:
    world.update()
    camera.taken(2)
    camera.updater().confirm()
    world.release(world.packs[0])
    camera.taken(3)
    assert camera.store.active().packs["part"].digest == world.digests[0]


# Deltas


def test_row_17_a_device_that_missed_releases_takes_one_delta(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    camera.taken(3, "1 delta")


def test_row_17_a_chain_is_taken_where_the_direct_delta_is_not_signed(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    first, _, last = world.digests
    with world.opened() as repository:
        repository.drop(f"knowledge/part/{first}-{last}.delta")
        repository.commit(world.keyring())
    camera.taken(3, "2 deltas")
    assert camera.store.active().packs["part"].digest == last


def test_row_17_a_delta_that_is_missing_on_the_server_makes_the_whole_pack(world: Any, camera: Any) -> None:
    world.update()
    world.file("knowledge/part/{}-{}.delta".format(*world.digests)).unlink()
    camera.taken(2, "whole")


def test_row_17_deltas_on_the_wrong_base_make_the_whole_pack(world: Any, camera: Any) -> None:
    world.update()
    world.update()
    first, second, third = world.digests
    path = f"knowledge/part/{first}-{third}.delta"
    with world.opened() as repository:
        repository.add(path, repository.read(f"knowledge/part/{second}-{third}.delta"))
        repository.commit(world.keyring())
    camera.taken(3, "whole")
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
    camera.taken(2)
    before = camera.store.state()
    assert camera.poll().status == "current"
    assert camera.store.state() == before
    first, second = world.digests
    delta = world.read(f"knowledge/part/{first}-{second}.delta")
    files = camera.snapshot()
    assert camera.store.apply_delta(delta) == second
    assert camera.snapshot() == files
