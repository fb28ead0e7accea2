"""Provenance: which photograph, which patch of it and which model made each row of a pack's memory banks.

Bytes in, a verified record or an error out; no files here (`edgead.runtime.provenance_file` has them). A record stands
beside a pack and is no part of it: cameras run without it, and a pack has the same digest with or without one.

**Leaf.** Each row has a digest over everything that made it. H is SHA-256, numbers are little-endian:

    leaf = H(0x00 | message)

    bytes  message
    14     ASCII "edgead/row/v1" and a NUL
    32     fingerprint of the feature space that the row lives in (weights, preprocessing, contract)
    32     SHA-256 of the source file; 32 zeros if it is not known
    12     int32 tile, int32 x, int32 y: the patch, counted from the left and the top of its tile's grid of patches.
           Tile -1: y is 0 and x the row in a file of rows; tile, x and y -1: not known
    8      uint64 id of the row
    3      ASCII "F16" or "F32"
    rest   the row itself, as it stands in the pack

**Root.** A bank's root is the Merkle tree hash of its leaves in row order (RFC 6962, section 2.1: an inner node is
H(0x01 | left | right), the left part holds the largest power of two of leaves that is smaller than their number, and
the hash of no leaves is H of nothing). The root of a record binds the banks with their names:

    root = H("edgead/banks/v1" NUL | for each bank in name order: uint16 length of its name | name | uint64 rows | root)

**Record.** A canonical safetensors file (`edgead.runtime.tensors`). Metadata, all of it always there:

- `edgead.provenance`: version of this schema, "1";
- `product`: of the pack; `fingerprint`: as in the leaves;
- `next_id`: the first row id that was never used, so that none is used again when its row is gone;
- `root`: of the leaves, 64 hex digits.

Arrays, with BANK for each bank's name:

- `images.sha256`: uint8 [I, 32], digests of the source files, strictly increasing;
- `images.names`: uint8 [bytes], canonical JSON list of their I names: without folders, in Unicode's form NFC;
- `BANK.ids`: uint64 [N], as in the pack;
- `BANK.image`: int32 [N], which of the I files; -1 if it is not known;
- `BANK.place`: int32 [N, 3], tile, x and y;
- `BANK.leaf`: uint8 [N, 32].

Limits: a file of 1 GiB, 1,000,000 images, names of 255 characters and 64 MiB in all.
"""

from __future__ import annotations

import hashlib
import json
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.knowledge import Pack, is_bank
from edgead.runtime.pack_checks import check_arrays, check_names
from edgead.runtime.spec import DEFAULT_LIMITS, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors

SCHEMA = 1
ROW_TAG = b"edgead/row/v1\0"
BANKS_TAG = b"edgead/banks/v1\0"
PROVENANCE_BYTES = 2**30
"""Largest record."""
MAX_IMAGES = 1_000_000
MAX_NAME = 255
_NAMES_BYTES = 64 * 2**20
_UNKNOWN = bytes(32)
_METADATA = frozenset({"edgead.provenance", "fingerprint", "next_id", "product", "root"})
_PARTS = ("ids", "image", "leaf", "place")
_DTYPES = {np.dtype("<f2"): b"F16", np.dtype("<f4"): b"F32"}

Places = NDArray[np.int32]


@dataclass(frozen=True)
class SourceImage:
    """A file that rows came from.

    Attributes:
        sha256: of its bytes, 64 hex digits.
        name: without folders, in Unicode's form NFC.
    """

    sha256: str
    name: str


@dataclass(frozen=True, eq=False)
class BankSources:
    """Where the rows of one bank came from, in row order.

    Attributes:
        ids: uint64 [N].
        images: int32 [N], indices into the record's images; -1 if not known.
        places: int32 [N, 3], tile, x and y.
        leaves: uint8 [N, 32].
    """

    ids: NDArray[np.uint64]
    images: NDArray[np.int32]
    places: Places
    leaves: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Provenance:
    """The record of one pack's rows. One that exists has passed every check but those against its pack.

    Attributes:
        product: of the pack.
        fingerprint: of the feature space that the rows live in. A pack that feeds two detectors has a fingerprint of
            both; this is that of the detector whose trunk made the rows.
        next_id: the first row id that was never used.
        images: by digest.
        banks: by name.

    Raises:
        KnowledgeError: a part breaks the rules of the format.
    """

    product: str
    fingerprint: str
    next_id: int
    images: tuple[SourceImage, ...]
    banks: Mapping[str, BankSources]

    def __post_init__(self) -> None:
        check_names(self.product, self.fingerprint)
        if len(self.images) > MAX_IMAGES:
            _refuse(f"at most {MAX_IMAGES} source images", str(len(self.images)))
        for image in self.images:
            check_names(self.product, image.sha256)
            if image_name(image.name) != image.name or not image.name:
                _refuse(f"names of images in form NFC, without folders, of 1 to {MAX_NAME} characters", image.name[:80])
        if any(one.sha256 >= other.sha256 for one, other in pairwise(self.images)):
            _refuse("source images in the order of their digests, each once", "another order")
        for name, bank in self.banks.items():
            _check_bank(name, bank, len(self.images), self.next_id)

    @cached_property
    def root(self) -> str:
        """Digest over all leaves, 64 hex digits."""
        return banks_root({name: bank.leaves for name, bank in self.banks.items()})

    def image_of(self, bank: str, row: int) -> SourceImage | None:
        """The source of a row; None if it is not known."""
        index = int(self.banks[bank].images[row])
        return None if index < 0 else self.images[index]


def image_name(path_or_name: str) -> str:
    """The last part of a path as a record spells it: NFC, without control characters, of at most 255 characters."""
    name = unicodedata.normalize("NFC", path_or_name.replace("\\", "/").rpartition("/")[2])
    kept = "".join(letter for letter in name if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return unicodedata.normalize("NFC", kept[-MAX_NAME:])


def leaf_digests(
    rows: NDArray[Any], ids: NDArray[np.uint64], sources: NDArray[np.uint8], places: Places, fingerprint: str
) -> NDArray[np.uint8]:
    """The leaves of a bank's rows.

    Args:
        rows: float16 or float32 [N, D], finite and without -0.0, as in a pack.
        ids: uint64 [N].
        sources: uint8 [N, 32], SHA-256 of each row's source file; zeros if not known.
        places: int32 [N, 3], tile, x and y.
        fingerprint: feature space, 64 hex digits.

    Returns:
        uint8 [N, 32].

    Raises:
        KnowledgeError: another dtype or shape; NaN, infinity or -0.0.
    """
    plain = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    kind = _DTYPES.get(plain.dtype)
    if kind is None or plain.ndim != 2 or not len(plain) == len(ids) == len(sources) == len(places):
        _refuse("float16 or float32 rows [N, D], each with its id, source and place", f"{rows.dtype} {rows.shape}")
    check_arrays({"rows": plain})
    begin = b"\0" + ROW_TAG + bytes.fromhex(fingerprint)
    heads = np.empty(
        len(plain), np.dtype([("source", np.uint8, 32), ("place", "<i4", 3), ("id", "<u8"), ("kind", "S3")])
    )
    heads["source"], heads["place"], heads["id"], heads["kind"] = sources, places, ids, kind
    leaves = np.empty((len(plain), 32), np.uint8)
    for row in range(len(plain)):
        digest = hashlib.sha256(begin + heads[row].tobytes() + plain[row].tobytes()).digest()
        leaves[row] = np.frombuffer(digest, np.uint8)
    return leaves


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962's tree hash of leaves that are hashes already, 32 bytes."""
    if not leaves:
        return hashlib.sha256().digest()
    level = list(leaves)
    while len(level) > 1:
        # Joining neighbours and carrying an odd last one up is the split at the largest power of two.
        joined = [
            hashlib.sha256(b"\1" + level[place] + level[place + 1]).digest() for place in range(0, len(level) - 1, 2)
        ]
        level = joined + level[len(joined) * 2 :]
    return level[0]


def banks_root(leaves: Mapping[str, NDArray[np.uint8]]) -> str:
    """The root over banks of leaves uint8 [N, 32], by name: 64 hex digits."""
    message = [BANKS_TAG]
    for name in sorted(leaves):
        spelled = name.encode()
        message += [struct.pack("<H", len(spelled)), spelled, struct.pack("<Q", len(leaves[name]))]
        message.append(merkle_root([leaf.tobytes() for leaf in leaves[name]]))
    return hashlib.sha256(b"".join(message)).hexdigest()


def check_provenance(pack: Pack, provenance: Provenance) -> None:
    """Check that a record is that of a pack: each row with its id, its bytes and what made it.

    Raises:
        KnowledgeError: another product or banks, other ids, or a leaf that its row does not give; names the row.
    """
    if provenance.product != pack.product or set(provenance.banks) != set(pack.banks):
        _refuse(
            f"the banks {', '.join(pack.banks) or 'none'} of {pack.product!r}",
            f"{', '.join(provenance.banks) or 'none'} of {provenance.product!r}",
        )
    digests = source_digests(provenance)
    for name, bank in provenance.banks.items():
        if not np.array_equal(bank.ids, pack.ids(name)):
            _refuse(f"the row ids of {name!r}", "others, more or fewer")
        leaves = leaf_digests(pack.arrays[name], bank.ids, digests[bank.images], bank.places, provenance.fingerprint)
        wrong = np.flatnonzero((leaves != bank.leaves).any(1))
        if len(wrong):
            _refuse(
                f"the row {bank.ids[wrong[0]]} of {name!r} as this pack has it",
                "another row, source, place or model under its id",
            )


def source_digests(provenance: Provenance) -> NDArray[np.uint8]:
    """SHA-256 of the sources, uint8 [I + 1, 32]; the last are the zeros that index -1 finds."""
    raw = b"".join([*(bytes.fromhex(image.sha256) for image in provenance.images), _UNKNOWN])
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def encode_provenance(provenance: Provenance) -> bytes:
    """The one encoding of a record.

    Raises:
        KnowledgeError: over a limit of the format.
    """
    names = canonical_json([image.name for image in provenance.images])
    if len(names) > _NAMES_BYTES:
        _refuse(f"names of images of {_NAMES_BYTES} bytes in all", str(len(names)))
    arrays: dict[str, NDArray[Any]] = {
        "images.names": np.frombuffer(names, np.uint8),
        "images.sha256": source_digests(provenance)[:-1],
    }
    for name, bank in provenance.banks.items():
        arrays |= {
            f"{name}.ids": bank.ids,
            f"{name}.image": bank.images,
            f"{name}.leaf": bank.leaves,
            f"{name}.place": bank.places,
        }
    return encode_tensors(
        arrays,
        {
            "edgead.provenance": str(SCHEMA),
            "fingerprint": provenance.fingerprint,
            "next_id": str(provenance.next_id),
            "product": provenance.product,
            "root": provenance.root,
        },
    )


def decode_provenance(data: bytes) -> Provenance:
    """A record from its bytes.

    Raises:
        KnowledgeError: over the limits, truncated, damaged, of a newer schema, not canonical, or with another root
            than its leaves give.
    """
    if len(data) > PROVENANCE_BYTES:
        _refuse(f"at most {PROVENANCE_BYTES} bytes", str(len(data)))
    arrays, metadata = decode_tensors(data, header_limit=DEFAULT_LIMITS.pack_header_bytes)
    if metadata.get("edgead.provenance") != str(SCHEMA) or metadata.keys() != _METADATA:
        _refuse(f"schema {SCHEMA} and its metadata", ", ".join(sorted(metadata))[:400])
    next_id = metadata["next_id"]
    if not (next_id.isascii() and next_id.isdigit() and len(next_id) <= 20 and str(int(next_id)) == next_id):
        _refuse("a number as next_id", next_id[:40])
    names, digests = arrays.pop("images.names", None), arrays.pop("images.sha256", None)
    if names is None or digests is None or digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != 32:
        _refuse("names and SHA-256 of the source images", "none, or of another shape")
    images = tuple(
        SourceImage(digest.tobytes().hex(), name)
        for name, digest in zip(_names(names, len(digests)), digests, strict=True)
    )
    banks: dict[str, BankSources] = {}
    for name in sorted({name.rpartition(".")[0] for name in arrays}):
        parts = [arrays.pop(f"{name}.{part}", None) for part in _PARTS]
        ids, image, leaf, place = parts
        if ids is None or image is None or leaf is None or place is None:
            _refuse(f"{', '.join(f'{name}.{part}' for part in _PARTS)}", "not all of them")
        banks[name] = BankSources(ids, image, place, leaf)
    if arrays:
        _refuse("no other arrays", ", ".join(arrays)[:200])
    found = Provenance(metadata["product"], metadata["fingerprint"], int(next_id), images, banks)
    if found.root != metadata["root"]:
        _refuse(f"the root {metadata['root'][:12]} that it names", f"leaves of {found.root[:12]}")
    return found


def _check_bank(name: str, bank: BankSources, images: int, next_id: int) -> None:
    rows = len(bank.ids)
    wanted = ((bank.ids, "<u8", ()), (bank.images, "<i4", ()), (bank.places, "<i4", (3,)), (bank.leaves, "|u1", (32,)))
    if not is_bank(name) or any(
        array.dtype.str != kind or array.shape != (rows, *rest) for array, kind, rest in wanted
    ):
        _refuse(f"ids, images, places and leaves of the rows of {name[:128]!r}", "others, or another number of them")
    if not (bank.ids[1:] > bank.ids[:-1]).all() or (rows and int(bank.ids[-1]) >= next_id) or not 1 <= next_id <= 2**64:
        _refuse(f"increasing ids below the next one, {next_id}, in {name!r}", "others")
    if ((bank.images < -1) | (bank.images >= images)).any() or (bank.places < -1).any():
        _refuse(f"images 0 to {images - 1} and places from 0 on, or -1, in {name!r}", "others")


def _names(array: NDArray[Any], count: int) -> list[str]:
    if array.dtype != np.uint8 or array.ndim != 1 or array.size > _NAMES_BYTES:
        _refuse("names of images as JSON", f"{array.dtype} {array.shape}")
    data = array.tobytes()
    try:
        names = json.loads(data.decode())
        same = canonical_json(names) == data
    except (ValueError, RecursionError) as error:
        _refuse("names of images as JSON", f"something else ({error})")
    if not same or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _refuse("names of images as a canonical JSON list", "another value or spelling")
    if len(names) != count:
        _refuse(f"{count} names of images", str(len(names)))
    return names


def _refuse(wanted: str, got: str) -> NoReturn:
    raise KnowledgeError(
        wanted=f"provenance with {wanted}",
        got=got,
        next_step="Use the file that was written beside this very pack; make no edits.",
    )
