"""Photographs of good parts -> a fitted memory-bank detector."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead import __version__
from edgead.detector_file import FittedDetector, detector_spec, read_detector, write_detector
from edgead.runtime.files import refuse_existing
from edgead.runtime.image import list_images, prepare, tile_count
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.progress import Progress
from edgead.runtime.provenance import Provenance
from edgead.runtime.provenance_file import provenance_path, write_provenance
from edgead.runtime.spec import Calibration, DetectorSpec, Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.banks import BankBuilder, greedy_coreset
from edgead.server_side.calibration import calibrate, statement
from edgead.server_side.detectors.memory_bank import (
    METHOD,
    MemoryBankHead,
    MemoryBankTrunk,
    memory_bank_ports,
    nearest_rows,
    patch_grid,
    receptive_sigma,
)
from edgead.server_side.painting import paint_defect
from edgead.server_side.photographs import (
    LeftOut,
    defect_mask,
    enough,
    leave_out_unreadable,
    left_out_facts,
    read_photograph,
)
from edgead.server_side.sources import Origins, patch_places, provenance_of, source_image

HOLD_OUT_FROM = 25
"""From so many images on a fifth is held out for calibration; below, each image is held out in its turn."""
GOLDEN = 4
"""Golden frames of normal parts; as many again get a painted defect, so both verdicts are tested."""
FEWEST_ROWS, MOST_ROWS = 2_000, 10_000
UNUSUAL = 3
"""Held-out images with the highest scores that the card names."""
MOST_ANOMALOUS_ROWS = 2_000
"""Rows of the anomalous bank; more patches than that are represented by their coreset."""
DEFAULT_PREPROCESSING = Preprocessing(256, 256)


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Attributes:
        backbone: see `edgead.server_side.backbones.load_backbone`.
        backbone_weights: local weights file for it.
        layers: which of its layers; its own choice if None.
        preprocessing: what happens to a frame before the trunk.
        rows: rows of the bank; 1 % of all patches, between 2,000 and 10,000, if None.
        neighbours: the paper's neighbour re-weighting (its b, 9 in the authors' code); 0 leaves it out.
        false_alarm_rate: wanted share of normal frames called NG.
        product: name of the product in the knowledge pack.
        seed: makes everything repeatable.
        skip_unreadable: leave pictures out that cannot be read, and name them in the card, instead of failing.
    """

    backbone: str = "embedded"
    backbone_weights: Path | None = None
    layers: tuple[str | int, ...] | None = None
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    rows: int | None = None
    neighbours: int = 0
    false_alarm_rate: float = 0.01
    product: str = "part"
    seed: int = 0
    skip_unreadable: bool = False


@dataclass(frozen=True, eq=False)
class Learned:
    """A detector that was fitted and not yet written: what `write_detector` takes, and where the rows are from."""

    trunk: MemoryBankTrunk
    head: MemoryBankHead
    spec: DetectorSpec
    pack: Pack
    golden: NDArray[np.uint8]
    card: dict[str, Any]
    provenance: Provenance


def fit_memory_bank(
    normal: Path | Sequence[Path],
    output: Path,
    options: FitOptions | None = None,
    *,
    anomalous: Sequence[tuple[Path, Path | None]] = (),
    force: bool = False,
) -> FittedDetector:
    """Fit PatchCore's method on photographs of good parts and write the fitted-detector file, and its provenance.

    Args:
        normal, options, anomalous: see `learn_memory_bank`.
        output: the `.detector` file to write.
        force: replace an existing file.

    Raises:
        OutputExistsError: the output exists and `force` is false.
        StorageError: the file system refused.
        EdgeadError: see `learn_memory_bank`.
    """
    refuse_existing(output, force)
    learned = learn_memory_bank(normal, options, anomalous=anomalous)
    write_detector(
        output,
        trunk=learned.trunk,
        head=learned.head,
        spec=learned.spec,
        pack=learned.pack,
        golden=learned.golden,
        card=learned.card,
        force=force,
    )
    write_provenance(provenance_path(output), learned.provenance)
    return read_detector(output)


def learn_memory_bank(
    normal: Path | Sequence[Path],
    options: FitOptions | None = None,
    *,
    anomalous: Sequence[tuple[Path, Path | None]] = (),
) -> Learned:
    """Fit PatchCore's method on photographs of good parts.

    Memory: the pool of the coreset (see `BankBuilder`) and the patches of the anomalous pictures.

    Args:
        normal: a folder of images, or the images.
        options: see `FitOptions`.
        anomalous: pictures of defects and masks of where they are; the patches there become the anomalous
            bank. Of a picture without a mask (None) it is the patches that are unlike every held-out normal.

    Raises:
        InputError: fewer than 2 (readable) images, or a mask that does not fit its picture.
        ImageError: a file is no picture (and `skip_unreadable` is not set), or the region of interest is not inside it.
        BackboneError: unknown backbone or weights.
    """
    chosen = options if options is not None else FitOptions()
    paths = list_images(normal) if isinstance(normal, Path) else list(normal)
    unreadable: list[LeftOut] = []
    if chosen.skip_unreadable:
        paths, anomalous, unreadable = leave_out_unreadable(paths, anomalous)
    enough(paths, unreadable)
    work = _Work(chosen)
    order = np.random.default_rng(chosen.seed).permutation(len(paths))
    held = max(5, round(0.2 * len(paths))) if len(paths) >= HOLD_OUT_FROM else 0
    calibration_paths = [paths[index] for index in sorted(order[:held])] if held else paths
    bank_paths = [paths[index] for index in sorted(order[held:])] if held else paths

    for image_path, mask_path in anomalous:
        if mask_path is not None:  # a mistake there is better told before minutes of work
            defect_mask(read_photograph(mask_path), mask_path, image_path, read_photograph(image_path))
    bank, patches = work.bank(bank_paths)
    sources = patches // work.frame_patches
    left_out = None if held else sources
    known = 0.0
    if any(mask is None for _, mask in anomalous):
        known = work.farthest(calibration_paths, bank, left_out)
    defects, defect_patches = work.anomalous_rows(anomalous, bank, known)
    scored, scores, maxima = work.held_out(calibration_paths, bank, defects, left_out)
    calibration = calibrate(scores, maxima, false_alarm_rate=chosen.false_alarm_rate)
    pack = new_pack(
        product=chosen.product,
        fingerprint=work.spec.fingerprint,
        calibration=calibration,
        arrays={
            "bank.normal": bank,
            "bank.anomalous": defects,
            "anomalous.weight": np.ones(1, np.float32),
        },
    )
    provenance = provenance_of(
        pack,
        fingerprint=work.spec.fingerprint,
        made={
            "bank.normal": (pack.ids("bank.normal"), work.origins(bank_paths, patches)),
            "bank.anomalous": (
                pack.ids("bank.anomalous"),
                work.origins([image for image, _ in anomalous], defect_patches),
            ),
        },
    )
    golden = work.golden(calibration_paths)
    card = work.card(paths, bank, defects, calibration, held, unreadable)
    # One bad part among the good ones raises the threshold; these are the first to look at.
    highest = np.argsort(-scores, kind="stable")[:UNUSUAL]
    card["most_unusual"] = [{"image": scored[i].name, "score": float(scores[i])} for i in highest]
    return Learned(work.trunk, work.head, work.spec, pack, golden, card, provenance)


class _Work:
    """The trunk and head of one fit, and the passes over the images."""

    def __init__(self, options: FitOptions) -> None:
        self.options = options
        size = options.preprocessing
        backbone = load_backbone(
            options.backbone, weights=options.backbone_weights, layers=options.layers, seed=options.seed
        )
        self.trunk = MemoryBankTrunk(backbone).eval()
        grid, dimensions = patch_grid(self.trunk, size)
        self.dimensions = dimensions
        self.frame_patches = grid[0] * grid[1] * tile_count(size)
        self.head = MemoryBankHead(
            grid,
            (size.height, size.width),
            sigma=receptive_sigma(min(size.height, size.width)),
            neighbours=options.neighbours,
        ).eval()
        features, knowledge, outputs = memory_bank_ports(size, grid, dimensions, options.neighbours)
        self.spec: DetectorSpec = detector_spec(
            self.trunk,
            method=METHOD,
            preprocessing=size,
            features=features,
            knowledge=knowledge,
            outputs=outputs,
        )

    def embed(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Patches of a source frame, float32 [T, P, D]."""
        with torch.inference_mode():
            prepared = torch.from_numpy(prepare(frame, self.options.preprocessing))
            return np.asarray(self.trunk(prepared).numpy())

    def origins(self, paths: Sequence[Path], patches: NDArray[np.int64]) -> Origins:
        """Where rows are from, by the numbers of their patches: those of one frame after the other."""
        index, inner = np.divmod(patches, self.frame_patches)
        places = patch_places(tile_count(self.options.preprocessing), self.head.grid)
        return Origins([source_image(path) for path in paths], index, places[inner])

    def bank(self, paths: Sequence[Path]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The normal rows, float32 [N, D], and the numbers of their patches: see `origins`."""
        expected = len(paths) * self.frame_patches
        rows = self.options.rows or min(MOST_ROWS, max(FEWEST_ROWS, expected // 100))
        rows = max(rows, self.options.neighbours)
        builder = BankBuilder(rows, expected, seed=self.options.seed)
        with Progress("reading normal images", len(paths)) as progress:
            for place, path in enumerate(progress.track(paths)):
                numbers = place * self.frame_patches + np.arange(self.frame_patches)
                builder.add(self.embed(read_photograph(path)).reshape(-1, self.dimensions), numbers)
        bank, patches = builder.build()
        # Rows in the order of their images: neighbours in the file are neighbours in the world, which
        # compresses better and makes the pack independent of the order of selection.
        order = np.argsort(patches // self.frame_patches, kind="stable")
        return bank[order], patches[order]

    def anomalous_rows(
        self, samples: Sequence[tuple[Path, Path | None]], bank: NDArray[np.float32], known: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Patches of defects, float32 [M, D]: those under a mask, or farther than `known` from the bank; and their
        numbers, see `origins`."""
        found, numbers = [np.zeros((0, self.dimensions), np.float32)], [np.zeros(0, np.int64)]
        for place, (image_path, mask_path) in enumerate(samples):
            frame = read_photograph(image_path)
            rows = self.embed(frame)
            if mask_path is None:
                # The rest of such a picture is normal: in this bank it would raise good parts.
                share = self.distances(rows, bank)
                inside = share > known
            else:
                marked = defect_mask(read_photograph(mask_path), mask_path, image_path, frame)
                mask = prepare(marked, self.options.preprocessing)[..., 0]
                share = _patch_share(mask.astype(np.float32) / 255.0, self.head.grid)
                inside = share >= 0.5
            if not inside.any():  # a defect smaller than half a patch, or one that looks normal
                inside = share == share.max()
            found.append(rows[inside])
            numbers.append(place * self.frame_patches + np.flatnonzero(inside))
        rows, patches = np.concatenate(found), np.concatenate(numbers)
        if len(rows) > MOST_ANOMALOUS_ROWS:
            chosen = np.sort(greedy_coreset(rows, MOST_ANOMALOUS_ROWS, seed=self.options.seed))
            rows, patches = rows[chosen], patches[chosen]
        return rows, patches

    def distances(self, patches: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float32]:
        """Distance of each patch [T, P, D] to its nearest bank row: [T, P]."""
        with torch.inference_mode():
            count = torch.tensor([len(bank)], dtype=torch.int32)
            return np.asarray(nearest_rows(torch.from_numpy(patches), torch.from_numpy(bank), count)[0].numpy())

    def farthest(self, paths: Sequence[Path], bank: NDArray[np.float32], sources: NDArray[np.int64] | None) -> float:
        """Largest distance of any held-out patch to the bank; with `sources` as for `held_out`."""
        largest = 0.0
        for place, path in enumerate(paths):
            rows = bank if sources is None else bank[sources != place]
            if len(rows):
                largest = max(largest, float(self.distances(self.embed(read_photograph(path)), rows).max()))
        return largest

    def held_out(
        self,
        paths: Sequence[Path],
        bank: NDArray[np.float32],
        anomalous: NDArray[np.float32],
        sources: NDArray[np.int64] | None,
    ) -> tuple[list[Path], NDArray[np.float32], NDArray[np.float32]]:
        """Images, their scores and map maxima [n]; with `sources`, each is scored without its own rows."""
        scored, scores, maxima = [], [], []
        with Progress("calibrating on held-out images", len(paths)) as progress:
            for place, path in enumerate(progress.track(paths)):
                rows = bank if sources is None else bank[sources != place]
                if len(rows) <= self.options.neighbours:
                    continue
                score, anomaly_map = self.score(self.embed(read_photograph(path)), rows, anomalous)
                scored.append(path)
                scores.append(score)
                maxima.append(float(anomaly_map.max()))
        return scored, np.array(scores, np.float32), np.array(maxima, np.float32)

    def score(
        self, patches: NDArray[np.float32], bank: NDArray[np.float32], anomalous: NDArray[np.float32]
    ) -> tuple[float, NDArray[np.float32]]:
        """Image score and anomaly maps [T, H, W] of patches [T, P, D], by the head itself."""
        defects = anomalous if len(anomalous) else np.zeros((1, self.dimensions), np.float32)
        with torch.inference_mode():
            score, anomaly_map, _, _ = self.head(
                torch.from_numpy(patches),
                torch.from_numpy(bank),
                torch.tensor([len(bank)], dtype=torch.int32),
                torch.from_numpy(defects),
                torch.tensor([len(anomalous)], dtype=torch.int32),
                torch.ones(1),
            )
        return float(score.max()), np.asarray(anomaly_map.numpy())

    def golden(self, paths: Sequence[Path]) -> NDArray[np.uint8]:
        """Engine-sized frames of normals, and the same with painted defects."""
        rng = np.random.default_rng(self.options.seed)
        frames = []
        for place, path in enumerate(paths[:GOLDEN]):
            frame = prepare(read_photograph(path), self.options.preprocessing)[0]
            kind = ("scratch", "stain", "crack", "hole")[place % 4]
            painted, _ = paint_defect(frame, kind, contrast=0.9, rng=rng)
            frames += [frame, painted]
        return np.stack(frames)

    def card(
        self,
        paths: Sequence[Path],
        bank: NDArray[np.float32],
        anomalous: NDArray[np.float32],
        calibration: Calibration,
        held: int,
        unreadable: Sequence[LeftOut],
    ) -> dict[str, Any]:
        """Facts for the model card: JSON-like, without paths of this machine."""
        names = hashlib.sha256("\n".join(path.name for path in paths).encode()).hexdigest()
        return {
            "method": METHOD,
            "paper": "Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022",
            "backbone": self.options.backbone,
            "images": {
                "all": len(paths),
                "held_out": held,
                "left_out_unreadable": len(unreadable),
                "names_sha256": names,
            },
            **({"left_out": left_out_facts(unreadable)} if unreadable else {}),
            "bank": {
                "normal_rows": len(bank),
                "anomalous_rows": len(anomalous),
                "dimensions": self.dimensions,
            },
            "neighbours": self.options.neighbours,
            "calibration": statement(calibration),
            "seed": self.options.seed,
            "made_with": {
                "edgead": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }


def _patch_share(mask: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    """How much of each patch a mask [T, H, W] of 0..1 covers: [T, P]."""
    rows = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[:, None], grid)
    return np.asarray(rows.flatten(1).numpy())
