"""Roll-out records: which devices a release reaches, decided by each device alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from edgead.runtime.errors import InputError
from edgead.runtime.rollout import (
    RECORD_BYTES,
    Rollout,
    applies,
    breached,
    bucket,
    changed,
    decode_rollout,
    encode_rollout,
    new_rollout,
    selected,
    wanted,
    widens,
    withdrawn,
)

DEVICES = [f"camera-{number:04d}" for number in range(4000)]


def record(**fields: Any) -> Rollout:
    return new_rollout("carpet", 7, 3, **{"previous": 6, **fields})


def test_a_record_is_these_bytes() -> None:
    assert encode_rollout(record(groups=("pilot",), percent=12.5)) == (
        b'{"error_threshold":0.1,"groups":["pilot"],"paused":false,"percent":12.5,"previous":6,"product":"carpet",'
        b'"release":7,"schema":1,"sequence":3,"stopped":false,"window":600}'
    )
    assert decode_rollout(encode_rollout(record())) == record()


def test_a_devices_place_is_the_hash_that_the_documentation_says() -> None:
    digest = hashlib.sha256(b"edgead/rollout/v1\0carpet\x007\0camera-0001").digest()
    assert bucket("carpet", 7, "camera-0001") == (int.from_bytes(digest[:8], "big") >> 11) / 2**53 * 100


def test_a_percentage_reaches_about_that_share_and_a_wider_one_only_adds() -> None:
    reached: set[str] = set()
    for percent in (1.0, 10.0, 50.0, 99.0):
        now = {device for device in DEVICES if applies(record(percent=percent), device)}
        assert reached <= now
        assert abs(len(now) / len(DEVICES) - percent / 100) < 0.03
        reached = now
    assert all(applies(record(percent=100.0), device) for device in DEVICES)
    assert not any(applies(record(percent=0.0), device) for device in DEVICES)


def test_other_devices_are_the_first_with_the_next_release() -> None:
    seven = {device for device in DEVICES if applies(record(percent=10.0), device)}
    eight = {device for device in DEVICES if applies(new_rollout("carpet", 8, 1, percent=10.0), device)}
    assert len(seven & eight) < len(seven) / 3


def test_all_of_a_group_take_it_and_nobody_else() -> None:
    pilot = record(groups=("hall-2", "pilot"))
    assert applies(pilot, "a", ["pilot", "spare"])
    assert not applies(pilot, "a", ["spare"])
    assert not applies(pilot, "a")


def test_a_paused_roll_out_reaches_no_more_devices_and_takes_nothing_back() -> None:
    paused = record(groups=("pilot",), paused=True)
    assert selected(paused, "a", ["pilot"])
    assert not applies(paused, "a", ["pilot"])
    assert not withdrawn(paused, 7)


def test_a_stopped_roll_out_sends_back_those_that_have_it() -> None:
    stopped = record(percent=100.0, stopped=True)
    assert not applies(stopped, "a")
    assert withdrawn(stopped, 7)
    assert not withdrawn(stopped, 6)
    assert not withdrawn(stopped, None)


def test_devices_that_are_not_reached_should_have_the_release_before() -> None:
    assert wanted(record(groups=("pilot",)), "a", ["pilot"]) == 7
    assert wanted(record(groups=("pilot",)), "new-camera") == 6
    assert wanted(record(previous=None), "new-camera") is None
    assert wanted(record(percent=100.0, stopped=True), "a") == 6


def test_failures_above_the_threshold_breach_and_at_it_do_not() -> None:
    assert not breached(record(error_threshold=0.1), 0, 0)
    assert not breached(record(error_threshold=0.1), 1, 10)
    assert breached(record(error_threshold=0.1), 2, 10)
    assert breached(record(error_threshold=0.0), 1, 1000)


def test_what_widens_reaches_every_device_that_was_reached() -> None:
    old = record(groups=("pilot",), percent=10.0)
    assert widens(old, changed(old, percent=20.0, groups=("hall-2", "pilot")))
    assert not widens(old, changed(old, percent=5.0))
    assert not widens(old, changed(old, groups=()))


@pytest.mark.parametrize(
    "fields",
    [
        {"percent": 101.0},
        {"percent": -1.0},
        {"percent": float("nan")},
        {"error_threshold": 1.5},
        {"release": 0},
        {"release": 6},
        {"sequence": 0},
        {"window": -1},
        {"product": "../carpet"},
        {"groups": ["b", "a"]},
        {"groups": ["a", "a"]},
        {"groups": ["a/b"]},
        {"schema": 2},
        {"schema": 0},
        {"surplus": 1},
        {"paused": 1},
    ],
)
def test_a_value_outside_of_the_format_is_refused(fields: dict[str, Any]) -> None:
    content = {**json.loads(encode_rollout(record())), **fields}
    data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(InputError):
        decode_rollout(data)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 50_000, b" " * (RECORD_BYTES + 1)], ids=range(7)
)
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        decode_rollout(data)


def test_another_spelling_of_the_same_record_is_refused() -> None:
    with pytest.raises(InputError, match="canonical"):
        decode_rollout(encode_rollout(record()) + b"\n")
