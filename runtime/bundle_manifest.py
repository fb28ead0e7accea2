"""What a bundle's manifest may say: its JSON, checked for itself and against itself. No files here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

import msgspec
from msgspec import Struct

from edgead.runtime.errors import BundleError
from edgead.runtime.spec import CONTRACT, MANIFEST_SCHEMA, DetectorSpec, Manifest, Preprocessing

MANIFEST = "manifest.json"
COMPILED = "compiled"
"""The one folder that no manifest lists: plans that a device built for itself with `edgead compile`."""

NORMALITY_TABLE = "normality.table"
"""The bank of sentences that a normality head takes: one row for each."""

_NORMALITY_OUTPUTS = {"score": "float32", "anomaly_map": "float32", "nearest_row": "int32"}
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
    references += _check_normality(manifest)
    references += [*manifest.packs.values(), *(golden.path for golden in manifest.golden)]
    for path in references:
        if path not in manifest.files:
            refuse("every file that the manifest speaks of in its list", f"{path[:300]!r} missing there")


def _check_normality(manifest: Manifest) -> list[str]:
    """The files that a bundle with a normality detector speaks of; refuses one that has half of it."""
    record = manifest.normality
    for engine in manifest.engines:
        if (engine.normality is None) != (record is None):
            refuse("normality graphs in each of its engines or in none", f"the engine '{engine.name}' that differs")
    if record is None:
        return []
    if record.detector.contract != CONTRACT:
        refuse(f"graph contract {CONTRACT} in both detectors", f"contract {record.detector.contract}")
    check_pair(manifest.detector, record.detector, refuse)
    ports = [port.name for port in (*record.detector.head_inputs(), *record.detector.outputs)]
    if len(set(ports)) != len(ports):
        refuse("a name of its own for each port of its normality detector", ", ".join(ports)[:300])
    if record.shared_trunk != (record.detector.fingerprint == manifest.detector.fingerprint):
        refuse("one trunk for both detectors exactly if their fingerprints are equal", "another statement")
    return [path for engine in manifest.engines if (pair := engine.normality) for path in (pair.trunk, pair.head)]


def check_pair(base: DetectorSpec, normality: DetectorSpec, refuse: Callable[[str, str], NoReturn]) -> None:
    """Check that the maps of a normality detector can suppress those of a base detector.

    Args:
        base: makes the anomaly maps.
        normality: makes the suppression maps.
        refuse: raises, given what was wanted and what came.
    """
    if not base.has_map:
        refuse("a detector that makes anomaly maps, for suppression to work on", f"one of '{base.method}' without")
    outputs = {port.name: port.dtype for port in normality.outputs}
    if any(outputs.get(name) != kind for name, kind in _NORMALITY_OUTPUTS.items()):
        refuse(
            f"a normality detector that gives {', '.join(_NORMALITY_OUTPUTS)}",
            f"one of '{normality.method}' that gives {', '.join(outputs)}",
        )
    ports = {port.name: port for port in normality.knowledge}
    table = ports.get(NORMALITY_TABLE)
    if table is None or table.rows is None or not table.empty_ok or len(table.shape) != 2:
        refuse(f"a normality detector whose bank '{NORMALITY_TABLE}' may be empty", ", ".join(ports) or "no knowledge")
    odd = [name for name in ports if not name.startswith("normality.")]
    if odd or any(port.name.startswith("normality.") for port in base.knowledge):
        refuse("knowledge named 'normality.*' in the normality detector only", ", ".join(odd) or "the base's own")
    one, other = base.preprocessing, normality.preprocessing
    if (one.rotate, one.roi, one.tiles) != (other.rotate, other.roi, other.tiles):
        refuse(
            f"a normality detector of the base's view ({view_text(one)})",
            f"one of {view_text(other)}",
        )


def view_text(spec: Preprocessing) -> str:
    """Rotation, region and tiles in words that are also the options of `edgead fit`."""
    roi = spec.roi
    parts = [f"--rotate {spec.rotate}"]
    if roi is not None:
        parts.append(f"--roi {roi.x},{roi.y},{roi.width},{roi.height}")
    if spec.tiles is not None:
        parts.append(f"--tiles {spec.tiles.columns}x{spec.tiles.rows} --overlap {spec.tiles.overlap:g}")
    return " ".join(parts)
