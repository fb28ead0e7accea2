"""SimpleNet as a trunk and a head (Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and
Localization", CVPR 2023, arXiv 2303.15140).

Locally averaged patches of a frozen backbone go through a linear adaptor, q = G(o) (equation 5). The same features
with Gaussian noise, q- = q + e (equation 6), stand for anomalies, and a discriminator D learns to tell them apart by
a truncated L1 loss (equations 7 and 8, with th+ = 0.5 and th- = -0.5), per patch

    max(0, th+ - D(q)) + max(0, -th- + D(q-))

The score of a patch is -D(q) (equation 9), the map is the patches' upsampled and smoothed, the image's score is the
highest patch (equations 10 and 11). G and D are in the trunk. Two statistics of the score of normal patches, its mean
and standard deviation, are knowledge: the head counts from the one in units of the other, so that thresholds are
positive and scores of one product compare with those of another.

Ours:
- Features are divided by their spread before the adaptor, and the noise is in that unit: the paper's sigma of 0.015
  belongs to the scale of its own backbone.
- The adaptor begins as the identity and learns slowly. One that begins at random, or learns fast, ends as a scale on
  which the noise is easily told and a real anomaly is not. The weights kept are a mean over the last sixth of the
  steps: those of single steps find now these anomalies, now those (which the authors meet by keeping the best epoch
  on the test pictures, as nobody can who has only good parts).
- Anomalies, which KKA (Chen et al. 2025, arXiv 2502.14880) gives to a detector as whole images, are used by patch:
  those inside a mask are anomalous features beside the noisy ones, with a mean and a weight of their own; those well
  outside of it are normal ones; the seam between is left out. Of an image without a mask only the patch with the
  highest score counts, as an anomalous one: that patch alone makes the image's score, and nobody knows of any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.map_head import MapHead
from edgead.server_side.detectors.masked_cells import ANOMALOUS, NORMAL, cell_labels
from edgead.server_side.detectors.memory_bank import MemoryBankTrunk, patch_grid, receptive_sigma
from edgead.server_side.detectors.simplenet_network import (
    HIDDEN,
    Averaged,
    SimpleNetwork,
    anomalous_l1,
    scores_of,
    truncated_l1,
)
from edgead.server_side.detectors.trained import Anomalies, Samples, TrainedOptions, load_data
from edgead.server_side.detectors.training import Schedule, batch_of, generator, train
from edgead.server_side.devices import CPU, placed, torch_device
from edgead.server_side.learned import Learned, Modules, finished

METHOD = "simplenet"
PAPER = "Liu et al., SimpleNet: A Simple Network for Image Anomaly Detection and Localization, CVPR 2023, 2303.15140"

NOISE = 0.5
"""Chosen of 0.03 to 1 on a part of the public data sets of magnetic tiles and castings."""
STEPS = 1200
LEARNING_RATE = 1e-3
"""Of the discriminator, five times the published one."""
ADAPTOR_RATE = 0.1
"""The adaptor's learning rate as a share of the discriminator's."""
WEIGHT_DECAY = 1e-5
PATCHES = 1024
"""Normal patches in a step, and as many noisy ones."""
ANOMALY_WEIGHT = 0.1
"""Of the anomalies beside the noise. On painted fabric and flanges, kinds of defects that were among the anomalies were
found as well as at a weight of 1, and other kinds better."""
_UNMASKED = 4
"""Anomalies without a mask in a step."""
_BATCH_EMBEDDED = 16
_BATCH_JUDGED = 16


class SimpleNetTrunk(nn.Module):
    """Frame -> score of every patch, not yet normalised."""

    def __init__(self, backbone: Backbone, network: SimpleNetwork) -> None:
        super().__init__()
        self.patches = MemoryBankTrunk(backbone)
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: patch_scores float32 [B, P], row by row."""
        patches = self.patches(image)
        found: Tensor = self.network(patches.flatten(0, 1)).reshape(-1, patches.shape[1])
        return found


class SimpleNetHead(MapHead):
    """Patch scores and their statistics -> image score and anomaly map; a cell is a patch."""

    def forward(self, patch_scores: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            patch_scores: float32 [B, P].
            statistics: float32 [2], mean and standard deviation over normal patches.

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W].
        """
        scores = (patch_scores - statistics[0]) / statistics[1]
        return scores.amax(1), self.upsampled(scores)


class PatchSet:
    """Patches of anomalies by what is known of them.

    Args:
        patches: float32 [M, P, D].
        labels: int8 [M, P] of `masked_cells`.
        known: bool [M], images with a mask.

    Attributes:
        anomalous: float32 [n, D].
        normal: float32 [m, D], of the same images.
        unmasked: float32 [U, P, D], images of which nothing more is known.
    """

    def __init__(self, patches: Tensor, labels: Tensor, known: Tensor) -> None:
        self.anomalous = patches[labels == ANOMALOUS]
        self.normal = patches[labels == NORMAL]
        self.unmasked = patches[~known]

    def __len__(self) -> int:
        return len(self.anomalous) + len(self.unmasked)


class SimpleNetTask:
    """Trains adaptor and discriminator; see `training.Task`.

    Args:
        normals: patches [N, P, D] to learn from.
        anomalies: to learn from, possibly none.
        stop: patches of held-out normals.
        stop_anomalies: held-out anomalies, possibly none.
        noise: standard deviation of the noise, in units of the features' spread.
        batch: normal images in a step.
        patches: normal patches in a step, at most, of all these images together.
        learning_rate: of the discriminator.
        steps: of the whole training; weights are averaged over a sixth of them.
        hidden: the discriminator's width.
        seed: of weights, batches and noise.
        device: where the networks are trained; patches and noise come from the CPU.
        identity: what a checkpoint must agree in.
    """

    def __init__(
        self,
        normals: Tensor,
        anomalies: PatchSet,
        stop: Tensor,
        stop_anomalies: PatchSet,
        *,
        noise: float = NOISE,
        batch: int = 32,
        patches: int = PATCHES,
        learning_rate: float = LEARNING_RATE,
        steps: int = STEPS,
        hidden: int = HIDDEN,
        seed: int = 0,
        device: torch.device = CPU,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._normals, self._anomalies = normals, anomalies
        self._stop, self._stop_anomalies = stop, stop_anomalies
        self._noise, self._seed, self._device = noise, seed, device
        self._batch = min(batch, len(normals))
        self._each = min(max(1, patches // self._batch), normals.shape[1])
        network = SimpleNetwork(normals.shape[-1], hidden, seed)
        network.spread.copy_(_spread(normals))
        self.module = Averaged(network, steps // 6).to(device)
        judging = [*network.hidden.parameters(), *network.norm.parameters(), *network.last.parameters()]
        self._optimizer = torch.optim.Adam(
            [
                {"params": network.adaptor.parameters(), "lr": learning_rate * ADAPTOR_RATE},
                {"params": judging, "lr": learning_rate},
            ],
            weight_decay=WEIGHT_DECAY,
        )
        self.optimizers = [self._optimizer]
        self.identity = {
            "method": METHOD,
            "seed": seed,
            "noise": noise,
            "batch": batch,
            "patches": patches,
            "learning_rate": learning_rate,
            "steps": steps,
            "hidden": hidden,
            **(identity or {}),
        }

    def step(self, number: int) -> dict[str, float]:
        """One step of Adam on patches of a batch of normals, the same with noise, and patches of anomalies."""
        drawn = generator(self._seed, number)
        images = batch_of(len(self._normals), self._batch, self._seed, number)
        places = torch.randint(self._normals.shape[1], (self._batch, self._each), generator=drawn)
        normal = self._normals[images[:, None], places].flatten(0, 1)
        share = len(normal) // 4
        beside = _some(self._anomalies.normal, share, drawn)
        anomalous = torch.cat([_some(self._anomalies.anomalous, share, drawn), self._worst(drawn)])
        losses = self._losses(self.module.current, torch.cat([normal, beside]), anomalous, drawn)
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.module.update()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def validate(self) -> float:
        """The same losses of the averaged network over what is held out, with noise that stays the same."""
        drawn = generator(self._seed, -2)
        total = 0.0
        for part in torch.split(self._stop, _BATCH_JUDGED):
            loss = self._losses(self.module.mean, part.flatten(0, 1), part.new_zeros(0, part.shape[-1]), drawn)["noise"]
            total += float(loss) * len(part) / len(self._stop)
        held = self._stop_anomalies
        worst = [-scores_of(self.module.mean, image.to(self._device)).amax()[None] for image in held.unmasked]
        return total + ANOMALY_WEIGHT * float(
            anomalous_l1(torch.cat([-scores_of(self.module.mean, held.anomalous.to(self._device)), *worst]))
        )

    def _losses(
        self, network: SimpleNetwork, normal: Tensor, anomalous: Tensor, drawn: torch.Generator
    ) -> dict[str, Tensor]:
        count = len(normal)
        adapted = network.adapted(torch.cat([normal, anomalous]).to(self._device))
        noise = (torch.randn(count, normal.shape[1], generator=drawn) * self._noise).to(self._device)
        judged = network.judged(torch.cat([adapted, adapted[:count] + noise]))
        losses = {"noise": truncated_l1(judged[:count], judged[count + len(anomalous) :])}
        if len(anomalous):
            losses["anomalies"] = ANOMALY_WEIGHT * anomalous_l1(judged[count : count + len(anomalous)])
        return losses

    def _worst(self, drawn: torch.Generator) -> Tensor:
        """The patch with the highest score of each of some images without a mask, [n, D]."""
        images = _some(self._anomalies.unmasked, _UNMASKED, drawn)
        if not len(images):
            return images.new_zeros(0, images.shape[-1])
        # Looking for them must not move the running statistics.
        network = self.module.current.eval()
        with torch.no_grad():
            worst = network(images.flatten(0, 1).to(self._device)).reshape(images.shape[:2]).argmax(1).cpu()
        network.train()
        return images[torch.arange(len(images)), worst]


def _some(rows: Tensor, count: int, drawn: torch.Generator) -> Tensor:
    """`count` rows drawn with replacement, or none of none."""
    return rows[torch.randint(len(rows), (count,), generator=drawn)] if len(rows) else rows


def _spread(patches: Tensor) -> Tensor:
    """Root of the mean variance of a patch's dimensions, a scalar; never 0."""
    return patches.flatten(0, 1).var(0).mean().sqrt().clamp_min(1e-6)


def patches_of(
    trunk: MemoryBankTrunk,
    frames: NDArray[np.uint8],
    grid: tuple[int, int],
    dimensions: int,
    device: torch.device = CPU,
) -> Tensor:
    """Patches of many frames uint8 [N, H, W, 3], in batches: float32 [N, P, D], 0.8 MB for a frame of 256 pixels.

    They are computed on the device and kept on the CPU.
    """
    found = torch.empty(len(frames), grid[0] * grid[1], dimensions)
    with placed(trunk, device), torch.inference_mode():
        for at in range(0, len(frames), _BATCH_EMBEDDED):
            part = torch.from_numpy(np.ascontiguousarray(frames[at : at + _BATCH_EMBEDDED]))
            found[at : at + len(part)] = trunk(part.to(device))
    return found


def simplenet_modules(
    backbone: Backbone, network: SimpleNetwork, preprocessing: Preprocessing, sigma: float | None = None
) -> Modules:
    """Trunk and head with their ports; `sigma` of the map's blur in pixels, by the frame's size if None."""
    trunk = SimpleNetTrunk(backbone, network).eval()
    grid, _ = patch_grid(trunk.patches, preprocessing)
    size = (preprocessing.height, preprocessing.width)
    blur = receptive_sigma(min(size)) if sigma is None else sigma
    return Modules(
        trunk,
        SimpleNetHead(grid, size, blur),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("patch_scores", "float32", ("B", grid[0] * grid[1])),),
        knowledge=(KnowledgePort("map.statistics", "float32", (2,)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    noise: float = NOISE,
    checkpoint: Path | None = None,
) -> Learned:
    """A SimpleNet detector from photographs of good parts and, if there are some, of anomalies.

    Args:
        normal: photographs of good parts.
        options: see `TrainedOptions`; `learning_rate` is the discriminator's.
        anomalous: pictures of anomalies, real or generated, with their masks where there are some; see the module.
        noise: standard deviation of the noise in units of the features' spread.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals, or no such device.
        ImageError: a file is no picture.
        BackboneError: an unknown backbone.
    """
    device = torch_device(options.device)
    backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
    data = load_data(normal, options, anomalous)
    trunk = MemoryBankTrunk(backbone).eval()
    grid, dimensions = patch_grid(trunk, options.preprocessing)

    def embedded(frames: NDArray[np.uint8]) -> Tensor:
        return patches_of(trunk, frames, grid, dimensions, device)

    def patch_set(anomalies: Anomalies) -> PatchSet:
        labels = cell_labels(anomalies, grid).flatten(1)
        return PatchSet(embedded(anomalies.frames), labels, torch.from_numpy(anomalies.known))

    learned_from, stop = patch_set(data.anomalies), embedded(data.stop)
    steps = options.steps or STEPS
    task = SimpleNetTask(
        embedded(data.train),
        learned_from,
        stop,
        patch_set(data.stop_anomalies),
        noise=noise,
        batch=options.batch,
        learning_rate=options.learning_rate or LEARNING_RATE,
        steps=steps,
        seed=options.seed,
        device=device,
        identity={"backbone": options.backbone, "data": data.digest},
    )
    schedule = Schedule(steps, validate_every=max(1, steps // 30), patience=options.patience)
    history = train(task, schedule, label="SimpleNet", checkpoint=checkpoint)
    network = task.module.to(CPU).mean.eval()
    with torch.inference_mode():
        scores = scores_of(network, stop.flatten(0, 1))
    mean, deviation = float(scores.mean()), max(float(scores.std()), 1e-6)
    modules = simplenet_modules(backbone, network, options.preprocessing)
    return finished(
        modules,
        options,
        {"map.statistics": np.array([mean, deviation], np.float32)},
        paper=PAPER,
        normal=normal,
        held_out=data.calibration,
        by_hand=max(2.0 * (float(scores.max()) - mean) / deviation, 1e-3),
        backbone=options.backbone,
        noise=noise,
        training=history.facts(),
        data=data.facts(),
        anomalous_patches=len(learned_from.anomalous),
    )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "PatchSet",
    "SimpleNetHead",
    "SimpleNetTask",
    "SimpleNetTrunk",
    "learn",
    "patches_of",
    "simplenet_modules",
)
