"""Parts of a release into the store: the cheapest way first, the whole file when that way is barred."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgead.runtime.bundle import open_bundle
from edgead.runtime.bundle_store import SUFFIX
from edgead.runtime.disk import Disk
from edgead.runtime.errors import (
    FetchContentError,
    FetchStatusError,
    KnowledgeError,
    OutOfMemoryError,
    ReleaseError,
    StorageError,
    StoreDamagedError,
    UntrustedError,
    storage_errors,
)
from edgead.runtime.fetch import Fetcher
from edgead.runtime.knowledge import encode_pack
from edgead.runtime.release import Release
from edgead.runtime.slots import Store
from edgead.runtime.slots_files import ENGINES, PACKS
from edgead.runtime.trust import Target, TrustedRepository
from edgead.runtime.update_rules import cheapest

_RESERVE = 2**20
_SMALL = 64 * 2**10
"""Files up to this size are not worth resuming after a restart."""


class Parts:
    """Brings engines and packs of a product into a store.

    Args:
        store: where to.
        repository: refreshed.
        fetcher: gets the files.
        disk: of the store.
        product: whose knowledge.

    Attributes:
        way: how the last pack came: 'here', 'initial' (the bundle's own), '1 delta', '2 deltas', ... or 'whole'.
    """

    def __init__(self, store: Store, repository: TrustedRepository, fetcher: Fetcher, disk: Disk, product: str) -> None:
        self.way = ""
        self._store = store
        self._repository = repository
        self._fetcher = fetcher
        self._disk = disk
        self._product = product

    def bring(self, release: Release) -> None:
        """Have all that a release names. The caller is the only updater.

        Raises:
            FetchError: something cannot be had.
            UntrustedError, StaleError: signatures do not allow it, or another file than the release says is signed.
            ReleaseError: a part that nobody signed.
            EdgeadError: a file that is not what it should be, or a disk that refuses.
        """
        missing = set(self._store.missing(release))
        self._forget(release)
        if f"{ENGINES}/{release.engine}{SUFFIX}" in missing:
            self._bring_engine(release.engine, release.sizes[release.engine])
        pack = release.product_packs[self._product]
        if f"{PACKS}/{pack}.safetensors" in missing:
            self._bring_pack(release, pack)
        else:
            self.way = "here"

    def _bring_engine(self, digest: str, size: int) -> None:
        target = self._signed(f"engines/{digest}{SUFFIX}", digest, size)
        path = self._store.downloads / f"{digest}{SUFFIX}"
        self._save(target, path)
        self._store.take_engine(path, digest)

    def _bring_pack(self, release: Release, digest: str) -> None:
        target = self._signed(f"knowledge/{self._product}/{digest}.safetensors", digest, release.sizes[digest])
        deltas = self._deltas(digest)
        steps = cheapest(self._here(), deltas, digest, target.length)
        if not steps:
            initial = self._initial(release)
            if initial == digest:
                self.way = "initial"
                return
            steps = cheapest(self._here(), deltas, digest, target.length)
        # An error of the line would stop the whole pack as well; any other is of the deltas alone.
        with contextlib.suppress(
            FetchContentError, FetchStatusError, KnowledgeError, StoreDamagedError, OutOfMemoryError, ReleaseError
        ):
            for base, result in steps:
                self._apply(base, result)
            if steps:
                self.way = f"{len(steps)} delta{'s' * (len(steps) > 1)}"
                return
        self.way = "whole"
        path = self._store.downloads / f"{digest}.safetensors"
        if target.length <= _SMALL:
            data = self._fetcher.read(target.url, target.length, sha256=target.sha256)
        else:
            self._save(target, path)
            with storage_errors(path, "to read a download"):
                data = self._disk.read(path, target.length)
        self._store.put_pack(data, digest)
        with storage_errors(path, "to remove a download"):
            self._disk.remove(path)

    def _initial(self, release: Release) -> str | None:
        """The digest of the pack that the engine's bundle brings along; now it is in the store."""
        bundle = open_bundle(self._store.folder / ENGINES / f"{release.engine}{SUFFIX}", verify=False)
        if self._product not in bundle.products:
            return None
        return self._store.put_pack(encode_pack(bundle.pack(self._product)))

    def _apply(self, base: str, result: str) -> None:
        target = self._repository.find(self._delta_path(base, result))
        if target is None:
            raise _unsigned(self._delta_path(base, result))
        made = self._store.apply_delta(self._fetcher.read(target.url, target.length, sha256=target.sha256))
        if made != result:
            raise KnowledgeError(
                wanted=f"a delta to {result[:12]}", got=f"one to {made[:12]}", next_step="Publish it with edgead."
            )

    def _here(self) -> list[str]:
        """Digests of packs that are in the store, sound or not."""
        folder = self._store.folder / PACKS
        with storage_errors(folder, "to list packs"):
            names = self._disk.names(folder)
        return [name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")]

    def _deltas(self, wanted: str) -> dict[tuple[str, str], int]:
        """Bytes of the deltas that are signed, by (base, result)."""
        start = f"knowledge/{self._product}/"
        found = {}
        for path, length in self._repository.listed(f"knowledge.{self._product}").items():
            base, _, result = path.removeprefix(start).removesuffix(".delta").partition("-")
            if path == self._delta_path(base, result):
                found[base, result] = length
        if not found:
            # A repository of many products spreads its targets over hash bins, which list those of others.
            for base in self._here():
                target = self._repository.find(self._delta_path(base, wanted))
                if target is not None:
                    found[base, wanted] = target.length
        return found

    def _delta_path(self, base: str, result: str) -> str:
        return f"knowledge/{self._product}/{base}-{result}.delta"

    def _signed(self, path: str, digest: str, size: int) -> Target:
        target = self._repository.find(path)
        if target is None:
            raise _unsigned(path)
        if (target.sha256, target.length) != (digest, size):
            raise UntrustedError(
                wanted=f"{path} of {size} bytes, as the release says",
                got=f"{target.length} bytes of SHA-256 {target.sha256[:12]}",
                next_step="Publish it with edgead; nothing of it was taken.",
            )
        return target

    def _save(self, target: Target, path: Path) -> None:
        with storage_errors(path, "to ask for free space"):
            free = self._disk.free_space(path.parent)
            if free < target.length + _RESERVE:
                self._store.garbage()
                free = self._disk.free_space(path.parent)
        if free < target.length + _RESERVE:
            raise StorageError(
                wanted=f"{target.length} bytes and a reserve of {_RESERVE} free at {path.parent}",
                got=f"{free}",
                next_step="Free some space on this device; the active release is as it was.",
            )
        self._fetcher.save(target.url, path, self._disk, length=target.length, sha256=target.sha256)

    def _forget(self, release: Release) -> None:
        """Remove what is left of downloads that nobody wants any more."""
        wanted = {release.engine, *release.product_packs.values()}
        folder = self._store.downloads
        with storage_errors(folder, "to tidy downloads"):
            for name in self._disk.names(folder):
                if name.partition(".")[0] not in wanted:
                    self._disk.remove(folder / name)


def _unsigned(path: str) -> ReleaseError:
    return ReleaseError(
        wanted=f"{path}, signed by whoever may",
        got="none in the repository",
        next_step="Publish it with: edgead ota publish",
    )


__all__ = ["Parts"]
