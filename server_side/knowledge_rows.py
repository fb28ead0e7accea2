"""Rows for memory banks, made by the bundle's own engine, and the scores that changed banks give. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import EngineError, InputError, storage_errors
from edgead.runtime.evidence import patch_grid
from edgead.runtime.image import Frame, prepare, read_image, tile_count
from edgead.runtime.inspection import Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, is_bank
from edgead.runtime.progress import Progress
from edgead.runtime.provenance import SourceImage
from edgead.runtime.spec import DetectorSpec
from edgead.server_side.coreset import nearest_distance
from edgead.server_side.photographs import defect_mask
from edgead.server_side.sources import Origins, patch_places, source_image

ANOMALOUS = "bank.anomalous"
"""Banks whose names begin so hold rows of defects."""

Rows = NDArray[np.float32]
Samples = Sequence[tuple[Path, Path | None]]


@dataclass(frozen=True, eq=False)
class Offered:
    """Rows that may go into a bank.

    Attributes:
        rows: float32 [n, D].
        origins: where each came from.
    """

    rows: Rows
    origins: Origins


def banks_of(detector: DetectorSpec, *, anomalous: bool, wanted: str | None = None) -> tuple[str, ...]:
    """The banks of a detector that rows of normal pictures, or of defects, go into.

    Args:
        detector: whose head takes them.
        anomalous: those of defects.
        wanted: only this one.

    Raises:
        InputError: no such bank.
    """
    every = [port.name for port in detector.knowledge if is_bank(port.name)]
    found = [name for name in every if name.startswith(ANOMALOUS) == anomalous and wanted in (None, name)]
    if not found:
        kind = "anomalous" if anomalous else "normal"
        raise InputError(
            wanted=f"a bank of {kind} rows{'' if wanted is None else f' named {wanted!r}'} in this detector",
            got=f"banks {', '.join(every) or 'none'}",
            next_step="Name one of these with --bank, or use a detector that has such a bank.",
        )
    return tuple(found)


def feature_of(detector: DetectorSpec, bank: str) -> str:
    """The trunk's output whose patches are the rows of a bank: the only one of its dimension, or the only one of
    those that ends with the same word (`windows.2` and `bank.normal.2`).

    Raises:
        InputError: the detector does not tell.
    """
    port = next(port for port in detector.knowledge if port.name == bank)
    fits = [item.name for item in detector.features if len(item.shape) == 3 and item.shape[2] == port.shape[1]]
    last = [name for name in fits if name.rpartition(".")[2] == bank.rpartition(".")[2]]
    for found in (fits, last):
        if len(found) == 1:
            return found[0]
    raise InputError(
        wanted=f"one feature of the trunk that the rows of {bank!r} are made of",
        got=", ".join(fits) or "none of that dimension",
        next_step="Make the rows yourself and add them with --rows FILE.npy --bank " + bank,
    )


def patches_of(inspector: Inspector, frame: Frame, feature: str) -> Rows:
    """Patches of a picture, float32 [T, P, D].

    Raises:
        EngineError: the engine failed, gave no numbers, or is one of 8 bits.
        ImageError: the region of interest is not inside the picture.
    """
    rows = inspector.embed(frame)[feature].astype(np.float32)
    if not np.isfinite(rows).all():
        raise EngineError(
            wanted="numbers for each patch", got="NaN or infinity", next_step="Check the picture and the engine."
        )
    return rows


def normal_rows(inspector: Inspector, paths: Sequence[Path], banks: Sequence[str]) -> dict[str, Offered]:
    """All patches of normal pictures, for each bank.

    Raises:
        InputError, EngineError, ImageError, StorageError: see `feature_of`, `patches_of` and `read_image`.
    """
    whole = {bank: _Collected(inspector, bank) for bank in banks}
    with Progress("embedding normal images", len(paths)) as progress:
        for path in progress.track(paths):
            frame, image = read_image(path), source_image(path)
            for collected in whole.values():
                collected.add(patches_of(inspector, frame, collected.feature), None, image)
    return {bank: collected.offered() for bank, collected in whole.items()}


def anomalous_rows(
    inspector: Inspector, samples: Samples, banks: Sequence[str], known: dict[str, float], pack: Pack
) -> dict[str, Offered]:
    """Patches of defects, for each bank: those under a mask, or unlike every held-out normal where there is none.

    A defect smaller than half a patch is the patch that it covers most.

    Args:
        inspector: of the bundle.
        samples: pictures with their masks, or None.
        banks: of defects.
        known: for each bank, how far patches of good parts come to lie from the normal rows at most.
        pack: the knowledge so far, for its normal rows.

    Raises:
        InputError: a mask that does not fit its picture, or marks nothing; or a missing normal bank.
        EngineError, ImageError, StorageError: see `patches_of` and `read_image`.
    """
    whole = {bank: _Collected(inspector, bank) for bank in banks}
    with Progress("embedding anomalous images", len(samples)) as progress:
        for path, mask_path in progress.track(samples):
            frame, image = read_image(path), source_image(path)
            mask = None if mask_path is None else defect_mask(read_image(mask_path), mask_path, path, frame)
            for bank, collected in whole.items():
                rows = patches_of(inspector, frame, collected.feature)
                if mask is not None:
                    share = _shares(mask, inspector, collected.grid)
                    inside = share >= 0.5
                else:
                    normal = np.asarray(pack.arrays[normal_of(pack, bank)], np.float32)
                    share = nearest_distance(rows.reshape(-1, rows.shape[-1]), normal)
                    inside = share > known[bank]
                collected.add(rows, inside if inside.any() else share == share.max(), image)
    return {bank: collected.offered() for bank, collected in whole.items()}


def file_rows(path: Path, bank: str, dimensions: int) -> Offered:
    """Rows from a `.npy` file: float [n, D], made by the trunk that the bank belongs to.

    Raises:
        InputError: not such a file, another shape or dtype, or not finite.
        StorageError: it cannot be read.
    """
    try:
        with storage_errors(path, "to read rows"), path.open("rb") as stream:
            rows = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(wanted=f"rows as a .npy file at {path}", got=f"something else ({error})") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != dimensions:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "several arrays"
        raise InputError(
            wanted=f"rows for {bank!r} as float [n, {dimensions}] in {path}",
            got=got,
            next_step="Make them with Inspector.embed of this bundle.",
        )
    plain = rows.astype(np.float32) + np.float32(0)  # packs want +0.0
    if not len(plain) or not np.isfinite(plain).all():
        raise InputError(wanted=f"at least one row, all finite, in {path}", got=f"{len(plain)} rows, NaN or infinity")
    places = np.stack([np.full(len(plain), -1), np.arange(len(plain)), np.zeros(len(plain))], axis=1).astype(np.int32)
    return Offered(plain, Origins([source_image(path)], np.zeros(len(plain), np.int64), places))


def normal_of(pack: Pack, bank: str) -> str:
    """The normal bank that belongs to a bank of defects: the one of the same name but for that word.

    Raises:
        InputError: the pack has none.
    """
    name = bank.replace(ANOMALOUS, "bank.normal", 1)
    if name not in pack.banks:
        raise InputError(
            wanted=f"a mask NAME_mask.png for each picture: nothing normal to compare {bank!r} with",
            got="a picture without one",
            next_step="Draw the masks.",
        )
    return name


def masked_patches(inspector: Inspector, mask: NDArray[np.uint8], bank: str) -> NDArray[np.bool_]:
    """Which patches of a bank's feature lie under a mask: bool [T * P], at least one."""
    share = _shares(mask, inspector, _Collected(inspector, bank).grid)
    inside = share >= 0.5
    return inside if inside.any() else share == share.max()


class Judge:
    """Scores held-out normals and known defects under one pack after another, by the bundle's engine.

    Args:
        inspector: of the bundle. Suppression by sentences must be eager: a threshold is set on what it leaves.
        normals: held-out pictures of good parts.
        defects: pictures that must alarm; may be empty.
    """

    def __init__(self, inspector: Inspector, normals: Sequence[Path], defects: Sequence[Path] = ()) -> None:
        self.inspector, self.normals, self.defects = inspector, normals, defects

    def held_out(self, pack: Pack) -> tuple[Rows, Rows | None]:
        """Scores [n] and map maxima [n] (None without maps) of the held-out normals.

        Raises:
            EngineError: a picture was not answered.
            KnowledgeError: the pack does not fit the engine.
        """
        found = list(self._inspected(pack, self.normals, "held-out normals"))
        maxima = [float(item.anomaly_map.max()) for item in found if item.anomaly_map is not None]
        scores = np.array([item.score for item in found], np.float32)
        return scores, np.array(maxima, np.float32) if len(maxima) == len(found) else None

    def known(self, pack: Pack) -> Rows:
        """Scores [m] of the known defects.

        Raises:
            EngineError, KnowledgeError: see `held_out`.
        """
        found = self._inspected(pack, self.defects, "known defects")
        return np.array([item.score for item in found], np.float32)

    def farthest(self, pack: Pack, bank: str, feature_bank: str | None = None) -> Rows:
        """For each held-out normal, the largest distance of its patches to the rows of a normal bank: [n]."""
        feature = feature_of(self.inspector.spec, feature_bank or bank)
        rows, found = np.asarray(pack.arrays[bank], np.float32), []
        for path in self.normals:
            patches = patches_of(self.inspector, read_image(path), feature)
            found.append(float(nearest_distance(patches.reshape(-1, patches.shape[-1]), rows).max()))
        return np.array(found, np.float32)

    def milliseconds(self, pack: Pack, runs: int = 15) -> float:
        """Median time of a whole frame under a pack, after a few that are not counted."""
        self.inspector.swap(pack)
        frame = read_image(self.normals[0])
        times = [self.inspector.inspect(frame, product=pack.product).timings["total"] for _ in range(runs + 3)]
        return float(np.median(times[3:]))

    def _inspected(self, pack: Pack, paths: Sequence[Path], label: str) -> Iterator[Inspection]:
        self.inspector.swap(pack)
        with Progress(f"inspecting {label}", len(paths)) as progress:
            for path in progress.track(paths):
                answer = self.inspector.inspect(read_image(path), product=pack.product)
                if answer.verdict is Verdict.NOT_INSPECTED:
                    raise EngineError(
                        wanted=f"an answer for {path}",
                        got=f"none: {answer.reason}",
                        next_step="Check the picture, and the engine with: edgead bench BUNDLE",
                    )
                yield answer


class _Collected:
    """Rows of one bank as they come in."""

    def __init__(self, inspector: Inspector, bank: str) -> None:
        spec = inspector.spec
        self.feature = feature_of(spec, bank)
        patches = next(port.shape[1] for port in spec.features if port.name == self.feature)
        grid = patch_grid(int(patches), spec.preprocessing)
        if grid is None:
            raise InputError(
                wanted=f"a grid of patches for {bank!r}",
                got=f"{patches} of them, which make none",
                next_step="Make the rows yourself and add them with --rows FILE.npy",
            )
        self.grid = grid
        self.places = patch_places(tile_count(spec.preprocessing), grid)
        self.rows: list[Rows] = []
        self.where: list[NDArray[Any]] = []
        self.index: list[int] = []
        self.images: list[SourceImage] = []

    def add(self, rows: Rows, inside: NDArray[np.bool_] | None, image: SourceImage) -> None:
        flat = rows.reshape(-1, rows.shape[-1])
        chosen = np.arange(len(flat)) if inside is None else np.flatnonzero(inside)
        self.rows.append(flat[chosen])
        self.where.append(self.places[chosen])
        self.index += [len(self.images)] * len(chosen)
        self.images.append(image)

    def offered(self) -> Offered:
        rows = np.concatenate(self.rows) + np.float32(0)  # packs want +0.0
        return Offered(rows, Origins(self.images, np.array(self.index, np.int64), np.concatenate(self.where)))


def _shares(mask: NDArray[np.uint8], inspector: Inspector, grid: tuple[int, int]) -> Rows:
    """How much of each patch a mask covers: float32 [T * P]."""
    tiles = prepare(mask, inspector.spec.preprocessing)[..., 0].astype(np.float32) / 255.0
    rows, columns = grid
    return np.stack([cv2.resize(tile, (columns, rows), interpolation=cv2.INTER_AREA) for tile in tiles]).reshape(-1)
