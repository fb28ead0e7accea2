"""A device that watches what it took, and polls by itself; numbers are the rows of the table of faults."""

from __future__ import annotations

import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tuf")

from edgead.runtime.frames import FrameRing
from edgead.runtime.inspection import Verdict
from edgead.runtime.knowledge import Pack
from edgead.runtime.live import LiveInspector
from edgead.runtime.rollout import new_rollout
from edgead.runtime.spec import Calibration
from edgead.runtime.update_rules import decide, judge_watch


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
    shadow = camera.taken(2).shadow
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
        camera.taken(2)  # by another updater, such as `edgead device update`
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
