"""The state of a store on disk: two copies written in turn, its lock, and the way back when copies are lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from edgead.runtime.disk import PART, Disk, locked, put_file
from edgead.runtime.errors import ReleaseError, StoreDamagedError, storage_errors
from edgead.runtime.release import RELEASE_BYTES, decode_release
from edgead.runtime.slots_files import ENGINES, PACKS, RELEASES, StoreFiles
from edgead.runtime.slots_state import (
    STATE_BYTES,
    Found,
    State,
    decode_state,
    encode_state,
    lifted,
    newest_of,
    recovered,
)

COPIES = ("state.a", "state.b")
"""The copy of an even and of an odd sequence number."""
MARKS = "good"
"""Folder of empty files named by the releases that this device confirmed and has not quarantined since."""

FOLDERS = (PACKS, ENGINES, RELEASES, MARKS, "downloads", "frames", "metadata", "spool")
"""Of a store; the last four belong to those who fetch, replay and report."""


class StatePointer:
    """Reads the state without a lock; changes it under one, which is held for moments.

    Args:
        folder: of the store.
        disk: takes the steps.
        files: the releases that are there.
        lock_timeout_s: how long to wait for another process.
    """

    def __init__(self, folder: Path, disk: Disk, files: StoreFiles, lock_timeout_s: float) -> None:
        self.folder = folder
        self._disk = disk
        self._files = files
        self._timeout = lock_timeout_s

    def read(self) -> State:
        """The state that holds; that of a new store if nothing ever happened here.

        Where a copy is lost, the counter is at least that of every release record on disk. Where both are, the state
        is made from the releases on disk.
        """
        copies, lost = self.copies()
        state = newest_of(copies)
        if state is not None and not lost:
            return state
        if state is not None:
            return lifted(state, [Found(digest, counter) for digest, counter in self._counters()])
        return recovered(self._found()) or State(alarm="the state was lost, and no release is here" if lost else "")

    def copies(self) -> tuple[list[State], bool]:
        """The sound copies, and whether one that was written once is lost."""
        found, lost = [], False
        for name in COPIES:
            try:
                found.append(decode_state(self._disk.read(self.folder / name, STATE_BYTES + 1)))
            except FileNotFoundError:
                pass
            except (OSError, StoreDamagedError):
                lost = True
        # The second state is written beside the first one, so from then on there are two.
        return found, lost or (len(found) == 1 and found[0].sequence > 1)

    def prepare(self) -> None:
        """Make the folders of a new store.

        Raises:
            StorageError: the file system refused.
        """
        with storage_errors(self.folder, "to make a store"):
            if set(FOLDERS) - set(self._disk.names(self.folder)):
                for name in FOLDERS:
                    self._disk.make_folder(self.folder / name)
                self._disk.sync_folder(self.folder)
                self._disk.sync_folder(self.folder.parent)

    @contextlib.contextmanager
    def changing(self) -> Iterator[State]:
        """Hold the lock of the state while the block runs. Yields the state.

        Raises:
            StoreBusyError: another process changed it all that time.
            StorageError: the file system refused.
        """
        self.prepare()
        with locked(self._disk, self.folder / "state.lock", self._timeout, "to change the state"):
            state = self.read()
            # Before anything else lies in a store, a first state does. So records without a state mean that it is lost.
            yield self._write(replace(state, sequence=1)) if not state.sequence else state

    def write(self, state: State, changed: State) -> State:
        """Replace `state` by `changed`: one rename. Under the lock only.

        Returns:
            the state as written; nothing is written if nothing changed.

        Raises:
            StorageError: the file system refused; the state is the old one or the new one.
        """
        return state if changed == state else self._write(replace(changed, sequence=state.sequence + 1))

    def mend(self) -> None:
        """Write lost copies anew and remove what an interrupted write left. Under the lock only.

        Raises:
            StorageError: the file system refused.
        """
        for folder in (self.folder, self.folder / MARKS):
            with storage_errors(folder, "to clean up"):
                for name in self._disk.names(folder):
                    if name.endswith(PART):
                        self._disk.remove(folder / name)
        for _ in COPIES:
            if self.copies()[1]:
                state = self.read()
                self._write(replace(state, sequence=state.sequence + 1))

    def mark(self, state: State, digest: str) -> None:
        """Remember beside the state that this device confirmed a release. Under the lock only.

        Raises:
            StorageError: the file system refused.
        """
        marks = self._marks()
        if digest not in marks:
            put_file(self._disk, self.folder / MARKS / digest, [b""])
        for old in marks - state.named:
            self.unmark(old)

    def unmark(self, digest: str) -> None:
        """Forget that. Under the lock only.

        Raises:
            StorageError: the file system refused.
        """
        if digest in self._marks():
            path = self.folder / MARKS / digest
            with storage_errors(path, "to remove a file"):
                self._disk.remove(path)
                self._disk.sync_folder(path.parent)

    def _write(self, state: State) -> State:
        put_file(self._disk, self.folder / COPIES[state.sequence % 2], [encode_state(state)])
        return state

    def _marks(self) -> set[str]:
        with storage_errors(self.folder / MARKS, "to list a folder"):
            return set(self._disk.names(self.folder / MARKS))

    def _counters(self) -> Iterator[tuple[str, int]]:
        for digest in self._files.digests(RELEASES):
            with contextlib.suppress(StoreDamagedError, ReleaseError):
                release = decode_release(self._files.read(RELEASES, digest, RELEASE_BYTES))
                yield digest, release.counter

    def _found(self) -> list[Found]:
        found, marks = [], self._marks()
        for digest, counter in self._counters():
            release = decode_release(self._files.read(RELEASES, digest, RELEASE_BYTES))
            damage = [self._files.damage(PACKS, pack) for pack in release.product_packs.values()]
            whole = not any((*damage, self._files.damage(ENGINES, release.engine)))
            found.append(Found(digest, counter, whole=whole, good=digest in marks))
        return found
