"""TensorRT plans as files: what they were built from, what for, and whether they may be used here.

A bundle's TensorRT engine always ships its source: ONNX of trunk and head, and `recipe.json` with the shapes
to build for. A plan may lie beside them (built ahead of time) or in a cache of the device, which is that of the
device's store where the bundle is an engine of one:

    compiled/<engine>/trunk.plan, head.plan, record.json, timing.cache
    plans/<sha256 of the bundle>/<engine>/...

Nothing here imports TensorRT.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from edgead.runtime.bundle import Bundle
from edgead.runtime.errors import BundleError, EngineMismatchError, storage_errors
from edgead.runtime.slots_files import plans_of
from edgead.runtime.spec import DeviceMatch, Digest, EngineRecord, Name

RECIPE = "recipe.json"
RECORD = "record.json"
TIMING_CACHE = "timing.cache"
CACHE_VARIABLE = "EDGEAD_PLAN_CACHE"
"""Environment variable that names a folder for plans outside of bundles."""
PARTS = ("trunk", "head")

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of one input."""


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How the plans of one engine are built. Types come from the ONNX; TF32 is off."""

    schema: int
    profiles: dict[str, dict[str, Shapes]]
    """'trunk' and 'head' -> input with free sizes -> its shapes."""


class PlanRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What the plans in one folder of the cache are."""

    schema: int
    engine: Name
    match: DeviceMatch
    sources: dict[str, Digest]
    """SHA-256 of ONNX and recipe, by file name: plans of another source are not used."""
    plans: dict[str, Digest]


def read_recipe(bundle: Bundle, record: EngineRecord) -> Recipe:
    """The recipe of a TensorRT engine.

    Raises:
        BundleError: the bundle has none for this engine, or one of a newer schema.
    """
    name = f"{folder_of(record)}/{RECIPE}"
    if record.target != "tensorrt" or not bundle.has(name):
        raise BundleError(
            wanted="a TensorRT engine with its ONNX and recipe",
            got=f"the engine '{record.name}' without them",
            next_step="Export the bundle with: --target tensorrt",
        )
    try:
        recipe = msgspec.json.decode(bundle.read(name), type=Recipe)
    except msgspec.MsgspecError as error:
        raise BundleError(
            wanted=f"a recipe in {name}", got=str(error), next_step="Update edgead here, or export anew."
        ) from error
    if recipe.schema != 1 or set(recipe.profiles) != set(PARTS):
        raise BundleError(
            wanted="a recipe of schema 1 for trunk and head",
            got=f"schema {recipe.schema} for {', '.join(recipe.profiles) or 'nothing'}",
            next_step="Update edgead on this machine.",
        )
    return recipe


def folder_of(record: EngineRecord) -> str:
    """The engine's folder inside the bundle."""
    return record.trunk.rpartition("/")[0]


def sources_of(bundle: Bundle, record: EngineRecord) -> dict[str, str]:
    """SHA-256 of everything that the engine's plans are built from, by file name."""
    folder = folder_of(record)
    names = [RECIPE, *(f"{part}.onnx{data}" for part in PARTS for data in ("", ".data"))]
    files = bundle.manifest.files
    return {name: files[f"{folder}/{name}"].sha256 for name in names if f"{folder}/{name}" in files}


def plan_folder(bundle: Bundle, record: EngineRecord, cache: Path | None = None) -> Path | None:
    """Where this machine keeps the engine's plans: in `cache`, in $EDGEAD_PLAN_CACHE, in the bundle, or in its store.

    In a shared cache the folder is named after the engine's sources, so equal engines share it. None for a
    bundle in one file if no cache is named and it lies in no device's store. The folder may not exist.
    """
    if cache is None and os.environ.get(CACHE_VARIABLE):
        cache = Path(os.environ[CACHE_VARIABLE])
    if cache is not None:
        sources = sources_of(bundle, record)
        text = "".join(f"{name}\0{digest}\n" for name, digest in sorted(sources.items()))
        return cache / f"{record.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    place = plans_of(bundle.path) if bundle.compiled is None else bundle.compiled
    return None if place is None else place / record.name


def read_record(folder: Path | None) -> PlanRecord | None:
    """The record of a folder of plans; None if there is none, or none that this version understands."""
    if folder is None or not (folder / RECORD).is_file():
        return None
    with storage_errors(folder, "to read compiled plans"):
        data = (folder / RECORD).read_bytes()
    try:
        found = msgspec.json.decode(data, type=PlanRecord)
    except msgspec.MsgspecError:
        return None
    return found if found.schema == 1 else None


def read_plan(folder: Path, found: PlanRecord, part: str) -> bytes:
    """One plan of a folder, checked.

    Raises:
        EngineMismatchError: the file is not the one that was built.
        StorageError: it cannot be read.
    """
    name = f"{part}.plan"
    with storage_errors(folder / name, "to read a compiled plan"):
        data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != found.plans.get(name):
        raise EngineMismatchError(
            wanted=f"the plan that was compiled to {folder / name}",
            got="a file with another SHA-256",
            next_step="Run: edgead compile BUNDLE --force",
        )
    return data


def differences(match: DeviceMatch, here: DeviceMatch) -> list[str]:
    """Why a plan for `match` may not be used `here`, in words; empty if it may.

    Plans are refused by another version of their library, and one that is tuned for another GPU is slow
    even where it runs. A plan that was built ahead of time names several compute capabilities and no GPU.
    """
    found = []
    if match.library != here.library:
        found.append(f"library {match.library}, here {here.library}")
    elif match.library_version != here.library_version:
        found.append(f"{match.library} {match.library_version}, here {here.library_version}")
    if here.compute_capability not in match.compute_capability.split(","):
        found.append(f"compute capability {match.compute_capability}, here {here.compute_capability}")
    if match.gpu is not None and match.gpu != here.gpu:
        found.append(f"GPU '{match.gpu}', here '{here.gpu}'")
    return found


def has_plan(bundle: Bundle, record: EngineRecord) -> bool:
    """Whether some plan of the engine lies here, built for whatever machine. Imports no library."""
    found = read_record(plan_folder(bundle, record))
    return record.match is not None or (found is not None and found.sources == sources_of(bundle, record))


def describe(match: DeviceMatch) -> str:
    """A match in words."""
    place = f", {match.gpu}" if match.gpu is not None else ""
    return f"{match.library} {match.library_version}, compute capability {match.compute_capability}{place}"
