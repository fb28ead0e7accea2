"""The confusion evaluator of a run: Deep SAD over the normals and the anomalies so far, in folds.

KKA (arXiv 2502.14880), section on confusion: a detector is trained as Deep SAD with the normals and the generated
anomalies; what still lies nearer to its centre than some normals is what confuses it, the hard anomalies, equation (6).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from edgead.runtime.errors import DetectorError
from edgead.runtime.image import read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.deep_sad import SphereNetwork, embedded, maps_of, train_sphere
from edgead.server_side.detectors.trained import Anomalies
from edgead.server_side.kka.choices import collect
from edgead.server_side.kka.records import Image, Normal
from edgead.server_side.kka.seams import Frame, seed_of
from edgead.server_side.kka.stages import hard_limit, painted_image
from edgead.server_side.kka.work import WorkFolder

_VALIDATIONS_WITHOUT_GAIN = 8


@dataclass(frozen=True, eq=False)
class _Fold:
    network: SphereNetwork
    centre: torch.Tensor
    normal_distances: NDArray[np.float32]
    limit: float


class ConfusionEvaluator:
    """Measures images with the fold that was not trained on them; see `seams.Evaluator`."""

    def __init__(self, backbone: Backbone, size: int, folds: Sequence[_Fold]) -> None:
        self._backbone = backbone
        self._preprocessing = Preprocessing(size, size)
        self._folds = tuple(folds)

    @property
    def normal_distances(self) -> NDArray[np.float32]:
        """Of the held-out normals under every fold, in multiples of the fold's limit."""
        return np.concatenate([fold.normal_distances / np.float32(fold.limit) for fold in self._folds])

    def measure(self, names: Sequence[str], frames: Sequence[Frame]) -> list[tuple[float, float]]:
        """(squared distance, limit) of each frame."""
        found = []
        for name, frame in zip(names, frames, strict=True):
            fold = self._folds[fold_of(name, len(self._folds))]
            maps = maps_of(self._backbone, prepare(frame, self._preprocessing))
            distance = (embedded(fold.network, maps) - fold.centre).square().sum(1)
            found.append((float(distance[0]), fold.limit))
        return found


def fold_of(name: str, folds: int) -> int:
    """The fold that judges an image, by its id alone."""
    return seed_of("fold", name) % folds


def fitted_evaluator(work: WorkFolder, number: int) -> ConfusionEvaluator:
    """The evaluator of a round: read if it was trained, else trained and kept.

    Args:
        work: the run; the images of the round are painted.
        number: of the round.

    Raises:
        InputError: a round before is not complete.
        DetectorError: a kept evaluator that was changed.
        FailureError: training failed.
    """
    settings = work.config.judge
    if settings.evaluator == "first":
        number = 0
    backbone = load_backbone(work.config.backbone).eval()
    folds = []
    data: _Data | None = None
    for fold in range(settings.folds):
        path = work.round_folder(number) / f"evaluator-{fold}.safetensors"
        if not path.exists():
            data = data or _read(work, number)
            _train(work, number, fold, backbone, data)
        folds.append(_load(work, number, fold, backbone))
    return ConfusionEvaluator(backbone, settings.size, folds)


@dataclass(frozen=True, eq=False)
class _Data:
    train: NDArray[np.uint8]
    held: NDArray[np.uint8]
    names: list[str]
    """Ids of the anomalies."""
    anomalies: NDArray[np.uint8]


def _read(work: WorkFolder, number: int) -> _Data:
    """Normals and anomalies at the evaluator's size."""
    settings = work.config.judge
    preprocessing = Preprocessing(settings.size, settings.size)
    normals = work.records(Normal)
    order = np.random.default_rng(seed_of(work.config.seed, "held-out normals")).permutation(len(normals))
    held = min(max(1, round(settings.held_out * len(normals))), len(normals) - 1)
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

        pictures = [frame(read_image(work.normals / normals[at].file)) for at in order.tolist()]
        painted = [frame(painted_image(work, images[name])) for name in names]
    empty = np.zeros((0, settings.size, settings.size, 3), np.uint8)
    return _Data(np.stack(pictures[held:]), np.stack(pictures[:held]), names, np.stack(painted) if painted else empty)


def _train(work: WorkFolder, number: int, fold: int, backbone: Backbone, data: _Data) -> None:
    settings = work.config.judge
    # With one fold everything is trained on; with more, what this fold judges is left out.
    others = [at for at, name in enumerate(data.names) if settings.folds == 1 or fold_of(name, settings.folds) != fold]
    chosen = np.array(others, np.intp)
    # A tenth of them says when training has to end.
    stop = chosen[: len(chosen) // 10] if len(chosen) >= 20 else chosen[:0]
    rest = chosen[len(stop) :]
    checkpoint = work.round_folder(number) / f"evaluator-{fold}.training"
    network, centre, history = train_sphere(
        backbone,
        data.train,
        data.held,
        _as_anomalies(data.anomalies[rest]),
        _as_anomalies(data.anomalies[stop]),
        eta=settings.eta,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        patience=_VALIDATIONS_WITHOUT_GAIN,
        # The same start in every round, so that rounds differ by their anomalies alone.
        seed=seed_of(work.config.seed, "evaluator", fold),
        identity={"config": work.config.digest, "round": number, "fold": fold, "anomalies": len(rest)},
        checkpoint=checkpoint,
        label=f"round {number}: confusion evaluator {fold + 1} of {settings.folds}",
    )
    distances = (embedded(network, maps_of(backbone, data.held)) - centre).square().sum(1).numpy().astype(np.float32)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    weights = save({**tensors, "centre": centre.contiguous(), "normal_distances": torch.from_numpy(distances)})
    content = {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "limit": hard_limit(distances, settings.hard_quantile),
        "normals": len(data.train),
        "held_out": len(data.held),
        "anomalies": len(rest),
        "steps": history.steps,
        "kept_step": history.best_step,
    }
    folder = f"round-{number}/evaluator-{fold}"
    work.write(f"{folder}.json", json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    work.write(f"{folder}.safetensors", weights)
    checkpoint.unlink(missing_ok=True)


def _load(work: WorkFolder, number: int, fold: int, backbone: Backbone) -> _Fold:
    path = work.round_folder(number) / f"evaluator-{fold}.safetensors"
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


__all__ = ["ConfusionEvaluator", "fitted_evaluator", "fold_of"]
