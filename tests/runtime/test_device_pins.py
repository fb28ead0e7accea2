"""Cameras that ask who vouches for a pack: the real updater over HTTP; numbers are the rows of the table of faults."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("tuf")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tuf.api.metadata import TargetFile, Targets

from edgead.runtime.device_folder import init_device, read_device
from edgead.runtime.device_pins import PINS, load_pin_keys
from edgead.runtime.errors import InputError, PinError, ReleaseError
from edgead.runtime.pins import Pin, decode_pin, encode_pin, signed_bytes
from edgead.runtime.rollout import decode_rollout, encode_rollout
from edgead.runtime.update_outcome import Device
from edgead.server_side.ota.pins import PinSigner, publish_beside, put_pin, sign_pack
from edgead.server_side.ota.publish import packs_of
from edgead.server_side.ota.rollouts import roll_out

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = KEY.public_key().public_bytes_raw()
QUALITY = PinSigner(KEY.sign, "quality", "Anna, quality")


@pytest.fixture
def asking(camera: Any) -> Any:
    """The camera with release 1, which from now on asks for pins by one key."""
    camera.device = replace(camera.device, pin_keys={"quality": PUBLIC})
    return camera


def pinned(world: Any, digest: str, signer: PinSigner = QUALITY) -> Pin:
    with world.opened() as repository:
        pin = sign_pack(repository, "part", digest, signer)
        repository.commit(world.keyring())
    return pin


def put(world: Any, digest: str, data: bytes) -> None:
    """Have any bytes signed by the repository's roles as the pin of a pack."""
    with world.opened() as repository:
        repository.add(f"knowledge/part/{digest}.pin", data)
        repository.commit(world.keyring())


def signed_again(pin: Pin, key: Ed25519PrivateKey = KEY) -> Pin:
    """The pin with a good signature over whatever it says."""
    text = base64.urlsafe_b64encode(key.sign(signed_bytes(pin))).rstrip(b"=").decode()
    return msgspec.structs.replace(pin, sig=text)


def refused(camera: Any, server: Any, wanted: str) -> None:
    """A poll ends with an error about the pin of release 2, before any part of it; release 1 stays as it is."""
    before = camera.snapshot()
    server.log.clear()
    outcome = camera.poll()
    assert outcome.status == "failed", outcome
    assert isinstance(outcome.error, PinError), outcome.error
    assert wanted in outcome.error.wanted
    assert "release 2" in outcome.reason
    assert outcome.release == 1
    assert camera.snapshot() == before
    assert camera.store.state().counter == 1
    assert camera.store.state().quarantined == ()
    assert not [path for path, _ in server.log if path.endswith((".safetensors", ".delta", ".edgead"))]


def test_a_release_whose_knowledge_is_pinned_is_taken_and_the_pin_costs_less_than_a_kilobyte(
    world: Any, asking: Any, server: Any
) -> None:
    world.publish(world.pack())
    world.release()
    plain = replace(asking, device=replace(asking.device, pin_keys={}), folder=asking.folder.with_name("plain"))
    cold = replace(asking, folder=asking.folder.with_name("cold"))
    pin = pinned(world, world.digests[1])
    costs = [device.poll() for device in (plain, cold)]
    assert [outcome.status for outcome in costs] == ["activated", "activated"], costs
    size = len(encode_pin(pin))
    assert costs[1].received - costs[0].received == size < 1000
    assert costs[1].requests - costs[0].requests == 1
    assert decode_pin((cold.folder / PINS / f"{pin.pack}.pin").read_bytes()) == pin
    assert not (plain.folder / PINS).exists()
    asking.taken(2)
    assert asking.poll().status == "current"


def test_a_release_without_a_pin_is_taken_once_somebody_vouches_for_it(world: Any, asking: Any, server: Any) -> None:
    world.update()
    refused(asking, server, "a pin of the knowledge")
    pinned(world, world.digests[1])
    asking.taken(2)


def test_an_unknown_key_and_a_foreign_one_under_a_trusted_name_vouch_for_nothing(
    world: Any, asking: Any, server: Any
) -> None:
    world.update()
    pinned(world, world.digests[1], PinSigner(OTHER.sign, "somebody", "Eve"))
    refused(asking, server, "one of the trusted keys quality")
    pinned(world, world.digests[1], PinSigner(OTHER.sign, "quality", "Eve"))
    refused(asking, server, "a signature of the key")


def test_row_38_a_pin_of_another_pack_is_refused_by_the_camera(world: Any, asking: Any, server: Any) -> None:
    first = pinned(world, world.digests[0])
    world.update()
    put(world, world.digests[1], encode_pin(first))
    refused(asking, server, "the digest of this pack")


def test_row_38_a_pin_moved_to_another_pack_or_to_other_rows_is_refused_by_the_camera(
    world: Any, asking: Any, server: Any
) -> None:
    first = pinned(world, world.digests[0])
    world.update()
    second = pinned(world, world.digests[1])
    moved = msgspec.structs.replace(first, pack=second.pack)
    put(world, world.digests[1], encode_pin(moved))
    refused(asking, server, "a signature of the key")
    put(world, world.digests[1], encode_pin(msgspec.structs.replace(second, root=first.root)))
    refused(asking, server, "a signature of the key")


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        ({"kid": "another"}, "one of the trusted keys quality"),
        ({"v": 1}, "version 2"),
        ({"v": 3}, "version 2"),
        ({"signer": "Eve"}, "a signature of the key"),
        ({"product": "bolt"}, "a signature of the key"),
        ({"fingerprint": "0" * 64}, "a signature of the key"),
        ({"not_after": "2999-01-01T00:00:00Z"}, "a signature of the key"),
    ],
)
def test_row_38_an_edited_pin_is_refused_by_the_camera(
    world: Any, asking: Any, server: Any, edit: dict[str, Any], wanted: str
) -> None:
    world.update()
    pin = pinned(world, world.digests[1])
    put(world, world.digests[1], encode_pin(msgspec.structs.replace(pin, **edit)))
    refused(asking, server, wanted)


def test_row_38_an_edited_version_does_not_count_even_with_a_good_signature(
    world: Any, asking: Any, server: Any
) -> None:
    world.update()
    pin = pinned(world, world.digests[1])
    put(world, world.digests[1], encode_pin(signed_again(msgspec.structs.replace(pin, v=1))))
    refused(asking, server, "version 2")


def test_row_38_a_window_that_has_ended_or_not_begun_is_refused_by_the_time_that_is_signed(
    world: Any, asking: Any, server: Any
) -> None:
    world.update()
    pin = pinned(world, world.digests[1])
    # Taken here: this module may have been read long before.
    now = datetime.now(timezone.utc)

    def window(begin: timedelta, end: timedelta) -> Pin:
        first, last = (f"{now + part:%Y-%m-%dT%H:%M:%SZ}" for part in (begin, end))
        return signed_again(msgspec.structs.replace(pin, ts=first, not_before=first, not_after=last))

    put(world, pin.pack, encode_pin(window(timedelta(days=-30), timedelta(hours=-1))))
    refused(asking, server, "a key that counts now")
    put(world, pin.pack, encode_pin(window(timedelta(days=1), timedelta(days=30))))
    refused(asking, server, "a key that counts now")
    put(world, pin.pack, encode_pin(window(timedelta(days=-1), timedelta(hours=1))))
    # The camera's own clock is not asked: within the slack it may be behind.
    outcome = asking.poll(clock=lambda: now.timestamp() - 3000)
    assert outcome.status == "activated", outcome


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 700, b"[" * 5000], ids=["empty", "object", "noise", "deep"])
def test_bytes_that_are_no_pin_are_refused_by_the_camera(world: Any, asking: Any, server: Any, data: bytes) -> None:
    world.update()
    put(world, world.digests[1], data)
    refused(asking, server, "a pin with")


def test_a_pin_that_is_too_large_is_not_fetched(world: Any, asking: Any, server: Any) -> None:
    world.update()
    put(world, world.digests[1], bytes(70_000))
    outcome = asking.poll()
    assert outcome.status == "failed"
    assert outcome.received < 20_000
    assert outcome.release == 1


def test_the_knowledge_key_alone_reaches_no_camera(world: Any, camera: Any) -> None:
    """A pack and its pin, signed and public, without a release."""
    before = camera.snapshot()
    world.publish(world.pack())
    pinned(world, world.digests[1])
    outcome = camera.poll()
    assert outcome.status == "current"
    assert camera.snapshot() == before
    # The best that its holder can do besides: whatever stands under a name of a release is not theirs to sign.
    release = world.read("releases/part/1.json")
    forged = release.replace(world.digests[0].encode(), world.digests[1].encode())
    entry = TargetFile.from_data("releases/part/2.json", forged)
    place = world.folder / "targets" / "releases" / "part" / f"{entry.hashes['sha256']}.2.json"
    place.write_bytes(forged)
    with world.opened() as repository:  # the rollout key, too, names the release that nobody signed
        roll_out(repository, "part", release=1, percent=100.0)
        record = decode_rollout(repository.read("rollout/part.json"))
        repository.add("rollout/part.json", encode_rollout(msgspec.structs.replace(record, release=2)))
        repository.commit(world.keyring())

    def sneak(content: Targets) -> None:
        content.targets["releases/part/2.json"] = entry

    world.forge("knowledge.part", sneak, "knowledge")
    outcome = camera.poll()
    assert isinstance(outcome.error, ReleaseError), outcome
    assert "no release that its signers signed" in outcome.reason
    assert camera.snapshot() == before


def test_pins_are_no_packs_and_go_with_their_pack(world: Any) -> None:
    for _ in range(5):
        world.publish(world.pack())
        pinned(world, world.packs[-1].digest)
        world.release()
    with world.opened() as repository:
        names = {path.rpartition("/")[2] for path in repository.entries("knowledge", "part")}
        packs = packs_of(repository, "part")
    assert all(len(digest) == 64 for digest in packs)
    pins = {name.removesuffix(".pin") for name in names if name.endswith(".pin")}
    assert pins
    assert pins <= set(packs)


def test_a_pin_beside_a_published_file_must_be_of_that_file(world: Any, tmp_path: Path) -> None:
    pin = pinned(world, world.digests[0])
    world.publish(world.pack())
    (tmp_path / "new.safetensors.pin").write_bytes(encode_pin(pin))
    with world.opened() as repository:
        with pytest.raises(PinError, match="a pin of the knowledge"):
            publish_beside(repository, tmp_path / "new.safetensors", world.packs[1])
        with pytest.raises(PinError, match="a published pack"):
            put_pin(repository, msgspec.structs.replace(pin, pack="0" * 64))


def test_a_camera_remembers_whose_pins_it_trusts(tmp_path: Path, world: Any) -> None:
    pem = tmp_path / "quality.pem"
    pem.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    keys = load_pin_keys([str(pem), f"quality={pem}"])
    assert keys == {"quality": PUBLIC, "56475aa75463474c": PUBLIC}
    device = Device("cam", world.folder.as_uri(), "part", world.root, (), keys)
    init_device(tmp_path / "cam", device)
    assert read_device(tmp_path / "cam").pin_keys == keys
    other = tmp_path / "other.pem"
    other.write_bytes(OTHER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(InputError, match="two for 'quality'"):
        load_pin_keys([f"quality={pem}", f"quality={other}"])
    (tmp_path / "none.pem").write_bytes(b"no key")
    with pytest.raises(InputError, match="Ed25519"):
        load_pin_keys([str(tmp_path / "none.pem")])
