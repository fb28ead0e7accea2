"""The alarm of a device that can take no update, from stale metadata, a wrong clock or a cut line to a good poll."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec import UNSET
from msgspec.structs import replace

pytest.importorskip("tuf")

from edgead.runtime import slots_state
from edgead.runtime.device_cli import device
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import FetchError, StaleError
from edgead.runtime.slots import Store
from edgead.runtime.slots_state import UNREACHED_S, State, decode_state, encode_state, failed, frozen, thawed
from edgead.runtime.updater import DeviceUpdater

DAY = 86400.0


def test_the_first_reason_stays_until_updates_can_be_taken_again() -> None:
    well = State(sequence=3, alarm="rolled back from x")
    first = frozen(well, 1_800_000_000.0, "timestamp.json is expired")
    assert first.frozen == (
        "updates are frozen since 2027-01-15 08:00 UTC by this device's clock: timestamp.json is expired"
    )
    assert frozen(first, 1_900_000_000.0, "another") is first
    assert thawed(first) == well
    assert thawed(well) is well


def test_no_other_alarm_is_overwritten_or_cleared_by_it_nor_it_by_them() -> None:
    ice = frozen(State(active="a" * 64, confirmed=True, candidate="b" * 64), 0.0, "1970")
    rejected = slots_state.rejected(ice, "a wrong score")
    assert rejected.warning == f"{ice.frozen}; {rejected.alarm}"
    assert thawed(rejected).warning == rejected.alarm
    assert thawed(rejected).alarm.startswith("rejected")
    back = slots_state.rolled_back(replace(slots_state.activated(ice)), "frames failed")
    assert back.frozen == ice.frozen
    assert "rolled back" in back.warning
    assert slots_state.activated(ice).frozen == slots_state.alarmed(ice, "x").frozen == ice.frozen
    assert State().warning == ""


@pytest.mark.parametrize("now", [-1e18, 0.0, 2e12, 1e300, float("nan")])
def test_a_clock_that_says_anything_gives_a_text(now: float) -> None:
    assert frozen(State(), now, "x" * 5000 + "\udcff").warning.startswith("updates are frozen since ")


def test_a_state_without_it_lies_on_disk_as_it_did_before_there_was_one() -> None:
    assert b"frozen" not in encode_state(State(sequence=3))
    ice = frozen(State(sequence=3), 5.0, "x")
    assert decode_state(encode_state(ice)) == ice
    assert decode_state(encode_state(State(sequence=3))) == thawed(ice)


class Counted(RealDisk):
    """Counts renames onto the two copies of the state."""

    writes = 0

    def replace(self, source: Path, target: Path) -> None:
        Counted.writes += target.name in ("state.a", "state.b")
        super().replace(source, target)


@pytest.mark.parametrize("why", ["expired", "clock behind"])
def test_rows_11_13_a_device_without_updates_alarms_until_the_next_good_poll(world: Any, camera: Any, why: str) -> None:
    clock = {"expired": lambda: time.time() + 8 * DAY, "clock behind": lambda: 0.0}[why]
    world.update()
    disk = Counted()
    store = Store(camera.folder, disk=disk)
    late = DeviceUpdater(store, camera.device, limits=camera.limits, clock=clock, disk=disk)
    Counted.writes = 0
    for _ in range(3):
        assert isinstance(late.poll().error, StaleError)
    assert Counted.writes == 1  # flash wears
    warning = camera.store.state().warning
    assert warning.startswith("updates are frozen since ")
    assert {"expired": "expired", "clock behind": "signed metadata was made at"}[why] in warning
    shown = CliRunner().invoke(device, ["status", str(described(camera)), "--json"])
    assert json.loads(shown.output)["alarm"] == warning
    camera.taken(2)
    assert camera.store.state().warning == ""
    Counted.writes = 0
    camera.updater().confirm()
    good = DeviceUpdater(store, camera.device, limits=camera.limits, disk=disk)
    assert good.poll().status == good.poll().status == "current"
    assert Counted.writes == 0


def described(camera: Any) -> Path:
    """The folder with what `edgead device init` writes into it."""
    root = camera.folder / "given-root.json"
    root.write_bytes(camera.device.root)
    who = camera.device
    words = ["init", str(camera.folder), "--id", who.device_id, "--repository", who.repository]
    done = CliRunner().invoke(device, [*words, "--product", who.product, "--root", str(root), "--force"])
    assert done.exit_code == 0, done.output
    return Path(camera.folder)


def test_a_line_that_is_down_for_less_than_a_day_neither_sets_nor_clears_it(
    worlds: ModuleType, world: Any, camera: Any
) -> None:
    gone = worlds.camera(camera.folder, "http://127.0.0.1:1", world.root)
    gone.refused(FetchError)
    assert camera.store.state().warning == ""
    camera.refused(StaleError, clock=lambda: 0.0)
    warning = camera.store.state().warning
    gone.refused(FetchError)
    assert camera.store.state().warning == warning


def test_a_line_that_is_down_for_a_day_alarms_until_the_next_good_poll_and_seldom_writes(
    worlds: ModuleType, world: Any, camera: Any
) -> None:
    assert camera.poll().status == "current"
    start = time.time()
    disk = Counted()
    store = Store(camera.folder, disk=disk)
    gone = worlds.camera(camera.folder, "http://127.0.0.1:1", world.root)
    Counted.writes = 0

    def polled(after: float) -> None:
        # A new process each time, as with a timer that runs `edgead device update --once`.
        late = DeviceUpdater(store, gone.device, limits=gone.limits, clock=lambda: start + after, disk=disk)
        assert isinstance(late.poll().error, FetchError)

    for after in (0.0, 3600.0, UNREACHED_S - 2.0):
        polled(after)
    assert (store.state().warning, Counted.writes) == ("", 1)
    for after in (UNREACHED_S + 2.0, 3 * UNREACHED_S):
        polled(after)
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(start))
    assert store.state().warning.startswith(f"no server has been reached since {since} by this device's clock: ")
    assert Counted.writes == 2
    assert camera.poll().status == "current"
    assert (store.state().warning, store.state().failing) == ("", UNSET)


def test_polls_that_fail_alarm_after_a_day_and_no_clock_that_was_set_does() -> None:
    well = State(sequence=3, last_seen=1_800_000_000)
    now = 1_800_000_600.0
    first = failed(well, now, now, "refused")
    assert (first.failing, first.warning) == (1_800_000_600, "")
    assert failed(first, now + 9, now + UNREACHED_S - 1, "refused") is first
    late = failed(first, now, now + UNREACHED_S, "refused")
    assert late.warning == "no server has been reached since 2027-01-15 08:10 UTC by this device's clock: refused"
    assert failed(late, now, now + 9 * UNREACHED_S, "another") is late
    assert thawed(late) == thawed(first) == well
    other = failed(first, now, now + UNREACHED_S, "the answer 404", answered=True)
    assert other.warning.startswith("no poll has been good since ")
    # It began to fail in 1970; then somebody set the clock.
    assert failed(failed(well, 5.0, 5.0, "x"), now, now, "x").warning == ""
    assert failed(frozen(well, now, "expired"), 0.0, now + UNREACHED_S, "x").warning.count(" since ") == 2


def test_an_alarm_about_a_release_stays_over_a_freeze_and_its_end(world: Any, camera: Any) -> None:
    world.update()
    camera.taken(2)
    camera.store.rollback("by hand")
    alarm = camera.store.state().alarm
    camera.refused(StaleError, clock=lambda: 0.0)
    assert camera.store.state().warning.endswith(f"; {alarm}")
    assert camera.poll().status == "current"
    assert camera.store.state().warning == alarm
