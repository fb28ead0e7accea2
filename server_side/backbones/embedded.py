"""The embedded backbone: a compact convolutional network whose weights ship inside the package.

Two maps, at strides 8 and 16, whose channels are already decorrelated and scaled against each other: a memory
bank may concatenate them and use Euclidean distance as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgead.runtime.errors import BackboneError
from edgead.server_side.backbones.base import Backbone, read_state, weights_mismatch
from edgead.server_side.backbones.inverted_residuals import (
    EXPANSIONS,
    DownConv2d,
    InvertedResiduals,
    convolutions,
)

EMBEDDED_WEIGHTS = Path(__file__).with_name("embedded.safetensors")
EMBEDDED_CARD = Path(__file__).with_name("embedded.json")

TAPS = (6, 10)
PROJECTION_CHANNELS = (96, 96)
DOWN_KERNEL = 4

_INPUT_SCALE = 255 / 128
_INPUT_SHIFT = -1.0


class EmbeddedBackbone(Backbone):
    """Inverted residuals up to the stride-16 expansion of block 10, and one 1x1 projection per output map.

    Stride-2 kernels are 4x4 with one pixel of padding on every side, so that each output cell is centred on
    the pixels that it stands for, at every stride; 3x3 kernels drift by half a cell.

    Attributes:
        name: "embedded".
        strides: (8, 16).
        channels: channels of each map.
    """

    def __init__(self, channels: Sequence[int] = PROJECTION_CHANNELS) -> None:
        super().__init__()
        self.name = "embedded"
        self.strides = tuple(EXPANSIONS[tap][0] for tap in TAPS)
        self.channels = tuple(channels)
        self.expansion_channels = tuple(EXPANSIONS[tap][1] for tap in TAPS)
        self._kept = tuple(range(len(TAPS)))
        self.trunk = InvertedResiduals(TAPS, DOWN_KERNEL)
        self.projections = nn.ModuleList(
            nn.Conv2d(inputs, width, 1) for inputs, width in zip(self.expansion_channels, self.channels, strict=True)
        )

    def expansions(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The trunk's maps before projection, in 0..6; `image` as for `forward`."""
        maps: list[torch.Tensor] = self.trunk(image * _INPUT_SCALE + _INPUT_SHIFT)
        return maps

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of an image.

        Arguments and result as for `Backbone.forward`; strides 8 and 16.
        """
        maps = self.expansions(image)
        return [self.projections[index](maps[index]) for index in self._kept]

    def only(self, strides: Sequence[int]) -> EmbeddedBackbone:
        """Keep the maps of these strides; returns the module itself.

        Raises:
            BackboneError: a stride that the network does not have, or none.
        """
        if not strides or set(strides) - set(self.strides):
            raise BackboneError(
                wanted=f"layers of the embedded backbone by stride, from {self.strides}",
                got=f"{tuple(strides)}",
                next_step="Name 8, 16 or both.",
            )
        self._kept = tuple(i for i, stride in enumerate(self.strides) if stride in strides)
        self.strides = tuple(self.strides[i] for i in self._kept)
        self.channels = tuple(self.channels[i] for i in self._kept)
        return self


def random_embedded(seed: int = 0, channels: Sequence[int] = PROJECTION_CHANNELS) -> EmbeddedBackbone:
    """The architecture with He-normal weights and zero biases that depend on `seed` alone."""
    model = EmbeddedBackbone(channels)
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_in = layer.weight[0].numel()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            assert layer.bias is not None
            layer.bias.zero_()
    return model


def start_from(model: EmbeddedBackbone, teacher: InvertedResiduals) -> None:
    """Copy a 3x3-kernel trunk into `model`'s.

    A 4x4 kernel becomes the mean of the 3x3 one at its four possible offsets: centred, and smoothed by a 2x2
    box against aliasing. Projections are left as they are.
    """
    for mine, theirs in zip(convolutions(model.trunk), convolutions(teacher), strict=False):
        with torch.no_grad():
            assert mine.bias is not None
            assert theirs.bias is not None
            mine.bias.copy_(theirs.bias)
            if isinstance(theirs, DownConv2d):
                weight = theirs.weight
                corners = [(a, 1 - a, b, 1 - b) for a in (0, 1) for b in (0, 1)]
                mine.weight.copy_(torch.stack([functional.pad(weight, c) for c in corners]).mean(0))
            else:
                mine.weight.copy_(theirs.weight)


def load_embedded(path: Path = EMBEDDED_WEIGHTS) -> EmbeddedBackbone:
    """Read the embedded backbone's weights (safetensors, any float type) into float32.

    Returns:
        the frozen module in evaluation mode.

    Raises:
        BackboneError: no such file, not safetensors, or weights of another network.
    """
    state = read_state(path)
    try:
        widths = [len(state[f"projections.{index}.weight"]) for index in range(len(TAPS))]
        model = EmbeddedBackbone(widths)
        model.load_state_dict(state)
    except KeyError as error:
        raise weights_mismatch("embedded", path, f"no tensor {error}") from error
    except RuntimeError as error:
        raise weights_mismatch("embedded", path, str(error).splitlines()[-1].strip()) from error
    return model.eval().requires_grad_(False)


def embedded_card() -> dict[str, Any]:
    """The card of the packaged weights: how they were made and how they scored.

    Raises:
        BackboneError: the package carries no card.
    """
    try:
        card: dict[str, Any] = json.loads(EMBEDDED_CARD.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(
            wanted=f"the embedded backbone's card at {EMBEDDED_CARD}",
            got="a missing or damaged file",
            next_step="Install edgead again.",
        ) from error
    return card


def multiply_adds(model: nn.Module, height: int = 256, width: int = 256) -> int:
    """Multiply-adds of all convolutions and linear layers for one image of `height` x `width` pixels."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        per_value = layer.weight[0].numel()
        total += output.numel() * per_value

    handles = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, height, width))
    finally:
        for handle in handles:
            handle.remove()
    return total
