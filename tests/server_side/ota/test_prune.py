"""What goes from a repository and what stays, for devices that are there, were away for long, or are fetching it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import EdgeadError, InputError
from edgead.runtime.release import decode_release
from edgead.server_side.ota.prune import WAITING, drop_old, sweep
from edgead.server_side.ota.publish import delta_path, pack_path
from edgead.server_side.ota.repository import opened, utc_now

DAY = 86400.0


def grown(place: Any, releases: int) -> None:
    for _ in range(releases):
        place.publish(place.next_pack())
        place.release()


def pruned(place: Any, keep: int = 2, grace: float = 0.0, days: float = 0.0, **words: Any) -> tuple[list[str], Any]:
    clock = lambda: utc_now() + timedelta(days=days)  # noqa: E731
    with opened(place.folder, place.keyring().root, clock=clock) as repository:
        dropped = drop_old(repository, keep)
        if dropped and not words.get("dry_run"):
            repository.commit(place.keyring())
        return dropped, sweep(repository, grace * DAY, **words)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_old_releases_go_and_what_devices_are_given_stays(place: Any, device: Any) -> None:
    grown(place, 4)
    dropped, swept = pruned(place)
    assert "releases/part/3.json" in dropped
    assert pack_path("part", place.packs[1].digest) in dropped
    assert swept.freed > 0
    for counter in (4, 5):
        release = decode_release(device.fetch(f"releases/part/{counter}.json"))
        assert device.fetch(pack_path("part", release.product_packs["part"])) is not None
        assert device.fetch(f"engines/{release.engine}.edgead") is not None
    for counter in (1, 2, 3):
        assert device.fetch(f"releases/part/{counter}.json") is None
    # A camera that is new comes with the bundle's own pack, and finds a delta from there.
    assert device.fetch(delta_path("part", place.packs[0].digest, place.packs[-1].digest)) is not None
    assert device.fetch(pack_path("part", place.packs[1].digest)) is None


def test_what_the_roll_out_names_and_what_was_never_released_stays(place: Any, device: Any) -> None:
    from edgead.server_side.ota.rollouts import roll_out

    grown(place, 1)
    with place.opened() as repository:
        from edgead.server_side.ota.releases import make_release

        for _ in range(2):
            make_release(repository, "part", pack=place.packs[0].digest)
            repository.commit(place.keyring())
        roll_out(repository, "part", release=3, groups=["pilot"])
        repository.commit(place.keyring())
    fresh = place.next_pack()
    place.publish(fresh)
    pruned(place, keep=1)
    for counter in (2, 3, 4):  # before the pilot's, the pilot's, the last one
        assert device.fetch(f"releases/part/{counter}.json") is not None
    assert device.fetch(pack_path("part", fresh.digest)) is not None


def test_files_stay_for_the_grace_so_that_no_fetch_breaks_off(place: Any, device: Any) -> None:
    grown(place, 3)
    before = names(place.folder)
    _, first = pruned(place, grace=7)
    assert first.removed == []
    assert before <= names(place.folder)
    assert {path for path, _, _ in first.waiting} > set()
    _, early = pruned(place, grace=7, days=6.5)
    assert early.removed == []
    _, late = pruned(place, grace=7, days=7.5)
    assert {path for path, _ in late.removed} == {path for path, _, _ in first.waiting}
    assert device.fetch("releases/part/4.json") is not None
    assert not any((place.folder / path).exists() for path, _ in late.removed)


def test_a_dry_run_changes_nothing_and_says_what_would_go(place: Any) -> None:
    grown(place, 3)
    before = {name: (place.folder / name).read_bytes() for name in names(place.folder)}
    would, swept = pruned(place, dry_run=True)
    assert {name: (place.folder / name).read_bytes() for name in names(place.folder)} == before
    dropped, really = pruned(place)
    assert would == dropped
    assert {path for path, _ in swept.removed} <= {path for path, _ in really.removed}


def test_a_root_is_never_removed_and_a_device_that_was_away_follows(place: Any, device: Any) -> None:
    from edgead.server_side.ota.rotation import rotate

    device.fetch("releases/part/1.json")
    for _ in range(2):
        with place.opened() as repository:
            rotate(repository, "timestamp", place.keyring())
    grown(place, 2)
    pruned(place, keep=1)
    left = sorted(path.name for path in (place.folder / "metadata").iterdir())
    assert [name for name in left if name.endswith("root.json")] == ["1.root.json", "2.root.json", "3.root.json"]
    assert len([name for name in left if name.endswith("snapshot.json")]) == 1
    assert len([name for name in left if name.endswith("knowledge.part.json")]) == 1
    assert device.fetch("releases/part/3.json") is not None


class Killed(Exception):
    """Somebody pulled the plug."""


class Failing(RealDisk):
    """Stops at the n-th change."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def _step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Killed

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        super().replace(source, target)


def test_it_may_stop_anywhere_and_run_again(place: Any, device: Any) -> None:
    grown(place, 3)
    steps = 0
    while True:
        try:
            pruned(place, disk=Failing(steps))
            break
        except Killed:
            steps += 2
            if steps % 6 == 0:
                assert device.fetch("releases/part/4.json") is not None
    assert steps > 10
    assert device.fetch("releases/part/4.json") is not None
    left = names(place.folder)
    assert pruned(place)[1].removed == []
    assert names(place.folder) == left


def test_a_pack_that_is_published_again_is_there_again(place: Any, device: Any) -> None:
    grown(place, 3)
    old = place.packs[1]
    pruned(place, keep=1)
    assert device.fetch(pack_path("part", old.digest)) is None
    place.publish(old)
    pruned(place, keep=1)
    assert device.fetch(pack_path("part", old.digest)) is not None


def test_a_record_of_what_waits_that_was_damaged_lets_files_wait_anew(place: Any) -> None:
    grown(place, 2)
    pruned(place, keep=1, grace=7)
    (place.folder / WAITING).write_bytes(b'{"a":')
    _, swept = pruned(place, keep=1, grace=7, days=8)
    assert swept.removed == []


def test_nothing_is_removed_that_keys_which_are_missing_would_have_to_drop(place: Any) -> None:
    grown(place, 3)
    before = names(place.folder)
    with place.opened() as repository:
        assert drop_old(repository, 1)
        with pytest.raises(InputError, match="private key"):
            repository.commit(place.keyring("snapshot", "timestamp"))
    assert names(place.folder) == before
    with place.opened() as repository, pytest.raises(EdgeadError, match="at least one release"):
        drop_old(repository, 0)


def test_the_command_says_what_it_frees(place: Any, passphrase: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgead.server_side.ota.cli import ota

    grown(place, 2)

    def run(*words: object) -> str:
        line = ["prune", str(place.folder), "--keys", str(place.keys), "--passphrase-env", passphrase, *map(str, words)]
        done = CliRunner().invoke(ota, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert "would free" in run("--keep", 1, "--dry-run")
    draft = tmp_path / "prune.draft"
    run("--keep", 1, "--draft", draft)
    assert "releases/part/1.json" in draft.read_text()
    assert json.loads(run("--keep", 1, "--json"))["freed"] == 0
    assert json.loads(run("--keep", 1, "--grace", 0, "--json"))["freed"] > 0
