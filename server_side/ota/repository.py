"""The repository on disk: read and verified, changed in memory, written so that every moment is a valid repository.

    metadata/N.<role>.json, timestamp.json      signed metadata; the names that TUF gives them
    targets/<folder>/<sha256>.<name>            engines, packs, deltas, releases, roll-out records
    publisher.json                              how it is laid out; for the publisher only

Every file but `timestamp.json` has a name that no older metadata speaks of, and `timestamp.json` is replaced last, in
one rename. So a device, a mirror or a publisher that was killed in between sees the old repository or the new one.
What lies on the disk is not trusted: it is verified from the root that the key folder keeps before anything is signed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.signer import Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Key, Metadata, MetaFile, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from edgead.runtime.disk import PART, Disk, RealDisk, locked, put_file
from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.spec import canonical_json
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.roles import Layout, Settings
from edgead.server_side.ota.verified import forged, parsed, read_settings, verify

SETTINGS = "publisher.json"
MADE = "made"
"""Field of the signed timestamp: when it was made, from which devices know the time at least."""
_METADATA_BYTES = 64 * 2**20
_LOCK_SECONDS = 10.0
_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Now, in whole seconds, as TUF has it."""
    return datetime.now(timezone.utc).replace(microsecond=0)


class Repository:
    """A verified repository in memory, and what is to change in it. See `opened` and `created`.

    Attributes:
        folder: what a web server serves.
        layout: its roles.
        root, targets, snapshot, timestamp: verified metadata of the top-level roles.
    """

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]

    def __init__(self, folder: Path, settings: Settings, disk: Disk, clock: Clock) -> None:
        self.folder = folder
        self.layout = Layout(settings)
        self.clock = clock
        self._disk = disk
        self._delegated: dict[str, Metadata[Targets]] = {}
        self._dirty: dict[str, None] = {}
        self._files: dict[str, Iterable[bytes]] = {}
        self._signed: set[str] = set()
        self._settings_changed = False

    @property
    def settings(self) -> Settings:
        """How it is laid out."""
        return self.layout.settings

    def change_settings(self, **fields: Any) -> None:
        """Change how it is laid out; takes effect on disk with the next commit."""
        self.layout = Layout(msgspec.structs.replace(self.settings, **fields))
        self._settings_changed = True

    def role(self, name: str) -> Metadata[Targets]:
        """Verified metadata of the targets role or a delegated one.

        Raises:
            InputError: it is missing or forged.
        """
        if name == "targets":
            return self.targets
        if name not in self._delegated:
            entry = self.snapshot.signed.meta.get(f"{name}.json")
            if entry is None:
                raise forged(f"the role {name} in its snapshot", "a snapshot without it")
            parent = self.role(self.layout.parent(name))
            self._delegated[name] = self._read(f"{entry.version}.{name}.json", Targets, name, parent.signed)
        return self._delegated[name]

    def authority(self, name: str) -> tuple[Role, list[Key]]:
        """Threshold and keys of a role, as the role above it says."""
        above = self._above(name)
        role = above.get_delegated_role(name)
        return role, [above.get_key(keyid) for keyid in role.keyids]

    def edit(self, name: str) -> Targets:
        """The content of a role that is to be changed and signed anew by `commit`."""
        content = self.role(name).signed
        self._dirty[name] = None
        return content

    def new_role(self, name: str, content: Targets) -> None:
        """A delegated role that is new."""
        # `commit` makes every version one higher than what is here.
        content.version = 0
        self._delegated[name] = Metadata(content)
        self._dirty[name] = None

    def find(self, path: str) -> TargetFile | None:
        """The entry of a target, or None."""
        return self.role(self.layout.role_of(path)).signed.targets.get(path)

    def entries(self, kind: str, product: str | None = None) -> dict[str, TargetFile]:
        """Target paths of a kind, of a product, with their entries."""
        start = f"{kind}/" if product is None or kind == "engines" else f"{kind}/{product}"
        found = {}
        for name in self.layout.roles(kind, product):
            for path, entry in self.role(name).signed.targets.items():
                if path == f"{start}.json" or path.startswith(start if start.endswith("/") else f"{start}/"):
                    found[path] = entry
        return found

    def file(self, path: str, entry: TargetFile) -> Path:
        """Where the content of a target lies."""
        folder, _, name = path.rpartition("/")
        return self.folder / "targets" / folder / f"{entry.hashes['sha256']}.{name}"

    def read(self, path: str) -> bytes:
        """The content of a target, verified.

        Raises:
            InputError: no such target, or its file was changed.
            StorageError: the file cannot be read.
        """
        entry = self.find(path)
        if entry is None:
            raise forged(f"the target {path}", "none of that name")
        place, pending = self.file(path, entry), self._files.get(path)
        if isinstance(pending, tuple):
            return b"".join(pending)
        with storage_errors(place, "to read a target"):
            data = self._disk.read(place, entry.length + 1)
        if len(data) != entry.length or hashlib.sha256(data).hexdigest() != entry.hashes["sha256"]:
            raise forged(f"the content of {path} that was signed", "another one")
        return data

    def add(self, path: str, data: bytes) -> None:
        """Put a target, new or in place of an older one."""
        self.add_file(path, hashlib.sha256(data).hexdigest(), len(data), (data,))

    def add_file(self, path: str, sha256: str, length: int, chunks: Iterable[bytes]) -> None:
        """Put a target whose content is too large to be held in memory."""
        entry = TargetFile(length, {"sha256": sha256}, path)
        self.edit(self.layout.role_of(path)).targets[path] = entry
        self._files[path] = chunks

    def drop(self, path: str) -> None:
        """Take a target out of the metadata. Its file stays, for devices that are about to fetch it."""
        del self.edit(self.layout.role_of(path)).targets[path]
        self._files.pop(path, None)

    def commit(self, keyring: Keyring, *, also: Mapping[str, Sequence[Signer]] | None = None) -> None:
        """Sign what was changed, and write it.

        Args:
            keyring: has a threshold of keys of each changed role, and those of snapshot and timestamp.
            also: further signers by role, for a role whose keys are about to change.

        Raises:
            InputError: keys are missing; nothing was written.
            StorageError: the disk refused; the repository is as it was.
        """
        also = also or {}
        sealed: list[tuple[str, bytes]] = []
        for name in self.layout.order(self._dirty):
            metadata = self.role(name)
            if name in self._signed:
                verify(self._above(name), name, metadata)
                sealed.append((f"{metadata.signed.version}.{name}.json", metadata.to_bytes()))
            else:
                sealed.append(self._sealed(name, metadata, keyring, also))
            self.snapshot.signed.meta[f"{name}.json"] = MetaFile(metadata.signed.version)
        sealed.append(self._sealed("snapshot", self.snapshot, keyring, also))
        self.timestamp.signed.snapshot_meta = MetaFile(self.snapshot.signed.version)
        last = self._stamped(keyring, also)
        self._put_files()
        if self._settings_changed:
            self._put(self.folder / SETTINGS, (canonical_json(self.settings),))
        for name, data in sealed:
            self._put(self.folder / "metadata" / name, (data,))
        self._put(self.folder / "metadata" / "timestamp.json", (last,))
        self._dirty, self._signed, self._settings_changed = {}, set(), False

    def stage(self) -> dict[str, Metadata[Targets]]:
        """Changed roles, one version higher and unsigned, for others to sign.

        Their targets are written, under names that no metadata speaks of. Nothing else may be done with this object.

        Raises:
            StorageError: the disk refused.
        """
        found = {}
        for name in self.layout.order(self._dirty):
            found[name] = self.role(name)
            self._advance(name, found[name])
        self._put_files()
        return found

    def take(self, name: str, metadata: Metadata[Targets]) -> None:
        """A role that others changed and signed; `commit` verifies and writes it."""
        if name == "targets":
            self.targets = metadata
        else:
            self._delegated[name] = metadata
        self._dirty[name] = None
        if metadata.signatures:
            self._signed.add(name)

    def put_root(self, new: Metadata[Root], keyring: Keyring) -> None:
        """Write a root that others signed.

        Raises:
            InputError: a threshold of the root before it, or its own, is not met.
        """
        verify(self.root.signed, "root", new)
        verify(new.signed, "root", new)
        self.root = new
        data = new.to_bytes()
        self._put(self.folder / "metadata" / f"{new.signed.version}.root.json", (data,))
        keyring.keep_root(data)

    def next_root(self) -> Metadata[Root]:
        """The root as it is, one version higher and unsigned."""
        new: Metadata[Root] = Metadata(copy.deepcopy(self.root.signed))
        self._advance("root", new)
        return new

    def stamp(self, keyring: Keyring) -> None:
        """Sign and write the timestamp alone.

        Raises:
            InputError: its key is missing.
            StorageError: the disk refused.
        """
        self._put(self.folder / "metadata" / "timestamp.json", (self._stamped(keyring, {}),))

    def commit_root(self, keyring: Keyring, old: Metadata[Root] | None) -> None:
        """Sign and write a new root: by its own threshold, and by that of the one before.

        Raises:
            InputError: keys are missing; nothing was written.
            StorageError: the disk refused.
        """
        signed = self.root.signed
        signed.version = 1 if old is None else old.signed.version + 1
        signed.expires = self._expiry("root")
        self.root.signatures.clear()
        for content in (signed, signed if old is None else old.signed):
            role = content.roles["root"]
            self._sign(self.root, keyring.signers(map(content.get_key, role.keyids), role.threshold, "root"))
        if old is not None:
            old.signed.verify_delegate("root", self.root.signed_bytes, self.root.signatures)
        signed.verify_delegate("root", self.root.signed_bytes, self.root.signatures)
        data = self.root.to_bytes()
        self._put(self.folder / "metadata" / f"{signed.version}.root.json", (data,))
        keyring.keep_root(data)

    def load(self, trusted: bytes) -> None:
        """Read and verify the top-level roles, from a root that is trusted on.

        Raises:
            InputError: something is missing or forged.
            StorageError: a file cannot be read.
        """
        self.root = parsed(trusted, Root, "root")
        while (self.folder / "metadata" / f"{self.root.signed.version + 1}.root.json").exists():
            version = self.root.signed.version + 1
            new: Metadata[Root] = self._read(f"{version}.root.json", Root, "root", self.root.signed)
            verify(new.signed, "root", new)
            if new.signed.version != version:
                raise forged(f"version {version} in {version}.root.json", str(new.signed.version))
            self.root = new
        top = self.root.signed
        self.timestamp = self._read("timestamp.json", Timestamp, "timestamp", top)
        version = self.timestamp.signed.snapshot_meta.version
        self.snapshot = self._read(f"{version}.snapshot.json", Snapshot, "snapshot", top)
        version = self.snapshot.signed.meta["targets.json"].version
        self.targets = self._read(f"{version}.targets.json", Targets, "targets", top)

    def _stamped(self, keyring: Keyring, also: Mapping[str, Sequence[Signer]]) -> bytes:
        self.timestamp.signed.unrecognized_fields[MADE] = self.clock().strftime(_FORMAT)
        return self._sealed("timestamp", self.timestamp, keyring, also)[1]

    def _sealed(
        self, name: str, metadata: Metadata[Any], keyring: Keyring, also: Mapping[str, Sequence[Signer]]
    ) -> tuple[str, bytes]:
        """File name and bytes of a role, one version higher and signed."""
        role, keys = self.authority(name)
        self._advance(name, metadata)
        self._sign(metadata, [*keyring.signers(keys, role.threshold, name), *also.get(name, ())])
        verify(self._above(name), name, metadata)
        return f"{metadata.signed.version}.{name}.json", metadata.to_bytes()

    def _advance(self, name: str, metadata: Metadata[Any]) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = self._expiry(self.layout.kind_of(name))
        metadata.signatures.clear()

    def _above(self, name: str) -> Root | Targets:
        parent = self.layout.parent(name)
        return self.root.signed if parent == "root" else self.role(parent).signed

    def _put_files(self) -> None:
        for path, chunks in self._files.items():
            entry = self.role(self.layout.role_of(path)).signed.targets[path]
            self._put(self.file(path, entry), chunks)
        self._files = {}

    def _sign(self, metadata: Metadata[Any], signers: Iterable[Signer]) -> None:
        for signer in signers:
            try:
                metadata.sign(signer, append=True)
            except UnsignedMetadataError as error:
                raise InputError(
                    wanted=f"a signature by the key {signer.public_key.keyid}",
                    got="a signer that failed",
                    next_step="Check the card, the network or the service that holds the key.",
                ) from error

    def _expiry(self, kind: str) -> datetime:
        return self.clock() + timedelta(days=self.settings.days[kind])

    def _read(self, name: str, kind: type[Any], role: str, above: Root | Targets) -> Metadata[Any]:
        place = self.folder / "metadata" / name
        with storage_errors(place, "to read signed metadata"):
            data = self._disk.read(place, _METADATA_BYTES)
        metadata = parsed(data, kind, name)
        verify(above, role, metadata)
        return metadata

    def _put(self, place: Path, chunks: Iterable[bytes]) -> None:
        with storage_errors(place, "to make a folder"):
            self._disk.make_folder(place.parent)
        put_file(self._disk, place, chunks)


@contextlib.contextmanager
def opened(
    folder: Path,
    trusted: bytes | None,
    *,
    disk: Disk | None = None,
    clock: Clock = utc_now,
    wait_s: float = _LOCK_SECONDS,
) -> Iterator[Repository]:
    """A repository that nobody else changes while the block runs.

    Args:
        folder: as made by `edgead ota init`.
        trusted: a root to begin from; None for the repository's own first one, to look only.
        disk: the file system.
        clock: what time it is.
        wait_s: how long to wait for another publisher to end.

    Raises:
        InputError: no repository, or one that was tampered with.
        StoreBusyError: another publisher is at work.
        StorageError: a file cannot be read.
    """
    disk = disk or RealDisk()
    if not (folder / SETTINGS).is_file():
        raise InputError(
            wanted=f"an update repository in {folder}",
            got=f"a folder without {SETTINGS}" if folder.is_dir() else "no such folder",
            next_step="Make one with: edgead ota init FOLDER --product NAME --keys DIR",
        )
    with locked(disk, folder / ".lock", wait_s, "to publish"):
        repository = Repository(folder, read_settings(disk, folder / SETTINGS), disk, clock)
        with storage_errors(folder, "to clean up after an interrupted publisher"):
            for name in disk.names(folder / "metadata"):
                if name.endswith(PART):
                    disk.remove(folder / "metadata" / name)
        if trusted is None:
            with storage_errors(folder, "to read its first root"):
                trusted = disk.read(folder / "metadata" / "1.root.json", _METADATA_BYTES)
        repository.load(trusted)
        yield repository


__all__ = ["MADE", "SETTINGS", "Clock", "Repository", "opened", "utc_now"]
