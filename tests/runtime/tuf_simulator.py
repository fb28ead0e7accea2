"""A TUF repository of any publisher in the memory of a web server, and the adapter that polls it in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

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
TOP = ("root", "timestamp", "snapshot", "targets")
BELOW = ("targets", "snapshot", "timestamp")


def moment(days: float = 0) -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=days)


class Simulator:
    """Content, keys and published files of a repository; nothing is served before `publish`.

    Attributes:
        content: by role, what is signed next.
        signers: by role, who signs it.
        hashes: whether snapshot and timestamp name hashes and lengths of what they list.
    """

    def __init__(self, files: dict[str, bytes], *, consistent: bool = True) -> None:
        self.files, self.hashes = files, False
        self.signers: dict[str, list[CryptoSigner]] = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        root = Root(consistent_snapshot=consistent, expires=moment(30))
        for role, (signer,) in self.signers.items():
            root.add_key(signer.public_key, role)
        self.content: dict[str, Any] = {
            "root": root,
            "targets": Targets(expires=moment(30)),
            "snapshot": Snapshot(expires=moment(30)),
            "timestamp": Timestamp(expires=moment(30)),
        }
        for signed in self.content.values():
            signed.version = 0  # `publish` counts
        self.publish("root", *BELOW)

    def publish(self, *roles: str, change: Callable[[bytes], bytes] = bytes) -> None:
        """Sign roles one version higher and serve them, each listed in the one above; `change` spoils the bytes."""
        for role in roles:
            signed = self.content[role]
            signed.version += 1
            metadata = Metadata(signed)
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            data = change(metadata.to_bytes())
            plain = role == "timestamp" or (role != "root" and not self.content["root"].consistent_snapshot)
            self.files[f"/metadata/{role}.json" if plain else f"/metadata/{signed.version}.{role}.json"] = data
            if role not in ("root", "timestamp"):
                hashes = {"sha256": hashlib.sha256(data).hexdigest()} if self.hashes else None
                entry = MetaFile(signed.version, len(data) if self.hashes else None, hashes)
                if role == "snapshot":
                    self.content["timestamp"].snapshot_meta = entry
                else:
                    self.content["snapshot"].meta[f"{role}.json"] = entry

    def rekey(self, role: str, keys: Sequence[CryptoSigner] = (), threshold: int = 1) -> None:
        """Name other keys for a top-level role; they sign it, too."""
        keys = list(keys) or [CryptoSigner.generate_ed25519()]
        entry = self.content["root"].roles[role]
        entry.keyids, entry.threshold, self.signers[role] = [], threshold, keys
        for signer in keys:
            self.content["root"].add_key(signer.public_key, role)

    def add(self, path: str, data: bytes, role: str = "targets", hashes: Sequence[str] = ("sha256",)) -> str:
        """Name a target and serve it; the server's path of it, by its first hash."""
        entry = self.content[role].targets[path] = TargetFile.from_data(path, data, list(hashes))
        folder, slash, name = path.rpartition("/")
        prefixes = [f"{digest}." for digest in entry.hashes.values()]
        if not self.content["root"].consistent_snapshot:
            prefixes = [""]
        places = [f"/targets/{folder}{slash}{prefix}{name}" for prefix in prefixes]
        self.files |= dict.fromkeys(places, data)
        return places[0]

    def delegate(self, parent: str, name: str, *paths: str, terminating: bool = False, **fields: Any) -> None:
        """A further delegation, after those that `parent` has."""
        above = self.content[parent]
        above.delegations = above.delegations or Delegations({}, roles={})
        signer = self.signers.setdefault(name, [CryptoSigner.generate_ed25519()])[0]
        key = signer.public_key
        patterns = list(paths) if paths else None
        above.delegations.roles[name] = DelegatedRole(name, [key.keyid], 1, terminating, patterns, **fields)
        above.delegations.keys[key.keyid] = key
        self._new(name)

    def bins(self, bits: int) -> SuccinctRoles:
        """Hash bins in place of named delegations."""
        signer = CryptoSigner.generate_ecdsa()
        found = SuccinctRoles([signer.public_key.keyid], 1, bits, "bin")
        keys = {signer.public_key.keyid: signer.public_key}
        self.content["targets"].delegations = Delegations(keys, succinct_roles=found)
        for name in found.get_roles():
            self.signers[name] = [signer]
            self._new(name)
        return found

    def _new(self, role: str) -> None:
        if role not in self.content:
            self.content[role] = Targets(expires=moment(30))
            self.content[role].version = 0


class Client:
    """The adapter with a folder of its own.

    Attributes:
        server: where it polls.
        folder: holds its metadata and what it downloaded.
    """

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.folder = server, folder
        self._main = adapter().main

    def init(self, root: bytes | None = None) -> int:
        place = self.folder / "first.json"
        place.write_bytes(self.server.files["/metadata/1.root.json"] if root is None else root)
        return self._call("init", str(place))

    def refresh(self, days: float = 0) -> int:
        return self._call("--metadata-url", f"{self.server.url}/metadata/", "refresh", days=days)

    def download(self, *names: str, days: float = 0) -> int:
        words = ["--metadata-url", f"{self.server.url}/metadata/", "--target-base-url", f"{self.server.url}/targets/"]
        words += ["--target-dir", str(self.folder / "targets")]
        words += [word for name in names for word in ("--target-name", name)]
        return self._call(*words, "download", days=days)

    def _call(self, *words: str, days: float = 0) -> int:
        code: int = self._main(
            ["--metadata-dir", str(self.folder / "metadata"), *words], clock=lambda: time.time() + days * 86400
        )
        return code

    def versions(self) -> dict[str, int]:
        """What it trusts now."""
        return {
            path.name.removesuffix(".json"): json.loads(path.read_bytes())["signed"]["version"]
            for path in (self.folder / "metadata").glob("*.json")
        }

    def contents(self) -> list[bytes]:
        """What it downloaded and kept."""
        return sorted(path.read_bytes() for path in (self.folder / "targets").rglob("*") if path.is_file())

    def asked(self) -> list[str]:
        """File names that the server was asked for since the last call."""
        found = [path.removeprefix("/metadata/").removesuffix(".json") for path, _ in self.server.log]
        self.server.log.clear()
        return found


def adapter() -> ModuleType:
    """The adapter as a module; it belongs to no package."""
    name = "edgead_tests_tuf_adapter"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, CLIENT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
