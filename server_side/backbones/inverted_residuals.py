"""MobileNetV2's trunk up to the expansion of block 13, shared by the teacher and the embedded backbone.

Architecture: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, table 2; blocks
are numbered from 0 as in the TensorFlow release. There are no normalisation layers: their effect is folded
into weights and biases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

STEM_CHANNELS = 32
EXPANSION = 6

BLOCKS: tuple[tuple[int, int, int], ...] = (
    (1, 16, 1),
    (EXPANSION, 24, 2),
    (EXPANSION, 24, 1),
    (EXPANSION, 32, 2),
    (EXPANSION, 32, 1),
    (EXPANSION, 32, 1),
    (EXPANSION, 64, 2),
    (EXPANSION, 64, 1),
    (EXPANSION, 64, 1),
    (EXPANSION, 64, 1),
    (EXPANSION, 96, 1),
    (EXPANSION, 96, 1),
    (EXPANSION, 96, 1),
    (EXPANSION, 160, 2),
)
"""(expansion factor, output channels, stride) of each block; of block 13 only the expansion is used."""

EXPANSIONS: dict[int, tuple[int, int]] = {
    1: (2, 96),
    3: (4, 144),
    6: (8, 192),
    10: (16, 384),
    13: (16, 576),
}
"""Block number -> (stride, channels) of the expansions worth tapping."""


class DownConv2d(nn.Conv2d):
    """A stride-2 convolution with TensorFlow's 'SAME' padding of even sizes: one row below, one column right.

    The centre of output cell i lies on input pixel 2i + 1; plain `padding=1` would put it on 2i.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] with even H and W -> [B, C', H / 2, W / 2]."""
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int, down_kernel: int) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    if down_kernel == 3:
        return DownConv2d(inputs, outputs, 3, stride=2, groups=groups)
    return nn.Conv2d(inputs, outputs, down_kernel, stride=2, padding=1, groups=groups)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3, or `down_kernel` at stride 2), project (1x1, linear)."""

    def __init__(self, inputs: int, factor: int, outputs: int, stride: int, down_kernel: int) -> None:
        super().__init__()
        hidden = inputs * factor
        self.expand = nn.Conv2d(inputs, hidden, 1) if factor > 1 else None
        self.depthwise = _conv(hidden, hidden, 3, stride, hidden, down_kernel)
        self.project = nn.Conv2d(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def expanded(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, inputs * factor, H, W] in 0..6."""
        return x if self.expand is None else functional.relu6(self.expand(x))

    def bottleneck(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The block's output from its expansion `hidden` and its input `x`."""
        out: torch.Tensor = self.project(functional.relu6(self.depthwise(hidden)))
        return x + out if self.residual else out


class InvertedResiduals(nn.Module):
    """The trunk: image in -1..1 -> expansions of chosen blocks.

    Args:
        taps: block numbers, ascending, keys of `EXPANSIONS`.
        down_kernel: size of stride-2 kernels. 3 is MobileNetV2 itself, padded below and right only. 4 with
            one pixel of padding on every side is centred: no half-pixel drift from stride to stride.
    """

    def __init__(self, taps: Sequence[int], down_kernel: int) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.stem = _conv(3, STEM_CHANNELS, 3, 2, 1, down_kernel)
        blocks: list[nn.Module] = []
        channels = STEM_CHANNELS
        for factor, outputs, stride in BLOCKS[: max(self.taps)]:
            blocks.append(InvertedResidual(channels, factor, outputs, stride, down_kernel))
            channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Conv2d(channels, channels * EXPANSION, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] float, sides divisible by 32 -> [B, C, H / stride, W / stride] in 0..6 per tap."""
        maps = []
        x = functional.relu6(self.stem(x))
        for number, block in enumerate(self.blocks):
            assert isinstance(block, InvertedResidual)
            hidden = block.expanded(x)
            if number in self.taps:
                maps.append(hidden)
            x = block.bottleneck(hidden, x)
        maps.append(functional.relu6(self.last(x)))
        return maps


def convolutions(trunk: InvertedResiduals) -> list[nn.Conv2d]:
    """The trunk's convolutions in the order in which they run."""
    return [module for module in trunk.modules() if isinstance(module, nn.Conv2d)]
