"""What devices find in a repository, what forgers cannot make them find, and what a killed publisher leaves behind."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets

from edgead.runtime.disk import Disk, RealDisk
from edgead.runtime.errors import InputError, StoreBusyError
from edgead.runtime.knowledge import decode_pack
from edgead.runtime.release import decode_release
from edgead.runtime.rollout import decode_rollout
from edgead.server_side.ota.publish import delta_path, engine_path, pack_path, publish_pack
from edgead.server_side.ota.repository import MADE, opened
from edgead.server_side.ota.rotation import renew, revoke, rotate
from edgead.server_side.ota.serve import serving


def test_a_device_finds_what_each_role_signed(place: Any, device: Any) -> None:
    release = decode_release(device.fetch("releases/part/1.json"))
    assert decode_rollout(device.fetch("rollout/part.json")).release == release.counter == 1
    pack = decode_pack(device.fetch(pack_path("part", release.product_packs["part"])))
    assert pack.digest == place.packs[0].digest
    assert len(device.fetch(engine_path(release.engine))) == release.sizes[release.engine]


def test_a_delta_leads_from_the_released_pack_to_the_new_one(place: Any, device: Any) -> None:
    from edgead.runtime.deltas import apply_delta

    new = place.next_pack()
    place.publish(new)
    delta = device.fetch(delta_path("part", place.packs[0].digest, new.digest))
    assert apply_delta(place.packs[0], delta).digest == new.digest


@pytest.mark.parametrize(
    "path",
    [
        "releases/part/2.json",
        "rollout/tile.json",
        "knowledge/tile/x.safetensors",
        "engines/../engines/x.edgead",
        "../publisher.json",
        "/etc/passwd",
        "engines/\0",
        "knowledge/part/" + "a" * 5000,
        "knowledge/pаrt/x.safetensors",
        "",
    ],
)
def test_a_name_that_nobody_signed_is_not_found(device: Any, path: str) -> None:
    assert device.fetch(path) is None
    assert not list((device.folder / "targets").iterdir())


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("knowledge.part", "engines/{}.edgead"),
        ("knowledge.part", "releases/part/2.json"),
        ("knowledge.part", "knowledge/tile/{}.safetensors"),
        ("rollout.part", "releases/part/2.json"),
        ("rollout.part", "rollout/tile.json"),
        ("rollout.part", "knowledge/part/{}.safetensors"),
        ("releases.part", "rollout/part-2.json"),
        ("engines", "knowledge/part/{}.safetensors"),
    ],
)
def test_a_role_that_signs_a_path_of_another_is_not_heard(place: Any, device: Any, role: str, path: str) -> None:
    path = path.format("e" * 64)
    entry = place.place(path, b"evil")

    def add(content: Targets) -> None:
        content.targets[path] = entry

    place.forge(role, add, role.partition(".")[0])
    assert device.poll().get_targetinfo(path) is None
    assert device.fetch("releases/part/1.json") is not None


def test_the_rollout_key_can_name_an_unsigned_release_but_no_device_finds_it(place: Any, device: Any) -> None:
    from edgead.runtime.rollout import encode_rollout, new_rollout

    path = "rollout/part.json"
    entry = place.place(path, encode_rollout(new_rollout("part", 99, 2, percent=100.0)))

    def name_it(content: Targets) -> None:
        content.targets[path] = entry

    place.forge("rollout.part", name_it, "rollout")
    named = decode_rollout(device.fetch(path)).release
    assert named == 99
    assert device.poll().get_targetinfo(f"releases/part/{named}.json") is None


def test_metadata_signed_by_a_wrong_key_is_refused(place: Any, device: Any) -> None:
    entry = place.place("knowledge/part/x.safetensors", b"evil")

    def add(content: Targets) -> None:
        content.targets[entry.path] = entry

    place.forge("knowledge.part", add, "engines")
    with pytest.raises(RepositoryError):
        device.fetch(entry.path)


def test_a_release_with_one_signature_of_two_is_refused(place: Any, device: Any) -> None:
    entry = place.place("releases/part/2.json", b"evil")

    def sign_with(change: Callable[[dict[str, Any]], None]) -> None:
        with place.opened() as repository:
            metadata = Metadata(copy.deepcopy(repository.role("releases.part").signed))
            metadata.signed.version += 1
            metadata.signed.targets[entry.path] = entry
            records = list(place.keyring("releases").records.values())
            metadata.sign(place.keyring()._open(records[0]))
            content = json.loads(metadata.to_bytes())
            change(content["signatures"][0] | {"other": records[1].key.keyid, "all": content["signatures"]})
            place.put(repository, "releases.part", json.dumps(content).encode(), metadata.signed.version)

    def once(first: dict[str, Any]) -> None:
        pass

    def twice(first: dict[str, Any]) -> None:
        first["all"].append(dict(first["all"][0]))

    def under_both_names(first: dict[str, Any]) -> None:
        first["all"].append({"keyid": first["other"], "sig": first["sig"]})

    kept = [shutil.copytree(place.folder, place.folder.with_name(f"copy{n}")) for n in range(2)]
    for change in (once, twice, under_both_names):
        sign_with(change)
        with pytest.raises(RepositoryError):
            device.fetch(entry.path)
        if kept:
            shutil.rmtree(place.folder)
            shutil.move(kept.pop(), place.folder)
            shutil.rmtree(device.folder)
            device.folder.mkdir()


def test_a_forged_root_is_refused_and_the_old_one_stays(place: Any, device: Any) -> None:
    device.poll()
    with place.opened() as repository:
        forged = Metadata(copy.deepcopy(repository.root.signed))
    thief = CryptoSigner.generate_ed25519()
    forged.signed.version += 1
    for role in ("root", "timestamp"):
        forged.signed.add_key(thief.public_key, role)
    forged.signed.roles["root"].threshold = 1
    forged.sign(thief)
    # One true signature is below the threshold of two.
    forged.sign(place.keyring()._open(next(iter(place.keyring("root").records.values()))), append=True)
    (place.folder / "metadata" / "2.root.json").write_bytes(forged.to_bytes())
    with pytest.raises(RepositoryError):
        device.poll()
    assert json.loads((device.folder / "root.json").read_bytes())["signed"]["version"] == 1


def test_a_root_that_skips_a_version_is_refused(place: Any, device: Any) -> None:
    with place.opened() as repository:
        rotate(repository, "timestamp", place.keyring())
        rotate(repository, "timestamp", place.keyring())
    metadata = place.folder / "metadata"
    shutil.copy(metadata / "3.root.json", metadata / "2.root.json")
    with pytest.raises(RepositoryError):
        device.poll()


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "knowledge", "releases", "rollout"])
def test_old_and_new_devices_follow_a_rotation_and_the_old_key_signs_nothing_more(
    place: Any, device: Any, helpers: dict[str, Any], tmp_path: Path, role: str
) -> None:
    device.poll()
    old = place.keyring(role)
    with place.opened() as repository:
        made = rotate(repository, role, place.keyring())
    assert not set(made) & old.records.keys()
    place.publish(place.next_pack())
    place.release()
    fresh = helpers["Device"](tmp_path / "fresh", device.url, device.root)
    for one in (device, fresh):
        assert decode_release(one.fetch("releases/part/2.json")).product_packs["part"] == place.packs[-1].digest
    if role in ("knowledge", "releases", "rollout"):
        name = f"{role}.part"
        with place.opened() as repository:
            metadata = Metadata(copy.deepcopy(repository.role(name).signed))
            metadata.signed.version += 1
            for record in old.records.values():
                metadata.sign(old._open(record), append=True)
            place.put(repository, name, metadata.to_bytes(), metadata.signed.version)
        with pytest.raises(RepositoryError):
            device.fetch(
                {"knowledge": "knowledge/part/x", "releases": "releases/part/9.json"}.get(role, "rollout/part.json")
            )


def test_a_revoked_key_is_replaced_and_the_rest_of_its_role_stays(place: Any, device: Any) -> None:
    keys = list(place.keyring("root").records)
    with place.opened() as repository:
        role, made = revoke(repository, keys[0], place.keyring())
        left = repository.root.signed.roles["root"].keyids
    assert role == "root"
    assert set(left) == {*keys[1:], *made}
    assert device.fetch("releases/part/1.json") is not None
    with place.opened() as repository, pytest.raises(InputError, match="key in use"):
        revoke(repository, keys[0], place.keyring())


def test_a_lost_key_cannot_be_rotated_from_but_is_named(place: Any) -> None:
    with place.opened() as repository, pytest.raises(InputError, match="targets"):
        rotate(repository, "knowledge", place.keyring("knowledge", "snapshot", "timestamp"))


def test_a_new_timestamp_needs_its_key_alone_and_tells_the_time(place: Any, device: Any) -> None:
    before = device.poll()._trusted_set.timestamp
    with place.opened() as repository:
        renew(repository, (), place.keyring("timestamp"))
    after = device.poll()._trusted_set.timestamp
    assert after.version == before.version + 1
    assert after.snapshot_meta.version == before.snapshot_meta.version
    assert after.unrecognized_fields[MADE] >= before.unrecognized_fields[MADE]


def test_roles_are_renewed_by_name(place: Any, device: Any) -> None:
    with place.opened() as repository:
        renew(repository, ("targets", "releases", "root"), place.keyring())
    assert device.poll()._trusted_set.root.version == 2
    assert device.fetch("releases/part/1.json") is not None


def test_nothing_is_signed_on_top_of_what_was_tampered_with(place: Any) -> None:
    path = next((place.folder / "metadata").glob("2.knowledge.part.json"))
    path.write_bytes(path.read_bytes().replace(b'"length":', b'"length":1'))
    with place.opened() as repository, pytest.raises(InputError, match="forged"):
        publish_pack(repository, place.next_pack())


def test_a_repository_with_another_root_is_not_signed_for(place: Any, helpers: dict[str, Any], tmp_path: Path) -> None:
    from edgead.server_side.ota.init import create
    from edgead.server_side.ota.roles import Settings

    other = helpers["Place"](tmp_path / "other", tmp_path / "other-keys", [], place.tiny)
    create(other.folder, other.keyring(), Settings(products=("part",)))
    with pytest.raises(InputError, match="forged"), opened(other.folder, place.keyring().root):
        pass


def test_two_publishers_do_not_work_at_once(place: Any) -> None:
    root = place.keyring().root
    with place.opened(), pytest.raises(StoreBusyError), opened(place.folder, root, wait_s=0.1):
        pass
    with opened(place.folder, root, wait_s=0.1):
        pass


class LastStep(RealDisk):
    """A disk on which the process is killed before its step number `last`; a write is then half done."""

    def __init__(self, last: int) -> None:
        self.last, self.step = last, 0

    def _next(self) -> bool:
        self.step += 1
        return self.step == self.last

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        if self._next():
            data = b"".join(chunks)
            super().write(path, (data[: len(data) // 2],))
            self._die()
        super().write(path, chunks)

    def sync(self, path: Path) -> None:
        if self._next():
            self._die()
        super().sync(path)

    def replace(self, source: Path, target: Path) -> None:
        if self._next():
            self._die()
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        if self._next():
            self._die()
        super().sync_folder(folder)


def steps_of(place: Any, work: Callable[[Any, Disk], None]) -> int:
    """How many steps the work takes, on a copy."""
    disk = LastStep(0)
    copied = copy.copy(place)
    copied.folder = shutil.copytree(place.folder, place.folder.with_name("rehearsal"))
    copied.packs = list(place.packs)
    work(copied, disk)
    return disk.step


def killed_at(place: Any, step: int, work: Callable[[Any, Disk], None]) -> Any:
    """A copy of the repository on which the work was killed at that step."""
    copied = copy.copy(place)
    copied.folder = shutil.copytree(place.folder, place.folder.with_name(f"killed-{step}"))
    copied.keys = shutil.copytree(place.keys, place.keys.with_name(f"keys-{step}"))
    copied.packs = list(place.packs)
    child = os.fork()
    if not child:
        try:
            work(copied, LastStep(step))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the work ended before that step"
    return copied


def test_a_publisher_killed_at_any_step_leaves_the_old_repository_or_the_new_one(
    place: Any, helpers: dict[str, Any], tmp_path: Path
) -> None:
    new = place.next_pack()
    path = pack_path("part", new.digest)

    def publish(where: Any, disk: Disk) -> None:
        where.publish(new, disk)

    total = steps_of(place, publish)
    assert total >= 5 * 4
    seen = []
    root = place.keyring().root
    for step in range(1, total + 1):
        after = killed_at(place, step, publish)
        with serving(after.folder) as server:
            device = helpers["Device"](tmp_path / f"device-{step}", server.url, root)
            found = device.fetch(path)
            seen.append(found is not None)
            assert found is None or decode_pack(found).digest == new.digest
            assert decode_release(device.fetch("releases/part/1.json")).counter == 1
            # The next publisher finishes what this one began, and devices follow.
            after.publish(new)
            after.publish(after.next_pack())
            assert device.fetch(path) is not None
            assert device.fetch(pack_path("part", after.packs[-1].digest)) is not None
        assert not list((after.folder / "metadata").glob("*.part"))
        shutil.rmtree(after.folder)
    assert seen == sorted(seen)
    assert seen[0] is False
    assert seen[-1] is True


@pytest.mark.parametrize("role", ["timestamp", "root", "knowledge"])
def test_a_rotation_killed_at_any_step_leaves_a_repository_that_devices_and_publishers_accept(
    place: Any, helpers: dict[str, Any], tmp_path: Path, role: str
) -> None:
    def turn(where: Any, disk: Disk) -> None:
        with where.opened(disk) as repository:
            rotate(repository, role, where.keyring())

    root = place.keyring().root
    shutil.copytree(place.keys, tmp_path / "kept")
    total = steps_of(place, turn)
    shutil.rmtree(place.keys)
    shutil.copytree(tmp_path / "kept", place.keys)
    for step in range(1, total + 1):
        after = killed_at(place, step, turn)
        with serving(after.folder) as server:
            device = helpers["Device"](tmp_path / f"device-{step}", server.url, root)
            assert device.fetch("releases/part/1.json") is not None
            after.publish(after.next_pack())
            assert device.fetch(pack_path("part", after.packs[-1].digest)) is not None
        shutil.rmtree(after.folder)
