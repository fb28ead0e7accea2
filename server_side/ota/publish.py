"""Engines and packs into the repository, with the deltas that devices need to come from what they have."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edgead.runtime.bundle import Bundle, open_bundle
from edgead.runtime.bundle_manifest import MANIFEST
from edgead.runtime.bundle_store import SUFFIX, write_zip
from edgead.runtime.chain import begins_as_delta, read_delta_file
from edgead.runtime.deltas import apply_delta, make_delta
from edgead.runtime.errors import BundleError, InputError, KnowledgeError, storage_errors
from edgead.runtime.knowledge import Pack, check_fits, decode_pack, encode_pack, read_pack
from edgead.runtime.release import Release, decode_release
from edgead.server_side.ota.repository import Repository

_CHUNK = 2**20
_SHOWN = 12


@dataclass
class Published:
    """What a command put into the repository.

    Attributes:
        files: (target path, bytes), without what was there already.
        skipped: deltas that were not made, with the reason.
        dropped: target paths that devices are no longer given.
    """

    files: list[tuple[str, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def engine_path(digest: str) -> str:
    """Target path of a bundle by the SHA-256 of its file."""
    return f"engines/{digest}{SUFFIX}"


def pack_path(product: str, digest: str) -> str:
    """Target path of a pack."""
    return f"knowledge/{product}/{digest}.safetensors"


def delta_path(product: str, base: str, result: str) -> str:
    """Target path of a delta, by the digests of the packs that it leads from and to."""
    return f"knowledge/{product}/{base}-{result}.delta"


def releases_of(repository: Repository, product: str) -> list[Release]:
    """Releases of a product that devices can be given, oldest first."""
    paths = repository.entries("releases", product)
    return sorted((decode_release(repository.read(path)) for path in paths), key=lambda release: release.counter)


def packs_of(repository: Repository, product: str) -> list[str]:
    """Digests of a product's packs."""
    paths = repository.entries("knowledge", product)
    names = (path.rpartition("/")[2] for path in paths if path.endswith(".safetensors"))
    return sorted(name.removesuffix(".safetensors") for name in names)


def engines_of(repository: Repository) -> dict[str, Bundle]:
    """The published bundles by digest; their contents are checked as they are read."""
    found = {}
    for path, entry in repository.entries("engines").items():
        digest = path.rpartition("/")[2].removesuffix(SUFFIX)
        found[digest] = open_bundle(repository.file(path, entry), verify=False)
    return found


def load_pack(repository: Repository, product: str, digest: str) -> Pack:
    """A published pack.

    Raises:
        InputError: there is none, or its file was changed.
        KnowledgeError: it breaks a rule of the format.
    """
    return decode_pack(repository.read(pack_path(product, digest)))


def publish_bundle(repository: Repository, path: Path) -> Published:
    """Put a bundle, and its initial packs of the repository's products. `Repository.commit` then signs.

    Raises:
        BundleError: damaged, or without any product of the repository.
        StorageError: a file cannot be read.
    """
    bundle = open_bundle(path)
    products = [product for product in bundle.products if product in repository.settings.products]
    if not products:
        raise BundleError(
            wanted=f"a bundle with one of the products {', '.join(repository.settings.products)}",
            got=f"one with {', '.join(bundle.products)}",
            next_step="Add its product: edgead ota add-product FOLDER PRODUCT",
        )
    done = Published()
    stream = _as_file(bundle)
    digest, length = _digest(stream)
    place = engine_path(digest)
    if repository.find(place) is None:
        repository.add_file(place, digest, length, _chunks(stream))
        done.files.append((place, length))
    for product in products:
        pack = bundle.pack(product)
        if repository.find(pack_path(product, pack.digest)) is None:
            data = encode_pack(pack)
            repository.add(pack_path(product, pack.digest), data)
            _count_ids(repository, pack)
            done.files.append((pack_path(product, pack.digest), len(data)))
    return done


def read_knowledge(repository: Repository, path: Path) -> Pack:
    """A pack file, or the pack that a delta file makes of a published one.

    Raises:
        KnowledgeError: damaged, or a delta against a pack that is not published.
        StorageError: the file cannot be read.
    """
    if not begins_as_delta(path):
        return read_pack(path)
    delta = read_delta_file(path)
    if delta.product not in repository.settings.products or delta.base not in packs_of(repository, delta.product):
        raise KnowledgeError(
            wanted=f"a delta against a published pack of {delta.product!r}",
            got=f"one against {delta.base[:_SHOWN]}",
            next_step="Publish that pack first, or publish the result as a whole pack.",
        )
    return apply_delta(load_pack(repository, delta.product, delta.base), delta)


def publish_pack(repository: Repository, pack: Pack, *, calibrated: bool = False) -> Published:
    """Put a pack, and deltas to it from what devices have. `Repository.commit` then signs.

    Args:
        repository: where to.
        pack: the knowledge.
        calibrated: the calibration was made again for this bank, and came out as it was.

    Raises:
        InputError: the repository has no such product.
        KnowledgeError: no published engine can take it, or its bank changed and its calibration did not.
    """
    product, done = pack.product, Published()
    whole = pack_path(product, pack.digest)
    if repository.find(whole) is not None:
        return done
    fitting = _fitting(repository, pack)
    releases = releases_of(repository, product)
    initial = {digest: bundle.pack(product) for digest, bundle in fitting.items() if product in bundle.products}
    if not calibrated:
        _check_calibration(pack, _before(repository, product, releases, list(initial.values())))
    data = encode_pack(pack)
    repository.add(whole, data)
    _count_ids(repository, pack)
    done.files.append((whole, len(data)))
    bases = dict.fromkeys(release.product_packs[product] for release in reversed(releases))
    published = packs_of(repository, product)
    known = {item.digest: item for item in initial.values()}
    for base in (*bases, *(digest for digest in known if digest not in bases)):
        if base == pack.digest or (base not in known and base not in published):
            continue
        try:
            delta = make_delta(known[base] if base in known else load_pack(repository, product, base), pack)
        except KnowledgeError as error:
            done.skipped.append(f"from {base[:_SHOWN]}: {error.got}")
            continue
        if len(delta) >= len(data):
            done.skipped.append(f"from {base[:_SHOWN]}: it would be no smaller than the pack")
            continue
        place = delta_path(product, base, pack.digest)
        repository.add(place, delta)
        done.files.append((place, len(delta)))
    done.dropped = prune(repository, product, pack.digest, releases, set(known))
    return done


def resolve(prefix: str, digests: Sequence[str], what: str) -> str:
    """The one digest that begins with `prefix`.

    Raises:
        InputError: none does, or several do.
    """
    found = [digest for digest in digests if digest.startswith(prefix)]
    if len(found) != 1:
        raise InputError(
            wanted=f"the beginning of the digest of one {what}",
            got=f"{prefix[:64]!r}, which fits {len(found)} of {', '.join(item[:_SHOWN] for item in digests) or 'none'}",
            next_step="Name one of these.",
        )
    return found[0]


def _fitting(repository: Repository, pack: Pack) -> dict[str, Bundle]:
    """Published bundles whose engines can take `pack`."""
    found, reason = {}, "no engine is published"
    for digest, bundle in engines_of(repository).items():
        try:
            check_fits(pack, bundle.manifest.knowing)
            found[digest] = bundle
        except KnowledgeError as error:
            reason = f"{digest[:_SHOWN]} wants {error.wanted} and got {error.got}"
    if not found:
        raise KnowledgeError(
            wanted=f"a published engine that can take the pack {pack.version} of {pack.product!r}",
            got=f"none ({reason})",
            next_step="Publish its bundle first: edgead ota publish FOLDER BUNDLE",
        )
    return found


def _before(repository: Repository, product: str, releases: list[Release], initial: list[Pack]) -> list[Pack]:
    """What the devices have: the latest release's pack, or the packs that they came with."""
    published = packs_of(repository, product)
    for release in reversed(releases):
        if release.product_packs[product] in published:
            return [load_pack(repository, product, release.product_packs[product])]
    return initial


def _check_calibration(pack: Pack, before: list[Pack]) -> None:
    for old in before:
        if old.fingerprint != pack.fingerprint or old.calibration != pack.calibration:
            continue
        for bank in {*old.banks, *pack.banks}:
            mine, its = pack.arrays.get(bank), old.arrays.get(bank)
            if mine is not None and its is not None and mine.dtype == its.dtype and mine.tobytes() == its.tobytes():
                continue
            raise KnowledgeError(
                wanted=f"a calibration of its own for the changed bank {bank!r} of {pack.version}",
                got=f"that of {old.version}",
                next_step="Recalibrate it on the held-out images; --calibrated says that it came out the same.",
            )


def prune(repository: Repository, product: str, new: str, releases: list[Release], initial: set[str]) -> list[str]:
    """Drop what no device needs any more: packs of releases that are gone, and deltas to all but the last two packs.

    Args:
        repository: which.
        product: whose packs.
        new: digest of the pack that was just put.
        releases: that devices can be given, oldest first.
        initial: packs that devices came with.

    Returns:
        paths of what was dropped.
    """
    kept = [release.product_packs[product] for release in releases]
    gone = _released(repository, product) - set(kept) - {new}
    results = {new, *kept[-1:]}
    dropped = []
    for path in repository.entries("knowledge", product):
        name = path.rpartition("/")[2]
        if name.endswith(".delta"):
            base, _, result = name.removesuffix(".delta").partition("-")
            stays = (base in kept or base in initial) and (result in results or result not in {*kept, *gone})
        else:
            stays = name.partition(".")[0] not in gone  # pin and provenance go with their pack
        if not stays:
            repository.drop(path)
            dropped.append(path)
    return dropped


def _count_ids(repository: Repository, pack: Pack) -> None:
    """Remember the row ids that a pack uses, so that none of them is given out again."""
    known = repository.settings.next_ids
    last = max((int(pack.ids(bank)[-1]) for bank in pack.banks if len(pack.ids(bank))), default=0)
    if last >= known.get(pack.product, 1):
        repository.change_settings(next_ids={**known, pack.product: last + 1})


def _released(repository: Repository, product: str) -> set[str]:
    """Packs that any release ever named, as far as its record still lies on the disk."""
    found: set[str] = set()
    folder = repository.folder / "targets" / "releases" / product
    for path in folder.glob("*.json") if folder.is_dir() else ():
        # Not verified: at worst somebody who writes there makes devices fetch a whole pack.
        found.update(re.findall(r"[0-9a-f]{64}", path.read_text("utf-8", errors="replace")))
    return found


def _as_file(bundle: Bundle) -> BinaryIO:
    """The bundle as one file: as it is, or made of a folder; the same content always gives the same bytes."""
    if bundle.path.is_file():
        with storage_errors(bundle.path, "to read a bundle"):
            return bundle.path.open("rb")
    with storage_errors(tempfile.gettempdir(), "to make one file of a bundle"):
        stream: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        manifest = (bundle.path / MANIFEST).read_bytes()
        names = sorted([*bundle.manifest.files, MANIFEST])
        write_zip(stream, ((name, manifest if name == MANIFEST else bundle.read(name)) for name in names))
        stream.flush()
    return stream


def _digest(stream: BinaryIO) -> tuple[str, int]:
    digest, length = hashlib.sha256(), 0
    for chunk in _chunks(stream):
        digest.update(chunk)
        length += len(chunk)
    return digest.hexdigest(), length


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    stream.seek(0)
    while chunk := stream.read(_CHUNK):
        yield chunk
