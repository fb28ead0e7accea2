"""A teacher for EfficientAD without a download: a patch description network distilled from a backbone.

The paper distils its teacher from a WideResNet-101 on ImageNet in 60,000 steps of 16 pictures. Ours is made in a few
minutes from the photographs of the part themselves and from generic pictures: it need not describe the world, only be
a fixed description that a student can learn on normals and does not know elsewhere. It begins with the closed forms of
`efficientad_start`, which explain 12 to 30 % of the embedded backbone on photographs that they have not seen. From
random weights 200 steps explain nothing at any learning rate, and from the closed forms they add little.

As in the paper the backbone sees the picture at twice the size, so that its stride of 8 is the PDN's of 4, and its
features are standardised by channel. Ours too: the backbone's features of the picture at its own size are appended,
which with the embedded backbone makes the paper's 384 channels; other numbers are averaged to it, as the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.runtime.errors import FailureError
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone
from edgead.server_side.detectors.efficientad_crops import Place, crop_place, cropped, normalised, of_crop
from edgead.server_side.detectors.efficientad_networks import BORDER, CELL, CHANNELS, PatchDescription
from edgead.server_side.detectors.efficientad_start import CROPS, component_filters, normal_examples, read_out
from edgead.server_side.detectors.training import History, Schedule, batch_of, generator, train
from edgead.server_side.devices import CPU, computing_on, device_of, placed
from edgead.server_side.painting_parts import MATERIALS, paint_part, smooth_noise
from edgead.server_side.photographs import read_photograph

GENERIC = 48
"""Generic pictures that are painted."""
STEPS = 200
LEARNING_RATE = 1e-4
"""The paper's. At 1e-3 all of a teacher's ReLUs die within 50 steps on photographs."""
_OTHER_CROPS = 77
"""Added to the seed, so that teacher and student do not begin from the same patches."""
_VALIDATED = 4
_STANDARDISED = 48
"""Normals that the teacher is standardised over: 150,000 cells at 256 pixels."""
_STD_FLOOR = 1e-3
_DEAD = 1e-3
"""Share of what a channel says that must differ over normals; one with less is constant but for rounding."""


def generic_frames(preprocessing: Preprocessing, seed: int = 0, count: int = GENERIC) -> NDArray[np.uint8]:
    """Painted pictures of anything: coloured noise of every grain, and parts of the painter's, crops of all scales.

    Returns:
        uint8 [count, H, W, 3].
    """
    rng = np.random.default_rng([seed, 7])
    size = (preprocessing.height, preprocessing.width)
    found = np.zeros((count, *size, 3), np.uint8)
    for place in range(count):
        if place % 3 == 0:
            part = paint_part(sorted(MATERIALS)[place // 3 % len(MATERIALS)], rng=rng, new_pattern=True).image
            side = int(part.shape[0] * rng.uniform(0.3, 1.0))
            top, left = (int(rng.integers(0, part.shape[0] - side + 1)) for _ in range(2))
            picture = cv2.resize(part[top : top + side, left : left + side], size[::-1], interpolation=cv2.INTER_AREA)
            picture = picture[..., rng.permutation(3)]
        else:
            grains = np.exp(rng.uniform(np.log(2.0), np.log(min(size) / 2), (3, 2)))
            layers = [smooth_noise(rng, size, (float(high), float(wide))) for high, wide in grains]
            shades = np.stack([layer / max(float(np.abs(layer).max()), 1e-6) for layer in layers], -1)
            coloured = 128.0 + 127.0 * shades @ rng.uniform(-0.6, 0.6, (3, 3)) + rng.uniform(-60, 60, 3)
            picture = np.clip(coloured, 0, 255).astype(np.uint8)
        found[place] = picture
    return found


def picture_frames(paths: Sequence[Path], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Own generic pictures as frames of the engine's size; rotation, region and tiles of the part do not apply.

    Raises:
        ImageError: a file that is no picture.
        StorageError: a file that cannot be read.
    """
    plain = Preprocessing(preprocessing.width, preprocessing.height)
    found = [prepare(read_photograph(path), plain) for path in paths]
    empty = np.zeros((0, preprocessing.height, preprocessing.width, 3), np.uint8)
    return np.concatenate([empty, *found])


def described(backbone: Backbone, frames: NDArray[np.uint8], channels: int = CHANNELS) -> Tensor:
    """What the teacher is to say of frames.

    Args:
        backbone: frozen.
        frames: uint8 [B, H, W, 3], sides divisible by 32.
        channels: of the description.

    Returns:
        float32 [B, channels, H / 4, W / 4], where the backbone is.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device_of(backbone)).permute(0, 3, 1, 2).float() / 255.0
    grid = (pixels.shape[-2] // CELL, pixels.shape[-1] // CELL)
    maps = []
    with torch.inference_mode():
        twice = F.interpolate(pixels, scale_factor=2.0, mode="bilinear", align_corners=False)
        for found in (*backbone(twice), *backbone(pixels)):
            same = found.shape[-2:] == grid
            maps.append(found if same else F.interpolate(found, size=grid, mode="bilinear", align_corners=False))
        joined = torch.cat(maps, 1)
        if joined.shape[1] != channels:
            flat = joined.flatten(2).transpose(1, 2)
            joined = F.adaptive_avg_pool1d(flat, channels).transpose(1, 2).reshape(-1, channels, *grid)
    return joined.clone()


class TeacherTask:
    """Distils a backbone into a PDN; see `training.Task`.

    Args:
        backbone: frozen.
        frames: uint8 [N, H, W, 3] of normals.
        generic: uint8 [G, H, W, 3], possibly none; every second step learns from one of them.
        stop: uint8 [V, H, W, 3] of normals that nothing is learned from.
        steps: of the whole training; the learning rate falls to 0 over them.
        seed: of weights, frames and crops.
        identity: what a checkpoint must agree in.
        device: where it is distilled; the backbone is moved there.
    """

    def __init__(
        self,
        backbone: Backbone,
        frames: NDArray[np.uint8],
        generic: NDArray[np.uint8],
        stop: NDArray[np.uint8],
        *,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
        identity: dict[str, Any] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._backbone, self._frames, self._generic = backbone.to(device), frames, generic
        self._device = device
        self._steps, self._rate, self._seed = steps, learning_rate, seed
        self.module = PatchDescription(seed=seed).to(device)
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=learning_rate)
        self.optimizers = [self._optimizer]
        self.identity = {"distilled": True, "steps": steps, "seed": seed, **(identity or {})}
        some = np.concatenate([frames[:: max(1, len(frames) // 8)][:8], generic[:4]])
        with computing_on(device):
            seen = torch.stack([_moments(described(backbone, frame[None])) for frame in some])
        mean = seen[:, 0].mean(0)
        self._mean = mean.float()
        self._std = (seen[:, 1].mean(0) - mean.square()).clamp_min(_STD_FLOOR**2).sqrt().float()
        self._held = [stop[place] for place in range(0, len(stop), max(1, len(stop) // _VALIDATED))][:_VALIDATED]

    def start(self) -> None:
        """Begin with closed forms instead of random weights, see `efficientad_start`.

        They rest on generic pictures as much as on normals: filters of normals alone would be the student's.
        """
        seed = self._seed + _OTHER_CROPS
        both = [frames for frames in (self._frames, self._generic) if len(frames)]
        some = [frames[batch_of(len(frames), min(CROPS // 2, len(frames)), seed, 0).numpy()] for frames in both]
        frames = np.concatenate(some)
        with computing_on(self._device):
            component_filters(self.module, frames, seed, "teacher: ")
            read_out(self.module, normal_examples(frames, self._wanted, seed), CHANNELS, seed, "teacher: ")

    def step(self, number: int) -> dict[str, float]:
        """One step of Adam on a crop of one frame."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * (1.0 - number / self._steps)
        own = number % 2 == 0 or not len(self._generic)
        frames = self._frames if own else self._generic
        frame = frames[batch_of(len(frames), 1, self._seed, number // 2).numpy()]
        loss = self._loss(frame, crop_place(frame.shape[1:3], generator(self._seed, number)))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"unexplained": float(loss.detach())}

    def validate(self) -> float:
        """The share of the backbone's variance that is not explained on held-out normals."""
        found = [self._loss(frame[None], (0, 0, *frame.shape[:2])) for frame in self._held]
        return float(torch.stack(found).mean())

    def _wanted(self, frame: NDArray[np.uint8], place: Place) -> Tensor:
        """What is to be said of a crop of a frame [1, H, W, 3]: [C, h, w]."""
        maps = of_crop(described(self._backbone, frame)[0], place, BORDER)
        return (maps - self._mean[:, None, None]) / self._std[:, None, None]

    def _loss(self, frame: NDArray[np.uint8], place: Place) -> Tensor:
        got = self.module(normalised(cropped(frame, place)).to(self._device))
        return F.mse_loss(got[0], self._wanted(frame, place))


def _moments(maps: Tensor) -> Tensor:
    """Mean and mean square by channel, [2, C]."""
    maps = maps.double()
    return torch.stack([maps.mean((0, 2, 3)), maps.square().mean((0, 2, 3))])


def distil_teacher(
    backbone: Backbone,
    frames: NDArray[np.uint8],
    generic: NDArray[np.uint8],
    stop: NDArray[np.uint8],
    *,
    steps: int = STEPS,
    seed: int = 0,
    identity: dict[str, Any] | None = None,
    closed: bool = True,
    checkpoint: Path | None = None,
    device: torch.device = CPU,
) -> tuple[PatchDescription, History]:
    """Distil a teacher.

    Args:
        backbone: frozen.
        frames, generic, stop: see `TeacherTask`.
        steps: of Adam.
        seed: makes it repeatable.
        identity: what a checkpoint must agree in.
        closed: begin with closed forms, see `efficientad_start`, not with random weights.
        checkpoint: where the distillation is kept between interruptions.
        device: where it is distilled.

    Returns:
        the frozen teacher on the CPU, not yet standardised, and how its training went.

    Raises:
        DetectorError: a checkpoint of another distillation.
        FailureError: the loss is no number any more.
    """
    home = device_of(backbone)
    task = TeacherTask(backbone, frames, generic, stop, steps=steps, seed=seed, identity=identity, device=device)
    if closed and (checkpoint is None or not checkpoint.is_file()):
        task.start()
    schedule = Schedule(steps, validate_every=max(1, steps // 4), patience=0, from_start=closed)
    history = train(task, schedule, label="distilling the teacher", checkpoint=checkpoint)
    backbone.to(home)
    return task.module.cpu().requires_grad_(False), history


def standardise(teacher: PatchDescription, frames: NDArray[np.uint8], device: torch.device = CPU) -> None:
    """Bring each channel of what a teacher says to mean 0 and deviation 1 over normals.

    Args:
        teacher: changed in place.
        frames: uint8 [N, H, W, 3] of normals; some of them are enough.
        device: where it is computed.

    Raises:
        FailureError: the teacher says the same of everything.
    """
    with placed(teacher, device), torch.inference_mode():
        some = frames[:: max(1, len(frames) // _STANDARDISED)]
        seen = torch.stack([_moments(teacher(normalised(frame[None]).to(device))) for frame in some]).mean(0).cpu()
    variance = seen[1] - seen[0].square()
    silent = int((variance <= _DEAD**2 * seen[1]).sum())
    if silent > len(variance) / 2:
        raise FailureError(
            wanted="a teacher that says different things of different places of the normals",
            got=f"{silent} of its {len(variance)} channels are constant there",
            next_step="Name another --teacher, or a --generic folder with pictures of more kinds.",
        )
    std = variance.clamp_min(_STD_FLOOR**2).sqrt()
    teacher.normalise(seen[0].float(), std.float())


__all__ = [
    "GENERIC",
    "STEPS",
    "TeacherTask",
    "described",
    "distil_teacher",
    "generic_frames",
    "picture_frames",
    "standardise",
]
