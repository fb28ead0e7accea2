"""The networks of ReContrast (see `recontrast`): two encoders behind a shared part, and a small decoder for both."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.server_side.backbones import Backbone, EmbeddedBackbone
from edgead.server_side.backbones.inverted_residuals import EXPANSIONS, InvertedResidual
from edgead.server_side.detectors.training import generator

WIDTH = 64
_SHARED_BLOCKS = 4
"""Blocks of the embedded backbone before stride 8 is reached, the one that reaches it included."""
Maps = list[Tensor]


class EmbeddedStem(nn.Module):
    """The first blocks of the embedded backbone: image [B, 3, H, W] in 0..1 -> [B, 32, H / 8, W / 8]."""

    def __init__(self, backbone: EmbeddedBackbone) -> None:
        super().__init__()
        self.stem = backbone.trunk.stem
        self.blocks = backbone.trunk.blocks[:_SHARED_BLOCKS]

    def forward(self, image: Tensor) -> Tensor:
        """Args and result: see the class."""
        hidden = F.relu6(self.stem(image * (255 / 128) - 1.0))
        for block in self.blocks:
            assert isinstance(block, InvertedResidual)
            hidden = block.bottleneck(block.expanded(hidden), hidden)
        return hidden


class EmbeddedTail(nn.Module):
    """The other blocks and the projections: what `EmbeddedStem` gives -> the backbone's maps."""

    def __init__(self, backbone: EmbeddedBackbone) -> None:
        super().__init__()
        self.blocks = backbone.trunk.blocks[_SHARED_BLOCKS:]
        self.last = backbone.trunk.last
        self.projections = backbone.projections
        self._taps = [tap - _SHARED_BLOCKS for tap in backbone.trunk.taps]
        self._kept = [EXPANSIONS[tap][0] in backbone.strides for tap in backbone.trunk.taps]

    def forward(self, hidden: Tensor) -> Maps:
        """Args: hidden: [B, 32, H / 8, W / 8]. Returns: as `Backbone.forward`."""
        found = []
        for place, block in enumerate(self.blocks):
            assert isinstance(block, InvertedResidual)
            expanded = block.expanded(hidden)
            if place in self._taps:
                found.append(expanded)
            hidden = block.bottleneck(expanded, hidden)
        found.append(F.relu6(self.last(hidden)))
        return [
            projection(each) for projection, each, kept in zip(self.projections, found, self._kept, strict=True) if kept
        ]


def encoders_of(backbone: Backbone) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(what both encoders share, the frozen encoder, the one to train) of a backbone; they share no weights."""
    frozen = copy.deepcopy(backbone).eval().requires_grad_(False)
    if isinstance(frozen, EmbeddedBackbone):
        tail = EmbeddedTail(frozen)
        return EmbeddedStem(frozen), tail, copy.deepcopy(tail).requires_grad_(True)
    return nn.Identity(), frozen, copy.deepcopy(frozen).requires_grad_(True)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Decoder(nn.Module):
    """Bottleneck and decoder: maps of an encoder, finest first -> the same maps, rebuilt.

    Every map is brought to half of the coarsest's grid and all are fused there. From that on the way up, the grid
    doubles, and each map is a 1x1 convolution of what there is at its grid.

    Args:
        channels: of each map.
        strides: of each map, each at least the one before, doubling from one to the next that differs.
        width: of the finest layer; the coarser ones are half as wide again, and twice as wide.
        seed: of the weights.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.strides = tuple(strides)
        coarsest = max(strides)
        self.down = nn.ModuleList()
        for inputs, stride in zip(channels, strides, strict=True):
            steps: list[nn.Module] = []
            while stride < 2 * coarsest:
                steps.append(_block(inputs, width, 2))
                inputs, stride = width, 2 * stride
            self.down.append(nn.Sequential(*steps))
        self.fuse = _block(width * len(channels), 2 * width)
        self.up, self.outputs = nn.ModuleList(), nn.ModuleList()
        inputs, stride = 2 * width, 2 * coarsest
        while stride > min(strides):
            stride //= 2
            outputs = width if stride == min(strides) else width + width // 2
            raised = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
            self.up.append(nn.Sequential(raised, nn.BatchNorm2d(outputs), nn.ReLU(), _block(outputs, outputs)))
            self.outputs.append(
                nn.ModuleList(nn.Conv2d(outputs, c, 1) for c, s in zip(channels, strides, strict=True) if s == stride)
            )
            inputs = outputs
        drawn = generator(seed, -1)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.kaiming_normal_(layer.weight, generator=drawn)
                    if layer.bias is not None:
                        layer.bias.zero_()

    def forward(self, maps: Maps) -> Maps:
        """Args: maps: [B, C, h, w] each, sides of the coarsest even. Returns: the same shapes."""
        hidden = self.fuse(torch.cat([down(each) for down, each in zip(self.down, maps, strict=True)], 1))
        found: Maps = []
        for up, outputs in zip(self.up, self.outputs, strict=True):
            hidden = up(hidden)
            assert isinstance(outputs, nn.ModuleList)
            found = [*(output(hidden) for output in outputs), *found]
        return found


class ReContrastNetwork(nn.Module):
    """Both encoders behind what they share, and the decoder.

    Args:
        backbone: copied; itself it is left as it is.
        width: see `Decoder`.
        seed: of the decoder's weights.
    """

    def __init__(self, backbone: Backbone, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.strides = tuple(backbone.strides)
        self.shared, self.frozen, self.encoder = encoders_of(backbone)
        self.decoder = Decoder(backbone.channels, backbone.strides, width, seed)

    def train(self, mode: bool = True) -> ReContrastNetwork:
        """Of the parts only the decoder has anything that differs."""
        super().train(False)
        self.decoder.train(mode)
        self.training = mode
        return self

    def pairs(self, hidden: Tensor, frozen: Maps) -> tuple[Maps, Maps]:
        """Maps of both encoders, and what the decoder makes of the other one's in their place.

        Args:
            hidden: what both encoders share, [B, ...].
            frozen: the frozen encoder's maps of it.

        Returns:
            encoder's maps: of the frozen one, then of the trained one; decoder's maps in the same order.
        """
        trained = self.encoder(hidden)
        # Both views in one batch, as the decoder's normalisation has to see both.
        rebuilt = self.decoder([torch.cat([mine, other]) for mine, other in zip(trained, frozen, strict=True)])
        count = len(hidden)
        return [*frozen, *trained], [*(each[:count] for each in rebuilt), *(each[count:] for each in rebuilt)]


__all__: Sequence[str] = (
    "WIDTH",
    "Decoder",
    "EmbeddedStem",
    "EmbeddedTail",
    "Maps",
    "ReContrastNetwork",
    "encoders_of",
)
