"""The networks and losses of EfficientAD small (Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at
Millisecond-Level Latencies", WACV 2024, arXiv 2303.14535; tables 6 and 8 of its appendix, Algorithm 1).

A patch description network (PDN) has no padding: cell (i, j) describes exactly the 33 x 33 pixels from (4i, 4j) on, so
the cells of a crop that starts at a multiple of 4 pixels are cells of the whole frame.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 384
CELL = 4
"""Pixels from one cell of a description to the next."""
FIELD = 33
"""Side in pixels of what one cell sees."""
BORDER = 4
"""Cells that a frame of H x W pixels has less on each side than its grid of H / 4 x W / 4."""
P_HARD = 0.999
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Per channel of pixels in 0..1, as in the paper."""
_DROPOUT = 0.2
_CODE = 64


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for weights."""
    return torch.Generator().manual_seed(seed)


def cells(pixels: int) -> int:
    """Cells of a PDN along a side of so many pixels."""
    return ((pixels - 3) // 2 - 3) // 2 - 5


def _initialise(module: nn.Module, drawn: torch.Generator) -> None:
    """Uniform weights as torch draws them for a convolution, from a generator instead of the global one."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=drawn)
                assert layer.bias is not None
                layer.bias.uniform_(-bound, bound, generator=drawn)


class PatchDescription(nn.Module):
    """PDN-S: 4 convolutions and 2 average poolings (table 6).

    Args:
        channels: of the description: 384 for a teacher, 768 for a student.
        seed: of the weights.
    """

    def __init__(self, channels: int = CHANNELS, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 128, 4)
        self.second = nn.Conv2d(128, 256, 4)
        self.third = nn.Conv2d(256, 256, 3)
        self.last = nn.Conv2d(256, channels, 4)
        _initialise(self, seeded(seed))

    def forward(self, pixels: Tensor) -> Tensor:
        """Args: pixels: float32 [B, 3, H, W], normalised. Returns: float32 [B, channels, cells(H), cells(W)]."""
        hidden = F.avg_pool2d(F.relu(self.first(pixels)), 2)
        hidden = F.avg_pool2d(F.relu(self.second(hidden)), 2)
        found: Tensor = self.last(F.relu(self.third(hidden)))
        return found

    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Fold (description - mean) / std, both [channels], into the last convolution."""
        with torch.no_grad():
            assert self.last.bias is not None
            self.last.weight.div_(std[:, None, None, None])
            self.last.bias.sub_(mean).div_(std)


class Autoencoder(nn.Module):
    """Frame -> 64 numbers -> the teacher's description of it (table 8).

    Args:
        size: height and width of the frame in pixels, multiples of 32. Below 256 the last kernel of the encoder
            shrinks with the frame; at 256 everything is the paper's.
        channels: of the description.
        seed: of the weights.
    """

    def __init__(self, size: tuple[int, int], channels: int = CHANNELS, seed: int = 0) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        self.encoder = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 4, stride=2, padding=1) for inputs, outputs in itertools.pairwise(widths)
        )
        height, width = size
        self.code = nn.Conv2d(64, _CODE, (min(8, height // 32), min(8, width // 32)))
        steps = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
        self.sizes = tuple((max(height // by - less, 1), max(width // by - less, 1)) for by, less in steps)
        self.grid = (cells(height), cells(width))
        self.decoder = nn.ModuleList(nn.Conv2d(_CODE, 64, 4, padding=2) for _ in steps)
        self.smooth = nn.Conv2d(64, 64, 3, padding=1)
        self.last = nn.Conv2d(64, channels, 3, padding=1)
        _initialise(self, seeded(seed))

    def forward(self, pixels: Tensor, drawn: torch.Generator | None = None) -> Tensor:
        """Reconstruct a description.

        Args:
            pixels: float32 [B, 3, H, W], normalised, of `size`.
            drawn: where dropout takes its random numbers from; None for no dropout.

        Returns:
            float32 [B, channels, cells(H), cells(W)].
        """
        hidden = pixels
        for layer in self.encoder:
            hidden = F.relu(layer(hidden))
        hidden = self.code(hidden)
        for size, layer in zip(self.sizes, self.decoder, strict=True):
            hidden = F.relu(layer(F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)))
            if drawn is not None:
                kept = (torch.rand(hidden.shape, generator=drawn) >= _DROPOUT).to(hidden.device)
                hidden = hidden * kept / (1.0 - _DROPOUT)
        hidden = F.relu(self.smooth(F.interpolate(hidden, size=self.grid, mode="bilinear", align_corners=False)))
        found: Tensor = self.last(hidden)
        return found


def hard_feature_loss(teacher: Tensor, student: Tensor, p_hard: float = P_HARD) -> Tensor:
    """The mean of the squared differences that are at or above their `p_hard`-quantile (section 3.2, L_hard).

    Args:
        teacher, student: [B, C, h, w].
        p_hard: 0 makes it the mean over everything.

    Returns:
        a scalar.
    """
    distance = (teacher - student).square()
    hard = torch.quantile(distance.detach().flatten(), p_hard)
    return distance[distance >= hard].mean()


def penalty_loss(student: Tensor, where: Tensor | None = None) -> Tensor:
    """What the student says on pictures that are no normals, squared and averaged (section 3.2).

    Args:
        student: [B, C, h, w].
        where: bool [B, h, w], cells that count; all if None. Without any the loss is 0.

    Returns:
        a scalar.
    """
    squared = student.square().mean(1)
    if where is None:
        return squared.mean()
    return (squared * where).sum() / where.sum().clamp_min(1)


def reconstruction_loss(description: Tensor, autoencoder: Tensor) -> Tensor:
    """The mean squared difference: L_AE between teacher and autoencoder, L_STAE between autoencoder and student."""
    return (description - autoencoder).square().mean()


def difference_maps(teacher: Tensor, student: Tensor, autoencoder: Tensor) -> tuple[Tensor, Tensor]:
    """Squared differences averaged over channels: the local map and the global one.

    Args:
        teacher: [B, C, h, w].
        student: [B, 2 C, h, w]; its first half imitates the teacher, its second the autoencoder.
        autoencoder: [B, C, h, w].

    Returns:
        teacher against student, autoencoder against student, each [B, h, w].
    """
    channels = teacher.shape[1]
    local = (teacher - student[:, :channels]).square().mean(1)
    whole = (autoencoder - student[:, channels:]).square().mean(1)
    return local, whole


__all__ = [
    "BORDER",
    "CELL",
    "CHANNELS",
    "FIELD",
    "Autoencoder",
    "PatchDescription",
    "cells",
    "difference_maps",
    "hard_feature_loss",
    "penalty_loss",
    "reconstruction_loss",
]
