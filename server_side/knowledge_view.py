"""Knowledge to look at: a pack with its provenance and pin, what differs between two, where a row came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgead.runtime.bundle import open_bundle
from edgead.runtime.bundle_store import SUFFIX
from edgead.runtime.chain import begins_as_delta, read_delta_file
from edgead.runtime.deltas import apply_delta, make_delta
from edgead.runtime.device_folder import read_device
from edgead.runtime.device_pins import PINS
from edgead.runtime.errors import InputError, KnowledgeError, storage_errors
from edgead.runtime.evidence import patch_grid
from edgead.runtime.image import list_images, read_image, tile_boxes, to_frame
from edgead.runtime.knowledge import IDS, Pack, encode_pack, is_bank, read_pack
from edgead.runtime.pins import Pin
from edgead.runtime.provenance import Provenance, check_provenance
from edgead.runtime.provenance_file import pin_path, provenance_beside, read_pin, read_provenance
from edgead.runtime.slots import Store
from edgead.runtime.spec import DetectorSpec, Region
from edgead.server_side.knowledge_rows import feature_of
from edgead.server_side.knowledge_tools import rows_named
from edgead.server_side.sources import provenance_of

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pack from a file, and what stands beside it.

    Attributes:
        path: the pack's or the bundle's.
        pack: the knowledge; of a bundle, its initial pack.
        provenance, pin: None where there is none. The provenance has been checked against the pack, the pin has not.
    """

    path: Path
    pack: Pack
    provenance: Provenance | None
    pin: Pin | None

    @property
    def known_rows(self) -> int:
        """Rows whose source the provenance knows."""
        banks = {} if self.provenance is None else self.provenance.banks
        return sum(int((bank.images >= 0).sum()) for bank in banks.values())

    @property
    def rows(self) -> int:
        """Rows of all banks."""
        return sum(len(self.pack.ids(bank)) for bank in self.pack.banks)


def is_bundle(path: Path) -> bool:
    """Whether a path is that of a bundle, by its kind."""
    return (path.is_dir() and not is_device(path)) or path.suffix == SUFFIX


def is_device(path: Path) -> bool:
    """Whether a path is the folder of a device."""
    return (path / "device.json").is_file() or (path / "device.copy.json").is_file()


def load_device(folder: Path, product: str | None = None, record: Path | None = None) -> tuple[Loaded, Path]:
    """What a device inspects with, its pin if it asked for one, and its bundle.

    Args:
        folder: of the device.
        product: whose knowledge; the device's own if None.
        record: the provenance of the pack, which cameras do not fetch; None if it is not at hand.

    Raises:
        InputError: no such product.
        KnowledgeError: the provenance is of another pack.
        StoreDamagedError: the device has no whole release.
        StorageError: a file cannot be read.
    """
    active = Store(folder).active()
    name = product or read_device(folder).product
    if name not in active.packs:
        raise InputError(
            wanted=f"one of the products {', '.join(active.packs)}", got=repr(name), next_step="Name it with --product."
        )
    pack = active.packs[name]
    provenance = None if record is None else read_provenance(record)
    if provenance is not None:
        check_provenance(pack, provenance)
    pin = folder / PINS / f"{pack.digest}.pin"
    return Loaded(folder, pack, provenance, read_pin(pin) if pin.is_file() else None), active.engine


def load(path: Path, product: str | None = None) -> Loaded:
    """A pack, or a bundle's initial one, with its provenance and pin.

    Raises:
        InputError: nothing there, or a delta.
        BundleError, KnowledgeError: damaged, or a provenance that is not that of the pack.
        StorageError: a file cannot be read.
    """
    if not path.exists():
        raise InputError(
            wanted=f"a knowledge pack or bundle at {path}", got="nothing there", next_step="Check the path."
        )
    if is_bundle(path):
        bundle = open_bundle(path, verify=False)
        pack = bundle.pack(product or bundle.manifest.default)
    elif begins_as_delta(path):
        raise InputError(
            wanted=f"a whole pack or a bundle at {path}",
            got="a delta",
            next_step=f"Apply it first: edgead knowledge apply PACK {path} -o NEW.safetensors",
        )
    else:
        pack = read_pack(path)
        if product not in (None, pack.product):
            raise InputError(
                wanted=f"a pack of {product!r} at {path}", got=f"one of {pack.product!r}", next_step="Name another."
            )
    provenance = provenance_beside(path)
    if provenance is not None and provenance.product != pack.product:
        provenance = None  # of another product of the bundle
    if provenance is not None:
        check_provenance(pack, provenance)
    pin = read_pin(pin_path(path)) if pin_path(path).is_file() else None
    return Loaded(path, pack, provenance, pin)


def applied(base: Loaded, deltas: Sequence[Path]) -> tuple[Pack, Provenance | None]:
    """What deltas make of a pack, one upon the other; with provenance if any of the files has one.

    Raises:
        KnowledgeError: a delta is damaged, or for another base.
        StorageError: a file cannot be read.
    """
    pack, records = base.pack, [] if base.provenance is None else [base.provenance]
    for path in deltas:
        if not begins_as_delta(path):
            raise InputError(
                wanted=f"a delta at {path}", got="something else", next_step="Name deltas, in their order."
            )
        pack = apply_delta(pack, read_delta_file(path))
        beside = provenance_beside(path)
        if beside is not None:
            records.insert(0, beside)
    if not records:
        return pack, None
    return pack, provenance_of(pack, fingerprint=records[0].fingerprint, before=records)


def described(loaded: Loaded) -> Record:
    """A pack as JSON-like values."""
    pack, record, pin = loaded.pack, loaded.provenance, loaded.pin
    banks = {}
    for name in pack.banks:
        ids = pack.ids(name)
        banks[name] = {
            "rows": len(ids),
            "dimensions": int(pack.arrays[name].shape[1]),
            "dtype": pack.arrays[name].dtype.name,
            "bytes": pack.arrays[name].nbytes + ids.nbytes,
            "first_id": int(ids[0]) if len(ids) else None,
            "last_id": int(ids[-1]) if len(ids) else None,
            "known_sources": None if record is None else int((record.banks[name].images >= 0).sum()),
        }
    others = [name for name in pack.arrays if not is_bank(name) and not is_bank(name.removesuffix(IDS))]
    return {
        "product": pack.product,
        "digest": pack.digest,
        "version": pack.version,
        "fingerprint": pack.fingerprint,
        "bytes": len(encode_pack(pack)),
        "banks": banks,
        "arrays": {name: [pack.arrays[name].dtype.name, *pack.arrays[name].shape] for name in others},
        "calibration": msgspec.to_builtins(pack.calibration),
        "provenance": None
        if record is None
        else {"root": record.root, "images": len(record.images), "next_id": record.next_id},
        "pin": None if pin is None else pinned(pin),
    }


def pinned(pin: Pin) -> Record:
    """What a pin says; not that it is true."""
    content: Record = msgspec.to_builtins(pin)
    return {name: content[name] for name in ("kid", "signer", "ts", "not_before", "not_after")}


def difference(before: Loaded, after: Loaded) -> Record:
    """What differs between two packs, as JSON-like values."""
    old, new = before.pack, after.pack
    banks: Record = {}
    for name in sorted({*old.banks, *new.banks}):
        there, here = name in old.banks, name in new.banks
        if not there or not here:
            rows = len((new if here else old).ids(name))
            banks[name] = {"added": rows if here else 0, "removed": 0 if here else rows, "rewritten": 0}
            continue
        one, other = old.ids(name), new.ids(name)
        _, left, right = np.intersect1d(one, other, assume_unique=True, return_indices=True)
        rows_old, rows_new = old.arrays[name], new.arrays[name]
        if rows_old.dtype == rows_new.dtype and rows_old.shape[1] == rows_new.shape[1]:
            rewritten = int((rows_old[left] != rows_new[right]).any(1).sum())
        else:
            rewritten = len(left)
        banks[name] = {
            "added": len(other) - len(left),
            "removed": len(one) - len(left),
            "rewritten": rewritten,
            "rows": [len(one), len(other)],
        }
    others = {name for name in (*old.arrays, *new.arrays) if not is_bank(name) and not is_bank(name.removesuffix(IDS))}
    calibration = [msgspec.to_builtins(pack.calibration) for pack in (old, new)]
    images = [{} if item.provenance is None else _used(item.provenance) for item in (before, after)]
    return {
        "before": old.digest,
        "after": new.digest,
        "product": [old.product, new.product],
        "same_feature_space": old.fingerprint == new.fingerprint,
        "banks": {name: bank for name, bank in banks.items() if bank["added"] or bank["removed"] or bank["rewritten"]},
        "arrays": {
            "added": sorted(others - old.arrays.keys()),
            "removed": sorted(others - new.arrays.keys()),
            "changed": sorted(
                name
                for name in others & old.arrays.keys() & new.arrays.keys()
                if old.arrays[name].dtype != new.arrays[name].dtype
                or not np.array_equal(old.arrays[name], new.arrays[name])
            ),
        },
        "calibration": {
            name: [calibration[0].get(name), calibration[1].get(name)]
            for name in sorted({*calibration[0], *calibration[1]})
            if calibration[0].get(name) != calibration[1].get(name)
        },
        "images": {
            "added": sorted(images[1][digest] for digest in images[1].keys() - images[0].keys()),
            "removed": sorted(images[0][digest] for digest in images[0].keys() - images[1].keys()),
        },
        "delta_bytes": _delta_bytes(old, new),
        "pack_bytes": len(encode_pack(new)),
    }


def traced(
    loaded: Loaded,
    row: int,
    bank: str | None = None,
    photographs: Path | None = None,
    detector: DetectorSpec | None = None,
) -> Record:
    """Where a row came from, as JSON-like values.

    Args:
        loaded: the pack.
        row: its id.
        bank: where several banks have that id.
        photographs: a folder in which the picture is looked for by its digest.
        detector: that made the row; with it, and the picture, the patch is told in pixels.

    Raises:
        InputError: no such row, or no provenance beside the pack.
    """
    name = next(iter(rows_named(loaded.pack, [row], bank)))
    record = loaded.provenance
    if record is None:
        raise InputError(
            wanted=f"the provenance of {loaded.path}",
            got="none beside it",
            next_step="Keep NAME.provenance, which fit and the knowledge commands write, beside the pack.",
        )
    place = int(np.searchsorted(loaded.pack.ids(name), np.uint64(row)))
    image = record.image_of(name, place)
    tile, x, y = (int(value) for value in record.banks[name].places[place])
    found = None
    if image is not None and photographs is not None:
        found = next((str(path) for path in list_images(photographs) if _sha256(path) == image.sha256), None)
    return {
        "row": row,
        "bank": name,
        "place": place,
        "image": None if image is None else image.name,
        "sha256": None if image is None else image.sha256,
        "file": found,
        "tile": tile,
        "x": x,
        "y": y,
        "pixels": None if found is None or detector is None or tile < 0 else _pixels(detector, name, found, tile, x, y),
        "model": record.fingerprint,
        "leaf": record.banks[name].leaves[place].tobytes().hex(),
        "pin": None if loaded.pin is None else pinned(loaded.pin),
    }


def _pixels(detector: DetectorSpec, bank: str, path: str, tile: int, x: int, y: int) -> list[int] | None:
    """A patch in its picture: left, top, width and height in pixels; None if the detector does not tell."""
    feature = next(port for port in detector.features if port.name == feature_of(detector, bank))
    spec = detector.preprocessing
    grid = patch_grid(int(feature.shape[1]), spec)
    shape = read_image(path).shape
    if grid is None:
        return None
    boxes = tile_boxes(shape, spec)
    first, last, box = boxes[0], boxes[-1], boxes[tile]
    left, right = (box.x - first.x + box.width * column // grid[1] for column in (x, x + 1))
    top, bottom = (box.y - first.y + box.height * line // grid[0] for line in (y, y + 1))
    whole = (last.y + last.height - first.y, last.x + last.width - first.x)
    found = to_frame(Region(left, top, max(right - left, 1), max(bottom - top, 1)), whole, shape, spec)
    return [found.x, found.y, found.width, found.height]


def _used(record: Provenance) -> dict[str, str]:
    """Names of the images that rows came from, by digest: two may have one name."""
    places = {int(place) for bank in record.banks.values() for place in np.unique(bank.images) if place >= 0}
    return {record.images[place].sha256: record.images[place].name for place in places}


def _delta_bytes(old: Pack, new: Pack) -> int | None:
    try:
        return len(make_delta(old, new))
    except KnowledgeError:
        return None


def _sha256(path: Path) -> str:
    with storage_errors(path, "to read a picture"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
