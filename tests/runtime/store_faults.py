"""Releases small enough to enumerate every fault of a store, and disks that fail, stop or forget at a given step.

Also run as a program, by tests that need processes of their own: `python store_faults.py TASK FOLDER ...`.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from edgead.runtime.bundle import golden_files, write_bundle
from edgead.runtime.deltas import make_delta
from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import EdgeadError, OutOfMemoryError, StorageError
from edgead.runtime.knowledge import Pack, encode_pack, new_pack
from edgead.runtime.release import Release, digest_of, encode_release
from edgead.runtime.slots import Active, Store
from edgead.runtime.spec import (
    CONTRACT,
    Calibration,
    DetectorSpec,
    EngineRecord,
    KnowledgePort,
    Port,
    Preprocessing,
    fingerprint_of,
)

SIDE = 8


def detector(weights: bytes = b"\0" * 32) -> DetectorSpec:
    preprocessing = Preprocessing(SIDE, SIDE)
    features = (Port("patches", "float32", ("B", 4, 3)),)
    return DetectorSpec(
        contract=CONTRACT,
        method="none",
        preprocessing=preprocessing,
        features=features,
        knowledge=(KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),),
        outputs=(Port("score", "float32", ("B",)),),
        fingerprint=fingerprint_of(weights=weights, preprocessing=preprocessing, features=features),
    )


def pack(product: str, version: int, spec: DetectorSpec | None = None, rows: int = 4) -> Pack:
    """A bank whose rows and threshold both tell the version."""
    numbers = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + 1000 * version
    return new_pack(
        product=product,
        fingerprint=(spec or detector()).fingerprint,
        calibration=Calibration(threshold=float(version)),
        arrays={"bank.normal": numbers, "bank.normal.ids": np.arange(1, rows + 1, dtype=np.uint64) + 10**6 * version},
    )


@cache
def engine(version: int, weights: bytes = b"\0" * 32) -> bytes:
    """A sound bundle in one file. Its graphs are no graphs: a store never runs them."""
    golden, pictures = golden_files(np.zeros((1, SIDE, SIDE, 3), np.uint8), [0.0], [False])
    spec = detector(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.edgead"
        write_bundle(
            path,
            name=f"engine-{version}",
            detector=spec,
            engines=[EngineRecord("onnx-fp32", "onnx", "fp32", "e/trunk.onnx", "e/head.onnx", "a test")],
            packs={"bolt": pack("bolt", 1, spec)},
            golden=golden,
            files={"e/trunk.onnx": b"trunk %d" % version, "e/head.onnx": b"head", **pictures},
        )
        return path.read_bytes()


@dataclass(frozen=True)
class Parts:
    """A release and all that it names."""

    version: int
    engine: bytes
    packs: Mapping[str, bytes]
    record: bytes

    @property
    def digest(self) -> str:
        return digest_of(self.record)

    @property
    def engine_digest(self) -> str:
        return digest_of(self.engine)

    def pack_digest(self, product: str) -> str:
        return digest_of(self.packs[product])


@cache
def release(version: int, *, engine_version: int | None = None, pack_version: int | None = None) -> Parts:
    """Release number `version`, which is its counter too."""
    body = engine(version if engine_version is None else engine_version)
    knowledge = version if pack_version is None else pack_version
    packs = {product: encode_pack(pack(product, knowledge)) for product in ("bolt", "nut")}
    record = Release(
        schema=1,
        name=f"release-{version}",
        counter=version,
        fingerprint=detector().fingerprint,
        engine=digest_of(body),
        product_packs={product: digest_of(data) for product, data in packs.items()},
        sizes={digest_of(data): len(data) for data in (body, *packs.values())},
        scores={"bolt": {"golden/000.png": float(version)}},
        tolerance=0.5,
        made_at=1_800_000_000 + version,
    )
    return Parts(knowledge, body, packs, encode_release(record))


OLD, NEW, LATER = release(1), release(2), release(9, engine_version=2, pack_version=2)


def delta(product: str = "bolt", base: int = 1, result: int = 2) -> bytes:
    return make_delta(pack(product, base), pack(product, result))


def stage(store: Store, parts: Parts) -> str:
    """All of a release, as whole files."""
    store.put_engine([parts.engine[:100], parts.engine[100:]], parts.engine_digest, len(parts.engine))
    for data in parts.packs.values():
        store.put_pack(data)
    return store.stage(parts.record)


def install(store: Store, parts: Parts, *, confirmed: bool = True) -> Active:
    with store.updating():
        stage(store, parts)
        active = store.activate()
    if confirmed:
        store.confirm(active.digest)
    return active


def update(store: Store, phases: list[str] | None = None) -> None:
    """What an updater does: from the old release to the new one and, as a trial, back again."""
    note = (phases if phases is not None else []).append
    with store.updating():
        note("put")
        store.put_engine([NEW.engine[:64], NEW.engine[64:]], NEW.engine_digest, len(NEW.engine))
        store.apply_delta(delta("bolt"))
        store.put_pack(NEW.packs["nut"])
        note("stage")
        store.stage(NEW.record)
        store.see(1_800_000_500)
        note("activate")
        store.activate()
    note("confirm")
    store.confirm(NEW.digest)
    note("garbage")
    store.garbage()
    note("rollback")
    store.rollback("a trial")
    note("end")


class StepDisk(RealDisk):
    """Calls `step` before each step that changes something; a write has two, before and in the middle."""

    def __init__(self, *, syncs: bool = True) -> None:
        self.steps = 0
        self._syncs = syncs

    def step(self, what: str, path: Path) -> None:
        self.steps += 1

    def make_folder(self, folder: Path) -> None:
        self.step("make_folder", folder)
        super().make_folder(folder)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        self.step("write", path)
        data = b"".join(chunks)
        super().write(path, [data[: len(data) // 2]])
        self.step("write on", path)
        super().write(path, [data])

    def sync(self, path: Path) -> None:
        self.step("sync", path)
        if self._syncs:
            super().sync(path)

    def replace(self, source: Path, target: Path) -> None:
        self.step("replace", target)
        super().replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.step("sync_folder", folder)
        if self._syncs:
            super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self.step("remove", path)
        super().remove(path)


class QuickDisk(StepDisk):
    """A disk without syncs, for looking at what a fault left: nothing cuts its power."""

    def __init__(self) -> None:
        super().__init__(syncs=False)


class KillingDisk(StepDisk):
    """Ends its process by SIGKILL at the n-th step, counted from 1."""

    def __init__(self, at: int) -> None:
        super().__init__(syncs=False)  # a killed process loses nothing that it wrote
        self._at = at

    def step(self, what: str, path: Path) -> None:
        super().step(what, path)
        if self.steps == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


class FailingDisk(StepDisk):
    """Refuses the n-th step, counted from 1, or from that one on all of them, with an error of the system."""

    def __init__(self, at: int, code: int, *, lasting: bool = False) -> None:
        super().__init__(syncs=False)
        self.at = at
        self.code = code
        self.lasting = lasting
        self.failed: str = ""

    def step(self, what: str, path: Path) -> None:
        super().step(what, path)
        # A full disk still removes; nothing else does on a read-only or broken one.
        if what == "remove" and self.code == errno.ENOSPC:
            return
        if self.steps == self.at or (self.lasting and self.steps > self.at):
            self.failed = self.failed or what
            raise OSError(self.code, os.strerror(self.code), str(path))

    def try_lock(self, path: Path) -> int | None:
        if self.lasting and self.code == errno.EROFS and self.steps >= self.at:
            raise OSError(self.code, os.strerror(self.code), str(path))
        return super().try_lock(path)


class RecordingDisk(StepDisk):
    """Keeps every step with what it wrote, for `crash_images`. May leave out syncs, as a careless program would."""

    def __init__(self, *, forget: str = "") -> None:
        super().__init__(syncs=False)
        self.log: list[tuple[str, Path, bytes | Path]] = []
        self._forget = forget

    def step(self, what: str, path: Path) -> None:
        super().step(what, path)
        if what != "write on" and what != self._forget:
            self.log.append((what, path, b""))

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        data = b"".join(chunks)
        super().write(path, [data])
        self.log[-1] = ("write", path, data)

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.log[-1] = ("replace", target, source)


@dataclass
class _Inode:
    durable: bytes | None
    written: bytes
    """What a reader saw before the power went."""


@dataclass
class _Model:
    """A file system with caches: which names and which contents the platter has, and what is still on its way."""

    names: dict[Path, _Inode | None]
    """As a reader sees it; None is a folder."""
    platter: dict[Path, _Inode | None]
    pending: list[tuple[str, Path, Path | None, _Inode | None]] = field(default_factory=list)

    def apply(self, what: str, path: Path, about: bytes | Path) -> None:
        if what == "make_folder":
            missing = [folder for folder in (path, *path.parents) if folder not in self.names]
            for folder in reversed(missing):
                self.names[folder] = None
                self.pending.append(("link", folder, None, None))
        elif what == "write":
            assert isinstance(about, bytes)
            node = self.names.get(path)
            if node is None:
                node = self.names[path] = _Inode(None, about)
                self.pending.append(("link", path, None, node))
            node.written = about
        elif what == "sync":
            node = self.names[path]
            assert node is not None
            node.durable = node.written
        elif what == "replace":
            assert isinstance(about, Path)
            node = self.names.pop(about)
            self.names[path] = node
            self.pending.append(("rename", path, about, node))
        elif what == "remove":
            if path in self.names:
                self.names.pop(path)
                self.pending.append(("unlink", path, None, None))
        elif what == "sync_folder":
            for step in [step for step in self.pending if step[1].parent == path]:
                _take(self.platter, step)
                self.pending.remove(step)

    def images(self) -> Iterator[dict[Path, bytes | None]]:
        """Every content of the platter that a power cut could leave now: each name on its way arrived or did not, and
        contents on their way are absent, torn, zeros, or arrived."""
        for chosen in _choices(len(self.pending)):
            platter = dict(self.platter)
            for step in itertools.compress(self.pending, chosen):
                _take(platter, step)
            for fate in ("lost", "torn", "zeros", "whole"):
                image: dict[Path, bytes | None] = {}
                for path, node in platter.items():
                    image[path] = None if node is None else _content(node, fate)
                yield {
                    path: data
                    for path, data in image.items()
                    if all(image.get(folder, 0) is None for folder in path.parents if folder in self.names)
                }


def _choices(pending: int) -> Iterable[tuple[bool, ...]]:
    """Which names arrived: every combination of up to six; of more, none, all, one, or all but one."""
    if pending <= 6:
        return itertools.product((False, True), repeat=pending)
    ones = [tuple(place == one for place in range(pending)) for one in range(pending)]
    return [(False,) * pending, (True,) * pending, *ones, *(tuple(not chosen for chosen in one) for one in ones)]


def _take(platter: dict[Path, _Inode | None], step: tuple[str, Path, Path | None, _Inode | None]) -> None:
    what, path, source, node = step
    if what == "unlink":
        platter.pop(path, None)
        return
    if source is not None:
        platter.pop(source, None)
    platter[path] = node


def _content(node: _Inode, fate: str) -> bytes:
    if node.durable == node.written:
        return node.written
    size = len(node.written)
    lost = b"" if node.durable is None else node.durable
    return {"lost": lost, "torn": node.written[: size // 2], "zeros": b"\0" * size, "whole": node.written}[fate]


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All that lies in a folder, itself included."""
    found: dict[Path, bytes | None] = {folder: None}
    for path in sorted(folder.rglob("*")):
        found[path] = path.read_bytes() if path.is_file() else None
    return found


def crash_images(
    before: Mapping[Path, bytes | None], log: list[tuple[str, Path, bytes | Path]]
) -> Iterator[tuple[int, dict[Path, bytes | None]]]:
    """For each number of steps that were done, every different content that a power cut then could leave."""
    names = {path: None if data is None else _Inode(data, data) for path, data in before.items()}
    model = _Model(dict(names), dict(names))
    done = set()
    for steps in range(len(log) + 1):
        if steps:
            model.apply(*log[steps - 1])
        for image in model.images():
            key = (steps, hashlib.sha256(repr(sorted(image.items())).encode()).digest())
            if key not in done:
                done.add(key)
                yield steps, image


def write_image(image: Mapping[Path, bytes | None], source: Path, target: Path) -> None:
    """Lay a crash image of the folder `source` out at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for path, data in sorted(image.items()):
        if path == source or source in path.parents:
            place = target / path.relative_to(source)
            if data is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)


def check_whole(active: Active, allowed: Iterable[Parts]) -> Parts:
    """That an active release is one of these, with its own engine, rows and thresholds: never mixed."""
    found = [parts for parts in allowed if parts.digest == active.digest]
    assert found, f"{active.release.name} is none of those that may be active here"
    parts = found[0]
    assert active.engine.read_bytes() == parts.engine
    assert {product: encode_pack(item) for product, item in active.packs.items()} == dict(parts.packs)
    assert {item.calibration.threshold for item in active.packs.values()} == {float(parts.version)}
    return parts


def leftovers(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.part")]


def recover(folder: Path, allowed: Iterable[Parts], *, retry: bool = True) -> Parts:
    """Start the device on what a fault left: one of these, nothing half-written, and it can still be updated.

    Args:
        folder: of the store.
        allowed: what may be active.
        retry: whether the update that the fault met is tried again before a later one comes.
    """
    store = Store(folder, disk=QuickDisk())
    active = store.start()
    assert not leftovers(folder)
    parts = check_whole(active, allowed)
    state = store.state()
    if retry and parts is OLD and NEW.digest not in state.quarantined and state.active != NEW.digest:
        check_whole(install(store, NEW), [NEW])
    check_whole(install(store, LATER), [LATER])
    store.garbage()
    assert check_whole(Store(folder, disk=QuickDisk()).start(), [LATER])
    return parts


def _task_kill(home: Path) -> None:
    """For n = 1, 2, ...: a copy of the store in which a child was killed at the n-th step of an update."""
    for at in itertools.count(1):
        case = home / f"{at:04d}"
        shutil.copytree(home / "base", case)
        child = os.fork()
        if child == 0:
            try:
                update(Store(case, disk=KillingDisk(at)))
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(os.waitstatus_to_exitcode(status), at)
            return


def _task_update(folder: Path, version: str, hold: str, timeout: str) -> None:
    """Update in a process of its own; says when it holds the lock and when it is done."""
    store = Store(folder, lock_timeout_s=float(timeout))
    try:
        with store.updating():
            print("holds", time.monotonic(), flush=True)
            time.sleep(float(hold))
            active = install(store, release(int(version)))
            print("done", time.monotonic(), active.release.name, flush=True)
    except EdgeadError as error:
        print(type(error).__name__, error, flush=True)


def _task_memory(folder: Path) -> None:
    """Apply a delta with ever more bytes of address space beyond those that are used, until it succeeds."""
    data = (folder.parent / "large.delta").read_bytes()
    store = Store(folder)
    for room in itertools.chain(range(0, 2**23, 2**20), itertools.count(2**23, 2**22)):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with open("/proc/self/statm") as stream:
                used = int(stream.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
            try:
                store.apply_delta(data)
                os._exit(0)
            except OutOfMemoryError:
                os._exit(3)
            except BaseException:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, len(leftovers(folder)))
        if not code:
            return


def _task_file_limit(folder: Path, limit: str) -> None:
    """Update while no file may grow over a limit: the system refuses for real."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        update(Store(folder))
    except StorageError as error:
        print("StorageError", error)


def _task_mount(home: Path) -> None:
    """Update on file systems of ever more pages, until there are enough; then on a read-only one."""
    place = home / "mounted"
    place.mkdir()
    for pages in itertools.count(11):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "none", place], check=True)
        try:
            shutil.copytree(home / "base", place / "store")
            store = Store(place / "store", reserve_bytes=0)
            said = ""
            try:
                update(store)
            except StorageError as error:
                said = str(error)
            assert not leftovers(place)
            check_whole(Store(place / "store").start(), [OLD, NEW])
            if said:
                print("refused:", said)
                subprocess.run(["mount", "-o", "remount,size=9m", place], check=True)
                recover(place / "store", [OLD, NEW])
                continue
            install(store, LATER, confirmed=False)
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            active = Store(place / "store").start()
            check_whole(active, [LATER])
            print("read-only:", *active.faults)
            try:
                store.rollback("a trial")
            except StorageError as error:
                print("kept:", error)
            check_whole(store.active(), [LATER])
            return
        finally:
            subprocess.run(["umount", place], check=True)


if __name__ == "__main__":
    task, place, *words = sys.argv[1:]
    {
        "kill": _task_kill,
        "update": _task_update,
        "memory": _task_memory,
        "file-limit": _task_file_limit,
        "mount": _task_mount,
    }[task](Path(place), *words)
