"""The guard of a roll-out: what counts, when it stops, when it widens; and that it can be trusted with its key."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("tuf")

from edgead.runtime.errors import InputError
from edgead.runtime.rollout import Rollout, breached
from edgead.server_side.ota.adoption import STATES, Counts, counted, outcome_of, state_of
from edgead.server_side.ota.devices import DeviceKey
from edgead.server_side.ota.guard import (
    ENROLLED,
    LOG_BYTES,
    Caution,
    Decision,
    decide,
    log_of,
    must_stop,
    read_log,
    watch,
    witnesses,
)
from edgead.server_side.ota.rollouts import rollout_of
from edgead.server_side.ota.statuses import Found, Seen
from tests.server_side.ota.fleets import KEY, NOW, rollout, seen, tried

OUTCOMES = (None, "probation", "confirmed", "rolled back", "rejected")


def known(statuses: list[Seen], **notes: str) -> Found:
    """All of them registered with their key."""
    records = [DeviceKey(one.status.device, KEY, 0.0, notes.get(one.status.device, "")) for one in statuses]
    return Found(statuses, [], records)


def counts_of(statuses: list[Seen], record: Rollout | None = None) -> Counts:
    return counted(state_of(record or rollout(), one, NOW) for one in statuses)


def crowd(rng: np.random.Generator, most: int = 40) -> list[Seen]:
    """Any devices that say anything about release 2."""
    found = []
    for number in range(int(rng.integers(1, most))):
        outcome = OUTCOMES[int(rng.integers(len(OUTCOMES)))]
        quiet = float(rng.choice([10.0, 1000.0, 1e6]))
        found.append(tried(f"cam-{number}", outcome, received=NOW - quiet))
    return found


def test_every_reached_device_is_in_one_state() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        statuses = crowd(rng)
        record = rollout(percent=float(rng.choice([0.0, 30.0, 100.0])))
        states = [state_of(record, one, NOW) for one in statuses]
        counts = counted(states)
        assert counts.reached == sum(state is not None for state in states)
        assert sum(counts.of(state) for state in STATES) == counts.reached
        assert counts.failed <= counts.reported <= counts.reached


def test_one_device_moves_a_count_by_one_whatever_it_says() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        statuses = crowd(rng)
        before = counts_of(statuses)
        place = int(rng.integers(len(statuses)))
        name = statuses[place].status.device
        for outcome in OUTCOMES:
            lie = tried(name, outcome, sequence=99)
            after = counts_of([*statuses[:place], lie, *statuses[place + 1 :]])
            assert abs(after.failed - before.failed) <= 1
            assert abs(after.reported - before.reported) <= 1
            assert after.reached == before.reached


def test_one_stolen_key_stops_nothing_where_two_devices_are_reached() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        good = [tried(f"cam-{number}", str(rng.choice(["probation", "confirmed"]))) for number in range(1, 40)]
        good = good[: int(rng.integers(1, 39))]
        lie = tried("stolen", "rolled back")
        assert not must_stop(rollout(error_threshold=0.0), counts_of([lie, *good]), Caution())
    assert must_stop(rollout(), counts_of([lie]), Caution()), "a pilot of one camera, and it failed"


def test_more_failures_never_make_a_stop_undone() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        record = rollout(error_threshold=float(rng.uniform(0, 1)))
        good, failed = int(rng.integers(0, 30)), int(rng.integers(0, 30))
        here = must_stop(record, Counts(confirmed=good, rolled_back=failed), Caution())
        more = must_stop(record, Counts(confirmed=good, rolled_back=failed + 1), Caution())
        assert more or not here
        if here:
            assert breached(record, failed, good + failed)


def test_failures_come_before_confirmations_and_do_not_stop_a_sound_roll_out() -> None:
    # In the first minute 2 of 50 pilots refused it, and 48 watch it: 4 %, where 10 % are allowed.
    early = Counts(probation=48, rejected=2)
    assert not must_stop(rollout(), early, Caution())
    assert must_stop(rollout(), Counts(probation=44, rejected=6), Caution())


def test_too_few_reports_say_nothing_unless_no_more_devices_are_reached() -> None:
    assert not must_stop(rollout(), Counts(rejected=2, behind=40), Caution())
    assert must_stop(rollout(), Counts(rejected=2), Caution())
    assert must_stop(rollout(), Counts(rejected=2, confirmed=1), Caution())
    assert not must_stop(rollout(), Counts(rejected=1, confirmed=1), Caution())


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (tried("a", "confirmed"), "confirmed"),
        (tried("a", "probation"), "probation"),
        (tried("a", "rejected"), "rejected"),
        (tried("a", "probation", release=1), "rolled back"),
        (seen("a"), None),
        (seen("a", quarantined=("cd" * 32,)), "rolled back"),
        (seen("a", release=None), None),
    ],
)
def test_what_became_of_a_release_on_a_device(status: Seen, outcome: str | None) -> None:
    assert outcome_of(status.status, 2, "cd" * 32) == outcome


def test_a_device_that_watches_and_is_never_heard_again_is_lost_and_counts_for_nothing() -> None:
    hung = tried("hung", "probation", received=NOW - 600 - 901)
    assert state_of(rollout(), hung, NOW) == "lost"
    assert state_of(rollout(), tried("slow", "probation", received=NOW - 600 - 899), NOW) == "probation"
    counts = counts_of([hung, *(tried(f"cam-{number}", "confirmed") for number in range(3))])
    assert (counts.reported, counts.failed, counts.lost) == (3, 0, 1)
    decided = decide("part", rollout(percent=50.0), counts, Caution(steps=(100,), after=0), NOW)
    assert (decided.action, decided.reason) == ("wait", "0 failed and 1 lost of 4")


def test_only_devices_that_somebody_registered_count_and_each_once() -> None:
    honest = [tried(f"cam-{number}", "confirmed") for number in range(8)]
    forged = [dataclasses.replace(tried(f"fake-{number}", "rolled back"), verified=False) for number in range(50)]
    strange = [tried(f"new-{number}", "rolled back") for number in range(50)]
    other = [tried(f"cam-{number}", "rolled back", key="ee" * 32, sequence=9) for number in range(8)]
    found = known([*honest, *strange], **{f"new-{number}": ENROLLED for number in range(50)})
    twice = [tried("cam-0", "confirmed", sequence=3)]
    those = witnesses(Found([*found.latest, *forged, *other, *twice], [], found.devices))
    assert sorted(one.status.device for one in those.seen) == [f"cam-{number}" for number in range(8)]
    assert those.ignored == {"part": 108}
    assert not must_stop(rollout(), counts_of(list(those.seen)), Caution())


def test_without_a_registry_nobody_counts() -> None:
    assert not witnesses(Found([tried("cam-1", "rejected")], [], None)).seen


def healthy(count: int = 20) -> Counts:
    return Counts(confirmed=count)


def test_a_healthy_roll_out_is_widened_step_by_step_after_the_time() -> None:
    caution = Caution(steps=(10, 50, 100), after=3600)
    record, last, said = rollout(percent=0.0, groups=("pilot",)), None, []
    for minute in range(0, 240, 10):
        last = decide("part", record, healthy(), caution, NOW + minute * 60, last)
        if last.action == "widen":
            said.append((minute, last.percent))
            record = _next(rollout(percent=last.percent, groups=("pilot",)), last.sequence + 1)
    assert said == [(60, 10.0), (130, 50.0), (200, 100.0)]


def _next(record: Rollout, sequence: int) -> Rollout:
    return msgspec.structs.replace(record, sequence=sequence)


def test_what_makes_it_unhealthy_starts_the_time_anew() -> None:
    caution = Caution(steps=(100,), after=3600)
    record = rollout(percent=50.0)
    first = decide("part", record, healthy(), caution, NOW)
    assert (first.action, first.healthy_since) == ("wait", NOW)
    ill = decide("part", record, Counts(confirmed=8, rejected=1), caution, NOW + 3500, first)
    assert (ill.action, ill.healthy_since) == ("wait", None)
    again = decide("part", record, healthy(), caution, NOW + 3600, ill)
    assert (again.action, again.healthy_since) == ("wait", NOW + 3600)
    # Another record, by a person or another guard, is looked at for its own time.
    assert decide("part", _next(record, 6), healthy(), caution, NOW + 9000, again).action == "wait"
    assert decide("part", record, healthy(), caution, NOW + 7200, again).action == "widen"


def test_it_is_not_widened_before_half_of_the_reached_devices_have_confirmed() -> None:
    caution = Caution(steps=(100,), after=0)
    decided = decide("part", rollout(percent=10.0), Counts(confirmed=9, behind=5, not_heard=6), caution, NOW)
    assert (decided.action, decided.reason) == ("wait", "9 of 20 confirmed, 10 needed")
    assert decide("part", rollout(percent=10.0), Counts(confirmed=10, not_heard=10), caution, NOW).action == "widen"
    assert decide("part", rollout(percent=10.0), Counts(), caution, NOW).action == "wait"


def test_a_paused_roll_out_is_not_widened_and_still_stopped() -> None:
    caution = Caution(steps=(100,), after=0)
    paused = rollout(percent=10.0, paused=True)
    assert decide("part", paused, healthy(), caution, NOW).action == "wait"
    assert decide("part", paused, Counts(rejected=5), caution, NOW).action == "stop"
    stopped = rollout(percent=10.0, stopped=True)
    assert decide("part", stopped, Counts(rejected=5), caution, NOW).action == "none"
    assert decide("part", None, Counts(), caution, NOW).action == "none"


def test_a_clock_that_jumps_widens_nothing_early() -> None:
    caution = Caution(steps=(100,), after=3600)
    first = decide("part", rollout(percent=50.0), healthy(), caution, NOW)
    back = decide("part", rollout(percent=50.0), healthy(), caution, NOW - 9999, first)
    assert (back.action, back.healthy_since) == ("wait", NOW - 9999)


@pytest.mark.parametrize("steps", [(50, 10), (0,), (10, 101), (10, 10)])
def test_steps_that_do_not_rise_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="10,50,100"):
        Caution(steps=steps)


def test_the_log_keeps_its_newest_lines_and_forgives_torn_ones() -> None:
    lines = [Decision(NOW + number, "part", "wait", "x" * 200) for number in range(6000)]
    data = log_of(lines)
    assert len(data) <= LOG_BYTES
    assert read_log(data)[-1] == lines[-1]
    torn = b'{"time":1,"product":"part"\n\xff\x00\n[]\n' + data[:-20]
    assert read_log(torn)[-1] == lines[-2]


def test_a_failing_release_is_stopped_with_the_online_keys_alone(place: Any) -> None:
    place.publish(place.next_pack())
    place.release(groups=["pilot"], percent=0.0)
    statuses = [tried(f"cam-{number}", "confirmed", groups=("pilot",)) for number in range(4)]
    statuses += [tried(f"bad-{number}", "rolled back", groups=("pilot",)) for number in range(2)]
    ring = place.keyring("rollout", "snapshot", "timestamp")
    with place.opened() as repository:
        assert [one.action for one in watch(repository, None, known(statuses), Caution(), {}, now=NOW)] == ["stop"]
    with place.opened() as repository:
        record = rollout_of(repository, "part")
        assert record is not None
        assert not record.stopped, "without keys it only says so"
        (decided,) = watch(repository, ring, known(statuses), Caution(), {}, now=NOW)
    assert (decided.action, decided.failed, decided.reported) == ("stop", 2, 6)
    assert decided.reason == "2 of 6 devices failed: 33.3%, where 10.0% are allowed"
    with place.opened() as repository:
        record = rollout_of(repository, "part")
        assert record is not None
        assert record.stopped
        # The second guard, which saw the same statuses.
        (decided,) = watch(repository, ring, known(statuses), Caution(), {}, now=NOW)
        assert (decided.action, decided.reason) == ("none", "release 2 is stopped")
        after = rollout_of(repository, "part")
        assert after == record


def test_a_guard_without_the_rollout_key_says_so_and_changes_nothing(place: Any) -> None:
    place.publish(place.next_pack())
    place.release(percent=100.0)
    before = {path: path.read_bytes() for path in place.folder.rglob("*.json")}
    failed = known([tried(f"cam-{number}", "rejected") for number in range(5)])
    with place.opened() as repository, pytest.raises(InputError, match="role rollout"):
        watch(repository, place.keyring("snapshot", "timestamp"), failed, Caution(), {}, now=NOW)
    assert {path: path.read_bytes() for path in place.folder.rglob("*.json")} == before


def test_the_quarantine_of_a_release_is_known_by_its_digest(place: Any) -> None:
    place.publish(place.next_pack())
    place.release(percent=100.0)
    with place.opened() as repository:
        entry = repository.find("releases/part/2.json")
        assert entry is not None
        quarantined = (entry.hashes["sha256"],)
        statuses = [seen(f"cam-{number}", quarantined=quarantined) for number in range(5)]
        (decided,) = watch(repository, None, known(statuses), Caution(), {}, now=NOW)
    assert decided.action == "stop"


def test_the_json_of_a_decision_is_one_line() -> None:
    line = log_of([Decision(NOW, "part", "stop", "2 of 6\nfailed")])
    assert line.count(b"\n") == 1
    assert json.loads(line)["action"] == "stop"
