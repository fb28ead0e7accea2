"""What a bundle's manifest may say: its JSON, checked for itself and against itself. No files here."""

from __future__ import annotations

import re
from typing import NoReturn

import msgspec
from msgspec import Struct

from edgead.runtime.errors import BundleError
from edgead.runtime.spec import CONTRACT, MANIFEST_SCHEMA, Manifest

MANIFEST = "manifest.json"
COMPILED = "compiled"
"""The one folder that no manifest lists: plans that a device built for itself with `edgead compile`."""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")
_AGAIN = "Copy or download the bundle again, or export it anew."
_LONGEST_NAME = 255
_DEEPEST = 8


class _Schema(Struct, frozen=True):
    schema: int


def refuse(wanted: str, got: str) -> NoReturn:
    """Raise `BundleError` with the advice for a bundle that was damaged or edited."""
    raise BundleError(wanted=f"a bundle with {wanted}", got=got, next_step=_AGAIN)


def check_member(name: str) -> None:
    """Check that `name` can be a file of a bundle: a short relative path of plain names.

    Raises:
        BundleError: absolute, with '..', a backslash, NUL or other odd characters, too long or too deep, or
            inside `compiled/`.
    """
    parts = name.split("/")
    if len(name) > _LONGEST_NAME or len(parts) > _DEEPEST or not all(_PART.match(part) for part in parts):
        refuse("file names of letters, digits, '.', '_', '-', in folders named so", repr(name[:300]))
    if parts[0] == COMPILED:
        refuse(f"no listed file in '{COMPILED}', which belongs to the device", repr(name))


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its JSON.

    Raises:
        BundleError: not JSON, of a newer schema or contract, a wrong field, or a reference to a file,
            product or engine that is not there.
    """
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema > MANIFEST_SCHEMA:
            raise BundleError(
                wanted=f"a bundle of schema {MANIFEST_SCHEMA} or older",
                got=f"schema {schema}, from a newer edgead",
                next_step="Update edgead on this machine.",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        refuse(f"a manifest of schema {MANIFEST_SCHEMA} in {MANIFEST}", f"something else ({error})")
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check a manifest against itself: every reference is met, no name can leave the bundle.

    Raises:
        BundleError: names the first thing that does not hold.
    """
    if manifest.schema != MANIFEST_SCHEMA or manifest.detector.contract != CONTRACT:
        raise BundleError(
            wanted=f"manifest schema {MANIFEST_SCHEMA} and graph contract {CONTRACT}",
            got=f"schema {manifest.schema} and contract {manifest.detector.contract}",
            next_step="Update edgead on this machine, or export the bundle with this version.",
        )
    for name, record in manifest.files.items():
        check_member(name)
        if name == MANIFEST:
            refuse("a list of all files but the manifest", "the manifest in its own list")
        if record.size < 0:
            refuse("sizes of 0 bytes or more", f"{record.size} for {name!r}")
    ports = [port.name for port in (*manifest.detector.head_inputs(), *manifest.detector.outputs)]
    if len(set(ports)) != len(ports):
        refuse("a name of its own for each port of its detector", ", ".join(ports)[:300])
    names = [engine.name for engine in manifest.engines]
    if not names or len(set(names)) != len(names):
        refuse("at least one engine, each with its own name", ", ".join(names) or "none")
    if manifest.default not in manifest.packs:
        refuse(f"a pack for the default product {manifest.default!r}", ", ".join(manifest.packs) or "none")
    for product in manifest.packs:
        if not _PART.match(product):
            refuse("product names of letters, digits, '.', '_', '-'", repr(product[:200]))
    references = [path for engine in manifest.engines for path in (engine.trunk, engine.head)]
    references += [*manifest.packs.values(), *(golden.path for golden in manifest.golden)]
    for path in references:
        if path not in manifest.files:
            refuse("every file that the manifest speaks of in its list", f"{path[:300]!r} missing there")
