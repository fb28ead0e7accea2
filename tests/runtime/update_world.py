"""A publisher with all keys, a repository of the tiny detector, and devices that update themselves from it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tuf.api.metadata import Metadata, MetaFile, Targets

from edgead.runtime.bundle import golden_files, write_bundle
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.knowledge import Pack
from edgead.runtime.live import LiveInspector
from edgead.runtime.slots import Store
from edgead.runtime.spec import Calibration, EngineRecord
from edgead.runtime.update_outcome import Device
from edgead.runtime.updater import DeviceUpdater
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import publish_bundle, publish_pack
from edgead.server_side.ota.releases import make_release, release_path
from edgead.server_side.ota.repository import Repository, opened, utc_now
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import roll_out, stop

ROWS = 300
QUICK = FetchLimits(
    connect_s=1.0,
    gap_s=0.3,
    total_s=2.5,
    least_rate=500.0,
    rate_window_s=0.5,
    tries=2,
    first_wait_s=0.01,
    longest_wait_s=0.5,
)


@dataclass
class World:
    """A repository and its keys.

    Attributes:
        home: folder of both.
        tiny: the module of the tiny detector.
        packs: published, oldest first.
        now: gives the publisher's time.
        signers: keys that were decrypted, by name.
    """

    home: Path
    tiny: ModuleType
    packs: list[Pack]
    now: Callable[[], Any] = field(default=utc_now)
    signers: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.home / "updates"

    @property
    def root(self) -> bytes:
        return (self.folder / "metadata" / "1.root.json").read_bytes()

    @property
    def digests(self) -> list[str]:
        """Of the packs, oldest first."""
        return [pack.digest for pack in self.packs]

    def keyring(self, *kinds: str) -> Keyring:
        ring = Keyring([self.home / "keys"], lambda purpose: ["correct horse battery staple"])
        # To decrypt a key is slow on purpose; once is enough.
        ring._opened = self.signers
        if kinds:
            ring.records = {keyid: record for keyid, record in ring.records.items() if record.role in kinds}
        return ring

    @contextlib.contextmanager
    def opened(self) -> Iterator[Repository]:
        with opened(self.folder, self.keyring().root, clock=self.now) as repository:
            yield repository

    def copy(self, home: Path) -> World:
        shutil.copytree(self.home, home, dirs_exist_ok=True)
        return World(home, self.tiny, list(self.packs), signers=self.signers)

    def pack(self, added: int = 3, base: Pack | None = None) -> Pack:
        return grown(base or self.packs[-1], added)

    def publish(self, pack: Pack) -> None:
        with self.opened() as repository:
            publish_pack(repository, pack)
            repository.commit(self.keyring())
        self.packs.append(pack)

    def release(self, pack: Pack | None = None, *, out: bool = True, window: int = 0, **rollout: Any) -> int:
        """Release a pack, the last one by default, and roll it out."""
        with self.opened() as repository:
            made = make_release(repository, "part", pack=(pack or self.packs[-1]).digest)
            repository.commit(self.keyring())
            if out:
                roll_out(repository, "part", release=made.counter, window=window, **({"percent": 100.0} | rollout))
                repository.commit(self.keyring())
        return made.counter

    def update(self, added: int = 3, **rollout: Any) -> int:
        """A new pack, released and rolled out to all."""
        self.publish(self.pack(added))
        return self.release(**rollout)

    def stop(self) -> None:
        with self.opened() as repository:
            stop(repository, "part")
            repository.commit(self.keyring())

    def stamp(self) -> None:
        with self.opened() as repository:
            repository.stamp(self.keyring())

    def put_release(self, counter: int, data: bytes, **rollout: Any) -> None:
        """Sign any bytes as a release, and roll it out to all."""
        with self.opened() as repository:
            repository.add(release_path("part", counter), data)
            repository.commit(self.keyring())
            roll_out(repository, "part", release=counter, window=0, **({"percent": 100.0} | rollout))
            repository.commit(self.keyring())

    def read(self, path: str) -> bytes:
        with self.opened() as repository:
            return repository.read(path)

    def file(self, path: str) -> Path:
        """Where the content of a target lies."""
        with self.opened() as repository:
            entry = repository.find(path)
            assert entry is not None
            return repository.file(path, entry)

    def forge(self, role: str, change: Callable[[Targets], None], *signing: str) -> None:
        """Change a role's metadata and sign it with the keys of other roles, under a good snapshot and timestamp."""
        with self.opened() as repository:
            metadata = Metadata(repository.role(role).signed)
            metadata.signed.version += 1
            change(metadata.signed)
            for record in self.keyring(*signing).records.values():
                metadata.sign(self.keyring()._open(record), append=True)
            version = metadata.signed.version
            (self.folder / "metadata" / f"{version}.{role}.json").write_bytes(metadata.to_bytes())
            repository.snapshot.signed.meta[f"{role}.json"] = MetaFile(version)
            repository.commit(self.keyring())


@dataclass
class Camera:
    """A device: its store, and whatever makes an updater for it."""

    folder: Path
    device: Device
    limits: FetchLimits = QUICK

    @property
    def store(self) -> Store:
        return Store(self.folder)

    def updater(self, inspector: LiveInspector | None = None, **options: Any) -> DeviceUpdater:
        return DeviceUpdater(self.store, self.device, inspector, **({"limits": self.limits} | options))

    def poll(self, **options: Any) -> Any:
        return self.updater(**options).poll()

    def installed(self) -> Camera:
        """With the release that is out, confirmed."""
        outcome = self.poll()
        assert outcome.status == "activated", outcome
        self.updater().confirm()
        return self

    def refused(self, kind: Any, match: str = "", **options: Any) -> Any:
        """A poll that ends with this error and changes nothing of what the device inspects with."""
        before = self.snapshot()
        outcome = self.poll(**options)
        assert outcome.status in ("failed", "rejected"), outcome
        assert isinstance(outcome.error, kind), repr(outcome.error)
        assert match in str(outcome.error), str(outcome.error)
        assert self.snapshot() == before
        return outcome

    def taken(self, counter: int, way: str = "") -> Any:
        """A poll that makes this release active."""
        outcome = self.poll()
        assert (outcome.status, outcome.release) == ("activated", counter), outcome
        assert way in outcome.way
        return outcome

    def snapshot(self) -> dict[str, bytes]:
        """The bytes of all that the active release is made of."""
        active = self.store.active()
        paths = [
            active.engine,
            *(self.folder / "packs" / f"{pack.digest}.safetensors" for pack in active.packs.values()),
        ]
        return {active.digest: b"", **{path.name: path.read_bytes() for path in paths}}


def camera(folder: Path, url: str, root: bytes, *, device_id: str = "camera-1", groups: Sequence[str] = ()) -> Camera:
    return Camera(folder, Device(device_id, url, "part", root, tuple(groups)))


def grown(base: Pack, added: int) -> Pack:
    """`base` with some rows more, and thresholds of its own."""
    ids, rows = base.ids("bank.normal"), base.arrays["bank.normal"]
    more = np.random.default_rng(len(rows)).uniform(95, 105, (added, 3)).astype(np.float32)
    return Pack(
        "part",
        base.fingerprint,
        Calibration(threshold=base.calibration.threshold + 0.25, map_threshold=30.0),
        {
            "bank.normal": np.concatenate([rows, more]),
            "bank.normal.ids": np.concatenate([ids, ids[-1] + 1 + np.arange(added, dtype=np.uint64)]),
        },
    )


def bundle(path: Path, tiny: ModuleType, pack: Pack, *, off: float = 0.0, trunk: bytes | None = None) -> None:
    """The tiny detector with the golden scores that it has, or some that are off by so much."""
    bright = float(np.linalg.norm(200.0 - pack.arrays["bank.normal"], axis=1).min())
    golden, pictures = golden_files(np.stack([tiny.frame(), tiny.frame(200)]), [0.0, bright + off], [False, True])
    where = "engines/onnx-fp32/{}.onnx"
    write_bundle(
        path,
        name="tiny",
        detector=tiny.detector(),
        engines=[EngineRecord("onnx-fp32", "onnx", "fp32", where.format("trunk"), where.format("head"), "a test")],
        packs={"part": pack},
        golden=golden,
        files={where.format("trunk"): trunk or tiny.trunk_graph(), where.format("head"): tiny.head_graph(), **pictures},
    )


def new_world(home: Path, tiny: ModuleType) -> World:
    """Release 1 of 'part' is out, with the bundle's own pack."""
    rows = np.random.default_rng(0).uniform(95, 105, (ROWS, 3)).astype(np.float32)
    rows[0] = tiny.GREY
    first: Pack = tiny.pack(rows)
    world = World(home, tiny, [first])
    bundle(home / "tiny.edgead", tiny, first)
    create(world.folder, world.keyring(), Settings(products=("part",)))
    with world.opened() as repository:
        publish_bundle(repository, home / "tiny.edgead")
        repository.commit(world.keyring())
    world.release()
    return world
