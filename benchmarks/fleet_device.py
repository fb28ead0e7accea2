"""One simulated device: the real updater on a store in memory, and what goes wrong with it from poll to poll."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from benchmarks.fleet_disk import MemoryDisk, Pool, PowerCutError
from benchmarks.fleet_server import FAULTS, Board
from benchmarks.fleet_world import BEGIN, PRODUCT, Released
from edgead.runtime.errors import EdgeadError, FetchError
from edgead.runtime.fetch_rules import FetchLimits
from edgead.runtime.release import digest_of
from edgead.runtime.slots import Active, Store
from edgead.runtime.update_outcome import Device, Outcome
from edgead.runtime.update_rules import judge_watch
from edgead.runtime.updater import DeviceUpdater

LIMITS = FetchLimits(gap_s=0.5)
"""The defaults, but for the real seconds without a byte after which a transfer has stalled."""
_STEPS, _AFTER = 48, 8
"""A power cut comes before one of so many steps of the disk, a fault of the server in one of so many answers."""
_YEAR = 365.25 * 86400


@dataclass(frozen=True)
class Shares:
    """Share of all polls in which something goes wrong, by what it is.

    Attributes:
        cut: the connection ends in the middle of an answer.
        unavailable: 503 with `Retry-After`, of 2 s or of 600 s.
        truncated: half of a file, with a length that fits it.
        flipped: one bit of a file.
        stalled: half of an answer, then nothing.
        power: the power goes before a step of the disk; nothing happens if the poll has fewer steps.
        clock: the device's clock says 1970 or 2044.
        wiped: the cache of signed metadata is gone.
    """

    cut: float = 0.02
    unavailable: float = 0.02
    truncated: float = 0.005
    flipped: float = 0.005
    stalled: float = 0.0005
    power: float = 0.05
    clock: float = 0.005
    wiped: float = 0.01

    def draw(self, rng: random.Random) -> str:
        """What goes wrong with the next poll; '' for nothing."""
        place = rng.random()
        for item in fields(self):
            place -= getattr(self, item.name)
            if place < 0:
                return item.name
        return ""


@dataclass
class Tests:
    """Results of the tests that a release has to pass on a device.

    Every simulated device has this machine's processor and engine, and the tests depend on nothing else but the files
    of the release. So some devices test for themselves, and the others take the result that the same bytes had.

    Attributes:
        sample: devices that always test for themselves.
        real, remembered: how often which.
    """

    sample: int
    real: int = 0
    remembered: int = 0
    known: dict[str, EdgeadError | None] = field(default_factory=dict)

    def run(self, device: int, digest: str, test: Callable[[], None]) -> None:
        """Test, or raise what the test of the same release raised."""
        if device < self.sample or digest not in self.known:
            self.real += 1
            self.known.setdefault(digest, None)
            try:
                test()
            except EdgeadError as error:
                self.known[digest] = error
                raise
            return
        self.remembered += 1
        known = self.known[digest]
        if known is not None:
            raise known.with_traceback(None)


class Patience(threading.Event):
    """Waits between attempts cost no real time: they are added up, to be had by the virtual clock."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.waited += timeout or 0.0
        return False


class _Updater(DeviceUpdater):
    """The real one, but that it may know the result of a test."""

    number = 0
    tests: Tests

    def self_test(self, candidate: Active) -> None:
        self.tests.run(self.number, candidate.digest, lambda: super(_Updater, self).self_test(candidate))


@dataclass(frozen=True)
class Plant:
    """What all devices share.

    Attributes:
        home: folder for theirs.
        url, root: of the repository.
        board: of the server.
        released: the truth, see `Publisher.released`.
        shares: of faults.
        tests: see there.
        disk: makes a device's disk.
        seed: of all chance.
    """

    home: Path
    url: str
    root: bytes
    board: Board
    released: Mapping[str, Released]
    shares: Shares
    tests: Tests
    pool: Pool
    seed: int
    disk: type[MemoryDisk] = MemoryDisk
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Polled:
    """What a poll came to: an outcome, or None where the power went; the fault that was drawn; seconds of waiting."""

    outcome: Outcome | None
    fault: str
    waited: float

    @property
    def asked(self) -> float | None:
        """Seconds that the server asked to wait."""
        error = None if self.outcome is None else self.outcome.error
        return error.retry_after if isinstance(error, FetchError) else None


class SimulatedDevice:
    """A device.

    Args:
        plant: that it is in.
        number: its own.
        groups: that it belongs to.

    Attributes:
        generation: grows with each start, so that what was planned before is void.
        running: what it inspects with; None before its first release.
    """

    def __init__(self, plant: Plant, number: int, groups: tuple[str, ...]) -> None:
        self.number = number
        self.groups = groups
        self.generation = 0
        self.running: Active | None = None
        self.rng = random.Random(f"{plant.seed} device {number}")
        self._chance = random.Random(f"{plant.seed} chance {number}")
        self._plant = plant
        self._device = Device(f"camera-{number:06d}", plant.url, PRODUCT, plant.root, groups)
        self._now, self._wrong = 0.0, 0.0
        self.folder = plant.home / f"{number:06d}"
        self.disk = plant.disk(self.folder, plant.pool, self._chance)
        self._boot()

    @property
    def failures(self) -> int:
        """Polls in a row that failed since the device started."""
        return self._updater.failures

    @property
    def confirmed(self) -> bool:
        """Whether the active release has proved itself."""
        return self.store.state().confirmed

    def like(self, other: SimulatedDevice) -> None:
        """Take another one's disk and cache of metadata, as devices are imaged in a factory."""
        self.disk.like(other.disk)
        source, target = other.store.metadata, self.store.metadata
        for folder, _, names in os.walk(source):
            place = target / Path(folder).relative_to(source)
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                os.link(Path(folder) / name, place / name, follow_symlinks=False)

    def start(self) -> str:
        """Start with what the store has; see `check`."""
        self.generation += 1
        try:
            self.running = self.store.start()
        except EdgeadError:
            self.running = None
        return self.check()

    def poll(self, now: float, *, faults: bool = True) -> Polled:
        """Look once for a release, with or without something that goes wrong."""
        plant, fault = self._plant, self._plant.shares.draw(self._chance) if faults else ""
        before: dict[Path, int] = {}
        self._now, self._wrong = now, 0.0
        if fault in FAULTS:
            plant.board.plan(fault, self._chance.randrange(_AFTER), self._chance.choice((2, 600)))
        elif fault == "power":
            self.disk.cut_at = self.disk.steps + self._chance.randrange(1, _STEPS)
            before = _inodes(self.store.metadata)
        elif fault == "clock":
            self._wrong = self._chance.choice((-BEGIN.timestamp() - now, 14 * _YEAR))
        elif fault == "wiped":
            shutil.rmtree(self.store.metadata)
        plant.patience.waited = 0.0
        try:
            outcome = self._updater.poll()
        except PowerCutError:
            self._tear(before)
            self.disk.restart()
            self._boot()
            return Polled(None, fault, plant.patience.waited)
        finally:
            plant.board["fault"] = 0
            self.disk.cut_at = 0
        return Polled(outcome, fault, plant.patience.waited)

    def power_cut(self) -> None:
        """The power goes and comes back, between two polls."""
        self.disk.restart()
        self._boot()

    def confirm(self, window: float) -> None:
        """The window is over; a frame a second was inspected, by an inspector that is not simulated."""
        if judge_watch(round(window) or 1, 0, window, window, 0.1) == "confirm":
            self._updater.confirm()

    def check(self) -> str:
        """Whether engine, pack and threshold that it runs are those of one sound release.

        Bytes are read from below the device's own code, and compared with what the publisher made.

        Returns:
            what is wrong; '' if nothing is.
        """
        active = self.running
        if active is None:
            return "no release at all"
        truth = self._plant.released.get(active.digest)
        if truth is None:
            return "a release that nobody made"
        pack = self.disk.content(self.folder / "packs" / f"{truth.pack}.safetensors")
        record = self.disk.content(self.folder / "releases" / f"{active.digest}.json")
        given = active.packs[PRODUCT]
        parts = {
            "record": record is not None and digest_of(record) == active.digest,
            "engine": hashlib.sha256(active.engine.read_bytes()).hexdigest() == truth.engine,
            "pack": pack is not None and digest_of(pack) == truth.pack and given.digest == truth.pack,
            "threshold": given.calibration.threshold == truth.threshold,
        }
        wrong = [name for name, good in parts.items() if not good]
        if wrong:
            return f"mixed: {', '.join(wrong)} of another release"
        return "" if truth.sound else f"broken: release {truth.counter}"

    def _boot(self) -> None:
        plant = self._plant
        self.generation += 1
        self.store = Store(self.folder, disk=self.disk)
        self._updater = _Updater(
            self.store,
            self._device,
            limits=LIMITS,
            target="onnx",
            threads=1,
            clock=lambda: BEGIN.timestamp() + self._now + self._wrong,
            disk=self.disk,
            stop=plant.patience,
            rng=self.rng,
        )
        self._updater.number, self._updater.tests = self.number, plant.tests

    def _tear(self, before: dict[Path, int]) -> None:
        """The cache of metadata is never synced: chance leaves all, half or nothing of what is new in it."""
        for path, inode in _inodes(self.store.metadata).items():
            if before.get(path) != inode and not path.is_symlink():
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(self._chance.choice((data, data[: len(data) // 2], b"")))


def _inodes(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_ino for path in folder.rglob("*") if not path.is_dir()}


__all__ = ["Plant", "Polled", "Shares", "SimulatedDevice", "Tests"]
