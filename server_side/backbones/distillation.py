"""The recipe of the embedded backbone: distil what a teacher expects to see, not its single glance.

Teacher. A network with stride-2 layers sees a part differently when it moves by a few pixels, and its cells are
not centred on what they describe. The target is the teacher's mean feature over a picture and its three mirror
images, mirrored back: centred, and with less aliasing. Quarter turns are left out: they would make a feature
blind to the direction of a grain or an edge.

Target. Per map, principal components of the averaged features on the images, each divided by its standard
deviation to the power `whitening`, and the whole map scaled to `scales`.

Student. `EmbeddedBackbone`, started from the teacher's weights where it is a MobileNetV2 (or from random ones),
its projections by ridge regression onto the targets; then trained end to end with AdamW on the mean squared error
relative to each map's variance. The weights that are kept are an exponential moving average.

Every random choice of step n depends on (seed, n) alone: an interrupted run, continued, ends in the same bytes as
one that was not.
"""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.files import write_file
from edgead.runtime.progress import Progress
from edgead.server_side.backbones.embedded import EmbeddedBackbone, random_embedded, start_from
from edgead.server_side.backbones.mobilenet_v2 import MobileNetV2
from edgead.server_side.backbones.validation import Picture, find_images, read_picture

_TURNS = 4
_SYMMETRIES = 4
_RIDGE = 1e-3
_READ = 16
_STATISTICS, _CHAPTER, _ORDER, _STEP = range(4)


@dataclass(frozen=True)
class DistilConfig:
    """What a distillation run depends on besides the teacher and the images."""

    steps: int = 4500
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
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _crops(paths: Sequence[Path], seed: Sequence[int], count: int, size: int) -> Iterator[torch.Tensor]:
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
    """[B, C, S, S] mirrored left to right (bit 0 of `symmetry`) and top to bottom (bit 1); its own inverse."""
    sides = [side for side, bit in ((3, 1), (2, 2)) if symmetry & bit]
    return maps.flip(sides) if sides else maps


def expected_maps(
    teacher: nn.Module, image: torch.Tensor, *, low_precision: bool = False
) -> list[torch.Tensor]:
    """The teacher's mean maps over a picture and its three mirror images, mirrored back.

    Args:
        teacher: image [B, 3, S, S] -> list of [B, C, s, s].
        image: square images.
        low_precision: run the teacher in bfloat16; the mean is float32.
    """
    total: list[torch.Tensor] = []
    for symmetry in range(_SYMMETRIES):
        view = view_of(image, symmetry).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=low_precision):
            maps = teacher(view)
        maps = [view_of(m.float(), symmetry) for m in maps]
        total = [a + b for a, b in zip(total, maps, strict=True)] if total else maps
    return [m / _SYMMETRIES for m in total]


def _pooled(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] averaged 3x3, as a patch detector will."""
    return functional.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)


def _pooled_rows(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B * h * w, C], averaged 3x3."""
    return _pooled(maps).permute(0, 2, 3, 1).flatten(0, 2)


def fit_targets(
    teacher: nn.Module, student: EmbeddedBackbone, paths: Sequence[Path], config: DistilConfig, device: str
) -> Targets:
    """Components of the teacher's averaged features; also sets the student's projections by ridge regression.

    The student's projections become the affine maps from its own expansions to the targets with the least squared
    error on the same crops.
    """
    sums: list[torch.Tensor] = []
    products: list[torch.Tensor] = []
    count = [0.0] * len(config.channels)
    crops = _crops(paths, (config.seed, _STATISTICS), config.statistics, config.crop)
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
                    products.append(
                        torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=device)
                    )
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


# --- training ----------------------------------------------------------------------------------------------


class Distillation:
    """One run: its student, optimizer, moving average and step.

    Args:
        teacher: frozen; image [B, 3, S, S] in 0..1 -> one map per output of the student, of the same grid.
        images: folder of generic pictures (any content, no defects needed).
        config: the recipe.
        checkpoint: where the run is kept between interruptions; continued from if it is there.
        device: a torch device.
        leave_out: file-name prefixes of pictures kept for validation.

    Raises:
        InputError: no images.
        BackboneError: a checkpoint of another configuration, or of other images.
    """

    def __init__(
        self,
        teacher: nn.Module,
        images: Path,
        config: DistilConfig,
        *,
        checkpoint: Path | None = None,
        device: str = "cpu",
        leave_out: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.device = device
        self.checkpoint = checkpoint
        self.paths = [p for p in find_images(images) if not p.name.startswith(tuple(leave_out))]
        if not self.paths:
            raise InputError(
                wanted="images to distil on",
                got=f"{images} with all of them left out",
                next_step="Leave out fewer.",
            )
        self.teacher = teacher.to(device).to(memory_format=torch.channels_last).eval()
        student = random_embedded(config.seed, config.channels)
        if config.warm_start:
            if not isinstance(teacher, MobileNetV2):
                raise BackboneError(
                    wanted="a MobileNetV2 teacher to start from its weights",
                    got=type(teacher).__name__,
                    next_step="Set warm_start=False.",
                )
            start_from(student, teacher.trunk)
        self.student = student.to(device).to(memory_format=torch.channels_last)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[list[float]] = []
        self._chapter = -1
        found = self._read_checkpoint()
        if found is None:
            self.targets = fit_targets(self.teacher, self.student, self.paths, config, device)
        else:
            self.targets = Targets(found["means"], found["weights"], found["variances"])
            self.student.load_state_dict(found["student"])
        self.average = {name: value.detach().clone() for name, value in self.student.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        if found is not None:
            self.optimizer.load_state_dict(found["optimizer"])
            self.average = found["average"]
            self.step, self.seconds, self.losses = found["step"], found["seconds"], found["losses"]

    def run(self, until: int | None = None) -> None:
        """Train to the end, or to step `until`; the checkpoint is written on the way, at the end and on Ctrl-C."""
        end = min(self.config.steps, self.config.steps if until is None else until)
        started, before = time.monotonic(), self.seconds
        recent: list[list[float]] = []
        try:
            with Progress("distillation", end - self.step) as progress:
                while self.step < end:
                    recent.append(self._train_step(self.step))
                    self.step += 1
                    self.seconds = before + time.monotonic() - started
                    if self.step % self.config.checkpoint_every == 0 or self.step == end:
                        self.losses.append([float(self.step), *np.mean(recent, axis=0).round(5).tolist()])
                        recent = []
                        self._write_checkpoint()
                    progress.advance(note=self._note(recent))
        except KeyboardInterrupt:
            self._write_checkpoint()
            raise

    def _note(self, recent: list[list[float]]) -> str:
        losses = np.mean(recent[-50:], axis=0) if recent else self.losses[-1][1:]
        return "unexplained variance " + " ".join(f"{value:.3f}" for value in losses)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        if step < config.warmup:
            return config.learning_rate * (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def _open_chapter(self, number: int) -> None:
        """Draw the crops of a chapter and compute their targets; a function of (seed, number)."""
        config = self.config
        images, targets = [], []
        count = max(config.batch, config.chapter * config.batch // config.repeats)
        for crop in _crops(self.paths, (config.seed, _CHAPTER, number), count, config.crop):
            image = crop.to(self.device).float() / 255
            maps = self.targets(expected_maps(self.teacher, image, low_precision=config.low_precision))
            images.append(crop)
            targets.append([m.half() for m in maps])
        self._chapter = number
        self._images = torch.cat(images)
        self._maps = [torch.cat(maps) for maps in zip(*targets, strict=True)]
        rng = np.random.default_rng([config.seed, _ORDER, number])
        rounds = math.ceil(config.chapter * config.batch / count)
        self._order = torch.from_numpy(np.concatenate([rng.permutation(count) for _ in range(rounds)]))

    def _train_step(self, step: int) -> list[float]:
        config = self.config
        if self._chapter != step // config.chapter:
            self._open_chapter(step // config.chapter)
        place = step % config.chapter * config.batch
        picks = self._order[place : place + config.batch]
        generator = torch.Generator().manual_seed((config.seed * 4 + _STEP) * 1_000_003 + step)
        symmetry = int(torch.randint(_SYMMETRIES, (), generator=generator))
        image = view_of(self._images[picks].to(self.device).float() / 255, symmetry)
        target = [view_of(m[picks.to(m.device)].float(), symmetry) for m in self._maps]
        gain = 1 + 0.03 * torch.randn(len(image), 3, 1, 1, generator=generator)
        grain = torch.randn(image.shape, generator=generator) * 0.01
        grain = grain * torch.rand(len(image), 1, 1, 1, generator=generator)
        seen = (image * gain.to(self.device) + grain.to(self.device)).clamp(0, 1)
        maps = self.student(seen.contiguous(memory_format=torch.channels_last))
        losses = [
            _pooled(mine - wanted).square().sum(1).mean() / variance
            for mine, wanted, variance in zip(maps, target, self.targets.variances, strict=True)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        decay = min(config.averaging, (step + 1) / (step + 10))
        for name, value in self.student.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return [float(loss.detach()) for loss in losses]

    def weights(self) -> bytes:
        """The averaged student as float16 safetensors."""
        return save({name: value.half().cpu().contiguous() for name, value in self.average.items()})

    def _identity(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        del config["checkpoint_every"]
        return {"config": config, "images": [path.name for path in self.paths]}

    def _write_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "identity": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "student": self.student.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "means": self.targets.means,
                "weights": self.targets.weights,
                "variances": self.targets.variances,
            },
            buffer,
        )
        write_file(self.checkpoint, buffer.getvalue())

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        try:
            found = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            identity = found["identity"]
        except Exception as error:
            raise BackboneError(
                wanted=f"a checkpoint of a distillation at {self.checkpoint}",
                got="a file that does not load",
                next_step="Delete it, or start afresh without --resume.",
            ) from error
        if identity != self._identity():
            raise BackboneError(
                wanted=f"a checkpoint of this configuration and these images at {self.checkpoint}",
                got="one of another run",
                next_step="Name another checkpoint, or start afresh without --resume.",
            )
        return cast(dict[str, Any], found)


def distil(
    teacher: nn.Module,
    images: Path,
    config: DistilConfig,
    out: Path,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    leave_out: Sequence[str] = (),
) -> Distillation:
    """Run the recipe to its end and write the weights (float16 safetensors) to `out`.

    Arguments as for `Distillation`. Running it again with the same `checkpoint` continues where it stopped.

    Returns:
        the finished run.

    Raises:
        InputError: no images.
        BackboneError: a checkpoint of another configuration or of other images.
        StorageError: the weights or the checkpoint cannot be written.
    """
    run = Distillation(teacher, images, config, checkpoint=checkpoint, device=device, leave_out=leave_out)
    run.run()
    write_file(out, run.weights())
    return run
