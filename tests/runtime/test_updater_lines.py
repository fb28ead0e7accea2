"""Devices on lines and servers that lie, stall and cut; numbers are the rows of the table of faults."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")

from edgead.runtime.errors import FetchContentError, FetchError, UntrustedError
from edgead.runtime.update_rules import next_poll


@pytest.mark.parametrize("fault", ["flipped", "truncated", "oversize"])
@pytest.mark.parametrize("what", ["/targets/knowledge/", "/targets/releases/", "/metadata/", "timestamp"])
def test_rows_1_2_3_what_is_not_as_signed_is_refused(
    bad: ModuleType, world: Any, camera: Any, server: Any, what: str, fault: str
) -> None:
    world.update()
    server.only, server.fault = what, getattr(bad, fault)
    camera.refused(FetchError if "targets" in what else Exception)
    server.fault = None
    camera.taken(2)


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
    fresh.taken(1)


def test_row_4_an_endless_timestamp_ends_at_16_kilobytes(bad: ModuleType, world: Any, camera: Any, server: Any) -> None:
    world.update()
    server.only, server.fault = "timestamp", bad.endless
    outcome = camera.refused(FetchError, "16384")
    assert outcome.received <= 16384


@pytest.mark.parametrize("fault", ["stalls", "drips"])
def test_rows_5_6_a_line_that_stalls_or_drips_costs_a_poll(
    bad: ModuleType, world: Any, camera: Any, server: Any, fault: str
) -> None:
    world.update()
    server.only = "/targets/"
    server.fault = bad.stalls(0) if fault == "stalls" else bad.drips(0.05)
    begin = time.monotonic()
    camera.refused(FetchError)
    assert time.monotonic() - begin < 5.0
    server.fault = None
    camera.taken(2)


def test_row_7_an_update_over_a_line_that_is_cut_all_the_time_arrives(
    bad: ModuleType, worlds: ModuleType, world: Any, server: Any, tmp_path: Path
) -> None:
    server.only, server.fault = "/targets/engines/", bad.cut_after(700)
    fresh = worlds.camera(tmp_path / "fresh", server.url, world.root)
    fresh.taken(1)
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
    fresh.taken(1)


@pytest.mark.parametrize("code", [403, 404, 429, 500, 503])
@pytest.mark.parametrize("what", ["timestamp", "/targets/"])
def test_row_9_an_error_of_the_server_costs_a_poll(
    bad: ModuleType, world: Any, camera: Any, server: Any, what: str, code: int
) -> None:
    world.update()
    server.only, server.fault = what, bad.status(code, Retry_After="0")
    outcome = camera.refused(FetchError)
    assert outcome.error.status == code
    server.fault = None
    camera.taken(2)


def test_row_9_a_login_page_or_no_server_at_all_costs_a_poll(
    bad: ModuleType, worlds: ModuleType, world: Any, camera: Any, server: Any
) -> None:
    world.update()
    server.fault = bad.portal
    camera.refused(FetchError, "login page")
    server.fault = bad.status(200, Content_Type="application/json")  # a portal that lies about its kind
    camera.refused(UntrustedError)
    server.fault = None
    gone = worlds.camera(camera.folder, "http://127.0.0.1:1", world.root)
    gone.refused(FetchError)
    worlds.camera(camera.folder, "http://no-such-host.invalid", world.root).refused(FetchError)
    camera.taken(2)


def test_rows_5_9_polls_that_fail_come_later_and_later_and_never_all_at_once() -> None:
    rngs = [random.Random(seed) for seed in range(200)]
    waits = [[next_poll(60.0, 0.2, failures, None, rng) for failures in range(7)] for rng in rngs]
    for row in waits:
        for failures, wait in enumerate(row):
            middle = 60.0 * 2 ** min(failures, 4)
            assert 0.8 * middle <= wait <= 1.2 * middle
    assert len({round(row[3], 3) for row in waits}) > 190
    assert next_poll(60.0, 0.2, 1, 5000.0, rngs[0]) >= 5000.0
