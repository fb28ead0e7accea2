"""Row 36, small: the benchmark's fleet through a roll-out with faults, and that it would notice a mixed device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")


@pytest.fixture(scope="module")
def fleet() -> Any:
    """The modules of the benchmark, which are no package of edgead."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from benchmarks import fleet_device, fleet_disk, fleet_report, fleet_run
    finally:
        sys.path.pop(0)
    return {"device": fleet_device, "disk": fleet_disk, "report": fleet_report, "run": fleet_run}


def test_row_36_a_fleet_with_faults_ends_on_the_good_release_and_never_runs_a_mixed_or_broken_one(
    fleet: Any, tmp_path: Path
) -> None:
    shares = fleet["device"].Shares(power=0.3, stalled=0.0)
    settings = fleet["run"].Settings(devices=40, sample=2, installs=2, shares=shares, seed=3)
    found = fleet["run"].simulate(tmp_path, settings)
    assert found.wrong == []
    assert found.checks > 3 * settings.devices
    assert found.crashes > 3
    assert dict(found.ended) == {"release 3, confirmed": settings.devices}
    # The bad one was refused by the first of the pilots, and by them alone.
    assert found.stopped is not None
    assert 2 <= found.tried_bad <= found.pilots < settings.devices
    # Static files only, and no byte of a delta twice where nothing went wrong.
    assert found.answers["odd"] == 0
    numbers = fleet["report"].figures(found, settings)
    assert numbers["poll_without_news"]["requests"] == 2
    assert numbers["poll_without_news"]["bodies"] < 400
    assert numbers["bytes_per_device_quiet_day"] < numbers["bytes_per_device_day_of_update"]
    assert numbers["peak_polls_per_second_by_rules"]["60 s, 0"] == settings.devices
    assert numbers["peak_polls_per_second_by_rules"]["60 s, 0.2"] < settings.devices / 3
    assert fleet["report"].picture(found, settings).startswith("<svg ")


def test_row_36_a_disk_that_mixes_is_noticed(fleet: Any, tmp_path: Path) -> None:
    settings = fleet["run"].Settings(devices=6, sample=1, installs=1)
    found = fleet["run"].simulate(tmp_path, settings, fleet["disk"].MixingDisk)
    assert {what for _, _, what in found.wrong} == {"mixed: pack of another release"}
    assert len({number for number, _, _ in found.wrong}) == settings.devices
