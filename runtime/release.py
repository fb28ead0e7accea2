"""Releases: what becomes active together. Bytes in, a checked record or an error out; no files here.

A release names one engine and one knowledge pack for each product. Thresholds and calibration are part of a pack, so
a threshold can never meet another bank than its own. The record is canonical JSON (`edgead.runtime.spec`), and its
SHA-256 names it; who signed it stands elsewhere.

`counter` only ever grows from release to release. An old state of things is released anew under a new counter, which
may name old packs; an old release is refused whatever name it comes under.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.errors import ReleaseError
from edgead.runtime.knowledge import Pack, check_fits
from edgead.runtime.spec import Digest, Manifest, Name, canonical_json

RELEASE_SCHEMA = 1
"""Version of the release record."""
RELEASE_BYTES = 4 * 2**20
"""Largest release record."""

Counter = Annotated[int, Meta(ge=0, le=2**53)]
"""Exact in every JSON reader."""


class Release(Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes active together.

    Attributes:
        schema: version of this record.
        name: for people, such as 'carpet-7'.
        counter: greater than that of every release before it.
        fingerprint: feature space of the engine and of all packs.
        engine: SHA-256 of the bundle file (`.edgead`).
        product_packs: SHA-256 of the knowledge pack of each product.
        sizes: bytes of each of these files, by digest.
        scores: by product, the image scores that the bundle's golden images have under its pack: the release test.
        must_alarm: by product, golden images that the release test must find anomalous.
        tolerance: how far a score may be from `scores`, in score units.
        made_at: seconds since 1970 in UTC, as signed.
        notes: for people.
    """

    schema: int
    name: Name
    counter: Counter
    fingerprint: Digest
    engine: Digest
    product_packs: dict[Name, Digest]
    sizes: dict[Digest, Annotated[int, Meta(ge=0, le=2**53)]]
    scores: dict[Name, dict[str, float]] = msgspec.field(default_factory=dict)
    must_alarm: dict[Name, tuple[str, ...]] = msgspec.field(default_factory=dict)
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    made_at: Counter = 0
    notes: Annotated[str, Meta(max_length=10_000)] = ""


class _Schema(Struct, frozen=True):
    schema: int


_SCHEMA = msgspec.json.Decoder(_Schema)
_RELEASE = msgspec.json.Decoder(Release)


def encode_release(release: Release) -> bytes:
    """The one encoding of `release`: canonical JSON.

    Raises:
        ReleaseError: it breaks a rule of the record.
    """
    try:
        data = canonical_json(release)
    except (ValueError, TypeError) as error:
        _refuse("finite numbers and plain values", str(error))
    # Reading checks every field and makes whole numbers in float fields floats.
    return canonical_json(_read(data))


def decode_release(data: bytes) -> Release:
    """A checked release from its bytes.

    Raises:
        ReleaseError: too large, not canonical JSON, of a newer schema, an unknown, missing or wrong field, no product,
            or sizes, scores or alarms for something that the release does not name.
    """
    if len(data) > RELEASE_BYTES:
        _refuse(f"at most {RELEASE_BYTES} bytes", f"{len(data)}")
    release = _read(data)
    try:
        same = canonical_json(release) == data
    except ValueError:  # half a surrogate pair
        same = False
    if not same:
        _refuse("canonical JSON", "another spelling of it")
    return release


def digest_of(data: bytes) -> str:
    """SHA-256 as 64 hex digits: the name of a release's, pack's or engine's bytes."""
    return hashlib.sha256(data).hexdigest()


def check_whole(release: Release, manifest: Manifest, packs: Mapping[str, Pack]) -> None:
    """Check that engine and packs belong together, before anything of them becomes active.

    Args:
        release: names them.
        manifest: of the bundle that the release names.
        packs: by product, those that the release names.

    Raises:
        ReleaseError: an engine or pack of another feature space, a pack of another product, or a golden image that
            the bundle does not have.
        KnowledgeError: a pack that the engine's head cannot take.
    """
    if manifest.knowing.fingerprint != release.fingerprint:
        _refuse(f"an engine of feature space {release.fingerprint[:12]}", f"one of {manifest.knowing.fingerprint[:12]}")
    golden = {record.path for record in manifest.golden}
    for product in release.product_packs:
        pack = packs[product]
        if pack.product != product:
            _refuse(f"a pack of {product!r} under that name", f"one of {pack.product!r}")
        check_fits(pack, manifest.knowing)
        tested = {*release.scores.get(product, {}), *release.must_alarm.get(product, ())}
        if not tested <= golden:
            _refuse(
                "scores of golden images that the bundle has", f"{sorted(tested - golden)[0][:200]!r} of {product!r}"
            )


def _read(data: bytes) -> Release:
    try:
        schema = _SCHEMA.decode(data).schema
        if schema != RELEASE_SCHEMA:
            raise ReleaseError(
                wanted=f"a release of schema {RELEASE_SCHEMA}",
                got=f"schema {schema}",
                next_step="Update edgead on this machine, or publish the release with this version.",
            )
        release = _RELEASE.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        _refuse("every field as the format has it", f"something else ({error})")
    if not release.product_packs:
        _refuse("a pack of at least one product", "none")
    files = {release.engine, *release.product_packs.values()}
    if release.sizes.keys() != files:
        _refuse("the size of each file that it names, and of no other", f"{len(release.sizes)} for {len(files)}")
    odd = sorted((release.scores.keys() | release.must_alarm.keys()) - release.product_packs.keys())
    if odd:
        _refuse("scores of the products that it names", f"some of {odd[0]!r}")
    return release


def _refuse(wanted: str, got: str) -> NoReturn:
    raise ReleaseError(
        wanted=f"a release with {wanted}", got=got, next_step="Publish it anew with edgead, or fetch it again."
    )


__all__ = [
    "RELEASE_BYTES",
    "RELEASE_SCHEMA",
    "Release",
    "check_whole",
    "decode_release",
    "digest_of",
    "encode_release",
]
