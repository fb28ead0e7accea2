"""Releases as they lie in a store: loaded whole and checked, or an error that names what to fetch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgead.runtime.disk import Disk, RealDisk
from edgead.runtime.errors import EdgeadError, ReleaseError, StoreDamagedError
from edgead.runtime.knowledge import Pack, decode_pack
from edgead.runtime.release import RELEASE_BYTES, Release, decode_release
from edgead.runtime.slots_files import ENGINES, PACKS, RELEASES, StoreFiles, enough_memory
from edgead.runtime.slots_pointer import StatePointer
from edgead.runtime.slots_state import State
from edgead.runtime.spec import DEFAULT_LIMITS, Limits

_TRIES = 3


@dataclass(frozen=True, eq=False)
class Active:
    """One release, whole and checked: engine, packs and thresholds belong together.

    Attributes:
        digest: SHA-256 of the release's record.
        release: the record.
        engine: the bundle file.
        packs: knowledge by product.
        faults: what went wrong on the way here without stopping the device; see `Store.start`.
    """

    digest: str
    release: Release
    engine: Path
    packs: Mapping[str, Pack]
    faults: tuple[EdgeadError, ...] = ()


class StoreView:
    """The store of one device as those see it who change nothing. Reading takes no lock and waits for nobody.

    Args:
        folder: of the store.
        disk: takes the steps on the file system.
        lock_timeout_s: how long those who change something wait for another process.
        reserve_bytes: stay free on the disk whatever is written.
        limits: what is read at most.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        disk: Disk | None = None,
        lock_timeout_s: float = 30.0,
        reserve_bytes: int = 2**20,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.folder = Path(folder)
        self._disk = RealDisk() if disk is None else disk
        self._timeout = lock_timeout_s
        self._limits = limits
        self._files = StoreFiles(self.folder, self._disk, reserve_bytes, self._make_room)
        self._pointer = StatePointer(self.folder, self._disk, self._files, lock_timeout_s)

    @property
    def downloads(self) -> Path:
        """Where what is being fetched may lie, to be taken with `take_engine`."""
        return self.folder / "downloads"

    @property
    def metadata(self) -> Path:
        """The cache of signed metadata."""
        return self.folder / "metadata"

    @property
    def frames(self) -> Path:
        """The last frames, for a shadow replay."""
        return self.folder / "frames"

    @property
    def spool(self) -> Path:
        """Statuses that were not sent yet."""
        return self.folder / "spool"

    def state(self) -> State:
        """What the device remembers; that of a new store if nothing ever happened here."""
        return self._pointer.read()

    def active(self) -> Active:
        """The active release, every byte of it checked.

        Raises:
            StoreDamagedError: there is none yet, or its files are not sound; names what to fetch.
        """
        return self._named("active")

    def candidate(self) -> Active:
        """The staged release, every byte of it checked: for the tests before it becomes active.

        Raises:
            StoreDamagedError: there is none, or its files are not sound; names what to fetch.
        """
        return self._named("candidate")

    def missing(self, release: Release) -> tuple[str, ...]:
        """What of a release is not here or not sound, by its path in the store: what an updater has to fetch."""
        return tuple(sorted(damage_of(self._files, release)))

    def read_pack(self, digest: str) -> Pack:
        """A pack of the store.

        Raises:
            StoreDamagedError: it is not here or damaged; names what to fetch.
        """
        with enough_memory("to read a pack"):
            return decode_pack(self._files.read(PACKS, digest, self._limits.pack_bytes), limits=self._limits)

    def _named(self, which: str) -> Active:
        for attempt in range(_TRIES):
            state = self.state()
            digest = state.active if which == "active" else state.candidate
            if digest is None:
                raise nothing(which)
            try:
                return self._load(digest)
            except StoreDamagedError:
                # Somebody may have activated another release meanwhile, and removed this one.
                if attempt + 1 == _TRIES or self.state().sequence == state.sequence:
                    raise
        raise AssertionError("the last try returns or raises")

    def _load(self, digest: str, release: Release | None = None) -> Active:
        return load_release(self._files, digest, self._limits, release)

    def _make_room(self) -> int:
        """Free what nobody needs, and say how many bytes that were; who only reads frees nothing."""
        return 0


def read_release(files: StoreFiles, digest: str) -> Release:
    """A release's record.

    Raises:
        StoreDamagedError: missing or damaged; names it.
        ReleaseError: of a newer schema.
    """
    return decode_release(files.read(RELEASES, digest, RELEASE_BYTES))


def load_release(files: StoreFiles, digest: str, limits: Limits, release: Release | None = None) -> Active:
    """A release with every byte of its files checked.

    Args:
        files: of the store.
        digest: SHA-256 of the record.
        limits: what is read at most.
        release: the record, where it does not lie in the store yet.

    Raises:
        StoreDamagedError: files are missing or damaged; names all of them.
        ReleaseError: a record of a newer schema.
        KnowledgeError: a pack of a newer schema.
        OutOfMemoryError: too large for this machine.
    """
    release = read_release(files, digest) if release is None else release
    packs: dict[str, Pack] = {}
    reasons: dict[str, str] = {}
    with enough_memory("to load a release"):
        for product, pack in release.product_packs.items():
            try:
                packs[product] = decode_pack(files.read(PACKS, pack, release.sizes[pack]), limits=limits)
            except StoreDamagedError:
                reasons[files.name(PACKS, pack)] = files.damage(PACKS, pack) or "unreadable for a moment"
    if reason := files.damage(ENGINES, release.engine, release.sizes[release.engine]):
        reasons[files.name(ENGINES, release.engine)] = reason
    if reasons:
        raise files.damaged(reasons)
    return Active(digest, release, files.path(ENGINES, release.engine), packs)


def damage_of(files: StoreFiles, release: Release) -> dict[str, str]:
    """What is wrong with the files of a release, by their paths in the store; empty if nothing is."""
    found = {files.name(kind, part): files.damage(kind, part, release.sizes[part]) for kind, part in _parts(release)}
    return {name: reason for name, reason in found.items() if reason}


def files_of(files: StoreFiles, states: Iterable[State]) -> set[str] | None:
    """The files, by their paths in the store, that any of these states needs.

    Args:
        files: of the store.
        states: name releases.

    Returns:
        None if a release's record cannot be read, so that nobody knows what it names.
    """
    keep: set[str] = set()
    for state in states:
        records = {*state.named, *state.quarantined, *([state.newest] if state.newest else [])}
        keep |= {files.name(RELEASES, digest) for digest in records}
        for digest in state.named:
            try:
                release = read_release(files, digest)
            except (StoreDamagedError, ReleaseError):
                return None
            keep |= {files.name(kind, part) for kind, part in _parts(release)}
    return keep


def _parts(release: Release) -> list[tuple[str, str]]:
    return [(PACKS, pack) for pack in release.product_packs.values()] + [(ENGINES, release.engine)]


def nothing(which: str) -> StoreDamagedError:
    return StoreDamagedError(
        wanted=f"an {which} release" if which == "active" else f"a {which}",
        got="none",
        next_step="Put its packs and its engine, then stage and activate a release.",
    )
