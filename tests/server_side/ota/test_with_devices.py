"""Publisher and device together: what `edgead ota` publishes is what `edgead device` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgead.runtime.device_cli import device as device_command
from edgead.server_side.ota.init import create
from edgead.server_side.ota.publish import publish_bundle
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import stop
from edgead.server_side.ota.rotation import rotate


def update(folder: Path) -> dict[str, Any]:
    words = ["update", str(folder), "--once", "--json", "--confirm"]
    done = CliRunner().invoke(device_command, words, catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def camera(place: Any, folder: Path, repository: str, *groups: str) -> Path:
    words = ["init", str(folder), "--root", str(place.keys / "root.json"), "--id", folder.name]
    words += ["--repository", repository, "--product", "part", *(f"--group={group}" for group in groups)]
    done = CliRunner().invoke(device_command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


def test_a_pilot_takes_the_delta_others_stay_and_a_stop_sends_the_pilot_back(
    place: Any, server: Any, tmp_path: Path
) -> None:
    pilot = camera(place, tmp_path / "pilot", server.url, "pilot")
    other = camera(place, tmp_path / "other", server.url)
    assert [update(one)["release"] for one in (pilot, other)] == [1, 1]
    place.publish(place.next_pack())
    place.release(groups=["pilot"], percent=0.0)
    done = update(pilot)
    assert (done["release"], done["way"]) == (2, "1 delta")
    assert done["received"] < 7000
    assert update(other)["release"] == 1
    quiet = update(pilot)
    assert quiet["received"] < 1000
    with place.opened() as repository:
        stop(repository, "part")
        repository.commit(place.keyring("rollout", "snapshot", "timestamp"))
    assert update(pilot)["release"] == 1
    assert update(other)["release"] == 1
    # The correction is a new release; the camera that went back takes it too.
    place.publish(place.next_pack())
    place.release()
    assert [update(one)["release"] for one in (pilot, other)] == [3, 3]


def test_a_camera_that_missed_releases_and_rotations_catches_up(place: Any, server: Any, tmp_path: Path) -> None:
    late = camera(place, tmp_path / "late", server.url)
    assert update(late)["release"] == 1
    for role in ("root", "timestamp", "targets", "knowledge", "releases", "rollout", "snapshot"):
        with place.opened() as repository:
            rotate(repository, role, place.keyring())
        place.publish(place.next_pack())
        place.release()
    done = update(late)
    assert (done["release"], done["status"]) == (8, "activated"), done


@pytest.mark.parametrize("bins", [0, 4])
def test_the_repository_on_a_stick_is_the_same(place: Any, bundle_file: Path, tmp_path: Path, bins: int) -> None:
    place.folder, place.keys = tmp_path / "stick", tmp_path / "stick-keys"
    create(place.folder, place.keyring(), Settings(products=("part",), bins=bins))
    with place.opened() as repository:
        publish_bundle(repository, bundle_file)
        repository.commit(place.keyring())
    place.release()
    plugged = camera(place, tmp_path / "camera", str(place.folder))
    assert update(plugged)["release"] == 1
    place.publish(place.next_pack())
    place.release()
    done = update(plugged)
    assert (done["release"], done["way"]) == (2, "1 delta")
