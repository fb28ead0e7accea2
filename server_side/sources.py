"""Where rows come from, noted as they are made: source files by digest, patches by place. Makes provenance records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import storage_errors
from edgead.runtime.knowledge import Pack
from edgead.runtime.provenance import (
    BankSources,
    Places,
    Provenance,
    SourceImage,
    image_name,
    leaf_digests,
    source_digests,
)


@dataclass(frozen=True, eq=False)
class Origins:
    """Where some rows came from.

    Attributes:
        images: source files.
        index: int [n], which of `images` each row came from.
        places: int32 [n, 3], tile, x and y.
    """

    images: Sequence[SourceImage]
    index: NDArray[np.int64]
    places: Places

    def __getitem__(self, rows: NDArray[np.generic]) -> Origins:
        """The origins of some of the rows."""
        return Origins(self.images, self.index[rows], self.places[rows])


def source_image(path: Path) -> SourceImage:
    """A file as a source of rows.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors(path, "to read a source of rows"), path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return SourceImage(digest.hexdigest(), image_name(path.name) or "unnamed")


def patch_places(tiles: int, grid: tuple[int, int]) -> Places:
    """Places of all patches of a frame in the order of its rows: int32 [T * P, 3], tile, x and y.

    Args:
        tiles: how many tiles the frame becomes.
        grid: rows and columns of patches in each.
    """
    tile, y, x = np.indices((tiles, *grid), np.int32).reshape(3, -1)
    return np.stack([tile, x, y], axis=1)


def provenance_of(
    pack: Pack,
    *,
    fingerprint: str,
    made: Mapping[str, tuple[NDArray[np.uint64], Origins]] | None = None,
    before: Iterable[Provenance] = (),
    forgotten: Iterable[str] = (),
    next_id: int = 1,
) -> Provenance:
    """The record of a pack, from what is known of old rows and of new ones.

    A row has the origin that an earlier record gives to the same row with the same id: its leaf is computed anew and
    must be the one in the record. So a record of other rows under the same ids says nothing here.

    Args:
        pack: the knowledge.
        fingerprint: feature space of the rows.
        made: by bank, ids and origins of the new rows.
        before: earlier records, the most trusted first.
        forgotten: digests of images that are not to be named any more.
        next_id: the first row id that was never used, as far as the caller knows.
    """
    made, known = made or {}, [record for record in before if record.fingerprint == fingerprint]
    left_out = set(forgotten)
    images: dict[str, SourceImage] = {}
    for record in known:
        images |= {image.sha256: image for image in record.images if image.sha256 not in images}
    for _, origins in made.values():
        images |= {image.sha256: image for image in origins.images if image.sha256 not in images}
    table = tuple(images[digest] for digest in sorted(images) if digest not in left_out)
    place_of = {image.sha256: place for place, image in enumerate(table)}
    banks: dict[str, BankSources] = {}
    for name in pack.banks:
        ids, rows = pack.ids(name), pack.arrays[name]
        index, places = np.full(len(ids), -1, np.int32), np.full((len(ids), 3), -1, np.int32)
        for record in reversed(known):
            _take_over(record, name, pack, index, places, place_of)
        if name in made:
            new, origins = made[name]
            where = np.searchsorted(ids, new)
            index[where] = [place_of[origins.images[image].sha256] for image in origins.index]
            places[where] = origins.places
        leaves = leaf_digests(rows, ids, _digests(table)[index], places, fingerprint)
        banks[name] = BankSources(ids, index, places, leaves)
    largest = [int(bank.ids[-1]) + 1 for bank in banks.values() if len(bank.ids)]
    first = max([next_id, *largest, *(record.next_id for record in known)])
    return Provenance(pack.product, fingerprint, first, table, banks)


def _take_over(
    record: Provenance,
    name: str,
    pack: Pack,
    index: NDArray[np.int32],
    places: Places,
    place_of: Mapping[str, int],
) -> None:
    """Write what a record knows of the rows of a bank into `index` and `places`."""
    if name not in record.banks:
        return
    bank, ids = record.banks[name], pack.ids(name)
    _, here, there = np.intersect1d(ids, bank.ids, assume_unique=True, return_indices=True)
    sources = source_digests(record)[bank.images[there]]
    leaves = leaf_digests(pack.arrays[name][here], ids[here], sources, bank.places[there], record.fingerprint)
    numbers = np.array([*(place_of.get(image.sha256, -1) for image in record.images), -1], np.int32)
    # A source that is to be forgotten is in no table, and takes the place with it.
    told = (leaves == bank.leaves[there]).all(1) & (numbers[bank.images[there]] >= 0)
    index[here[told]] = numbers[bank.images[there[told]]]
    places[here[told]] = bank.places[there[told]]


def _digests(images: Sequence[SourceImage]) -> NDArray[np.uint8]:
    raw = b"".join([*(bytes.fromhex(image.sha256) for image in images), bytes(32)])
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)
