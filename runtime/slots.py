"""The A/B store of a device: what it inspects with, what it goes back to, and what is about to become active.

    state.a, state.b            two copies of the state (see `edgead.runtime.slots_state`), written in turn
    packs/<sha256>.safetensors  knowledge packs      engines/<sha256>.edgead  bundles in one file
    releases/<sha256>.json      release records      good/<sha256>             empty: the device confirmed that one
    plans/<sha256>/             what this device compiled from that engine; goes with it
    downloads/ frames/ spool/ metadata/              for those who fetch, replay and report; not touched here
    state.lock, update.lock     held for moments by whoever changes the state; for an update by the one updater

Everything but the state is immutable and named by its content. To activate a release is one rename of one small file
that names it, and the release names engine and packs; so a kill or power cut at any step leaves the old release or the
new one, whole, and never parts of both. A copy of the state that is lost costs one step back at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace as with_fields
from pathlib import Path

from edgead.runtime import slots_state
from edgead.runtime.bundle import open_bundle
from edgead.runtime.deltas import apply_delta, read_delta
from edgead.runtime.disk import Disk, UpdateLock
from edgead.runtime.errors import (
    EdgeadError,
    KnowledgeError,
    ReleaseError,
    RollbackError,
    StorageError,
    StoreBusyError,
    storage_errors,
)
from edgead.runtime.knowledge import decode_pack, encode_pack
from edgead.runtime.release import check_whole, decode_release, digest_of
from edgead.runtime.slots_files import ENGINES, PACKS, RELEASES, checked, enough_memory
from edgead.runtime.slots_load import Active, StoreView, files_of, nothing
from edgead.runtime.slots_state import State
from edgead.runtime.spec import DEFAULT_LIMITS, Limits


class Store(StoreView):
    """The store of one device. Methods may be called from any thread and process.

    One process at a time updates (puts, stages, activates, removes): the others wait for `lock_timeout_s`. Reading,
    `start`, `confirm`, `rollback`, `reject` and `see` wait for no update.

    Args:
        folder: of the store; made when something is first written.
        disk: takes the steps on the file system.
        most_starts: how often the device may start with a release that it does not confirm.
        lock_timeout_s: how long to wait for another process.
        reserve_bytes: stay free on the disk whatever is written.
        limits: what is read at most.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        disk: Disk | None = None,
        most_starts: int = 3,
        lock_timeout_s: float = 30.0,
        reserve_bytes: int = 2**20,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(
            folder,
            disk=disk,
            lock_timeout_s=lock_timeout_s,
            reserve_bytes=reserve_bytes,
            limits=limits,
        )
        self._most_starts = most_starts
        self._updater = UpdateLock(self._disk, self.folder / "update.lock", self._pointer.prepare, self._begin)
        self._fresh: set[str] = set()

    def updating(self, timeout_s: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Be the only updater while the block runs; may be nested. What an interrupted one left is cleaned up.

        Args:
            timeout_s: how long to wait for another updater; by default that of the store.

        Raises:
            StoreBusyError: another process or thread updated all that time.
            StorageError: the file system refused.
        """
        return self._updater.held(self._timeout if timeout_s is None else timeout_s)

    def put_pack(self, data: bytes, digest: str | None = None) -> str:
        """Keep a pack.

        Args:
            data: its bytes.
            digest: the SHA-256 that it is to have.

        Returns:
            its SHA-256.

        Raises:
            KnowledgeError: not a sound pack, or another one.
            StoreBusyError: somebody else updates.
            OutOfMemoryError: the pack is too large for this machine.
            StorageError: the file system refused; nothing is left half-written.
        """
        found = digest_of(data)
        if digest is not None and found != digest:
            raise KnowledgeError(
                wanted=f"the pack {digest[:12]}", got=f"{found[:12]}", next_step="Fetch it again, as a whole."
            )
        with enough_memory("to check a pack"):
            decode_pack(data, limits=self._limits)
        with self.updating():
            self._fresh.add(self._files.name(PACKS, found))
            self._files.put(PACKS, found, [data], len(data))
        return found

    def put_engine(self, chunks: Iterable[bytes], digest: str, size: int) -> None:
        """Keep an engine, a bundle in one file.

        Args:
            chunks: its bytes.
            digest: the SHA-256 that it is to have.
            size: its number of bytes.

        Raises:
            BundleError: the bytes are others.
            StoreBusyError: somebody else updates.
            StorageError: the file system refused; nothing is left half-written.
        """
        with self.updating():
            self._fresh.add(self._files.name(ENGINES, digest))
            self._files.put(ENGINES, digest, checked(chunks, digest, size), size)

    def take_engine(self, path: Path, digest: str) -> None:
        """Keep an engine that was downloaded to `downloads`, by renaming it.

        Raises:
            BundleError: the file has another SHA-256; it stays where it is.
            StoreBusyError: somebody else updates.
            StorageError: the file system refused.
        """
        with self.updating():
            with storage_errors(path, "to read an engine"):
                for _ in checked(self._disk.chunks(path), digest, self._disk.size(path)):
                    pass
            self._fresh.add(self._files.name(ENGINES, digest))
            self._files.adopt(ENGINES, digest, path)

    def apply_delta(self, data: bytes) -> str:
        """Make a pack from one that is here. A delta whose result is here already does nothing.

        Args:
            data: the delta's bytes.

        Returns:
            the SHA-256 of the pack that it made.

        Raises:
            StoreDamagedError: its base is not here or damaged; names the pack to fetch as a whole.
            KnowledgeError: the delta is damaged, or its result is another than it promises.
            StoreBusyError: somebody else updates.
            OutOfMemoryError: too large for this machine.
            StorageError: the file system refused; nothing is left half-written.
        """
        with enough_memory("to apply a delta"), self.updating():
            delta = read_delta(data, limits=self._limits)
            if self._files.damage(PACKS, delta.result):
                base = self.read_pack(delta.base)
                result = encode_pack(apply_delta(base, delta, limits=self._limits))
                self._files.put(PACKS, delta.result, [result], len(result))
            self._fresh.add(self._files.name(PACKS, delta.result))
        return delta.result

    def stage(self, record: bytes) -> str:
        """Make a release the candidate, once all of it is here and belongs together.

        Args:
            record: the release's bytes; whoever calls has checked who signed them.

        Returns:
            its SHA-256.

        Raises:
            ReleaseError: malformed, quarantined here, not newer than every one before, or not of one piece.
            KnowledgeError: a pack that the engine cannot take.
            BundleError: an engine that is no sound bundle.
            StoreDamagedError: files that it names are not here; names them.
            StoreBusyError: somebody else updates.
            OutOfMemoryError: too large for this machine.
            StorageError: the file system refused; the state is as it was.
        """
        release, digest = decode_release(record), digest_of(record)
        with self.updating():
            slots_state.staged(self.state(), digest, release)
            loaded = self._load(digest, release)
            check_whole(release, open_bundle(loaded.engine, limits=self._limits).manifest, loaded.packs)
            self._files.put(RELEASES, digest, [record], len(record))
            with self._pointer.changing() as state:
                self._pointer.write(state, slots_state.staged(state, digest, release))
            self._fresh.clear()
        return digest

    def activate(self) -> Active:
        """Make the candidate active, on probation until it is confirmed: one rename of one small file.

        Raises:
            ReleaseError: there is no candidate.
            StoreDamagedError: its files are not sound any more; names what to fetch.
            StoreBusyError: somebody else updates.
            StorageError: the file system refused; the active release is the old one or the new one.
        """
        with self.updating(), self._pointer.changing() as state:
            changed = slots_state.activated(state)
            active = self._load(str(changed.active))
            self._pointer.write(state, changed)
        return active

    def start(self) -> Active:
        """What a starting device inspects with; called once by each process that inspects.

        Counts the start while the active release is on probation. One that was started `most_starts` times and never
        confirmed is quarantined, and the release before it returns. Where the active release is damaged, the one before
        it is used. Neither a full nor a read-only disk keeps the device from starting.

        Returns:
            the release, with all that went wrong in `faults`. Errors of the disk among them say that the start was not
            counted; `StoreDamagedError` what to fetch; `ReleaseError` that a release was rolled back; `RollbackError`
            that it ought to have been and there is none to go back to.

        Raises:
            StoreDamagedError: no release is whole here; names what to fetch for the active one.
            OutOfMemoryError: the active release is too large for this machine, and there is no other.
        """
        faults: list[EdgeadError] = []
        for step in (self._clean, self._count_start):
            try:
                step(faults)
            except StorageError as error:
                faults.append(error)
        state = self.state()
        errors: list[EdgeadError] = []
        for digest in (state.active, state.previous):
            if digest is not None:
                try:
                    return with_fields(self._load(digest), faults=(*faults, *errors))
                except EdgeadError as error:
                    errors.append(error)
        raise errors[0] if errors else nothing("active")

    def confirm(self, digest: str) -> None:
        """The active release has proved itself.

        Args:
            digest: the release that the device ran; see `Active.digest`.

        Raises:
            ReleaseError: another release is active by now.
            StorageError: the file system refused; it can be confirmed again.
        """
        with self._pointer.changing() as state:
            changed = slots_state.confirmed(state, digest)
            if changed is not state:
                self._pointer.mark(state, digest)
                self._pointer.write(state, changed)

    def rollback(self, reason: str) -> Active:
        """Go back to the previous release and quarantine the active one.

        Args:
            reason: for people.

        Raises:
            RollbackError: there is no previous release, or it is not whole. The active one stays; the state's
                alarm says it.
            StorageError: the file system refused.
        """
        with self._pointer.changing() as state:
            return self._roll_back(state, reason)

    def reject(self, reason: str) -> None:
        """Give up the candidate and quarantine it: it failed a test on this device.

        Args:
            reason: for people.

        Raises:
            StorageError: the file system refused.
        """
        with self._pointer.changing() as state:
            self._pointer.write(state, slots_state.rejected(state, reason))

    def see(self, when: int) -> int:
        """Remember the time that signed metadata names; it only goes forward.

        Args:
            when: seconds since 1970 in UTC.

        Returns:
            the latest time ever seen.

        Raises:
            StorageError: the file system refused.
        """
        with self._pointer.changing() as state:
            return self._pointer.write(state, slots_state.seen(state, when)).last_seen

    def remember(self, change: Callable[[State], State]) -> None:
        """Remember whether updates can be taken; flash wears, so nothing is written or locked where nothing changes.

        Args:
            change: such as `slots_state.thawed`.

        Raises:
            StorageError: the file system refused.
        """
        before = self.state()
        if change(before) != before:
            with self._pointer.changing() as state:
                self._pointer.write(state, change(state))

    def garbage(self) -> int:
        """Remove what neither the active, the previous nor the staged release names.

        Returns:
            bytes freed.

        Raises:
            StoreBusyError: somebody else updates.
            StorageError: the file system refused.
        """
        with self.updating():
            return self._make_room()

    def _begin(self) -> None:
        self._files.remove_parts()
        with self._pointer.changing():
            pass

    def _clean(self, faults: list[EdgeadError]) -> None:
        # An updater at work has parts of files that are not to be removed, and removes its own.
        with contextlib.suppress(StoreBusyError), self.updating(0.0):
            pass

    def _count_start(self, faults: list[EdgeadError]) -> None:
        with self._pointer.changing() as state:
            if slots_state.in_crash_loop(state, self._most_starts):
                try:
                    self._roll_back(state, f"{state.starts} starts without a confirmation")
                    faults.append(_crash_loop(state))
                except RollbackError as error:
                    faults.append(error)
            else:
                self._pointer.write(state, slots_state.started(state))
            self._pointer.mend()

    def _roll_back(self, state: State, reason: str) -> Active:
        try:
            changed = slots_state.rolled_back(state, reason)
            active = self._load(str(changed.active))
        except EdgeadError as error:
            self._pointer.write(state, slots_state.alarmed(state, f"no way back ({reason}): {error.got}"))
            if isinstance(error, RollbackError):
                raise
            raise RollbackError(
                wanted=f"a whole release to go back to ({reason})", got=error.got, next_step=error.next_step
            ) from error
        self._pointer.unmark(str(state.active))
        self._pointer.write(state, changed)
        return active

    def _make_room(self) -> int:
        # Either copy of the state may still be the one that holds.
        keep = files_of(self._files, (*self._pointer.copies()[0], self.state()))
        return 0 if keep is None else self._files.remove_but(keep | self._fresh)


def _crash_loop(state: State) -> ReleaseError:
    return ReleaseError(
        wanted=f"release {str(state.active)[:12]} to be confirmed",
        got=f"{state.starts} starts without that",
        next_step="It is quarantined here and the release before it is back; publish a better one.",
    )


__all__ = ["Active", "Store"]
