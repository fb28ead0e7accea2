"""Keys are encrypted where they lie, may live elsewhere, and are never printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edgead.runtime.errors import InputError, OutputExistsError
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import KEYRING, Keyring, environment
from edgead.server_side.ota.roles import ROLES, Settings


def test_private_keys_lie_encrypted_and_for_their_owner_alone(place: Any, helpers: dict[str, Any]) -> None:
    files = list(place.keys.glob("*.pem"))
    assert len(files) == 11
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"ENCRYPTED" in path.read_bytes()
        with pytest.raises(TypeError):
            load_pem_private_key(path.read_bytes(), None)
        assert isinstance(load_pem_private_key(path.read_bytes(), helpers["PHRASE"].encode()), Ed25519PrivateKey)


def test_the_keyring_and_the_repository_hold_public_things_only(place: Any, helpers: dict[str, Any]) -> None:
    secrets = []
    for path in place.keys.glob("*.pem"):
        private = load_pem_private_key(path.read_bytes(), helpers["PHRASE"].encode())
        raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        secrets += [raw, raw.hex().encode()]
    secrets.append(helpers["PHRASE"].encode())
    looked = [place.keys / KEYRING, *(path for path in place.folder.rglob("*") if path.is_file())]
    for path in looked:
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret in data], path.name
        assert b"PRIVATE" not in data


def test_every_role_has_keys_of_its_own(place: Any) -> None:
    roles = [record.role for record in place.keyring().records.values()]
    assert {role: roles.count(role) for role in ROLES} == {
        **dict.fromkeys(ROLES, 1),
        "root": 3,
        "releases": 2,
    }


@pytest.mark.parametrize("phrase", ["", "short", None])
def test_keys_without_a_decent_passphrase_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phrase: str | None
) -> None:
    monkeypatch.delenv("EDGEAD_TEST_KEYS", raising=False)
    if phrase is not None:
        monkeypatch.setenv("EDGEAD_TEST_KEYS", phrase)
    with pytest.raises(InputError, match="passphrase"):
        create(tmp_path / "r", Keyring([tmp_path / "k"], environment("EDGEAD_TEST_KEYS")), Settings(products=("part",)))
    assert not (tmp_path / "k").exists()
    assert not (tmp_path / "r").exists()


def test_a_wrong_passphrase_is_told_without_saying_it(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEAD_TEST_KEYS", "not the right one")
    ring = Keyring([place.keys], environment("EDGEAD_TEST_KEYS"))
    with place.opened() as repository, pytest.raises(InputError) as caught:
        repository.commit(ring)
    assert "not the right one" not in str(caught.value)


def test_offline_and_online_keys_may_have_passphrases_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEAD_OFFLINE", "kept in the safe")
    monkeypatch.setenv("EDGEAD_ONLINE", "kept on the server")
    both = environment("EDGEAD_OFFLINE", "EDGEAD_ONLINE")
    create(tmp_path / "r", Keyring([tmp_path / "k"], both), Settings(products=("part",)))
    online = Keyring([tmp_path / "k"], environment("EDGEAD_ONLINE"))
    assert online.signers([record.key for record in online.records.values() if record.role == "rollout"], 1, "rollout")
    with pytest.raises(InputError):
        online.signers([record.key for record in online.records.values() if record.role == "targets"], 1, "targets")


def test_a_key_that_lives_elsewhere_signs_by_its_uri(tmp_path: Path, helpers: dict[str, Any], place: Any) -> None:
    from edgead.server_side.ota.repository import opened

    private = Ed25519PrivateKey.generate()
    (tmp_path / "own.pem").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "own.pub").write_bytes(public)
    ring = Keyring([tmp_path / "k"], lambda purpose: [helpers["PHRASE"]])
    given = {"targets": [(f"file2:{tmp_path / 'own.pem'}", tmp_path / "own.pub")]}
    create(tmp_path / "r", ring, Settings(products=("part",)), elsewhere=given)
    assert not list((tmp_path / "k").glob("targets-*.pem"))
    again = Keyring([tmp_path / "k"], lambda purpose: [helpers["PHRASE"]])
    with opened(tmp_path / "r", again.root) as repository:
        repository.edit("targets")
        repository.commit(again)
    with pytest.raises(InputError, match="as PEM"):
        ring.adopt("targets", "file2:x", tmp_path / "own.pem")
    with pytest.raises(InputError, match="a signer for the key"):
        ring.adopt("targets", "hsm:2", tmp_path / "own.pub")


def test_keys_may_lie_in_several_folders(place: Any, tmp_path: Path, helpers: dict[str, Any]) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    content = json.loads((place.keys / KEYRING).read_bytes())
    away = [item for item in content["keys"] if item["role"] in ("root", "targets", "releases")]
    for item in away:
        name = item["uri"].removeprefix("pem:")
        (place.keys / name).rename(stick / name)
    (stick / KEYRING).write_text(json.dumps({**content, "keys": away}))
    content["keys"] = [item for item in content["keys"] if item not in away]
    (place.keys / KEYRING).write_text(json.dumps(content))
    online = Keyring([place.keys], lambda purpose: [helpers["PHRASE"]])
    with place.opened() as repository:
        repository.edit("targets")
        with pytest.raises(InputError, match="1 private key of the role targets"):
            repository.commit(online)
    both = Keyring([place.keys, stick], lambda purpose: [helpers["PHRASE"]])
    with place.opened() as repository:
        repository.edit("targets")
        repository.commit(both)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"schema":2,"keys":[]}',
        b'{"schema":1,"keys":[{"keyid":"a","role":"root","uri":"pem:../x","public":{}}]}',
        b"[" * 100_000,
    ],
    ids=range(5),
)
def test_a_keyring_that_is_none_is_refused(place: Any, data: bytes) -> None:
    (place.keys / KEYRING).write_bytes(data)
    with pytest.raises(InputError, match="keyring"):
        place.keyring()


def test_a_repository_and_its_keys_are_never_overwritten(place: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        create(place.folder, Keyring([tmp_path / "new"], lambda purpose: ["long enough"]), Settings(products=("part",)))
    with pytest.raises(OutputExistsError):
        create(tmp_path / "new", place.keyring(), Settings(products=("part",)))


@pytest.mark.parametrize("counts", [(3, 2), (0, 1)])
def test_a_threshold_that_cannot_be_met_is_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    ring = Keyring([tmp_path / "k"], lambda purpose: ["long enough"])
    with pytest.raises(InputError, match="threshold"):
        create(tmp_path / "r", ring, Settings(products=("part",)), {"releases": counts})
    assert not (tmp_path / "k").exists()
