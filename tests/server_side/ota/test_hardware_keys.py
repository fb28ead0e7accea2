"""Keys in a PKCS#11 token: SoftHSM in place of a card, over the same library interface."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from edgead.runtime.errors import InputError
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import publish_bundle
from edgead.server_side.ota.repository import opened
from edgead.server_side.ota.roles import Settings

PLACES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
LIBRARY = next((place for place in PLACES if Path(place).is_file()), None)
PIN = "correct horse battery staple"

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="SoftHSM, which stands for a card, is not installed")


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token with an EC key of the id 2; its public half as a PEM file."""
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11, which keys in hardware take, is not installed")
    from pkcs11.util.ec import encode_ec_public_key, encode_named_curve_parameters

    (tmp_path / "tokens").mkdir()
    settings = tmp_path / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(settings))
    monkeypatch.setenv("PYKCS11LIB", str(LIBRARY))
    words = ["softhsm2-util", "--init-token", "--free", "--label", "edgead", "--pin", PIN, "--so-pin", PIN]
    subprocess.run(words, check=True, capture_output=True)
    library = pkcs11.lib(str(LIBRARY))
    library.reinitialize()
    with library.get_token(token_label="edgead").open(rw=True, user_pin=PIN) as session:
        curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
        public, _ = parameters.generate_keypair(store=True, id=b"\x02", label="release")
        key = load_der_public_key(encode_ec_public_key(public))
    place = tmp_path / "card.pem"
    place.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return place


def test_a_key_in_a_token_signs_for_a_role(token: Path, tmp_path: Path, bundle_file: Path) -> None:
    ring = Keyring([tmp_path / "keys"], lambda purpose: [PIN])
    elsewhere = {"engines": [("hsm:2?label=edgead", token)]}
    create(tmp_path / "updates", ring, Settings(products=("part",)), elsewhere=elsewhere)
    assert not list((tmp_path / "keys").glob("engines-*.pem"))
    # As the next command finds it: by the URI that the keyring keeps.
    again = Keyring([tmp_path / "keys"], lambda purpose: [PIN])
    with opened(tmp_path / "updates", again.root) as repository:
        publish_bundle(repository, bundle_file)
        repository.commit(again)
    with opened(tmp_path / "updates", again.root) as repository:
        assert len(repository.entries("engines")) == 1


@pytest.mark.parametrize(
    ("uri", "pin"), [("hsm:2?label=edgead", "another PIN"), ("hsm:3", PIN), ("hsm:2?label=x", PIN)]
)
def test_another_pin_key_or_token_is_said_at_once(token: Path, tmp_path: Path, uri: str, pin: str) -> None:
    ring: Any = Keyring([tmp_path / "keys"], lambda purpose: [pin])
    with pytest.raises(InputError, match="a signer for the key"):
        ring.adopt("releases", uri, token)
    assert ring.records == {}
