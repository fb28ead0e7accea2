"""What a poll and an update cost a device, and that they stay small beside thousands of other targets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from edgead.runtime.release import decode_release
from edgead.runtime.rollout import decode_rollout
from edgead.server_side.ota.init import add_product, create
from edgead.server_side.ota.publish import publish_bundle
from edgead.server_side.ota.roles import Settings


def follow(place: Any, device: Any) -> None:
    """What a device fetches of an update: roll-out, release, delta."""
    record = decode_rollout(device.fetch("rollout/part.json"))
    release = decode_release(device.fetch(f"releases/part/{record.release}.json"))
    result = release.product_packs["part"]
    base = place.packs[-2].digest if len(place.packs) > 1 else None
    delta = device.fetch(f"knowledge/part/{base}-{result}.delta") if base else None
    if delta is None:
        assert device.fetch(f"knowledge/part/{result}.safetensors") is not None


def body_bytes(server: Any) -> int:
    return sum(size for _, _, size in server.requests)


def crowd(repository: Any, products: int, targets: int) -> None:
    """Targets of other products, as entries: their files matter to nobody here."""
    for number in range(products):
        for item in range(targets):
            digest = hashlib.sha256(f"{number}/{item}".encode()).hexdigest()
            path = f"knowledge/other-{number}/{digest}.safetensors"
            repository.edit(repository.layout.role_of(path)).targets[path] = TargetFile(1, {"sha256": digest}, path)


def test_a_poll_without_change_is_one_timestamp(place: Any, device: Any, server: Any) -> None:
    follow(place, device)
    del server.requests[:]
    device.poll()
    assert [(path, status) for path, status, _ in server.requests] == [
        ("/metadata/2.root.json", 404),
        ("/metadata/timestamp.json", 200),
    ]
    assert body_bytes(server) < 400


def test_an_update_of_a_small_product_is_a_few_kilobytes(place: Any, device: Any, server: Any) -> None:
    follow(place, device)
    place.publish(place.next_pack())
    place.release()
    del server.requests[:]
    follow(place, device)
    assert not [path for path, _, _ in server.requests if path.endswith(".safetensors")]
    assert body_bytes(server) < 6000


def test_beside_a_thousand_targets_of_other_products_an_update_is_still_a_few_kilobytes(
    place: Any, device: Any, server: Any
) -> None:
    with place.opened() as repository:
        for number in range(10):
            add_product(repository, f"other-{number}", place.keyring())
        crowd(repository, 10, 100)
        repository.commit(place.keyring())
    follow(place, device)
    place.publish(place.next_pack())
    place.release()
    with place.opened() as repository:
        crowd(repository, 10, 101)
        repository.commit(place.keyring())
    del server.requests[:]
    follow(place, device)
    assert not [path for path, _, _ in server.requests if "other" in path]
    assert body_bytes(server) < 7500


def test_hash_bins_take_new_products_without_the_offline_keys_and_devices_find_everything(
    place: Any, helpers: dict[str, Any], bundle_file: Path, tmp_path: Path
) -> None:
    from edgead.server_side.ota.rotation import rotate
    from edgead.server_side.ota.serve import serving
    from edgead.server_side.ota.status import status

    binned = helpers["Place"](tmp_path / "binned", tmp_path / "binned-keys", place.packs[:1], place.tiny)
    create(binned.folder, binned.keyring(), Settings(products=("part",), bins=6))
    with binned.opened() as repository:
        publish_bundle(repository, bundle_file)
        repository.commit(binned.keyring("engines", "knowledge", "snapshot", "timestamp"))
        add_product(repository, "other-0", binned.keyring("snapshot", "timestamp"))
        crowd(repository, 1, 300)
        repository.commit(binned.keyring("knowledge", "snapshot", "timestamp"))
    binned.release()
    with serving(binned.folder) as server:
        device = helpers["Device"](tmp_path / "device", server.url, binned.keyring().root)
        follow(binned, device)
        binned.publish(binned.next_pack())
        binned.release()
        follow(binned, device)
        assert device.fetch("releases/part/3.json") is None
        for role in ("knowledge", "releases", "targets"):
            with binned.opened() as repository:
                rotate(repository, role, binned.keyring())
        binned.publish(binned.next_pack())
        binned.release()
        follow(binned, device)
    with binned.opened() as repository:
        content = status(repository, binned.keyring())
    assert content["products"]["part"]["rollout"]["release"] == 3
    assert content["roles"]["knowledge"]["days_left"] > 364


@pytest.mark.parametrize("role", ["engines", "releases-0"])
def test_another_role_cannot_sign_in_a_bin(
    place: Any, helpers: dict[str, Any], bundle_file: Path, tmp_path: Path, role: str
) -> None:
    from tuf.api.exceptions import RepositoryError

    from edgead.server_side.ota.serve import serving

    binned = helpers["Place"](tmp_path / "binned", tmp_path / "binned-keys", place.packs[:1], place.tiny)
    create(binned.folder, binned.keyring(), Settings(products=("part",), bins=2))
    path = "knowledge/part/x.safetensors"
    entry = binned.place(path, b"evil")
    with binned.opened() as repository:
        name = repository.layout.role_of(path)

    def add(content: Any) -> None:
        content.targets[path] = entry

    if role == "engines":
        binned.forge(name, add, "engines")
    else:
        binned.forge(role, add, "releases")
    with serving(binned.folder) as server:
        device = helpers["Device"](tmp_path / "device", server.url, binned.keyring().root)
        if role == "engines":
            with pytest.raises(RepositoryError):
                device.fetch(path)
        else:
            assert device.fetch(path) is None
