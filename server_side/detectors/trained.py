"""What the trained detectors share: their options, and photographs as arrays, split into parts that never mix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import Frame
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.learned import split_normals
from edgead.server_side.photographs import defect_mask, enough, read_photograph

Samples = Sequence[tuple[Path, Path | None]]
DEFAULT_PREPROCESSING = Preprocessing(256, 256)
_SEPARATE = 20
"""Held-out photographs from which on early stopping and calibration have a half each."""


@dataclass(frozen=True)
class TrainedOptions:
    """How to train a detector.

    Attributes:
        backbone: see `edgead.server_side.backbones.load_backbone`.
        backbone_weights: local weights file for it.
        layers: which of its layers; its own choice if None.
        preprocessing: what happens to a frame before the trunk.
        steps: at most; the method's own number if None.
        batch: normals in a step.
        learning_rate: the method's own if None.
        held_out: share of the normals that nothing is trained on: they stop training early and set the threshold.
        patience: validations without gain after which training ends.
        false_alarm_rate: wanted share of normal frames called NG.
        product: name of the product in the knowledge pack.
        seed: makes everything repeatable.
        device: where photographs are embedded and networks are trained, see `edgead.server_side.devices`; thresholds
            are set on the CPU in any case.
    """

    backbone: str = "embedded"
    backbone_weights: Path | None = None
    layers: tuple[str | int, ...] | None = None
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    steps: int | None = None
    batch: int = 32
    learning_rate: float | None = None
    held_out: float = 0.2
    patience: int = 5
    false_alarm_rate: float = 0.01
    product: str = "part"
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, eq=False)
class Anomalies:
    """Pictures of anomalies, generated or real, as engine-sized frames.

    Attributes:
        frames: uint8 [M, H, W, 3].
        masks: bool [M, H, W], where the anomaly is; all False where nobody knows.
        known: bool [M], whether there is a mask.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    known: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, places: NDArray[np.intp]) -> Anomalies:
        """Some of them."""
        return Anomalies(self.frames[places], self.masks[places], self.known[places])


@dataclass(frozen=True, eq=False)
class Data:
    """Photographs of one fit.

    Attributes:
        train: uint8 [N, H, W, 3] of normals to learn from.
        stop: uint8 [V, H, W, 3] of normals that stop training early.
        calibration: photographs that set the threshold; nothing was trained on them.
        stop_anomalies: anomalies that nothing is trained on.
        anomalies: to learn from.
        shared: `stop` and `calibration` are the same photographs, as there are few.
        digest: SHA-256 over all frames, for checkpoints.
    """

    train: NDArray[np.uint8]
    stop: NDArray[np.uint8]
    calibration: tuple[Path, ...]
    anomalies: Anomalies
    stop_anomalies: Anomalies
    shared: bool
    digest: str

    def facts(self) -> dict[str, Any]:
        """For the card."""
        return {
            "trained_on": len(self.train),
            "stopped_by": len(self.stop),
            "calibrated_on": len(self.calibration),
            "stop_and_calibration_are_one": self.shared,
            "anomalies": len(self.anomalies) + len(self.stop_anomalies),
            "anomalies_with_masks": int(self.anomalies.known.sum() + self.stop_anomalies.known.sum()),
        }


def load_data(normal: Sequence[Path], options: TrainedOptions, anomalous: Samples = ()) -> Data:
    """Read photographs and split them by the seed: to learn from, to stop by, to calibrate on.

    Tiles of a photograph always stay in one part.

    Args:
        normal: photographs of good parts.
        options: `preprocessing`, `held_out` and `seed` decide.
        anomalous: (picture, mask or None) of anomalies.

    Raises:
        InputError: fewer than 2 normals, or a mask that does not fit.
        ImageError: a file that is no picture.
        StorageError: a file that cannot be read.
    """
    enough(normal)
    rng = np.random.default_rng(options.seed)
    learned, stop, calibration = divided(len(normal), options.held_out, rng)
    with Progress("reading photographs", len(normal) + len(anomalous)) as progress:

        def frames(places: NDArray[np.intp]) -> NDArray[np.uint8]:
            found = []
            for place in sorted(places.tolist()):
                found.append(prepare(read_photograph(normal[place]), options.preprocessing))
                progress.advance()
            return np.concatenate(found)

        train, stopping = frames(learned), frames(stop)
        anomalies, pictures = _anomalies(anomalous, options.preprocessing, progress)
    shown = np.unique(pictures)
    apart = np.zeros(len(anomalies), bool)
    if len(shown) > 1:
        apart = np.isin(pictures, rng.permutation(shown)[: max(1, round(options.held_out * len(shown)))])
    digest = hashlib.sha256()
    for array in (train, stopping, anomalies.frames, anomalies.masks, anomalies.known, apart):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Data(
        train,
        stopping,
        tuple(normal[place] for place in sorted(calibration.tolist())),
        anomalies.part(np.flatnonzero(~apart)),
        anomalies.part(np.flatnonzero(apart)),
        np.array_equal(stop, calibration),
        digest.hexdigest(),
    )


def divided(
    count: int, held_out: float, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Numbers of the photographs to learn from, to stop by and to calibrate on; of few, the last two are the same.

    Args:
        count: photographs, at least 2.
        held_out: share that is not learned from.
        rng: decides; it is advanced.
    """
    order = rng.permutation(count)
    held = min(max(1, round(held_out * count)), count - 1)
    if held < _SEPARATE:
        return order[held:], order[:held], order[:held]
    half = (held + 1) // 2
    return order[held:], order[half:held], order[:half]


def _anomalies(
    samples: Samples, preprocessing: Preprocessing, progress: Progress
) -> tuple[Anomalies, NDArray[np.intp]]:
    """The pictures' tiles, and int [M] of which picture each is."""
    height, width = preprocessing.height, preprocessing.width
    frames: list[Frame] = [np.zeros((0, height, width, 3), np.uint8)]
    masks: list[NDArray[np.bool_]] = [np.zeros((0, height, width), np.bool_)]
    known = [np.zeros(0, bool)]
    pictures = [np.zeros(0, np.intp)]
    for place, (path, mask_path) in enumerate(samples):
        picture = read_photograph(path)
        tiles = prepare(picture, preprocessing)
        covered: NDArray[np.bool_] = np.zeros(tiles.shape[:3], np.bool_)
        if mask_path is not None:
            mask = defect_mask(read_photograph(mask_path), mask_path, path, picture)
            covered = prepare(mask, preprocessing)[..., 0] > 0
            # Of a tiled frame only the tiles with the anomaly show one.
            tiles, covered = tiles[covered.any((1, 2))], covered[covered.any((1, 2))]
        frames.append(tiles)
        masks.append(covered)
        known.append(np.full(len(tiles), mask_path is not None))
        pictures.append(np.full(len(tiles), place, np.intp))
        progress.advance()
    found = Anomalies(np.concatenate(frames), np.concatenate(masks), np.concatenate(known))
    return found, np.concatenate(pictures)


def split_held_out(normal: Sequence[Path], options: TrainedOptions) -> tuple[list[Path], list[Path]]:
    """(photographs to take statistics of, those to calibrate on), for methods that nothing is trained in.

    Raises:
        InputError: fewer than 2 normals.
    """
    enough(normal)
    held = min(max(1, round(options.held_out * len(normal))), len(normal) - 1)
    return split_normals(normal, len(normal) - held, options.seed)


def refuse_anomalies(method: str, anomalous: Samples) -> None:
    """Refuse pictures of anomalies that a method would do nothing with.

    Raises:
        InputError: there are some.
    """
    if anomalous:
        raise InputError(
            wanted=f"good parts alone for {method}",
            got=f"{len(anomalous)} pictures of anomalies",
            next_step="Leave --anomalous out, or name a method that learns from them, such as deep-sad.",
        )


__all__ = [
    "Anomalies",
    "Data",
    "Samples",
    "TrainedOptions",
    "divided",
    "load_data",
    "refuse_anomalies",
    "split_held_out",
]
