"""What no device needs any more goes: out of the signed metadata first, from the disk once nobody can be fetching it.

Kept are, of each product, the last releases and those that the roll-out names, with their engines and packs, the packs
that these engines came with, what was published and never released, and the deltas between these. A device that wants
a delta that is gone fetches the whole pack.

A file that the metadata in force does not name is removed when it has been so for the time of grace: a device that
read older metadata may still fetch it. Since when is kept in `pruned.json`, so a file is removed by a later run than
the one that found it. Old versions of metadata go the same way; roots never do, because a device that was away for
years follows them one by one. A run that breaks off anywhere leaves a good repository, and the next one goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgead.runtime.disk import PART, Disk, RealDisk, put_file
from edgead.runtime.errors import BundleError, InputError, storage_errors
from edgead.runtime.spec import canonical_json
from edgead.server_side.ota.publish import engines_of, releases_of
from edgead.server_side.ota.repository import Repository
from edgead.server_side.ota.rollouts import rollout_of

WAITING = "pruned.json"
_DAY = 86400
_VERSIONED = re.compile(r"([0-9]+)\.(.+)\.json")
_DIGESTS = re.compile(rb"[0-9a-f]{64}")


@dataclass
class Swept:
    """What a run found on the disk.

    Attributes:
        removed: (path below the repository, bytes) of files that are gone, or would be.
        waiting: (path, bytes, days that it still stays).
    """

    removed: list[tuple[str, int]] = field(default_factory=list)
    waiting: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def freed(self) -> int:
        """Bytes."""
        return sum(size for _, size in self.removed)


def drop_old(repository: Repository, keep: int) -> list[str]:
    """Take what no device needs out of the metadata; `Repository.commit` then signs.

    Args:
        repository: which.
        keep: how many releases of each product stay, at least 1.

    Returns:
        target paths that were dropped.

    Raises:
        InputError: `keep` is less than 1, or something was tampered with.
    """
    if keep < 1:
        raise InputError(wanted="at least one release to keep", got=str(keep), next_step="Give a larger number.")
    released = _ever_released(repository)
    bundles = engines_of(repository)
    needed: set[str] = set()
    dropped: list[str] = []
    for product in repository.settings.products:
        releases, record = releases_of(repository, product), rollout_of(repository, product)
        named = {record.release, record.previous} if record else set()
        kept = [release for release in releases if release in releases[-keep:] or release.counter in named]
        for release in kept:
            needed |= {release.engine, *release.product_packs.values()}
        dropped += [f"releases/{product}/{release.counter}.json" for release in releases if release not in kept]
    stays = {digest for digest in bundles if digest in needed or digest not in released}
    dropped += [path for path in repository.entries("engines") if _digest(path) not in stays]
    for product in repository.settings.products:
        for digest in stays:
            if product in bundles[digest].products:
                try:
                    needed.add(bundles[digest].pack(product).digest)
                except BundleError as error:
                    raise InputError(
                        wanted=f"the pack of {product} in a published bundle", got=str(error), next_step="Restore it."
                    ) from error
        for path in repository.entries("knowledge", product):
            # A pack, a delta's base and result, or what lies beside a pack.
            digests = _DIGESTS.findall(path.rpartition("/")[2].encode())
            if any(digest.decode() in released and digest.decode() not in needed for digest in digests):
                dropped.append(path)
    for path in dropped:
        repository.drop(path)
    return dropped


def sweep(repository: Repository, grace_s: float, *, dry_run: bool = False, disk: Disk | None = None) -> Swept:
    """Remove files that nothing in the repository has named for some time.

    Args:
        repository: as it lies on the disk, or with what is to be dropped for a dry run.
        grace_s: seconds.
        dry_run: say what would go, and change nothing.
        disk: the file system.

    Raises:
        InputError: something was tampered with.
        StorageError: the disk refused; run it again.
    """
    disk, folder = disk or RealDisk(), repository.folder
    now = repository.clock().timestamp()
    since, found, sizes = _since(folder), {}, {}
    for path in _unnamed(repository):
        name = path.relative_to(folder).as_posix()
        # A clock that was wrong once must not keep a file forever.
        found[name] = min(since.get(name, now), now)
        with storage_errors(path, "to see how large a file is"):
            sizes[name] = disk.size(path)
    swept = Swept()
    for name, seen in found.items():
        left = grace_s - (now - seen)
        if left <= 0:
            swept.removed.append((name, sizes[name]))
        else:
            swept.waiting.append((name, sizes[name], round(left / _DAY, 2)))
    if dry_run:
        return swept
    put_file(disk, folder / WAITING, (canonical_json(found),))
    for name, _ in swept.removed:
        with storage_errors(folder / name, "to remove what nothing names"):
            disk.remove(folder / name)
    put_file(disk, folder / WAITING, (canonical_json({name: found[name] for name, _, _ in swept.waiting}),))
    return swept


def _unnamed(repository: Repository) -> Iterator[Path]:
    """Files of targets and metadata that the metadata in force does not name; never a root."""
    folder, roles = repository.folder, ["targets", *repository.layout.delegated()]
    named = {
        repository.file(path, entry) for role in roles for path, entry in repository.role(role).signed.targets.items()
    }
    for path in sorted((folder / "targets").rglob("*")):
        if path.is_file() and not path.is_symlink() and path not in named:
            yield path
    versions = {name.removesuffix(".json"): entry.version for name, entry in repository.snapshot.signed.meta.items()}
    versions["snapshot"] = repository.snapshot.signed.version
    for path in sorted((folder / "metadata").iterdir()):
        match = _VERSIONED.fullmatch(path.name)
        # A newer one than is in force was left by a publisher who was killed before anything named it.
        if match is None or match[2] == "root" or path.name.endswith(PART) or match[2] not in versions:
            continue
        if int(match[1]) != versions[match[2]]:
            yield path


def _since(folder: Path) -> dict[str, float]:
    """Since when files are named by nothing, as far as runs before this one saw it."""
    path = folder / WAITING
    if not path.is_file():
        return {}
    with storage_errors(path, "to read since when files wait"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=dict[str, float])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}  # they wait anew


def _ever_released(repository: Repository) -> set[str]:
    """Digests of engines and packs that any release named whose record still lies on the disk."""
    found: set[str] = set()
    for path in (repository.folder / "targets" / "releases").rglob("*.json"):
        with storage_errors(path, "to read an old release"):
            # Not verified: at worst somebody who writes there makes devices fetch a whole pack.
            found.update(digest.decode() for digest in _DIGESTS.findall(path.read_bytes()))
    return found


def _digest(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


__all__ = ["WAITING", "Swept", "drop_old", "sweep"]
