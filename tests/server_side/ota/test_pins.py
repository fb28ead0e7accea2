"""Pins that the publisher publishes: from files, from a key, and together with a release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edgead.cli import cli
from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png
from edgead.runtime.knowledge import new_pack
from edgead.runtime.pins import TrustedKey, decode_pin, verify_pin
from edgead.runtime.provenance import decode_provenance
from edgead.runtime.spec import Calibration
from edgead.server_side.ota.publish import load_pack, packs_of
from edgead.server_side.ota.repository import opened

KEYS = ("--keys", "keys", "--passphrase-env", "EDGEAD_KEYS")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PIN = ("--pin-key", "quality.pem", "--pin-key-id", "quality", "--signer", "Anna, quality")


def run(*words: object) -> Any:
    done = CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in words else done.output


def ota(*words: object) -> Any:
    return run("ota", *words, *KEYS, "--json")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, helpers: dict[str, Any]) -> Path:
    """A line with a published and released bundle, and the key of its quality department."""
    monkeypatch.setenv("EDGEAD_KEYS", helpers["PHRASE"])
    monkeypatch.chdir(tmp_path)
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    Path("quality.pem").write_bytes(KEY.private_bytes(*form))
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path("quality.pub.pem").write_bytes(public)
    first = new_pack(
        product="part",
        fingerprint=tiny.detector().fingerprint,
        calibration=Calibration(threshold=30.0, map_threshold=30.0, typical=4.0, false_alarm_rate=0.05),
        arrays={"bank.normal": np.repeat(np.arange(100, 104, dtype=np.float32), 3).reshape(-1, 3)},
    )
    tiny.bundle(tmp_path / "part.edgead", [first])
    run("knowledge", "sign", "part.edgead", "--key", "quality.pem", "--key-id", "quality", "--signer", "Anna, quality")
    ota("init", "up", "--product", "part")
    return tmp_path


def pictures(tiny: Any, folder: str, *levels: int) -> str:
    Path(folder).mkdir()
    for level in levels:
        (Path(folder) / f"{level}.png").write_bytes(encode_png(tiny.frame(level)))
    return folder


def test_a_pin_beside_a_bundle_is_published_with_it_and_a_camera_that_asks_takes_its_release(
    shop: Path, bundle_file: Path
) -> None:
    shutil.copy(bundle_file, "line.edgead")  # its golden scores are those of its pack
    run("knowledge", "sign", "line.edgead", "--key", "quality.pem", "--key-id", "quality", "--signer", "Anna, quality")
    files = [item["path"] for item in ota("publish", "up", "line.edgead")["files"]]
    assert [path.rpartition(".")[2] for path in files] == ["edgead", "safetensors", "pin"]
    ota("release", "up", "part")
    ota("rollout", "up", "part", "--release", 1, "--percent", 100)
    who = ("--id", "cam", "--repository", "up", "--product", "part", "--pin-key", "quality=quality.pub.pem")
    run("device", "init", "camera", "--root", "keys/root.json", *who)
    assert run("device", "update", "camera", "--json")["status"] == "activated"
    row = ("knowledge", "trace", "camera", 1, "--provenance", "line.edgead.provenance")
    traced = run(*row, "--json")
    assert traced["pin"]["signer"] == "Anna, quality"
    assert (traced["row"], traced["bank"], traced["image"]) == (1, "bank.normal", None)
    with pytest.raises(InputError, match="provenance of camera"):
        run("knowledge", "trace", "camera", 1)


def test_sources_are_published_only_if_it_is_wished(shop: Path) -> None:
    ota("publish", "up", "part.edgead")
    with opened(Path("up"), None) as repository:
        digest = packs_of(repository, "part")[0]
        assert not [path for path in repository.entries("knowledge", "part") if path.endswith(".provenance")]
    told = ota("publish", "up", "part.edgead", "--with-provenance")
    assert [item["path"] for item in told["files"]] == [f"knowledge/part/{digest}.provenance"]
    assert ota("publish", "up", "part.edgead", "--with-provenance")["files"] == []


def test_what_a_flow_teaches_is_pinned_in_the_same_commit_with_its_sources(shop: Path, tiny: Any) -> None:
    ota("publish", "up", "part.edgead")
    ota("release", "up", "part")
    held_out = pictures(tiny, "held-out", *range(97, 107), 151, 152, 153)
    new = pictures(tiny, "new", 150, 154)
    told = ota("add-normal", "up", "part", new, "--held-out", held_out, *PIN, "--with-provenance")
    assert told["pin"]["kid"] == "quality"
    with opened(Path("up"), None) as repository:
        assert told["pack"] in packs_of(repository, "part")
        pack = load_pack(repository, "part", told["pack"])
        pin = decode_pin(repository.read(f"knowledge/part/{pack.digest}.pin"))
        record = decode_provenance(repository.read(f"knowledge/part/{pack.digest}.provenance"))
    verify_pin(pin, pack, record, {"quality": TrustedKey(KEY.public_key().public_bytes_raw())})
    assert {image.name for image in record.images} >= {"150.png"}


def test_a_released_pack_is_pinned_afterwards_and_its_pin_renewed(shop: Path) -> None:
    Path("part.edgead.pin").unlink()
    ota("publish", "up", "part.edgead")
    assert ota("release", "up", "part")["pin"] is None
    told = ota("pin", "up", "part", *PIN, "--pin-days", 3)
    with opened(Path("up"), None) as repository:
        first = repository.read(f"knowledge/part/{told['pack']}.pin")
    ota("pin", "up", "part", "--pack", told["pack"][:8], *PIN, "--pin-days", 30)
    with opened(Path("up"), None) as repository:
        second = repository.read(f"knowledge/part/{told['pack']}.pin")
    assert decode_pin(first).not_after < decode_pin(second).not_after


def test_half_of_the_options_of_a_pin_are_refused_in_words(shop: Path) -> None:
    ota("publish", "up", "part.edgead")
    with pytest.raises(InputError, match="--signer"):
        ota("release", "up", "part", "--pin-key", "quality.pem")
    with opened(Path("up"), None) as repository:
        assert not repository.entries("releases", "part")
