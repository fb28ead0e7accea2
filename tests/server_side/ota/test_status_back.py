"""Status back, by the programs that a plant runs: cameras, collector, broker, guard and who looks, each a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("tuf")
pytest.importorskip("sqlalchemy")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from msgspec.structs import replace

from edgead.runtime import Pack, encode_pack
from edgead.runtime.device_folder import read_device
from edgead.runtime.live import LiveInspector
from edgead.runtime.release import encode_release
from edgead.runtime.slots import Store
from edgead.runtime.status_report import reporter_of
from edgead.runtime.status_spool import StatusSpool
from edgead.runtime.updater import DeviceUpdater
from edgead.server_side.ota.publish import publish_pack, releases_of
from edgead.server_side.ota.rollouts import rollout_of
from edgead.server_side.ota.serve import RepositoryServer, serving
from edgead.server_side.ota.status_store import StatusStore
from tests.runtime import update_world

PHRASE = "correct horse battery staple"


@dataclass
class Plant:
    """A folder with the repository, and the programs that run in it.

    Attributes:
        home: the folder.
        world: the repository and its keys.
        address: of the repository.
        running: programs, by what they were started as.
    """

    home: Path
    world: Any
    address: str
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def database(self) -> Path:
        return self.home / "fleet.db"

    def run(self, *words: str, code: int = 0) -> str:
        """A command that ends by itself."""
        done = subprocess.run(self._command(words), capture_output=True, text=True, check=False, **self._as)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        """A program that does not; what it says is in NAME.log."""
        with open(self.home / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(self._command(words), stdout=log, stderr=log, **self._as)

    def said(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def stop(self, name: str) -> None:
        process = self.running.pop(name)
        process.terminate()
        process.wait(60)

    def collect(self, *more: str, listen: str = "127.0.0.1:0") -> str:
        """A collector; its address."""
        before = len(self.said("collector")) if (self.home / "collector.log").exists() else 0
        self.start("collector", "ota", "collect", "--database", "fleet.db", "--listen", listen, "--json", *more)
        until(lambda: "\n" in self.said("collector")[before:])
        return str(json.loads(self.said("collector")[before:].splitlines()[0])["url"])

    def camera(self, name: str, *more: str) -> None:
        """A device whose key the collector knows."""
        words = ["--id", name, "--product", "part", "--root", "root.json", "--repository", self.address]
        self.run("device", "init", name, *words, *more)
        self.run("ota", "devices", "add", "fleet.db", *self.run("device", "key", name).split())

    def numbers(self, name: str) -> list[int]:
        """Of the statuses of a device that the collector has."""
        with StatusStore(str(self.database), create=False) as store:
            return [one.status.sequence for one in store.history(name)]

    def waiting(self, name: str) -> int:
        return len(StatusSpool(Store(self.home / name).spool).waiting())

    def fleet(self, *more: str) -> dict[str, Any]:
        words = ["ota", "status", "--statuses", "fleet.db", "--repository", str(self.world.folder), "--json", *more]
        found: dict[str, Any] = json.loads(self.run(*words))["fleet"]
        return found

    @property
    def _as(self) -> dict[str, Any]:
        return {"cwd": self.home, "env": {**os.environ, "PLANT_KEYS": PHRASE, "PYTHONUNBUFFERED": "1"}}

    @staticmethod
    def _command(words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "edgead", *words]


@pytest.fixture(scope="module")
def made(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return update_world.new_world(tmp_path_factory.mktemp("published"), tiny)


@pytest.fixture
def server(made: Any, tmp_path: Path) -> Iterator[RepositoryServer]:
    world = made.copy(tmp_path / "world")
    with serving(world.folder) as running:
        yield running


@pytest.fixture
def plant(made: Any, server: RepositoryServer, tmp_path: Path) -> Iterator[Plant]:
    world = update_world.World(tmp_path / "world", made.tiny, list(made.packs), signers=made.signers)
    (tmp_path / "root.json").write_bytes(world.root)
    plant = Plant(tmp_path, world, server.url)
    try:
        yield plant
    finally:
        for process in plant.running.values():
            process.kill()
        for process in plant.running.values():
            process.wait(60)


def until(what: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait for something to be so; seldom enough to leave the processor to the programs."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


def whole(numbers: list[int], least: int) -> bool:
    """Whether statuses came from the first on, each once."""
    return len(numbers) >= least and numbers == list(range(1, len(numbers) + 1))


def test_statuses_of_two_cameras_come_to_the_table_and_the_page_and_outlast_a_collector_that_is_away(
    plant: Plant,
) -> None:
    address = plant.collect()
    for name in ("cam-1", "cam-2"):
        plant.camera(name, "--statuses", address, "--group", name)
        plant.start(name, "device", "update", name, "--every", "1", "--status-every", "1", "--confirm")
    until(lambda: all(whole(plant.numbers(name), 3) for name in ("cam-1", "cam-2")))

    plant.stop("collector")
    seen = {name: len(plant.numbers(name)) for name in ("cam-1", "cam-2")}
    until(lambda: all(plant.waiting(name) >= 3 for name in seen))
    shown = plant.run("device", "status", "cam-1")
    assert "failed since" in shown
    assert plant.collect(listen=address.removeprefix("http://")) == address
    # Who could not send waits for half a minute at most the first time.
    until(lambda: all(whole(plant.numbers(name), seen[name] + 4) for name in seen), 120)
    for name in seen:
        plant.stop(name)
    # What the last moment left is sent by whoever polls next.
    for name in seen:
        plant.run("device", "update", name)
        assert plant.waiting(name) == 0
        assert whole(plant.numbers(name), seen[name] + 5)

    fleet = plant.fleet("--html", "fleet.html")
    assert (fleet["devices"], fleet["verified"], fleet["odd"]) == (2, 2, [])
    (product,) = fleet["products"]
    assert (product["name"], product["releases"]) == ("part", {"1": 2})
    assert {group["name"]: group["counts"]["confirmed"] for group in product["groups"]} == {"cam-1": 1, "cam-2": 1}
    text = plant.run("ota", "status", "--statuses", "fleet.db")
    assert "2 cameras heard of" in text
    page = (plant.home / "fleet.html").read_text()
    for name in seen:
        assert name in text
        assert name in page


def test_over_a_broker_a_poke_makes_a_camera_poll_and_its_status_comes_back(plant: Plant, mosquitto: Any) -> None:
    mqtt = pytest.importorskip("paho.mqtt.client")
    plant.collect("--mqtt", mosquitto.url)
    plant.camera("cam-1", "--statuses", mosquitto.url, "--mqtt", mosquitto.url)
    # By itself it would poll some time within the next hours.
    plant.start("cam-1", "device", "update", "cam-1", "--every", "86400", "--confirm", "--json")
    publisher = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    publisher.connect("127.0.0.1", mosquitto.port)
    publisher.loop_start()
    try:
        # A poke that nobody hears is not kept for later.
        def polled() -> bool:
            publisher.publish("edgead/poke/part", b"whatever")
            return "activated" in plant.said("cam-1")

        until(polled)
    finally:
        publisher.disconnect()
        publisher.loop_stop()

    def confirmed() -> bool:
        with StatusStore(str(plant.database), create=False) as store:
            return any(one.status.release == 1 and one.status.confirmed for one in store.latest())

    until(confirmed)
    until(lambda: plant.waiting("cam-1") == 0)
    assert whole(plant.numbers("cam-1"), 1)
    # However often it is poked, once per interval is enough.
    assert plant.said("cam-1").count('"status": "activated"') == 1
    assert '"status": "current"' not in plant.said("cam-1")


def test_scores_of_the_frames_that_a_camera_inspects_come_to_the_fleet(plant: Plant, tiny: ModuleType) -> None:
    plant.camera("cam-1", "--statuses", plant.collect())
    folder = plant.home / "cam-1"
    store, device = Store(folder), read_device(folder)
    DeviceUpdater(store, device).poll()
    stop = threading.Event()
    with LiveInspector(store.start()) as inspector:
        reporter = reporter_of(folder, store, device, inspector=inspector, every_s=0.5)
        updater = DeviceUpdater(store, device, inspector, reporter=reporter, stop=stop)
        thread = updater.start(interval=1.0)
        try:
            for grey in (100, 100, 200):
                inspector.inspect(tiny.frame(grey))

            def told() -> bool:
                with StatusStore(str(plant.database), create=False) as found:
                    return any(scores.frames == 3 for one in found.latest() for scores in one.status.scores)

            until(told)
        finally:
            stop.set()
            thread.join(60)
    with StatusStore(str(plant.database), create=False) as found:
        (scores,) = found.latest()[0].status.scores
    assert (scores.product, scores.ok, scores.ng, scores.not_inspected) == ("part", 2, 1, 0)
    assert len(scores.ratios) == 5
    assert scores.ratios[0] < 1.0 < scores.ratios[-1]


def test_a_guard_that_runs_stops_a_roll_out_that_cameras_refuse(plant: Plant) -> None:
    address = plant.collect()
    names = ["cam-1", "cam-2"]
    for name in names:
        plant.camera(name, "--statuses", address)
        plant.run("device", "update", name, "--confirm")
    _sign_blind(plant.world)
    keys = ["--keys", str(plant.world.home / "keys"), "--passphrase-env", "PLANT_KEYS"]
    watching = ["ota", "guard", str(plant.world.folder), "--statuses", "fleet.db", "--every", "1", "--minimum", "2"]
    plant.start("guard", *watching, *keys)
    until(lambda: "part" in plant.said("guard"))
    for name in names:
        assert "rejected" in plant.run("device", "update", name, code=1)
    until(lambda: "STOPS" in plant.said("guard"))
    plant.stop("guard")
    with plant.world.opened() as repository:
        record = rollout_of(repository, "part")
    assert record is not None
    assert record.stopped
    for name in names:
        plant.run("device", "update", name)
    fleet = plant.fleet()
    assert fleet["products"][0]["releases"] == {"1": 2}
    assert [(why["release"], why["outcome"], why["devices"]) for why in fleet["failures"]] == [(2, "rejected", 2)]


def _sign_blind(world: Any) -> None:
    """Release 2 by hand, under which nothing would alarm; `edgead ota release` would not make it."""
    old = world.packs[-1]
    calibration = replace(old.calibration, threshold=1e3, map_threshold=1e3)
    blind = Pack("part", old.fingerprint, calibration, old.arrays)
    with world.opened() as repository:
        publish_pack(repository, blind)
        repository.commit(world.keyring())
        last = releases_of(repository, "part")[-1]
    sizes = {last.engine: last.sizes[last.engine], blind.digest: len(encode_pack(blind))}
    world.put_release(
        2, encode_release(replace(last, name="part-2", counter=2, product_packs={"part": blind.digest}, sizes=sizes))
    )
