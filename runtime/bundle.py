"""Bundles: open, check, write. A bundle is all that a device needs to inspect.

    manifest.json                      what everything is, with size and SHA-256 of every other file
    engines/<engine>/trunk.*, head.*   compiled graphs, or ONNX for the device to compile
    engines/<engine>/normality/        the same of the second detector, if there is one
    knowledge/<product>.safetensors    the initial knowledge packs
    golden/NNN.png, reference.safetensors   engine-sized frames and torch's float32 maps of them
    parity.json, card.md               how far the engines are from torch; what the detector was made from
    compiled/                          not listed: plans that this device built for itself

It lies in a folder, or in one `.edgead` file of the same content. Files that the manifest does not list are
refused everywhere but in `compiled/`, whose reader checks it. Every read checks size and digest.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgead
from edgead.runtime import files as disk
from edgead.runtime.bundle_manifest import COMPILED, MANIFEST, check_manifest, parse_manifest, refuse
from edgead.runtime.bundle_store import SUFFIX, FolderStore, Store, ZipStore, write_zip
from edgead.runtime.errors import BundleError, EdgeadError
from edgead.runtime.image import decode, encode_png
from edgead.runtime.knowledge import Pack, check_fits, decode_pack, encode_pack
from edgead.runtime.spec import (
    DEFAULT_LIMITS,
    MANIFEST_SCHEMA,
    DetectorSpec,
    EngineRecord,
    FileRecord,
    GoldenRecord,
    Limits,
    Manifest,
    NormalityRecord,
    canonical_json,
    with_normality,
)
from edgead.runtime.tensors import decode_tensors, encode_tensors

REFERENCE = "golden/reference.safetensors"
_CHUNK = 2**20


class Bundle:
    """An open bundle. Reads are independent of each other, from any thread.

    Attributes:
        path: the folder or file.
        manifest: its checked table of contents.
    """

    def __init__(self, path: Path, manifest: Manifest, store: Store, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        self.manifest = manifest
        self._store = store
        self._limits = limits

    def has(self, name: str) -> bool:
        """Whether the bundle lists a file of this name."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """The content of a file, as the manifest has it.

        Raises:
            BundleError: no such file, or its size or SHA-256 differs from the manifest.
            StorageError: the file system refused.
        """
        record = self._record(name)
        with self._store.open(name) as stream:
            data = stream.read(record.size + 1)
        _check_content(name, record, len(data), hashlib.sha256(data).hexdigest())
        return data

    def file(self, name: str) -> Path | None:
        """The path of a file after checking its content, for libraries that open files; None in a zip.

        Raises:
            BundleError: no such file, or its size or SHA-256 differs from the manifest.
            StorageError: the file system refused.
        """
        self._record(name)
        if not isinstance(self._store, FolderStore):
            return None
        self.check(name)
        return self.path / name

    def check(self, name: str) -> None:
        """Check a file's size and digest without holding it in memory.

        Raises:
            BundleError: no such file, or its size or SHA-256 differs from the manifest.
            StorageError: the file system refused.
        """
        record = self._record(name)
        digest, size = hashlib.sha256(), 0
        with self._store.open(name) as stream:
            while size <= record.size and (chunk := stream.read(_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
        _check_content(name, record, size, digest.hexdigest())

    @property
    def compiled(self) -> Path | None:
        """Where plans that this device built lie or may be put; None in a zip. The folder may not exist."""
        return self.path / COMPILED if isinstance(self._store, FolderStore) else None

    @property
    def products(self) -> tuple[str, ...]:
        """Products with an initial pack, the default one first."""
        default = self.manifest.default
        return (default, *sorted(product for product in self.manifest.packs if product != default))

    def pack(self, product: str | None = None) -> Pack:
        """The initial knowledge of a product, by default of the default one.

        Raises:
            BundleError: no such product (similar names are suggested), or the file was edited.
            KnowledgeError: the pack breaks a rule or does not fit the detector.
        """
        product = self.manifest.default if product is None else product
        if product not in self.manifest.packs:
            raise _unknown("a product", product, self.products)
        pack = decode_pack(self.read(self.manifest.packs[product]), limits=self._limits)
        if pack.product != product:
            refuse(f"the pack of {product!r}", f"one of {pack.product!r} in its place")
        check_fits(pack, self.manifest.knowing)
        return pack

    def engine(self, target: str | None = None) -> EngineRecord:
        """One engine's record.

        Args:
            target: an engine's name ('onnx-fp32'), a target ('onnx'), a target with its precision
                ('openvino:fp16'), or None for the bundle's first engine.

        Raises:
            BundleError: the bundle has no such engine; similar names are suggested.
        """
        engines = self.manifest.engines
        if target is None:
            return engines[0]
        for engine in engines:
            if target in (engine.name, engine.target, f"{engine.target}:{engine.precision}"):
                return engine
        names = dict.fromkeys(f"{engine.target}:{engine.precision}" for engine in engines)
        raise _unknown("an engine", target, (*names, *(engine.name for engine in engines)))

    def golden_images(self) -> list[tuple[GoldenRecord, NDArray[np.uint8]]]:
        """The golden frames, uint8 RGB [height, width, 3] of the engine's size, with torch's verdicts.

        Raises:
            BundleError: a file was edited, or is not of the engine's size.
        """
        size = self.manifest.detector.preprocessing
        images = []
        for record in self.manifest.golden:
            try:
                image = decode(self.read(record.path), name=record.path, limits=self._limits)
            except BundleError:
                raise
            except EdgeadError as error:
                raise _unreadable(record.path, error) from error
            if image.shape != (size.height, size.width, 3):
                refuse(f"golden frames of {size.width}x{size.height}", f"{record.path} of {image.shape}")
            images.append((record, image))
        return images

    def golden_maps(self) -> NDArray[np.float32] | None:
        """torch's anomaly maps of the golden frames, float32 [G, h, w]; None if the detector has no map.

        Raises:
            BundleError: the file was edited, or holds something else.
        """
        if not self.has(REFERENCE):
            return None
        data = self.read(REFERENCE)
        try:
            arrays, _ = decode_tensors(data, header_limit=self._limits.pack_header_bytes)
        except EdgeadError as error:
            raise _unreadable(REFERENCE, error) from error
        maps = arrays.get("anomaly_map")
        if maps is None or maps.dtype != np.float32 or maps.ndim != 3 or len(maps) != len(self.manifest.golden):
            refuse("one float32 anomaly map per golden frame", f"something else in {REFERENCE}")
        return maps

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            raise _unknown("a file", name, tuple(self.manifest.files))
        return record


def open_bundle(path: str | Path, *, verify: bool = True, limits: Limits = DEFAULT_LIMITS) -> Bundle:
    """Open a bundle, a folder or an `.edgead` file, and check it.

    Args:
        path: the folder or file.
        verify: check the digest of every file now. Otherwise names and sizes are checked now, and the
            digest of a file when it is read.
        limits: most files and bytes that a bundle may have.

    Raises:
        BundleError: not a bundle, truncated, edited, over the limits, or of a newer schema.
        StorageError: the file system refused.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise BundleError(
            wanted=f"a bundle at {path}",
            got="nothing there",
            next_step="Make one with: edgead export FILE --target onnx -o BUNDLE",
        )
    store: Store = FolderStore(path, limits) if path.is_dir() else ZipStore(path, limits)
    sizes = store.sizes()
    if MANIFEST not in sizes:
        refuse(f"the file {MANIFEST}", f"no such file in {path}")
    with store.open(MANIFEST) as stream:
        data = stream.read(limits.manifest_bytes + 1)
    if len(data) > limits.manifest_bytes:
        refuse(f"a manifest of at most {limits.manifest_bytes} bytes", "a larger one")
    manifest = parse_manifest(data)
    _check_listing(sizes, manifest, limits)
    bundle = Bundle(path, manifest, store, limits)
    if verify:
        for name in sorted(manifest.files):
            bundle.check(name)
    return bundle


def golden_files(
    images: NDArray[np.uint8],
    scores: Sequence[float],
    anomalous: Sequence[bool],
    maps: NDArray[np.float32] | None = None,
) -> tuple[list[GoldenRecord], dict[str, bytes]]:
    """Golden frames as the records and files that `write_bundle` takes.

    Args:
        images: uint8 RGB [G, height, width, 3] of the engine's size.
        scores: torch's image scores under the initial pack.
        anomalous: torch's verdicts.
        maps: torch's anomaly maps, float32 [G, h, w]; None if the detector has no map.
    """
    records, contents = [], {}
    for index, (image, score, verdict) in enumerate(zip(images, scores, anomalous, strict=True)):
        path = f"golden/{index:03d}.png"
        records.append(GoldenRecord(path, float(score), bool(verdict)))
        contents[path] = encode_png(image)
    if maps is not None:
        contents[REFERENCE] = encode_tensors({"anomaly_map": np.asarray(maps, np.float32)}, {})
    return records, contents


def write_bundle(
    path: str | Path,
    *,
    name: str,
    detector: DetectorSpec,
    engines: Sequence[EngineRecord],
    packs: Mapping[str, Pack],
    golden: Sequence[GoldenRecord] = (),
    files: Mapping[str, bytes],
    default: str | None = None,
    force: bool = False,
    normality: NormalityRecord | None = None,
) -> Bundle:
    """Write a bundle: a folder, or one file if `path` ends with `.edgead`. Same content, same bytes.

    Args:
        path: where to.
        name: the bundle's name.
        detector: the graph contract of its engines.
        engines: what is known of each engine; the first is the bundle's own choice.
        packs: initial knowledge by product.
        golden: see `golden_files`.
        files: content of every file but the manifest and the packs, by path inside the bundle.
        default: the default product; by default the first of `packs`.
        force: replace what is at `path`.
        normality: the second detector, whose graphs the engines then have too and whose knowledge the packs.

    Raises:
        BundleError: a name, a reference or a number that the format does not have.
        KnowledgeError: a pack that does not fit the detector.
        OutputExistsError: `path` exists and `force` is false.
        StorageError: the file system refused; nothing is left half-written.
    """
    path = Path(path)
    disk.refuse_existing(path, force)
    contents = dict(files)
    places: dict[str, str] = {}
    knowing = detector if normality is None else with_normality(detector, normality.detector)
    for product, pack in packs.items():
        check_fits(pack, knowing)
        if pack.product != product:
            refuse(f"the pack of {product!r}", f"one of {pack.product!r}")
        places[product] = f"knowledge/{product}.safetensors"
        contents[places[product]] = encode_pack(pack)
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        edgead=edgead.__version__,
        name=name,
        detector=detector,
        engines=tuple(engines),
        packs=places,
        default=default if default is not None else next(iter(packs), ""),
        golden=tuple(golden),
        files={
            member: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for member, data in sorted(contents.items())
        },
        normality=normality,
    )
    check_manifest(manifest)
    contents[MANIFEST] = _manifest_bytes(manifest)
    _check_listing({member: len(data) for member, data in contents.items()}, manifest, DEFAULT_LIMITS)
    if path.suffix == SUFFIX:
        with disk.new_file(path) as stream:
            write_zip(stream, sorted(contents.items()))
    else:
        with disk.new_folder(path, force=force) as folder:
            for member, data in sorted(contents.items()):
                target = folder / member
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    return open_bundle(path, verify=False)


def _manifest_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON that is known to read back; what would not is refused before anything is written."""
    try:
        data = canonical_json(manifest)
    except (ValueError, TypeError) as error:
        refuse("finite numbers and plain values in its manifest", str(error))
    # Reading turns whole numbers in float fields into floats, so that both spellings end as one.
    return canonical_json(parse_manifest(data))


def _check_listing(sizes: Mapping[str, int], manifest: Manifest, limits: Limits) -> None:
    """Compare the files that are there with those that the manifest lists."""
    present, listed = sizes.keys() - {MANIFEST}, manifest.files.keys()
    if len(listed) > limits.bundle_files or sum(sizes.values()) > limits.bundle_bytes:
        refuse(
            f"at most {limits.bundle_files} files and {limits.bundle_bytes} bytes",
            f"{len(listed)} files and {sum(sizes.values())} bytes",
        )
    for name in sorted(listed - present):
        refuse(f"the file {name!r} that its manifest lists", "no such file")
    for name in sorted(present - listed):
        raise BundleError(
            wanted=f"a bundle without files that its manifest does not list (but for '{COMPILED}/')",
            got=f"{name[:300]!r}",
            next_step="Remove that file, or copy or download the bundle again.",
        )
    for name, record in sorted(manifest.files.items()):
        if sizes[name] != record.size:
            refuse(f"{record.size} bytes in {name!r}", f"{sizes[name]}")


def _check_content(name: str, record: FileRecord, size: int, digest: str) -> None:
    if size != record.size:
        refuse(f"{record.size} bytes in {name!r}", f"{'more' if size > record.size else size}")
    if digest != record.sha256:
        refuse(f"SHA-256 {record.sha256[:12]}... of {name!r}", f"{digest[:12]}...: it was edited or damaged")


def _unknown(what: str, name: str, known: Sequence[str]) -> BundleError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return BundleError(
        wanted=f"{what} named {name[:200]!r} in the bundle",
        got=f"only {', '.join(known[:20])}" + (", ..." if len(known) > 20 else ""),
        next_step=f"Did you mean {' or '.join(map(repr, near))}?" if near else "Name one of these.",
    )


def _unreadable(name: str, error: EdgeadError) -> BundleError:
    return BundleError(wanted=f"a readable {name!r} in the bundle", got=str(error), next_step="Export the bundle anew.")


__all__ = ["SUFFIX", "Bundle", "golden_files", "open_bundle", "write_bundle"]
