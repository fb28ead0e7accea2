"""How EfficientAD's student and autoencoder are trained; what of it is ours is said in `efficientad`."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.server_side.detectors.efficientad_crops import (
    Place,
    crop_place,
    cropped,
    normalised,
    of_crop,
    place_around,
    reached,
)
from edgead.server_side.detectors.efficientad_networks import (
    CHANNELS,
    MEAN,
    STD,
    Autoencoder,
    PatchDescription,
    difference_maps,
    hard_feature_loss,
    penalty_loss,
    reconstruction_loss,
)
from edgead.server_side.detectors.efficientad_start import (
    component_filters,
    foreign_examples,
    normal_examples,
    read_out,
)
from edgead.server_side.detectors.trained import Anomalies
from edgead.server_side.detectors.training import batch_of, generator
from edgead.server_side.devices import CPU, computing_on

STEPS = 200
"""Of the student; the paper's 70,000 are for GPUs, and `TrainedOptions.steps` asks for as many."""
LEARNING_RATE = 1e-4
"""The paper's; it falls to a tenth for the last twentieth, as there."""
AUTOENCODER_RATE = 5.0
"""Times that: the autoencoder begins with random weights, which few steps at the paper's rate leave where they are."""
WEIGHT_DECAY = 1e-5
_CROP = 96
_PENALTY_CROP = 64
_VALIDATED = 4


class EfficientAdNetworks(nn.Module):
    """Teacher, student and autoencoder, as they are trained and kept.

    Args:
        size: height and width of the engine's frame in pixels.
        seed: of the weights.
    """

    unexplained: Tensor

    def __init__(self, size: tuple[int, int], seed: int = 0) -> None:
        super().__init__()
        self.teacher = PatchDescription(CHANNELS, seed).requires_grad_(False)
        self.student = PatchDescription(2 * CHANNELS, seed + 1)
        self.autoencoder = Autoencoder(size, CHANNELS, seed + 2)
        # Kept with the teacher, so that a continued run writes the same card.
        self.register_buffer("unexplained", torch.zeros(()))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Args: pixels: float32 [B, 3, H, W], normalised. Returns: local and global map, each float32 [B, h, w]."""
        return difference_maps(self.teacher(pixels), self.student(pixels), self.autoencoder(pixels))


def changed(pixels: Tensor, drawn: torch.Generator) -> Tensor:
    """Brightness, contrast or saturation times a factor of 0.8 to 1.2, one of them, as for the paper's autoencoder.

    Args:
        pixels: float32 [1, 3, H, W], normalised.
        drawn: decides; it is advanced by two numbers.
    """
    kind = int(torch.randint(3, (1,), generator=drawn))
    factor = 0.8 + 0.4 * float(torch.rand(1, generator=drawn))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    colours = pixels * std + mean
    grey = (colours * torch.tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    from_value = (torch.zeros(()), grey.mean(), grey)[kind]
    return ((from_value + factor * (colours - from_value)).clamp(0.0, 1.0) - mean) / std


class EfficientAdTask:
    """Trains student and autoencoder; see `training.Task`.

    Args:
        networks: with their teacher.
        frames: uint8 [N, H, W, 3] of normals.
        generic: uint8 [G, H, W, 3] for the penalty, possibly none.
        anomalies: to penalise where their masks are, possibly none.
        stop: uint8 [V, H, W, 3] of held-out normals.
        steps: of the whole training.
        learning_rate: of Adam for the student; the autoencoder's is `AUTOENCODER_RATE` times as high.
        seed: of frames, crops, changes and dropout.
        precision: 'float32', or 'bfloat16' for the networks' passes in a step; losses, the optimizer and everything
            that is kept are float32 either way.
        identity: what a checkpoint must agree in.
        device: where it is trained; the networks are moved there.
    """

    def __init__(
        self,
        networks: EfficientAdNetworks,
        frames: NDArray[np.uint8],
        generic: NDArray[np.uint8],
        anomalies: Anomalies,
        stop: NDArray[np.uint8],
        *,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
        precision: str = "float32",
        identity: dict[str, Any] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.module = networks.to(device)
        self._device, self._half = device, precision == "bfloat16"
        self._frames, self._generic = frames, generic
        # A mask at the very rim lies in the middle of no cell's field.
        marked = reached(anomalies.masks)
        some = np.flatnonzero(anomalies.known & marked.flatten(1).any(1).numpy())
        self._anomalies, self._cells = anomalies.part(some), marked[some]
        self._held = [stop[place] for place in range(0, len(stop), max(1, len(stop) // _VALIDATED))][:_VALIDATED]
        self._steps, self._rate, self._seed = steps, learning_rate, seed
        self._optimizer = torch.optim.Adam(
            [{"params": [*network.parameters()]} for network in (networks.student, networks.autoencoder)],
            lr=learning_rate,
            weight_decay=WEIGHT_DECAY,
        )
        self.optimizers = [self._optimizer]
        self.identity = {
            "method": "efficientad",
            "seed": seed,
            "steps": steps,
            "rate": learning_rate,
            "precision": precision,
            **(identity or {}),
        }

    def start(self) -> None:
        """Begin with closed forms instead of random weights, see `efficientad_start`.

        The half that imitates the autoencoder begins at 0, the mean of what a teacher says.
        """
        student, teacher = self.module.student, self.module.teacher

        def taught(frame: NDArray[np.uint8], place: Place) -> Tensor:
            found: Tensor = teacher(normalised(cropped(frame, place)).to(self._device))[0]
            return found

        foreign = foreign_examples(self._generic, self._anomalies.frames, self._cells, self._seed)
        examples = itertools.chain(normal_examples(self._frames, taught, self._seed), foreign)
        with computing_on(self._device):
            component_filters(student, self._frames, self._seed, "student: ")
            read_out(student, examples, CHANNELS, self._seed, "student: ")

    def step(self, number: int) -> dict[str, float]:
        """L_hard, the penalty, L_AE and L_STAE on one normal."""
        for group, times in zip(self._optimizer.param_groups, (1.0, AUTOENCODER_RATE), strict=True):
            group["lr"] = times * self._rate * (0.1 if number >= 0.95 * self._steps else 1.0)
        drawn = generator(self._seed, number)
        frame = self._frames[batch_of(len(self._frames), 1, self._seed, number).numpy()]
        pixels = changed(normalised(frame), drawn)
        place = crop_place(frame.shape[1:3], drawn, _CROP)
        top, left, height, width = place
        crop = pixels[..., top : top + height, left : left + width]
        with torch.no_grad():
            taught = self._passed(self.module.teacher, crop)
        said = self._passed(self.module.student, crop)
        rebuilt = of_crop(self._passed(self.module.autoencoder, pixels, drawn), place)
        losses = {
            "hard": hard_feature_loss(taught, said[:, :CHANNELS]),
            "penalty": self._penalty(number, drawn),
            "autoencoder": reconstruction_loss(taught, rebuilt),
            "student": reconstruction_loss(rebuilt, said[:, CHANNELS:]),
        }
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _passed(self, network: nn.Module, pixels: Tensor, *more: Any) -> Tensor:
        """What a network makes of pixels [B, 3, H, W], in the precision of the training: float32."""
        with torch.autocast(self._device.type, torch.bfloat16) if self._half else contextlib.nullcontext():
            found: Tensor = network(pixels.to(self._device), *more)
        return found.float()

    def _penalty(self, number: int, drawn: torch.Generator) -> Tensor:
        own = len(self._anomalies) > 0 and (number % 2 == 1 or not len(self._generic))
        if not own and not len(self._generic):
            return torch.zeros((), device=self._device)
        frames = self._anomalies.frames if own else self._generic
        which = batch_of(len(frames), 1, self._seed + 1, number).numpy()
        where = None
        if own:
            mask = self._cells[int(which[0])]
            place = place_around(mask, frames.shape[1:3], drawn, _PENALTY_CROP)
            where = of_crop(mask[None], place).to(self._device)
        else:
            place = crop_place(frames.shape[1:3], drawn, _PENALTY_CROP)
        crop = normalised(cropped(frames[which], place))
        return penalty_loss(self._passed(self.module.student, crop)[:, :CHANNELS], where)

    def validate(self) -> float:
        """L_AE, L_STAE and the mean difference of student and teacher over held-out normals."""
        found = []
        for frame in self._held:
            pixels = normalised(frame[None]).to(self._device)
            taught, said = self.module.teacher(pixels), self.module.student(pixels)
            rebuilt = self.module.autoencoder(pixels)
            local, whole = difference_maps(taught, said, rebuilt)
            found.append(local.mean() + whole.mean() + reconstruction_loss(taught, rebuilt))
        return float(torch.stack(found).mean())


__all__ = ["LEARNING_RATE", "STEPS", "EfficientAdNetworks", "EfficientAdTask", "changed"]
