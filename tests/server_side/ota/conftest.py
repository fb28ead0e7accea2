"""A repository of the tiny detector, publishers with all keys or some, and devices that run TUF's own client."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tuf")

from tuf.api.metadata import Metadata, MetaFile, TargetFile, Targets
from tuf.ngclient import Updater

from edgead.runtime.bundle import golden_files, write_bundle
from edgead.runtime.disk import Disk
from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import Calibration, EngineRecord
from edgead.server_side.ota.init import create
from edgead.server_side.ota.keys import Keyring
from edgead.server_side.ota.publish import publish_bundle, publish_pack
from edgead.server_side.ota.releases import make_release
from edgead.server_side.ota.repository import Repository, opened
from edgead.server_side.ota.roles import Settings
from edgead.server_side.ota.rollouts import roll_out
from edgead.server_side.ota.serve import RepositoryServer, serving

PHRASE = "correct horse battery staple"
ROWS = 300


@dataclass
class Place:
    """A repository and its keys on disk.

    Attributes:
        folder, keys: where they are.
        packs: published, oldest first.
        tiny: the module of the tiny detector.
    """

    folder: Path
    keys: Path
    packs: list[Pack]
    tiny: ModuleType

    def keyring(self, *kinds: str) -> Keyring:
        """All keys, or those of some roles only."""
        ring = Keyring([self.keys], lambda purpose: [PHRASE])
        if kinds:
            ring.records = {keyid: record for keyid, record in ring.records.items() if record.role in kinds}
        return ring

    @contextlib.contextmanager
    def opened(self, disk: Disk | None = None) -> Iterator[Repository]:
        with opened(self.folder, self.keyring().root, disk=disk) as repository:
            yield repository

    def next_pack(self, *, product: str = "part", added: int = 3) -> Pack:
        """The last pack with some rows more, and thresholds of its own."""
        return grown(self.packs[-1], added, product)

    def publish(self, pack: Pack, disk: Disk | None = None) -> None:
        with self.opened(disk) as repository:
            publish_pack(repository, pack)
            repository.commit(self.keyring())
        self.packs.append(pack)

    def release(self, *, groups: Sequence[str] = (), percent: float = 100.0) -> int:
        with self.opened() as repository:
            made = make_release(repository, "part", pack=self.packs[-1].digest)
            repository.commit(self.keyring())
            roll_out(repository, "part", release=made.counter, groups=groups, percent=percent)
            repository.commit(self.keyring())
        return made.counter

    def forge(self, role: str, change: Callable[[Targets], None], *signing: str) -> None:
        """What somebody does who holds the online keys, and signs `role` with the keys of `signing`."""
        with self.opened() as repository:
            metadata = Metadata(repository.role(role).signed)
            metadata.signed.version += 1
            change(metadata.signed)
            for record in self.keyring(*signing).records.values():
                metadata.sign(self.keyring()._open(record), append=True)
            self.put(repository, role, metadata.to_bytes(), metadata.signed.version)

    def put(self, repository: Repository, role: str, data: bytes, version: int) -> None:
        """Put bytes as a role's metadata under a good snapshot and timestamp."""
        (self.folder / "metadata" / f"{version}.{role}.json").write_bytes(data)
        repository.snapshot.signed.meta[f"{role}.json"] = MetaFile(version)
        repository.commit(self.keyring())

    def place(self, path: str, data: bytes) -> TargetFile:
        """A target's file on the server; its entry, for somebody to sign."""
        entry = TargetFile.from_data(path, data, ["sha256"])
        where = self.folder / "targets" / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.with_name(f"{entry.hashes['sha256']}.{where.name}").write_bytes(data)
        return entry


class Device:
    """TUF's own client with a metadata cache that it keeps."""

    def __init__(self, folder: Path, url: str, root: bytes) -> None:
        self.folder, self.url, self.root = folder, url, root
        folder.mkdir(parents=True, exist_ok=True)

    def poll(self) -> Updater:
        (self.folder / "targets").mkdir(exist_ok=True)
        updater = Updater(
            str(self.folder),
            f"{self.url}/metadata/",
            str(self.folder / "targets"),
            f"{self.url}/targets/",
            bootstrap=self.root,
        )
        updater.refresh()
        return updater

    def fetch(self, path: str) -> bytes | None:
        updater = self.poll()
        found = updater.get_targetinfo(path)
        return None if found is None else Path(updater.download_target(found)).read_bytes()


def grown(base: Pack, added: int, product: str = "part") -> Pack:
    ids, rows = base.ids("bank.normal"), base.arrays["bank.normal"]
    more = np.random.default_rng(len(rows)).uniform(95, 105, (added, 3)).astype(np.float32)
    return Pack(
        product,
        base.fingerprint,
        Calibration(threshold=base.calibration.threshold + 0.25, map_threshold=30.0),
        {
            "bank.normal": np.concatenate([rows, more]),
            "bank.normal.ids": np.concatenate([ids, ids[-1] + 1 + np.arange(added, dtype=np.uint64)]),
        },
    )


def module_at(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    pytest.importorskip("onnx")
    return module_at("edgead_tests_tiny_ota", Path(__file__).parents[2] / "runtime" / "tiny.py")


@pytest.fixture(scope="session")
def services() -> ModuleType:
    """The module services.py beside this file."""
    return module_at("edgead_tests_services", Path(__file__).with_name("services.py"))


@pytest.fixture(scope="session")
def postgres(services: ModuleType) -> Iterator[Any]:
    """A PostgreSQL of these tests' own."""
    if services.program("initdb") is None or services.program("postgres") is None:
        pytest.skip("PostgreSQL is not installed here")
    pytest.importorskip("psycopg")
    cluster = services.Postgres()
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture
def mosquitto(services: ModuleType, tmp_path: Path) -> Iterator[Any]:
    """A broker of this test's own."""
    if services.program("mosquitto") is None:
        pytest.skip("Mosquitto is not installed here")
    folder = tmp_path / "broker"
    folder.mkdir()
    broker = services.Mosquitto(folder)
    try:
        yield broker.start()
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def first_pack(tiny: ModuleType) -> Pack:
    rows = np.random.default_rng(0).uniform(95, 105, (ROWS, 3)).astype(np.float32)
    rows[0] = tiny.GREY
    pack: Pack = tiny.pack(rows)
    return pack


@pytest.fixture(scope="session")
def bundle_file(tiny: ModuleType, first_pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny detector with true scores of its golden images, so that it passes the engine test of a device."""
    path = tmp_path_factory.mktemp("ota") / "tiny.edgead"
    rows = first_pack.arrays["bank.normal"]
    frames = [tiny.frame(), tiny.frame(200)]
    scores = [float(np.linalg.norm(rows - frame[0, 0], axis=1).min()) for frame in frames]
    golden, pictures = golden_files(np.stack(frames), scores, [False, True])
    graphs = {"engines/trunk.onnx": tiny.trunk_graph(), "engines/head.onnx": tiny.head_graph()}
    write_bundle(
        path,
        name="tiny",
        detector=tiny.detector(),
        engines=[EngineRecord("onnx-fp32", "onnx", "fp32", *graphs, "a test")],
        packs={"part": first_pack},
        golden=golden,
        files=graphs | pictures,
    )
    return path


@pytest.fixture(scope="session")
def template(tiny: ModuleType, first_pack: Pack, bundle_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Release 1 of 'part' is out, with the bundle's own pack."""
    home = tmp_path_factory.mktemp("template")
    place = Place(home / "updates", home / "keys", [first_pack], tiny)
    create(place.folder, place.keyring(), Settings(products=("part",)))
    with place.opened() as repository:
        publish_bundle(repository, bundle_file)
        repository.commit(place.keyring())
    assert place.release() == 1
    return place


@pytest.fixture
def place(template: Place, tmp_path: Path) -> Place:
    """A copy of that repository to change."""
    shutil.copytree(template.folder, tmp_path / "updates")
    shutil.copytree(template.keys, tmp_path / "keys")
    return Place(tmp_path / "updates", tmp_path / "keys", list(template.packs), template.tiny)


@pytest.fixture
def server(place: Place) -> Iterator[RepositoryServer]:
    with serving(place.folder) as running:
        yield running


@pytest.fixture
def device(place: Place, server: RepositoryServer, tmp_path: Path) -> Device:
    """A device that was given the first root."""
    return Device(tmp_path / "device", server.url, (place.folder / "metadata" / "1.root.json").read_bytes())


@pytest.fixture
def passphrase(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGEAD_TEST_KEYS", PHRASE)
    assert os.environ["EDGEAD_TEST_KEYS"]
    return "EDGEAD_TEST_KEYS"


@pytest.fixture
def helpers() -> dict[str, Any]:
    """Classes and functions of this file; tests are no package and cannot import it."""
    return {"Device": Device, "Place": Place, "grown": grown, "PHRASE": PHRASE}
