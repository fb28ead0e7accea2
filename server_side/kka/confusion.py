"""The confusion evaluator of a run: Deep SAD over the normals and the anomalies so far, in folds.

KKA (arXiv 2502.14880), section on confusion: a detector is trained as Deep SAD with the normals and the generated
anomalies; what still lies nearer to its centre than some normals is what confuses it, the hard anomalies, equation (6).

Ours: an evaluator knows by heart what it was trained on. It finds any image easy that it was trained on, and anything
painted on a photograph hard that it was trained on as a normal. So photographs are divided into folds, with all that is
painted on them; those of a fold are judged, and its limit is set, by an evaluator that was trained on none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from edgead.runtime.errors import DetectorError, InputError
from edgead.runtime.image import read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.deep_sad import SphereNetwork, embedded, maps_of, train_sphere
from edgead.server_side.detectors.trained import Anomalies
from edgead.server_side.kka.alone import each_alone
from edgead.server_side.kka.choices import collect
from edgead.server_side.kka.config import Config
from edgead.server_side.kka.jobs import painted_image
from edgead.server_side.kka.records import Image, Normal
from edgead.server_side.kka.seams import Frame, seed_of
from edgead.server_side.kka.stages import hard_limit
from edgead.server_side.kka.work import WorkFolder

_VALIDATIONS_WITHOUT_GAIN = 8


@dataclass(frozen=True, eq=False)
class _Fold:
    network: SphereNetwork
    centre: torch.Tensor
    normal_distances: NDArray[np.float32]
    limit: float


class ConfusionEvaluator:
    """Measures images with the fold that was not trained on them; see `seams.Evaluator`.

    Sent to another process, it takes its folds along and loads the backbone there by its name.

    Args:
        backbone: frozen, for evaluation.
        size: side of the frames that the evaluator sees, in pixels.
        folds: the trained ones.
        places: image -> the fold that judges it; see `fold_of`.
    """

    def __init__(self, backbone: Backbone, size: int, folds: Sequence[_Fold], places: Mapping[str, int]) -> None:
        self._backbone = backbone
        self._preprocessing = Preprocessing(size, size)
        self._folds = tuple(folds)
        self._places = dict(places)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self._backbone.name, self._preprocessing.width, self._folds, self._places)

    @property
    def normal_distances(self) -> NDArray[np.float32]:
        """Of the held-out normals under every fold, in multiples of the fold's limit."""
        return np.concatenate([fold.normal_distances / np.float32(fold.limit) for fold in self._folds])

    def measure(self, names: Sequence[str], frames: Sequence[Frame]) -> list[tuple[float, float]]:
        """(squared distance, limit) of each frame.

        Args:
            names: ids of images of the run.
            frames: uint8 RGB [H, W, 3] of any size.
        """
        return each_alone(self._measured, list(zip(names, frames, strict=True)))

    def _measured(self, named: tuple[str, Frame]) -> tuple[float, float]:
        name, frame = named
        fold = self._folds[self._places[name]]
        maps = maps_of(self._backbone, prepare(frame, self._preprocessing))
        distance = (embedded(fold.network, maps) - fold.centre).square().sum(1)
        return float(distance[0]), fold.limit


def _unpacked(backbone: str, size: int, folds: Sequence[_Fold], places: Mapping[str, int]) -> ConfusionEvaluator:
    return ConfusionEvaluator(load_backbone(backbone).eval(), size, folds, places)


def folds_of_normals(config: Config, names: Sequence[str]) -> dict[str, int]:
    """Photograph -> the fold whose evaluator is not trained on it, all of about the same number.

    There are not more folds than photographs. With one fold the held-out share is in it (0) and the rest in none (-1).

    Args:
        config: of the run.
        names: ids of its normals, at least 2.
    """
    order = np.random.default_rng(seed_of(config.seed, "held-out normals")).permutation(len(names)).tolist()
    folds = min(config.judge.folds, len(names))
    held = min(max(1, round(config.judge.held_out * len(names))), len(names) - 1)
    return {names[at]: place % folds if folds > 1 else 0 if place < held else -1 for place, at in enumerate(order)}


def fold_of(image: Image, normals: Mapping[str, int]) -> int:
    """The fold that judges an image: that of the photograph it was painted on, or by its id where there is none.

    Args:
        image: its record.
        normals: see `folds_of_normals`.
    """
    folds = max(normals.values()) + 1
    if folds == 1:
        return 0
    return normals[image.normal] if image.normal else seed_of("fold", image.id) % folds


def fitted_evaluator(work: WorkFolder, number: int) -> ConfusionEvaluator:
    """The evaluator of a round: read if it was trained, else trained and kept.

    Args:
        work: the run; the images of the round are painted.
        number: of the round.

    Raises:
        InputError: normals that are not described, or a round before that is not complete.
        DetectorError: a kept evaluator that was changed.
        FailureError: training failed.
    """
    settings = work.config.judge
    described = [record.id for record in work.records(Normal)]
    if len(described) < 2:
        raise InputError(
            wanted=f"two normals or more in {work.path}",
            got=str(len(described)),
            next_step="Describe them with: edgead kka describe",
        )
    normals = folds_of_normals(work.config, described)
    places = {record.id: fold_of(record, normals) for at in range(number + 1) for record in work.records(Image, at)}
    if settings.evaluator == "first":
        number = 0
    backbone = load_backbone(work.config.backbone).eval()
    every = range(max(normals.values()) + 1)
    missing = [fold for fold in every if not _weights(work, number, fold).exists()]
    if missing:
        with work.timed("evaluator", number, len(missing)):
            data = _read(work, number, normals)
            for fold in missing:
                _train(work, number, fold, backbone, data)
    folds = [_load(work, number, fold, backbone) for fold in every]
    return ConfusionEvaluator(backbone, settings.size, folds, places)


@dataclass(frozen=True, eq=False)
class _Data:
    """Frames uint8 RGB [N, S, S, 3] at the evaluator's size, and int [N] of which fold each is."""

    normals: NDArray[np.uint8]
    folds_of_normals: NDArray[np.intp]
    anomalies: NDArray[np.uint8]
    folds_of_anomalies: NDArray[np.intp]


def _read(work: WorkFolder, number: int, folds: Mapping[str, int]) -> _Data:
    """The run's normals, and the anomalies that an evaluator of the round may train on."""
    settings = work.config.judge
    preprocessing = Preprocessing(settings.size, settings.size)
    normals = {record.id: record for record in work.records(Normal)}
    images = {record.id: record for at in range(number + 1) for record in work.records(Image, at)}
    before = [member.parent for member in collect(work, number - 1)] if number else []
    names = before + [
        record.id
        for record in work.records(Image, number)
        if not record.mask or record.visible >= settings.visible_floor
    ]
    with Progress(f"round {number}: reading for the evaluator", len(normals) + len(names)) as progress:

        def frame(picture: Frame) -> Frame:
            progress.advance()
            found: Frame = prepare(picture, preprocessing)[0]
            return found

        pictures = [frame(read_image(work.normals / normals[name].file)) for name in folds]
        painted = [frame(painted_image(work.path, images[name])) for name in names]
    empty = np.zeros((0, settings.size, settings.size, 3), np.uint8)
    return _Data(
        np.stack(pictures),
        np.array(list(folds.values()), np.intp),
        np.stack(painted) if painted else empty,
        np.array([fold_of(images[name], folds) for name in names], np.intp),
    )


def _train(work: WorkFolder, number: int, fold: int, backbone: Backbone, data: _Data) -> None:
    settings = work.config.judge
    train, held = data.normals[data.folds_of_normals != fold], data.normals[data.folds_of_normals == fold]
    # With one fold every anomaly is trained on; with more, what this fold judges is left out.
    one = data.folds_of_normals.max() == 0
    chosen = np.flatnonzero(one | (data.folds_of_anomalies != fold))
    # A tenth of them says when training has to end.
    stop = chosen[: len(chosen) // 10] if len(chosen) >= 20 else chosen[:0]
    rest = chosen[len(stop) :]
    checkpoint = work.round_folder(number) / f"evaluator-{fold}.training"
    network, centre, history = train_sphere(
        backbone,
        train,
        held,
        _as_anomalies(data.anomalies[rest]),
        _as_anomalies(data.anomalies[stop]),
        eta=settings.eta,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        patience=_VALIDATIONS_WITHOUT_GAIN,
        # The same start in every round, so that rounds differ by their anomalies alone.
        seed=seed_of(work.config.seed, "evaluator", fold),
        identity={"config": work.config.digest, "round": number, "fold": fold, "images": [len(train), len(rest)]},
        checkpoint=checkpoint,
        label=f"round {number}: confusion evaluator {fold + 1} of {settings.folds}",
    )
    distances = (embedded(network, maps_of(backbone, held)) - centre).square().sum(1).numpy().astype(np.float32)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    weights = save({**tensors, "centre": centre.contiguous(), "normal_distances": torch.from_numpy(distances)})
    content = {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "limit": hard_limit(distances, settings.hard_quantile),
        "normals": len(train),
        "held_out": len(held),
        "anomalies": len(rest),
        "steps": history.steps,
        "kept_step": history.best_step,
    }
    folder = f"round-{number}/evaluator-{fold}"
    work.write(f"{folder}.json", json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    work.write(f"{folder}.safetensors", weights)
    checkpoint.unlink(missing_ok=True)


def _weights(work: WorkFolder, number: int, fold: int) -> Path:
    return work.round_folder(number) / f"evaluator-{fold}.safetensors"


def _load(work: WorkFolder, number: int, fold: int, backbone: Backbone) -> _Fold:
    path = _weights(work, number, fold)
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            raise ValueError("other bytes than its record names")
        tensors = load_file(path)
        centre, distances = tensors.pop("centre"), tensors.pop("normal_distances")
        network = SphereNetwork(sum(backbone.channels))
        network.load_state_dict(tensors)
        limit = float(facts["limit"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DetectorError(
            wanted=f"the evaluator of round {number} at {path}",
            got=str(error)[:200],
            next_step="Delete it and its .json; it is then trained anew.",
        ) from error
    return _Fold(network.eval(), centre, distances.numpy(), limit)


def _as_anomalies(frames: NDArray[np.uint8]) -> Anomalies:
    return Anomalies(frames, np.zeros(frames.shape[:3], np.bool_), np.zeros(len(frames), np.bool_))


__all__ = ["ConfusionEvaluator", "fitted_evaluator", "fold_of", "folds_of_normals"]
