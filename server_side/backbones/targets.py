"""What the embedded backbone is taught: a teacher's mean features, decorrelated, on augmented crops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgead.runtime.progress import Progress
from edgead.server_side.backbones.embedded import EmbeddedBackbone
from edgead.server_side.backbones.validation import Picture, read_picture

SYMMETRIES = 4
"""A picture and its mirror images: as it is, left-right, top-bottom, both."""

_TURNS = 4
_RIDGE = 1e-3
_READ = 16
_STATISTICS = 0


@dataclass(frozen=True)
class DistilConfig:
    """What a distillation run depends on besides the teacher and the images."""

    steps: int = 4500
    """Length of the schedule."""
    stop_at: int | None = None
    """Stop early, after this step of the schedule."""
    cooldown: int = 500
    """Steps before an early stop over which the learning rate falls linearly to nothing."""
    batch: int = 16
    """Crops per step."""
    crop: int = 256
    """Side of the crops, pixels; divisible by 32."""
    learning_rate: float = 5e-4
    """Peak; linear warm-up, then a cosine to 1 % of it."""
    warmup: int = 100
    """Steps of warm-up."""
    weight_decay: float = 1e-4
    averaging: float = 0.998
    """Decay per step of the moving average of the weights."""
    channels: tuple[int, ...] = (96, 96)
    """Channels of each output map."""
    whitening: float = 0.25
    """0: principal components as they are; 1: all of equal variance."""
    scales: tuple[float, ...] = (1.0, 1.0)
    """Relative root mean square of the maps."""
    statistics: int = 400
    """Crops for the targets' components and the first projections."""
    warm_start: bool = True
    """Start from the teacher's weights; False starts from random ones."""
    low_precision: bool = False
    """Run the teacher in bfloat16."""
    seed: int = 0
    chapter: int = 100
    """Steps that share one set of crops and targets."""
    repeats: int = 4
    """How often a crop is seen in its chapter, each time in another view and with other noise."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Targets:
    """One affine map per teacher map: target = weight @ (feature - mean)."""

    means: list[torch.Tensor]
    """[C] per map."""
    weights: list[torch.Tensor]
    """[D, C] per map."""
    variances: list[float]
    """Mean square of the whole target vector, per map."""

    def __call__(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B, C, h, w] per map -> [B, D, h, w] per map."""
        return [
            functional.conv2d(m - mean[:, None, None], weight[:, :, None, None])
            for m, mean, weight in zip(maps, self.means, self.weights, strict=True)
        ]


# --- images ------------------------------------------------------------------------------------------------


def training_crop(picture: Picture, rng: np.random.Generator, size: int) -> Picture:
    """A random square crop, turned, with random contrast, colour, blur and grain: [size, size, 3] uint8."""
    short = min(picture.shape[:2])
    side = max(8, int(short * rng.uniform(0.4, 1.0)))
    top = int(rng.integers(0, picture.shape[0] - side + 1))
    left = int(rng.integers(0, picture.shape[1] - side + 1))
    crop = picture[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    crop = np.asarray(cv2.resize(crop, (size, size), interpolation=method), dtype=np.uint8)
    crop = np.rot90(crop, int(rng.integers(_TURNS)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    image = crop.astype(np.float32)
    if rng.random() < 0.35:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    mean = image.mean()
    image = (image - mean) * rng.uniform(0.35, 1.25) + mean * rng.uniform(0.6, 1.3)
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.8)))
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(1, 8), image.shape)
    return np.asarray(np.clip(np.round(image), 0, 255), dtype=np.uint8)


def training_crops(paths: Sequence[Path], seed: Sequence[int], count: int, size: int) -> Iterator[torch.Tensor]:
    """`count` crops in batches [<= 16, 3, size, size] uint8, a function of `seed`; read ahead by a thread."""

    def read(start: int) -> torch.Tensor:
        rng = np.random.default_rng([*seed, start])
        picks = rng.integers(0, len(paths), min(_READ, count - start))
        crops = [training_crop(read_picture(paths[i]), rng, size) for i in picks]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()

    with ThreadPoolExecutor(1) as pool:
        yield from pool.map(read, range(0, count, _READ))


# --- teacher and targets -----------------------------------------------------------------------------------


def view_of(maps: torch.Tensor, symmetry: int) -> torch.Tensor:
    """[B, C, S, S] mirrored left-right (bit 0 of `symmetry`) and top-bottom (bit 1); its own inverse."""
    sides = [side for side, bit in ((3, 1), (2, 2)) if symmetry & bit]
    return maps.flip(sides) if sides else maps


def expected_maps(teacher: nn.Module, image: torch.Tensor, *, low_precision: bool = False) -> list[torch.Tensor]:
    """The teacher's mean maps over a picture and its three mirror images, mirrored back.

    Args:
        teacher: image [B, 3, S, S] -> list of [B, C, s, s].
        image: square images.
        low_precision: run the teacher in bfloat16; the mean is float32.
    """
    total: list[torch.Tensor] = []
    for symmetry in range(SYMMETRIES):
        view = view_of(image, symmetry).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=low_precision):
            maps = teacher(view)
        maps = [view_of(m.float(), symmetry) for m in maps]
        total = [a + b for a, b in zip(total, maps, strict=True)] if total else maps
    return [m / SYMMETRIES for m in total]


def pooled(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] averaged 3x3, as a patch detector will."""
    return functional.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)


def _pooled_rows(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B * h * w, C], averaged 3x3."""
    return pooled(maps).permute(0, 2, 3, 1).flatten(0, 2)


def fit_targets(
    teacher: nn.Module, student: EmbeddedBackbone, paths: Sequence[Path], config: DistilConfig, device: str
) -> Targets:
    """Find the components of the teacher's mean features, and the student's first projections.

    The projections become the affine maps from the student's own expansions to the targets with the least
    squared error (ridge regression) on the same crops.
    """
    sums: list[torch.Tensor] = []
    products: list[torch.Tensor] = []
    count = [0.0] * len(config.channels)
    crops = training_crops(paths, (config.seed, _STATISTICS), config.statistics, config.crop)
    with Progress("target statistics", math.ceil(config.statistics / _READ)) as progress:
        for crop in progress.track(crops):
            image = crop.to(device).float() / 255
            averaged = expected_maps(teacher, image)
            with torch.no_grad():
                own = student.expansions(image.contiguous(memory_format=torch.channels_last))
            for index, (theirs, mine) in enumerate(zip(averaged, own, strict=True)):
                rows = torch.cat([_pooled_rows(theirs), _pooled_rows(mine)], 1).double()
                if len(sums) == index:
                    sums.append(torch.zeros_like(rows[0]))
                    products.append(torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=device))
                sums[index] += rows.sum(0)
                products[index] += rows.T @ rows
                count[index] += len(rows)
    targets = Targets([], [], [])
    for index, width in enumerate(config.channels):
        split = sums[index].numel() - student.expansion_channels[index]
        mean = sums[index] / count[index]
        covariance = products[index] / count[index] - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance[:split, :split])
        values, vectors = values.flip(0)[:width].clamp_min(1e-9), vectors.flip(1)[:, :width]
        vectors = vectors * torch.sign(vectors.sum(0))
        gains = values ** (-config.whitening / 2)
        norm = math.sqrt(float((gains**2 * values).sum()))
        rms = config.scales[index] * math.sqrt(width)
        weight = (vectors * gains).T * (rms / norm)
        inputs = covariance[split:, split:]
        ridge = _RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype, device=device)
        solution = torch.linalg.solve(inputs + ridge, covariance[split:, :split] @ weight.T).T
        projection = cast(nn.Conv2d, student.projections[index])
        with torch.no_grad():
            assert projection.bias is not None
            projection.weight.copy_(solution[:, :, None, None])
            projection.bias.copy_(-solution @ mean[split:])
        targets.means.append(mean[:split].float())
        targets.weights.append(weight.float())
        targets.variances.append(rms**2)
    return targets
