"""A fleet as its devices tell it: every number adds up, and what devices write can do no harm."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("tuf")

from edgead.runtime.device_status import (
    Attempt,
    Failure,
    Poll,
    ScoreStatistics,
    encode_status,
    new_device_key,
    public_of,
)
from edgead.runtime.rollout import new_rollout
from edgead.server_side.ota.devices import DeviceFile, DeviceKey, checked
from edgead.server_side.ota.fleet import NO_GROUP, OTHERS, Fleet, summary
from edgead.server_side.ota.fleet_page import page_of
from edgead.server_side.ota.fleet_scores import score_groups
from edgead.server_side.ota.fleet_text import fleet_text
from edgead.server_side.ota.guard import Decision
from edgead.server_side.ota.statuses import Found, Refused, Seen
from tests.server_side.ota.fleets import KEY, NOW, fleet, rollout, seen, tried

RECORD = new_rollout("bottle", 12, 31, groups=("pilot",), percent=35.0, previous=11)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def looked(statuses: list[Seen], **more: Any) -> Fleet:
    registry = [DeviceKey(one.status.device, KEY) for one in statuses]
    return summary(Found(statuses, [], registry), NOW, **({"records": {"bottle": RECORD, "part": rollout()}} | more))


def kinds(found: Fleet) -> dict[str, list[str]]:
    return {one.device: [sign.kind for sign in one.signs] for one in found.odd}


@pytest.mark.parametrize("count", [0, 1, 3, 40, 2000])
def test_every_device_is_counted_once(count: int) -> None:
    statuses = fleet(count)
    found = looked(statuses, records={"bottle": RECORD})
    assert found.devices == count == sum(product.devices for product in found.products)
    for product in found.products:
        assert sum(product.releases.values()) == product.devices
        assert all(sum(group.releases.values()) == group.devices for group in product.groups)
        if product.counts is not None:
            assert product.counts.reached <= product.devices
            assert all(group.counts is not None for group in product.groups)
            pilots = [group for group in product.groups if group.name == "pilot"]
            for group in pilots:
                assert group.counts is not None
                assert group.counts.reached == group.devices, "a roll-out to a group reaches all of it"
    assert sum(found.software.values()) == count
    json.dumps(msgspec.to_builtins(found))


def test_what_is_odd_is_told_and_a_healthy_device_is_not_named() -> None:
    poll = Poll("failed", "no answer", int(NOW), 7)
    statuses = [
        seen("fine", release=2, confirmed=True),
        tried("bad", "rejected", reason="golden image 3 is off", alarm="release 2 was rejected: golden image 3 is off"),
        tried("hung", "probation", received=NOW - 9000),
        seen("alarmed", release=2, alarm="there is nothing to go back to"),
        seen("quiet", release=2, received=NOW - 901),
        seen("early", release=2, time=int(NOW) + 4000),
        seen("offline", release=2, poll=poll, received=NOW - 800),
        seen("broken", release=2, error=Failure("EngineError", "no number", int(NOW), 3)),
        seen("behind", release=None, confirmed=False),
        seen("full", release=2, dropped=12),
        dataclasses.replace(seen("stranger", release=2), verified=False),
    ]
    found = looked(statuses)
    assert kinds(found) == {
        "bad": ["failed"],
        "hung": ["failed", "silent"],
        "alarmed": ["alarm"],
        "quiet": ["silent"],
        "stranger": ["unverified"],
        "early": ["clock"],
        "broken": ["error"],
        "offline": ["polls"],
        "behind": ["old"],
        "full": ["dropped"],
    }
    text = fleet_text(found, everything=True)
    assert "release 2 rejected: golden image 3 is off" in text
    assert "fine" not in text
    assert "has no release, and 1 is out for all" in text


def test_errors_of_another_day_and_a_release_before_that_was_refused_are_nothing_to_look_at() -> None:
    old = Failure("FetchError", "no answer", int(NOW) - 86_500, 1)
    refused = (Attempt(1, "rejected", "scores are off"), Attempt(2, "rejected", "scores are off"))
    found = looked([seen("well", release=2, time=int(NOW), error=old), seen("waits", release=0, attempts=refused)])
    assert kinds(found) == {"waits": ["failed"]}


def test_a_narrow_terminal_leaves_out_what_counts_nothing_before_releases() -> None:
    found = looked([tried(f"cam-{number}", "confirmed") for number in range(4)])
    wide, narrow = fleet_text(found, width=120), fleet_text(found, width=80)
    assert "silent" in wide
    assert "behind" in wide
    row = next(line for line in narrow.splitlines() if line.strip().startswith("all "))
    assert "2: 4" in row


def test_messages_that_differ_in_numbers_are_one_line() -> None:
    statuses = [tried(f"cam-{n}", "rejected", reason=f"scored {n}.25, where 38.9 was signed") for n in range(30)]
    statuses += [seen(f"x-{n}", error=Failure("EngineError", f"NaN on frame {n}", int(NOW), 2)) for n in range(10)]
    found = looked(statuses)
    assert [(reason.devices, reason.outcome) for reason in found.failures] == [(30, "rejected")]
    assert [(fault.devices, fault.count) for fault in found.faults] == [(10, 20)]


def test_devices_that_were_never_heard_of_and_statuses_that_do_not_count_are_told() -> None:
    refused = [Refused("a", "forged", "x"), Refused("b", "forged", "x"), Refused("c", "unknown device", "x")]
    found = summary(Found([seen("cam-1")], refused, [DeviceKey("cam-1", KEY), DeviceKey("cam-2", KEY)]), NOW)
    assert found.never == ("cam-2",)
    assert found.refused == {"forged": 2, "unknown device": 1}
    assert "1 registered and never heard of (cam-2)" in fleet_text(found)
    assert "never heard of: cam-2" in page_of(found)


def test_without_a_registry_not_every_device_is_named_as_unverified() -> None:
    statuses = [dataclasses.replace(seen(f"cam-{number}"), verified=False) for number in range(9)]
    found = summary(Found(statuses, [], None), NOW)
    assert not found.odd
    assert "9 of them UNVERIFIED" in fleet_text(found)


def scores(frames: int, share: float, middle: float) -> tuple[ScoreStatistics, ...]:
    ng = round(frames * share)
    ratios = tuple(middle * factor for factor in (0.7, 1.0, 1.5, 2.0, 3.0))
    return (ScoreStatistics("part", frames, frames - ng, ng, 0, 1, ratios),)


def test_scores_that_stand_out_are_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(5)
    usual = [
        seen(f"cam-{number}", scores=scores(20_000, 0.004, float(np.exp(rng.normal(-0.9, 0.03)))))
        for number in range(60)
    ]
    blurred = seen("blurred", scores=scores(20_000, 0.004, 0.75))
    alarming = seen("alarming", scores=scores(20_000, 0.06, 0.41))
    new = seen("new", scores=scores(150, 0.5, 0.9))
    (group,) = score_groups([*usual, blurred, alarming, new])
    assert group.devices == 62, "150 frames say nothing"
    assert {outlier.device for outlier in group.outliers} == {"blurred", "alarming"}
    assert sum(group.bins) == group.devices
    # The same among seven devices says nothing, as nobody knows which of them are right.
    (few,) = score_groups([*usual[:6], blurred])
    assert (few.compared, few.outliers) == (False, ())


def test_one_absurd_score_squeezes_nobody_into_one_bin() -> None:
    usual = [seen(f"cam-{number}", scores=scores(900, 0.0, 0.3 + number / 100)) for number in range(20)]
    (group,) = score_groups([*usual, seen("liar", scores=scores(900, 0.0, 1e300))])
    assert group.high < 3
    assert [outlier.device for outlier in group.outliers] == ["liar"]


def hostile(number: int = 0) -> Seen:
    return tried(
        f"cam-{number}",
        "rejected",
        reason=HOSTILE,
        alarm=HOSTILE[:60],
        version=HOSTILE[:60],
        groups=tuple(f"g-{number}-{place}" for place in range(16)),
        poll=Poll("failed", HOSTILE, int(NOW), 9),
        error=Failure("Error", HOSTILE * 5, 2**53, 2**53),
        attempts=(Attempt(2**53, "rolled back", HOSTILE), Attempt(2, "rejected", HOSTILE)),
    )


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_what_a_device_writes_stays_text() -> None:
    page = page_of(looked([hostile()], history=[Decision(NOW + n, "part", "stop", HOSTILE, release=2) for n in (0, 9)]))
    tags = Tags()
    tags.feed(page)
    assert not tags.found & {"script", "img", "link", "iframe", "object", "form"}
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert "&lt;script&gt;" in page


def test_the_page_fetches_nothing_and_knows_light_and_dark() -> None:
    page = page_of(looked(fleet(40)))
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!updates\.plant)", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme:dark" in page


def test_the_page_of_ten_thousand_devices_stays_small_whatever_they_write() -> None:
    assert len(page_of(looked(fleet(10_000)))) < 400_000
    assert len(page_of(looked([hostile(number) for number in range(2_000)]))) < 1_000_000


def test_groups_that_nobody_made_do_not_fill_the_page() -> None:
    (product,) = looked([hostile(number) for number in range(50)], records={}).products
    assert len(product.groups) == 41
    assert product.groups[-1].name == OTHERS
    assert product.groups[-1].devices <= 50


@pytest.mark.parametrize(("count", "lines"), [(3, 40), (40, 60), (5_000, 110)])
def test_the_tables_are_readable_in_eighty_columns(count: int, lines: int) -> None:
    statuses = fleet(count)
    text = fleet_text(looked(statuses, records={"bottle": RECORD}), statuses if count < 9 else (), width=80)
    long = [line for line in text.splitlines()[2:] if len(line) > 80 and not line.startswith("bottle: ")]
    assert not long
    assert len(text.splitlines()) < lines


def test_the_timeline_is_the_guards_log() -> None:
    history = [
        Decision(NOW + minute, "part", "widen" if minute == 30 else "wait", "x", 5, 2, reached=60, confirmed=minute)
        for minute in range(60)
    ]
    statuses = [tried("cam-1", "confirmed")]
    assert "Adoption" in page_of(looked(statuses, history=history))
    assert "Adoption" not in page_of(looked(statuses))
    other = [msgspec.structs.replace(line, release=1) for line in history]
    assert "Adoption" not in page_of(looked(statuses, history=other))


def test_a_device_without_a_group_has_one_in_the_tables() -> None:
    product = next(one for one in looked([seen("cam-1")]).products if one.name == "part")
    assert [group.name for group in product.groups] == [NO_GROUP]


def folder_of(folder: Path, count: int) -> Path:
    """Statuses in files, with a registry that lacks the last device."""
    folder.mkdir()
    records = []
    for one in fleet(count):
        seed = new_device_key()
        (folder / f"{one.status.device}.json").write_bytes(encode_status(one.status, seed))
        records.append(checked(one.status.device, public_of(seed).hex()))
    DeviceFile(folder).add(records[:-1])
    return folder


def test_the_command_shows_repository_and_fleet(place: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgead.server_side.ota.fleet_cli import status

    source, page = folder_of(tmp_path / "statuses", 6), tmp_path / "fleet.html"

    def said(*words: object) -> str:
        done = CliRunner().invoke(status, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output

    assert "role" in said(place.folder)
    both = said(place.folder, "--statuses", source, "--html", page)
    assert "role" in both
    assert "5 cameras heard of" in both
    assert "1 unknown device" in both
    assert page.read_text().startswith("<!doctype html>")
    content = json.loads(said("--statuses", source, "--repository", place.folder, "--json"))
    assert list(content) == ["fleet"]
    assert content["fleet"]["devices"] == 5
    assert json.loads(said(place.folder, "--json"))["products"]
    for words in ([], ["--product", "part"], ["--statuses", source, "--product", "nothing"]):
        assert CliRunner().invoke(status, list(map(str, words))).exit_code != 0
    wrong = CliRunner().invoke(status, ["--statuses", str(source), "--silent-after", "soon"])
    assert "15m" in wrong.output
