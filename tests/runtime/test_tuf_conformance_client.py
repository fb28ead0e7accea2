"""The adapter for TUF's conformance suite, run as the suite runs it, against repositories of any TUF publisher."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

CLIENT = Path(__file__).parents[2] / "benchmarks" / "tuf_conformance_client.py"
LATER = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=3)


class Publisher:
    """A repository in a server's memory, with other keys, thresholds and delegations than edgead has."""

    def __init__(self, files: dict[str, bytes], *, consistent: bool = True) -> None:
        self.files = files
        make = (CryptoSigner.generate_ed25519, CryptoSigner.generate_ecdsa, CryptoSigner.generate_rsa)
        self.signers: dict[str, list[Any]] = {
            "root": [make[0](), make[1]()],
            "timestamp": [make[1]()],
            "snapshot": [make[2]()],
            "targets": [make[0]()],
        }
        self.root = Root(consistent_snapshot=consistent, expires=LATER)
        for role, signers in self.signers.items():
            for signer in signers:
                self.root.add_key(signer.public_key, role)
        self.root.roles["root"].threshold = 2
        self.timestamp, self.snapshot = Timestamp(expires=LATER), Snapshot(expires=LATER)
        self.roles: dict[str, Targets] = {"targets": Targets(expires=LATER)}
        self.publish_root()
        self.publish()

    def put(self, role: str, signed: Any, signers: list[Any], *, versioned: bool) -> None:
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        name = f"{signed.version}.{role}.json" if versioned else f"{role}.json"
        self.files[f"/metadata/{name}"] = metadata.to_bytes()

    def publish_root(self, *more: Any) -> None:
        self.put("root", self.root, [*self.signers["root"], *more], versioned=True)

    def publish(self) -> None:
        consistent = bool(self.root.consistent_snapshot)
        for role, content in self.roles.items():
            self.put(role, content, self.signers[role], versioned=consistent)
            self.snapshot.meta[f"{role}.json"] = MetaFile(content.version)
        self.snapshot.version += 1
        self.put("snapshot", self.snapshot, self.signers["snapshot"], versioned=consistent)
        self.timestamp.version += 1
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.put("timestamp", self.timestamp, self.signers["timestamp"], versioned=False)

    def add(self, path: str, data: bytes, role: str = "targets") -> None:
        entry = TargetFile.from_data(path, data, ["sha256"])
        self.roles[role].targets[path] = entry
        self.roles[role].version += 1
        folder, slash, name = path.rpartition("/")
        prefix = f"{entry.hashes['sha256']}." if self.root.consistent_snapshot else ""
        self.files[f"/targets/{folder}{slash}{prefix}{name}"] = data
        self.publish()

    def delegate(self, delegations: Delegations, *roles: str, signer: Any) -> None:
        self.roles["targets"].delegations = delegations
        self.roles["targets"].version += 1
        for role in roles:
            self.roles[role] = Targets(expires=LATER)
            self.signers[role] = [signer]


@pytest.fixture
def server() -> Iterator[Any]:
    path = Path(__file__).parents[1] / "misbehaving_server.py"
    spec = importlib.util.spec_from_file_location("edgead_tests_misbehaving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with module.misbehaving() as running:
        yield running


Call = Callable[..., int]


@pytest.fixture
def call(server: Any, tmp_path: Path) -> Call:
    def run(command: str, *names: str) -> int:
        words = ["--metadata-dir", str(tmp_path / "metadata")]
        if command == "init":
            (tmp_path / "root.json").write_bytes(server.files["/metadata/1.root.json"])
            words += ["init", str(tmp_path / "root.json")]
        else:
            words += ["--metadata-url", f"{server.url}/metadata/"]
            if names:
                words += ["--target-base-url", f"{server.url}/targets/", "--target-dir", str(tmp_path / "targets")]
                words += [word for name in names for word in ("--target-name", name)]
            words.append(command)
        return subprocess.run([sys.executable, str(CLIENT), *words], capture_output=True, check=False).returncode

    return run


def content(folder: Path, name: str) -> bytes:
    return (folder / "targets" / hashlib.sha256(name.encode()).hexdigest()).read_bytes()


def test_init_asks_for_nothing_and_refresh_keeps_metadata_by_plain_names(
    server: Any, call: Call, tmp_path: Path
) -> None:
    publisher = Publisher(server.files)
    assert call("init") == 0
    assert server.log == []
    assert (tmp_path / "metadata" / "root.json").read_bytes() == server.files["/metadata/1.root.json"]
    assert call("refresh") == 0
    assert call("refresh") == 0
    for name in ("root", "timestamp", "snapshot", "targets"):
        assert (tmp_path / "metadata" / f"{name}.json").is_file()
    publisher.timestamp.version -= 2
    publisher.publish()
    assert call("refresh") == 1  # older than what is here


@pytest.mark.parametrize("consistent", [True, False])
def test_targets_are_fetched_once_and_verified(server: Any, call: Call, tmp_path: Path, consistent: bool) -> None:
    publisher = Publisher(server.files, consistent=consistent)
    names = ["a.bin", "folder/b b.bin", "../../up", "ünïcode"]
    for name in names:
        publisher.add(name, name.encode() * 100)
    assert call("init") == 0
    assert call("download", *names) == 0
    assert [content(tmp_path, name) for name in names] == [name.encode() * 100 for name in names]
    assert len(list((tmp_path / "targets").iterdir())) == 4
    server.log.clear()
    assert call("download", *names) == 0
    assert not [path for path, _ in server.log if path.startswith("/targets/")]
    assert call("download", "unknown") == 1
    place = next(path for path in server.files if path.endswith("a.bin"))
    server.files[place] = b"x" * len(server.files[place])
    (tmp_path / "targets" / hashlib.sha256(b"a.bin").hexdigest()).unlink()
    assert call("download", "a.bin") == 1


def test_delegations_and_hash_bins_are_followed(server: Any, call: Call, tmp_path: Path) -> None:
    publisher = Publisher(server.files)
    signer = CryptoSigner.generate_ecdsa()
    keyid = signer.public_key.keyid
    role = DelegatedRole("../odd role", [keyid], 1, terminating=True, paths=["odd/*"])
    publisher.delegate(Delegations({keyid: signer.public_key}, roles={role.name: role}), role.name, signer=signer)
    publisher.add("odd/one", b"one", role.name)
    assert call("init") == 0
    assert call("download", "odd/one") == 0
    assert call("download", "even/one") == 1

    bins = SuccinctRoles([keyid], 1, 3, "bin")
    publisher.roles.pop(role.name)
    publisher.delegate(Delegations({keyid: signer.public_key}, succinct_roles=bins), *bins.get_roles(), signer=signer)
    for name in ("one", "two", "three"):
        publisher.add(name, name.encode(), bins.get_role_for_target(name))
    assert call("download", "one", "two", "three") == 0
    assert content(tmp_path, "three") == b"three"


def test_a_root_is_followed_by_its_threshold_only(server: Any, call: Call) -> None:
    publisher = Publisher(server.files)
    assert call("init") == 0
    assert call("refresh") == 0
    old = list(publisher.signers["root"])
    for signer in old:
        publisher.root.revoke_key(signer.public_key.keyid, "root")
    publisher.signers["root"] = [CryptoSigner.generate_ed25519(), CryptoSigner.generate_ed25519()]
    for signer in publisher.signers["root"]:
        publisher.root.add_key(signer.public_key, "root")
    publisher.root.version = 2
    publisher.publish_root(old[0])
    assert call("refresh") == 1  # one of two of the old keys
    publisher.publish_root(*old)
    assert call("refresh") == 0


def test_metadata_that_expired_is_refused(server: Any, call: Call) -> None:
    publisher = Publisher(server.files)
    assert call("init") == 0
    publisher.timestamp.expires = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=1)
    publisher.publish()
    assert call("refresh") == 1
    publisher.timestamp.expires = LATER
    publisher.publish()
    assert call("refresh") == 0
