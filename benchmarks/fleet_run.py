"""Days of a fleet in minutes: a queue of events on a virtual clock, whose polls and publications are the real ones."""

from __future__ import annotations

import gc
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.common import note
from benchmarks.fleet_device import Plant, Shares, SimulatedDevice, Tests
from benchmarks.fleet_disk import MemoryDisk, Pool
from benchmarks.fleet_server import Board, serving
from benchmarks.fleet_world import Publisher, pilot
from edgead.runtime.rollout import breached
from edgead.runtime.update_rules import first_poll, next_poll

HOUR = 3600.0
DAY = 24 * HOUR
PILOT = "pilot"
BAD, GOOD, TENTH, HALF, ALL, DARK, END = (HOUR * hour for hour in (24, 28, 31, 32, 33, 60, 66))
"""When the bad release comes, the good one, its further steps, the power cut of the plant, and the end."""
_LAST_DAY = 9
"""How long those are followed that have the good release not yet at the end; the others' polls are then left out."""
_QUIET_REQUESTS = 2
"""Of a poll since whose forerunner nothing was published: a root that is not there, and the timestamp."""
_DARK_S, _REBOOT_S, _HAND_S = 600.0, 60.0, 300.0
"""Seconds without power of the plant and of one device, and until the publisher's hand follows a report."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        devices, seed: how many; of all chance.
        interval, jitter: of the polls, in seconds and as a share.
        pilot_share, pilot_interval: of the pilot group.
        sample: devices that test releases on the engine themselves.
        installs: devices that install their first release over the network; the others are imaged from one of them.
        shares: of faults.
    """

    devices: int = 10_000
    seed: int = 0
    interval: float = DAY
    jitter: float = 0.2
    pilot_share: float = 0.01
    pilot_interval: float = 2 * HOUR
    sample: int = 20
    installs: int = 20
    shares: Shares = field(default_factory=Shares)


@dataclass
class Flow:
    """Of some polls: how many, their requests, and bytes sent with heads, received with heads, and of bodies."""

    polls: int = 0
    requests: int = 0
    sent: int = 0
    received: int = 0
    bodies: int = 0


@dataclass
class Results:
    """What happened.

    Attributes:
        outcomes: of polls, by status, with the kind of the error where there is one.
        faults, felled: by name: drawn, and polls among them that failed.
        crashes: power cuts that struck in the middle of a poll.
        flows: by kind of poll ('no news', "others' news", 'activated', ...), and by day ('quiet day', ...).
        seconds: requests by virtual second.
        adopted: seconds at which a device first ran the good release.
        checks: looks at what a device runs.
        wrong: device, second and what was wrong, of each look that found something.
        answers: of the server.
        stopped: second at which the publisher stopped the bad release; None if it did not.
        tried_bad: devices that tested the bad release.
        ended: devices by what they ended with.
        steps: what the publisher did, by second.
        tests: real and remembered ones.
        pilots: devices of the pilot group.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    felled: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    flows: dict[str, Flow] = field(default_factory=dict)
    seconds: Counter[int] = field(default_factory=Counter)
    adopted: list[float] = field(default_factory=list)
    checks: int = 0
    wrong: list[tuple[int, float, str]] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    stopped: float | None = None
    tried_bad: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    steps: list[tuple[float, str]] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)
    pilots: int = 0


def simulate(home: Path, settings: Settings, disk: type[MemoryDisk] = MemoryDisk) -> Results:
    """Run the whole story.

    Args:
        home: an empty folder; a file system in memory is best.
        settings: see there.
        disk: makes the devices' disks.
    """
    publisher = Publisher(home)
    board = Board(home / "board")
    with serving(publisher.folder, home / "board") as url:
        tests = Tests(settings.sample)
        pool = Pool(home / "pool")
        plant = Plant(
            home / "devices",
            url,
            publisher.root,
            board,
            publisher.released,
            settings.shares,
            tests,
            pool,
            settings.seed,
            disk,
        )
        return _Run(settings, publisher, plant).results()


class _Run:
    def __init__(self, settings: Settings, publisher: Publisher, plant: Plant) -> None:
        self._settings = settings
        self._publisher = publisher
        self._plant = plant
        self._found = Results()
        self._queue: list[tuple[float, int, int, Callable[[], None], SimulatedDevice | None]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._good: int | None = None
        self._bad: int | None = None
        self._reports = {"failed": 0, "reported": 0}
        self._adopted: set[int] = set()
        self._rejected: set[int] = set()
        self._devices = self._install()
        self._found.pilots = sum(PILOT in device.groups for device in self._devices)

    def results(self) -> Results:
        """Run to the end."""
        for device in self._devices:
            # The fleet was switched on long ago: polls are anywhere in the interval.
            self._plan(device, device.rng.random() * self._interval(device), self._poll)
        for day in range(1, _LAST_DAY):
            self._publish(day * DAY, "timestamp of the day", self._publisher.stamp)
        self._publish(BAD, "a bad release to the pilot group", self._release_bad)
        self._publish(GOOD, "a good release to the pilot group", self._release_good)
        for when, percent in ((TENTH, 10.0), (HALF, 50.0), (ALL, 100.0)):
            self._publish(when, f"to {percent:g} %", partial(self._publisher.widen, percent))
        self._at(DARK, self._dark)
        usual = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        try:
            self._run()
        finally:
            gc.set_threshold(*usual)
            gc.unfreeze()
        found = self._found
        found.answers = self._plant.board.counts()
        found.tests = {"real": self._plant.tests.real, "remembered": self._plant.tests.remembered}
        found.tried_bad = len(self._rejected)
        for device in self._devices:
            self._look(device, device.check())
            counter = None if device.running is None else device.running.release.counter
            sure = "confirmed" if device.confirmed else "on probation"
            found.ended["none" if counter is None else f"release {counter}, {sure}"] += 1
        return found

    def _run(self) -> None:
        hour = 0
        while self._queue and self._queue[0][0] <= _LAST_DAY * DAY:
            self._now, _, generation, action, device = heapq.heappop(self._queue)
            if self._now > END and device is not None and device.number in self._adopted and device.confirmed:
                continue
            if hour * HOUR <= self._now <= END:
                note(f"  hour {hour} of {END / HOUR:g}, {self._plant.board['requests']} requests")
                hour = int(self._now / HOUR) // 6 * 6 + 6
            if device is None or device.generation == generation:
                action()

    def _install(self) -> list[SimulatedDevice]:
        settings = self._settings
        note(f"{settings.devices} devices ...")
        devices: list[SimulatedDevice] = []
        for number in range(settings.devices):
            groups = (PILOT,) if pilot(number, settings.devices, settings.pilot_share) else ()
            device = SimulatedDevice(self._plant, number, groups)
            if number < settings.installs or not devices:
                outcome = device.poll(0.0, faults=False).outcome
                if outcome is None or outcome.status != "activated":
                    raise SystemExit(f"the first release cannot be installed: {outcome}")
                device.start()
                device.confirm(1.0)
            else:
                device.like(devices[0])
            self._look(device, device.start())
            devices.append(device)
        board = self._plant.board
        for name in board.counts():
            board[name] = 0
        return devices

    def _poll(self, device: SimulatedDevice) -> None:
        board, found = self._plant.board, self._found
        before = board.counts()
        polled = device.poll(self._now)
        after = board.counts()
        moved = {name: after[name] - before[name] for name in before}
        found.seconds[int(self._now)] += moved["requests"]
        outcome = polled.outcome
        if polled.fault:
            found.faults[polled.fault] += 1
        if outcome is None:
            found.crashes += 1
            self._count("power cut in the middle", moved)
            self._plan(device, self._now + _REBOOT_S, self._start)
            return
        quiet = outcome.status == "current" and moved["requests"] <= _QUIET_REQUESTS
        self._count(outcome.status if outcome.status != "current" else "no news" if quiet else "others' news", moved)
        if outcome.status == "failed":
            found.felled[polled.fault or "none"] += 1
            found.outcomes[f"failed: {type(outcome.error).__name__}"] += 1
        else:
            found.outcomes[outcome.status + (f", by {outcome.way}" if outcome.way else "")] += 1
        if outcome.status == "activated":
            # The program that inspects starts anew with the release.
            self._start(device, again=False)
        elif outcome.status == "rejected":
            self._rejected.add(device.number)
            self._report(failed=True)
        interval, jitter = self._interval(device), self._settings.jitter
        pause = next_poll(interval, jitter, device.failures, polled.asked, device.rng)
        self._plan(device, self._now + polled.waited + pause, self._poll)

    def _start(self, device: SimulatedDevice, again: bool = True) -> None:
        """A start of the program that inspects; `again`: and of the one that updates."""
        self._look(device, device.start())
        if device.running is not None and not device.confirmed:
            self._plan(device, self._now + self._publisher.rollout().window, self._confirm)
        if again:
            wait = first_poll(self._interval(device), self._settings.jitter, device.rng)
            self._plan(device, self._now + wait, self._poll)

    def _confirm(self, device: SimulatedDevice) -> None:
        device.confirm(float(self._publisher.rollout().window))
        if device.confirmed:
            self._report(failed=False)

    def _look(self, device: SimulatedDevice, wrong: str) -> None:
        found = self._found
        found.checks += 1
        if wrong:
            found.wrong.append((device.number, self._now, wrong))
        running = device.running
        if running is not None and running.release.counter == self._good and device.number not in self._adopted:
            self._adopted.add(device.number)
            found.adopted.append(self._now)

    def _count(self, kind: str, moved: dict[str, int]) -> None:
        day = "quiet day" if self._now < DAY else "day of the update" if self._now < 2 * DAY else "after it"
        for name in (kind, day, "all"):
            flow = self._found.flows.setdefault(name, Flow())
            flow.polls += 1
            flow.requests += moved["requests"]
            flow.sent += moved["sent"]
            flow.received += moved["received"]
            flow.bodies += moved["bodies"]

    def _report(self, *, failed: bool) -> None:
        """A device tells its publisher; in the simulation it always gets through."""
        self._reports["reported"] += 1
        self._reports["failed"] += failed
        if self._found.stopped is not None or self._bad is None or self._good is not None:
            return
        least = max(2, min(5, self._found.pilots // 2))
        if self._reports["reported"] >= least and breached(self._publisher.rollout(), **self._reports):
            self._found.stopped = self._now + _HAND_S
            self._publish(self._found.stopped, "the bad release is stopped", self._publisher.stop)

    def _release_bad(self) -> None:
        self._reports = {"failed": 0, "reported": 0}
        self._bad = self._publisher.release_bad(PILOT)

    def _release_good(self) -> None:
        self._reports = {"failed": 0, "reported": 0}
        self._good = self._publisher.release_good(PILOT)

    def _dark(self) -> None:
        """The power of the whole plant goes, and comes back for all at once."""
        self._found.steps.append((self._now, "power cut of the plant"))
        for device in self._devices:
            device.power_cut()
            self._plan(device, self._now + _DARK_S, self._start)

    def _publish(self, when: float, what: str, action: Callable[[], object]) -> None:
        def act() -> None:
            self._publisher.now = self._now
            self._found.steps.append((self._now, what))
            action()

        self._at(when, act)

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), 0, action, None))

    def _plan(self, device: SimulatedDevice, when: float, action: Callable[[SimulatedDevice], None]) -> None:
        event = (when, next(self._order), device.generation, lambda: action(device), device)
        heapq.heappush(self._queue, event)

    def _interval(self, device: SimulatedDevice) -> float:
        return self._settings.pilot_interval if PILOT in device.groups else self._settings.interval


def peak_by_rules(devices: int, interval: float, jitter: float, seed: int) -> int:
    """Most polls in one second after all devices start at once, by the rules of the loop alone."""
    seconds: Counter[int] = Counter()
    for number in range(devices):
        rng = random.Random(f"{seed} wake {number}")
        due = first_poll(interval, jitter, rng)
        for _ in range(3):
            seconds[int(due)] += 1
            due += next_poll(interval, jitter, 0, None, rng)
    return max(seconds.values())


__all__ = ["DAY", "END", "HOUR", "Flow", "Results", "Settings", "peak_by_rules", "simulate"]
