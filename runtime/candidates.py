"""A candidate: a picture that somebody at a camera marked as normal or as a defect, signed with the camera's key.

It says what was seen and by whom, and holds no row of any bank and no row id: those are made by the publisher, if a
person there accepts it. No device inspects with a candidate. Bytes in, a verified record or an error out; no files.

The file is canonical safetensors (`edgead.runtime.tensors`) with the metadata

    edgead.candidate   1
    key                the device's public key: 32 bytes of Ed25519 as 64 hex digits
    record             canonical JSON of a `Mark`, which has the digests of the pictures
    signature          64 bytes as 128 hex digits

and the arrays `picture` and, where a mask was drawn, `mask`: U8, each the bytes of one PNG. Signed are the 19 bytes
`edgead/candidate/v1` and a NUL, followed by the record; its SHA-256 is the candidate's digest. A file is of at most
8 MiB, and a picture of at most 40 million pixels, so that nothing that comes from a stolen device is large in memory.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn

import msgspec
import numpy as np
from msgspec import Meta, Struct

from edgead.runtime.errors import CandidateError, EdgeadError, missing_dependency
from edgead.runtime.image import Frame, decode
from edgead.runtime.image_header import Unfit, inspect_header
from edgead.runtime.release import Counter
from edgead.runtime.spec import Digest, Limits, Name, Region, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors

SCHEMA = 1
DOMAIN = b"edgead/candidate/v1\0"
CANDIDATE_BYTES = 8 * 2**20
"""Largest file."""
PIXELS = 40_000_000
"""Most pixels of a picture and of a mask."""
NOTE = 1000
"""Most characters of a note."""
SUFFIX = ".candidate"
_HEADER_BYTES = 32 * 2**10
_LIMITS = Limits(image_bytes=CANDIDATE_BYTES, image_pixels=PIXELS)
_MARK = "edgead.candidate"
_FIELDS = {_MARK, "key", "record", "signature"}
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

Kind = Literal["normal", "anomalous"]


class Mark(Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody at a camera says about a picture.

    Attributes:
        device: which camera.
        product: what it inspected.
        kind: what the picture shows.
        picture: SHA-256 of the PNG.
        width, height: of the picture, in pixels.
        time: when it was marked, seconds since 1970 by the device's clock.
        fingerprint: feature space of the knowledge that inspected it.
        verdict: at that time: `OK`, `NG` or `NOT_INSPECTED`.
        score: of the verdict; None exactly if it was not inspected.
        threshold: of the verdict.
        knowledge: version of the knowledge.
        release: counter of the release that was active.
        mask: SHA-256 of the PNG that shows where the defect is; None without one.
        box: where the defect is, in pixels of the picture; None without one. Never beside a mask.
        resized: whether the picture is the engine's frame because the camera's was too large to be sent.
        note: by whoever marked it; one line.
        schema: version of this record.
    """

    device: Name
    product: Name
    kind: Kind
    picture: Digest
    width: Annotated[int, Meta(ge=1, le=65536)]
    height: Annotated[int, Meta(ge=1, le=65536)]
    time: Counter
    fingerprint: Digest
    verdict: Literal["OK", "NG", "NOT_INSPECTED"]
    score: float | None
    threshold: float
    knowledge: Annotated[str, Meta(max_length=128)]
    release: Counter
    mask: Digest | None = None
    box: Region | None = None
    resized: bool = False
    note: Annotated[str, Meta(max_length=NOTE)] = ""
    schema: int = SCHEMA


@dataclass(frozen=True, eq=False)
class Candidate:
    """A candidate as it came: well formed and of one piece; whether it is the device's shows `verify`.

    Attributes:
        mark: what is said.
        picture: PNG.
        mask: PNG of the same size; None without one.
        key: public key that it names, 32 bytes.
        signature: 64 bytes.
    """

    mark: Mark
    picture: bytes
    mask: bytes | None
    key: bytes
    signature: bytes

    @property
    def digest(self) -> str:
        """Names the content, whoever signed it: SHA-256 of `signed_bytes`, 64 hex digits."""
        return hashlib.sha256(signed_bytes(self.mark)).hexdigest()

    def verify(self, public_key: bytes) -> None:
        """Check that the device with this key signed it.

        Args:
            public_key: 32 bytes that the device is known by.

        Raises:
            CandidateError: it is signed with another key, or what it says was edited.
            MissingDependencyError: the package for signatures is not installed.
        """
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ModuleNotFoundError as error:
            raise missing_dependency("cryptography", "ota", "signatures") from error
        device = self.mark.device
        if not secrets.compare_digest(self.key, public_key):
            _refuse(f"the key {public_key.hex()[:16]} of {device!r}", f"the key {self.key.hex()[:16]}")
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(self.signature, signed_bytes(self.mark))
        except (InvalidSignature, ValueError):
            _refuse(f"a signature of {device!r} over what it says", "another one: it was edited or forged")

    def frame(self) -> Frame:
        """The picture, uint8 RGB [height, width, 3].

        Raises:
            CandidateError: its PNG is damaged inside.
        """
        return _pixels(self.picture, "picture")

    def region(self) -> Frame | None:
        """Where the defect is, as uint8 RGB [height, width, 3], bright inside: the mask, or the box as one.

        Raises:
            CandidateError: the mask's PNG is damaged inside.
        """
        if self.mask is not None:
            return _pixels(self.mask, "mask")
        box = self.mark.box
        if box is None:
            return None
        region = np.zeros((self.mark.height, self.mark.width, 3), np.uint8)
        region[box.y : box.y + box.height, box.x : box.x + box.width] = 255
        return region


def signed_bytes(mark: Mark) -> bytes:
    """What a candidate's signature is over. The pictures are bound by their digests."""
    return DOMAIN + canonical_json(mark)


def encode_candidate(mark: Mark, picture: bytes, mask: bytes | None, private_key: bytes) -> bytes:
    """A candidate as a file.

    Args:
        mark: what is said, with the digests of the pictures.
        picture, mask: PNG.
        private_key: 32 bytes of the device's key.

    Raises:
        CandidateError: a value that the format does not have, or more than `CANDIDATE_BYTES`.
        MissingDependencyError: the package for signatures is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise missing_dependency("cryptography", "ota", "signatures") from error
    try:
        # A record that was built is not checked yet, and whole numbers in float fields are no floats yet.
        mark = msgspec.json.decode(canonical_json(mark), type=Mark)
        key = Ed25519PrivateKey.from_private_bytes(private_key)
        signature = key.sign(signed_bytes(mark))
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        _refuse("every field as the format has it", f"something else ({error})"[:300])
    arrays = {"picture": np.frombuffer(picture, np.uint8)}
    if mask is not None:
        arrays["mask"] = np.frombuffer(mask, np.uint8)
    metadata = {
        _MARK: str(SCHEMA),
        "key": key.public_key().public_bytes_raw().hex(),
        "record": canonical_json(mark).decode(),
        "signature": signature.hex(),
    }
    data = encode_tensors(arrays, metadata)
    decode_candidate(data)
    return data


def decode_candidate(data: bytes) -> Candidate:
    """A candidate from its bytes; whose it is shows `Candidate.verify`. No picture is decoded, only its header read.

    Raises:
        CandidateError: too large, not canonical, of another schema, an unknown, missing or wrong field, a number that
            is not finite, a picture that is no PNG of the size and digest that the record says, or a place outside it.
    """
    if len(data) > CANDIDATE_BYTES:
        _refuse(f"at most {CANDIDATE_BYTES} bytes", f"{len(data)}")
    try:
        arrays, metadata = decode_tensors(data, header_limit=_HEADER_BYTES)
    except EdgeadError as error:
        _refuse("canonical safetensors", error.got)
    if metadata.keys() != _FIELDS or metadata[_MARK] != str(SCHEMA):
        _refuse(f"exactly {', '.join(sorted(_FIELDS))}, of schema {SCHEMA}", ", ".join(sorted(metadata))[:300])
    if any(array.dtype != np.uint8 or array.ndim != 1 for array in arrays.values()):
        _refuse("pictures as plain bytes", "arrays of another kind")
    key, signature = _hex(metadata["key"], 32, "a key"), _hex(metadata["signature"], 64, "a signature")
    mark = _mark(metadata["record"].encode())
    pictures = {name: array.tobytes() for name, array in arrays.items()}
    stated = {"picture": mark.picture} if mark.mask is None else {"picture": mark.picture, "mask": mark.mask}
    if pictures.keys() != stated.keys():
        _refuse(" and ".join(stated), " and ".join(pictures)[:200] or "no picture")
    for name, digest in stated.items():
        if hashlib.sha256(pictures[name]).hexdigest() != digest:
            _refuse(f"the {name} that its record names", "another one")
        _check_png(pictures[name], name, mark)
    return Candidate(mark, pictures["picture"], pictures.get("mask"), key, signature)


def _mark(data: bytes) -> Mark:
    try:
        mark = msgspec.json.decode(data, type=Mark)
        same = canonical_json(mark) == data
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        _refuse("every field as the format has it", f"something else ({error})"[:300])
    if not same:
        _refuse("a record in canonical JSON", "another spelling of it")
    if mark.schema != SCHEMA:
        _refuse(f"schema {SCHEMA}", f"schema {mark.schema}")
    for text in (mark.note, mark.knowledge):
        if unicodedata.normalize("NFC", text) != text or any(unicodedata.category(one) in _HIDDEN for one in text):
            _refuse("plain texts in form NFC", "one with control or direction characters, or another form")
    # JSON has no infinity, but a number of a thousand digits is read as one.
    finite = all(math.isfinite(value) for value in (mark.score, mark.threshold) if value is not None)
    if not finite or (mark.score is None) != (mark.verdict == "NOT_INSPECTED"):
        _refuse("a finite score exactly where there was a verdict", f"{mark.score} with {mark.verdict}")
    if mark.kind == "normal" and (mark.mask is not None or mark.box is not None):
        _refuse("no place on a normal picture: all of it is normal", "a mask or a box")
    box = mark.box
    if box is not None:
        if mark.mask is not None:
            _refuse("a mask or a box", "both")
        if box.x + box.width > mark.width or box.y + box.height > mark.height:
            _refuse(f"a box inside of {mark.width} x {mark.height} pixels", f"one that reaches out of them: {box}")
    return mark


def _check_png(data: bytes, name: str, mark: Mark) -> None:
    try:
        header = inspect_header(data, _LIMITS)
    except Unfit as error:
        _refuse(f"a {name} as PNG", str(error))
    # One that is to be turned when it is shown would put a place elsewhere than where it was marked.
    if (header.kind, header.width, header.height, header.orientation) != ("PNG", mark.width, mark.height, 1):
        _refuse(
            f"a {name} as PNG of {mark.width} x {mark.height} pixels",
            f"{header.kind} of {header.width} x {header.height}, orientation {header.orientation}",
        )


def _pixels(data: bytes, name: str) -> Frame:
    try:
        return decode(data, name=name, limits=_LIMITS)
    except EdgeadError as error:
        _refuse(f"a {name} that can be decoded", error.got)


def _hex(text: str, size: int, name: str) -> bytes:
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        _refuse(f"{name} as {2 * size} lower-case hex digits", repr(text[:40]))
    return bytes.fromhex(text)


def _refuse(wanted: str, got: str) -> NoReturn:
    raise CandidateError(
        wanted=f"a candidate with {wanted}",
        got=got,
        next_step="Do not count it; mark the picture again, or look at what lies between the camera and here.",
    )


__all__ = [
    "CANDIDATE_BYTES",
    "DOMAIN",
    "NOTE",
    "PIXELS",
    "SUFFIX",
    "Candidate",
    "Kind",
    "Mark",
    "decode_candidate",
    "encode_candidate",
    "signed_bytes",
]
