"""The recipe of the embedded backbone: distil what a teacher expects to see, not its single glance.

Teacher. A network with stride-2 layers sees a part differently when it moves by a few pixels, and its cells
are not centred on what they describe. The target is the teacher's mean feature over a picture and its three
mirror images, mirrored back: centred, and with less aliasing. Quarter turns are left out: they would make a
feature blind to the direction of a grain or an edge.

Target. Per map, principal components of the averaged features on the images, each divided by its standard
deviation to the power `whitening`, and the whole map scaled to `scales`.

Student. `EmbeddedBackbone`, started from the teacher's weights where it is a MobileNetV2 (or from random
ones), its projections by ridge regression onto the targets; then trained end to end with AdamW on the mean
squared error relative to each map's variance. The weights that are kept are an exponential moving average.

Every random choice of step n depends on (seed, n) alone: an interrupted run, continued, ends in the same
bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.files import write_file
from edgead.runtime.progress import Progress
from edgead.server_side.backbones.embedded import random_embedded, start_from
from edgead.server_side.backbones.mobilenet_v2 import MobileNetV2
from edgead.server_side.backbones.targets import (
    SYMMETRIES,
    DistilConfig,
    Targets,
    expected_maps,
    fit_targets,
    pooled,
    training_crops,
    view_of,
)
from edgead.server_side.backbones.validation import find_images
from edgead.server_side.interruption import interruption

__all__ = ["DistilConfig", "Distillation", "distil"]

_CHAPTER, _ORDER, _STEP = 1, 2, 3


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
        self.leave_out = tuple(leave_out)
        self.paths = [p for p in find_images(images) if not p.name.startswith(self.leave_out)]
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
        """Train to the end, or to step `until`.

        The checkpoint is written on the way, at the end, and on Ctrl-C between two steps.

        Raises:
            KeyboardInterrupt: Ctrl-C; the run can be continued from the checkpoint.
            StorageError: the checkpoint cannot be written.
        """
        end = self.end if until is None else min(self.end, until)
        started, before = time.monotonic(), self.seconds
        recent: list[list[float]] = []
        with Progress("distillation", end - self.step) as progress, interruption() as interrupted:
            while self.step < end:
                recent.append(self._train_step(self.step))
                self.step += 1
                self.seconds = before + time.monotonic() - started
                if self.step % self.config.checkpoint_every == 0 or self.step == end:
                    self.losses.append([float(self.step), *np.mean(recent, axis=0).round(5).tolist()])
                    recent = []
                    self._write_checkpoint()
                progress.advance(note=self._note(recent))
                if interrupted.is_set():
                    self._write_checkpoint()
                    raise KeyboardInterrupt

    @property
    def end(self) -> int:
        """The last step of this run."""
        steps, stop = self.config.steps, self.config.stop_at
        return steps if stop is None else min(steps, stop)

    def _note(self, recent: list[list[float]]) -> str:
        losses = np.mean(recent[-50:], axis=0) if recent else self.losses[-1][1:]
        return "unexplained variance " + " ".join(f"{value:.3f}" for value in losses)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        if step < config.warmup:
            return config.learning_rate * (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        rate = config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        if self.end < config.steps:
            rate *= min(1.0, (self.end - step) / config.cooldown)
        return rate

    def _open_chapter(self, number: int) -> None:
        """Draw the crops of a chapter and compute their targets; a function of (seed, number)."""
        config = self.config
        images, targets = [], []
        count = max(config.batch, config.chapter * config.batch // config.repeats)
        for crop in training_crops(self.paths, (config.seed, _CHAPTER, number), count, config.crop):
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
        symmetry = int(torch.randint(SYMMETRIES, (), generator=generator))
        image = view_of(self._images[picks].to(self.device).float() / 255, symmetry)
        target = [view_of(m[picks.to(m.device)].float(), symmetry) for m in self._maps]
        gain = 1 + 0.03 * torch.randn(len(image), 3, 1, 1, generator=generator)
        grain = torch.randn(image.shape, generator=generator) * 0.01
        grain = grain * torch.rand(len(image), 1, 1, 1, generator=generator)
        seen = (image * gain.to(self.device) + grain.to(self.device)).clamp(0, 1)
        maps = self.student(seen.contiguous(memory_format=torch.channels_last))
        losses = [
            pooled(mine - wanted).square().sum(1).mean() / variance
            for mine, wanted, variance in zip(maps, target, self.targets.variances, strict=True)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
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
    """Run the recipe and write the averaged weights (float16 safetensors) to `out`.

    Arguments as for `Distillation`. Running it again with the same `checkpoint` continues where it stopped.

    Returns:
        the run.

    Raises:
        InputError: no images.
        BackboneError: a checkpoint of another configuration or of other images.
        StorageError: the weights or the checkpoint cannot be written.
    """
    run = Distillation(teacher, images, config, checkpoint=checkpoint, device=device, leave_out=leave_out)
    run.run()
    write_file(out, run.weights())
    return run
