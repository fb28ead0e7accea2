"""Deep SAD as a trunk and a head (Ruff et al., "Deep Semi-Supervised Anomaly Detection", ICLR 2020), with which KKA
trains its confusion evaluator (Chen et al. 2025, arXiv 2502.14880).

A network phi maps normals near a centre c and anomalies away from it. Equation (7) of the paper, for a batch of n
unlabelled normals x and m labelled anomalies x~, without its weight decay (which the optimizer applies):

    1 / (n + m) * ( sum_x |phi(x) - c|^2  +  eta sum_x~ (|phi(x~) - c|^2 + eps)^-1 )

The score of a frame is |phi(x) - c|^2; there is no map. c is knowledge, phi is the trunk.

Ours: phi is a small bias-free convolutional network over the maps of a frozen pretrained backbone, in place of a LeNet
that an autoencoder pretrained: a few hundred photographs are enough for it, and a centre cannot be reached by biases.
Ours too: where there are more anomalies than normals, as after some rounds of KKA, a batch has half of each; by their
numbers the few normals would hardly be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.detector_file import weights_digest
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.frozen_maps import joined_maps, maps_of
from edgead.server_side.detectors.trained import Anomalies, Samples, TrainedOptions, load_data
from edgead.server_side.detectors.training import History, Schedule, batch_of, generator, train
from edgead.server_side.devices import CPU, device_of, torch_device
from edgead.server_side.learned import Learned, Modules, finished

METHOD = "deep-sad"
PAPER = "Ruff et al., Deep Semi-Supervised Anomaly Detection, ICLR 2020, arXiv 1906.02694"

EPS = 1e-6
"""In the inverse distance, as in the authors' code."""
CENTRE_FLOOR = 0.1
"""Components of the centre nearer to 0 are moved out to it, as the authors do: zero weights would reach a zero."""
STEPS = 1500
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.5e-6
"""Published settings of KKA; the learning rate falls to a tenth for the last quarter."""
WIDTH = 64
DIMENSIONS = 64


class SphereNetwork(nn.Module):
    """phi without its backbone: maps of all layers at the coarsest grid -> one vector.

    Args:
        channels: of all maps together.
        width: of the inner layers.
        dimensions: of the vector.
        seed: of the weights.
    """

    def __init__(self, channels: int, width: int = WIDTH, dimensions: int = DIMENSIONS, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width, affine=False)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width, affine=False)
        self.last = nn.Linear(2 * width, dimensions, bias=False)
        drawn = generator(seed, -1)
        with torch.no_grad():
            for weight in (self.first.weight, self.second.weight, self.last.weight):
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=drawn) * (2 / fan_in) ** 0.5)

    def forward(self, maps: Tensor) -> Tensor:
        """Args: maps: float32 [B, C, h, w]. Returns: float32 [B, dimensions]."""
        hidden = F.leaky_relu(self.first_norm(self.first(maps)), 0.1)
        hidden = F.leaky_relu(self.second_norm(self.second(hidden)), 0.1)
        # A mean alone does not see a small defect.
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)
        found: Tensor = self.last(pooled)
        return found


class DeepSadTrunk(nn.Module):
    """Frame -> vector: a frozen backbone and phi."""

    def __init__(self, backbone: Backbone, network: SphereNetwork) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: embedding float32 [B, D]."""
        found: Tensor = self.network(joined_maps(self.backbone, image))
        return found


class DeepSadHead(nn.Module):
    """Vector and centre -> squared distance."""

    def forward(self, embedding: Tensor, centre: Tensor) -> Tensor:
        """Args: embedding float32 [B, D]; centre float32 [1, D]. Returns: score float32 [B]."""
        return (embedding - centre).square().sum(1)


def sphere_loss(embedding: Tensor, anomalous: Tensor, centre: Tensor, *, eta: float = 1.0, eps: float = EPS) -> Tensor:
    """Equation (7) without weight decay; see the module.

    Args:
        embedding: phi(x), [B, D].
        anomalous: bool [B], labelled anomalies.
        centre: [D] or [1, D].
        eta: weight of the anomalies.
        eps: in the inverse distance.

    Returns:
        the mean, a scalar.
    """
    distance = (embedding - centre).square().sum(1)
    return torch.where(anomalous, eta / (distance + eps), distance).mean()


def first_centre(embeddings: Tensor, floor: float = CENTRE_FLOOR) -> Tensor:
    """The centre before training: the mean of phi over the normals, kept away from 0.

    Args:
        embeddings: [N, D] of the untrained network.
        floor: see `CENTRE_FLOOR`; a component of exactly 0 becomes `floor`.

    Returns:
        float32 [D].
    """
    centre = embeddings.mean(0)
    near = centre.abs() < floor
    return torch.where(near & (centre < 0), -floor, torch.where(near, floor, centre))


class SphereTask:
    """Trains phi around a fixed centre; see `training.Task`.

    Args:
        normals: maps [N, C, h, w] to learn from.
        anomalies: maps [M, C, h, w] of labelled anomalies, possibly none.
        stop: maps of held-out normals.
        stop_anomalies: maps of held-out anomalies, possibly none.
        eta: weight of anomalies.
        batch: frames in a step, drawn from normals and anomalies alike.
        learning_rate: of Adam.
        steps: of the whole training, for the learning rate.
        seed: of weights and batches.
        device: where phi is trained; the maps stay where they are.
        identity: what a checkpoint must agree in.
    """

    def __init__(
        self,
        normals: Tensor,
        anomalies: Tensor,
        stop: Tensor,
        stop_anomalies: Tensor,
        *,
        eta: float = 1.0,
        batch: int = 32,
        learning_rate: float = LEARNING_RATE,
        steps: int = STEPS,
        seed: int = 0,
        device: torch.device = CPU,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._maps = torch.cat([normals, anomalies])
        self._anomalous = torch.arange(len(self._maps)) >= len(normals)
        self._held = torch.cat([stop, stop_anomalies])
        self._held_anomalous = torch.arange(len(self._held)) >= len(stop)
        self._normals, self._anomalies = len(normals), len(anomalies)
        self._eta, self._batch, self._seed = eta, batch, seed
        self._rate, self._steps, self._device = learning_rate, steps, device
        network = SphereNetwork(normals.shape[1], seed=seed)
        self.module = _Sphere(network).to(device)
        network.eval()
        self.module.centre.copy_(first_centre(embedded(network, normals)))
        self._optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
        self.optimizers = [self._optimizer]
        self.identity = {
            "method": METHOD,
            "seed": seed,
            "eta": eta,
            "batch": batch,
            "learning_rate": learning_rate,
            "steps": steps,
            **(identity or {}),
        }

    def step(self, number: int) -> dict[str, float]:
        """One step of Adam on a batch of normals and anomalies."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * (0.1 if number >= 0.75 * self._steps else 1.0)
        places = self._batch_of_step(number)
        embedding = self.module.network(self._maps[places].to(self._device))
        anomalous = self._anomalous[places].to(self._device)
        loss = sphere_loss(embedding, anomalous, self.module.centre, eta=self._eta)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": float(loss.detach())}

    def validate(self) -> float:
        """The same loss over what is held out."""
        embedding, anomalous = embedded(self.module.network, self._held), self._held_anomalous
        centre = self.module.centre.cpu()
        if self._anomalies <= self._normals or not anomalous.any():
            return float(sphere_loss(embedding, anomalous, centre, eta=self._eta))
        halves = [
            sphere_loss(embedding[part], anomalous[part], centre, eta=self._eta) for part in (anomalous, ~anomalous)
        ]
        return float(sum(halves) / 2)

    def _batch_of_step(self, number: int) -> Tensor:
        """Which frames a step sees: by their numbers, but never more anomalies than normals."""
        # The network's normalisation needs more than one frame where a map is a single cell.
        batch = max(2, min(self._batch, len(self._maps)))
        if self._anomalies <= self._normals:
            return batch_of(len(self._maps), batch, self._seed, number)
        half = batch // 2
        anomalies = batch_of(self._anomalies, half, self._seed, number) + self._normals
        return torch.cat([batch_of(self._normals, batch - half, self._seed, number), anomalies])


class _Sphere(nn.Module):
    def __init__(self, network: SphereNetwork) -> None:
        super().__init__()
        self.network = network
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(network.last.out_features))


def embedded(network: SphereNetwork, maps: Tensor) -> Tensor:
    """phi of many maps, in batches, without gradients: float32 [N, D] on the CPU, wherever phi is."""
    home = device_of(network)
    with torch.inference_mode():
        parts = [network(maps[at : at + 64].to(home)).cpu() for at in range(0, len(maps), 64)]
    return torch.cat(parts).clone() if parts else torch.zeros(0, network.last.out_features)


def deep_sad_modules(backbone: Backbone, network: SphereNetwork, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    dimensions = network.last.out_features
    return Modules(
        DeepSadTrunk(backbone, network).eval(),
        DeepSadHead(),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("embedding", "float32", ("B", dimensions)),),
        knowledge=(KnowledgePort("sphere.centre", "float32", (1, dimensions)),),
        outputs=(Port("score", "float32", ("B",)),),
    )


def train_sphere(
    backbone: Backbone,
    frames: NDArray[np.uint8],
    stop: NDArray[np.uint8],
    anomalies: Anomalies,
    stop_anomalies: Anomalies,
    *,
    eta: float = 1.0,
    steps: int = STEPS,
    batch: int = 32,
    learning_rate: float = LEARNING_RATE,
    patience: int = 5,
    seed: int = 0,
    device: str = "auto",
    identity: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
    label: str = "Deep SAD",
) -> tuple[SphereNetwork, Tensor, History]:
    """Train phi; see `SphereTask`, and for `device` `edgead.server_side.devices`.

    Returns:
        phi and the centre float32 [D], both on the CPU, and how the training went.

    Raises:
        InputError: no such device.
        DetectorError: a checkpoint of another training.
        FailureError: the loss is no number any more.
    """
    there = torch_device(device)
    task = SphereTask(
        maps_of(backbone, frames, there),
        maps_of(backbone, anomalies.frames, there),
        maps_of(backbone, stop, there),
        maps_of(backbone, stop_anomalies.frames, there),
        eta=eta,
        batch=batch,
        learning_rate=learning_rate,
        steps=steps,
        seed=seed,
        device=there,
        identity=identity,
    )
    schedule = Schedule(steps, validate_every=max(1, steps // 30), patience=patience)
    history = train(task, schedule, label=label, checkpoint=checkpoint)
    task.module.to(CPU)
    return task.module.network.eval(), task.module.centre.clone(), history


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    eta: float = 1.0,
    checkpoint: Path | None = None,
) -> Learned:
    """A Deep SAD detector from photographs of good parts and, if there are some, of anomalies.

    Args:
        normal: photographs of good parts.
        options: see `TrainedOptions`.
        anomalous: pictures of anomalies, real or generated. The method has no map: masks only choose, of a tiled
            picture, the tiles that show the anomaly.
        eta: weight of the anomalies.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals, or no such device.
        ImageError: a file is no picture.
        BackboneError: an unknown backbone.
    """
    torch_device(options.device)  # a mistake there is better told before photographs are read
    backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
    data = load_data(normal, options, anomalous)
    network, centre, history = train_sphere(
        backbone,
        data.train,
        data.stop,
        data.anomalies,
        data.stop_anomalies,
        eta=eta,
        steps=options.steps or STEPS,
        batch=options.batch,
        learning_rate=options.learning_rate or LEARNING_RATE,
        patience=options.patience,
        seed=options.seed,
        device=options.device,
        identity={"backbone": weights_digest(backbone).hex(), "patience": options.patience, "data": data.digest},
        checkpoint=checkpoint,
    )
    modules = deep_sad_modules(backbone, network, options.preprocessing)
    return finished(
        modules,
        options,
        {"sphere.centre": centre.numpy()[None].astype(np.float32)},
        paper=PAPER,
        normal=normal,
        held_out=data.calibration,
        by_hand=2.0 * max(history.best, EPS),
        backbone=options.backbone,
        eta=eta,
        training=history.facts(),
        data=data.facts(),
    )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "DeepSadHead",
    "DeepSadTrunk",
    "SphereNetwork",
    "SphereTask",
    "deep_sad_modules",
    "embedded",
    "first_centre",
    "joined_maps",
    "learn",
    "maps_of",
    "sphere_loss",
    "train_sphere",
)
