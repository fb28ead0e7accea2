"""The student of a distillation as a trunk and a head: a frozen backbone and a few convolutions; see `distil`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone
from edgead.server_side.detectors.map_head import MapHead
from edgead.server_side.detectors.training import generator
from edgead.server_side.learned import Modules

METHOD = "distilled"
WIDTH = 64


class StudentDecoder(nn.Module):
    """Maps of a backbone -> the logarithm of the teacher's map, at the finest grid.

    Args:
        channels: of each map, finest first.
        width: of the inner layers.
        seed: of the weights.
    """

    def __init__(self, channels: Sequence[int], width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 1)
        drawn = generator(seed, -1)
        with torch.no_grad():
            for layer in (*self.inputs, *self.inner, self.last):
                assert isinstance(layer, nn.Conv2d)
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=drawn) * (2 / fan_in) ** 0.5)
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Args: maps: float32 [B, C_l, h_l, w_l], finest first. Returns: z float32 [B, h, w]."""
        finest = maps[0].shape[-2]
        joined = torch.zeros(())
        for layer, each in zip(self.inputs, maps, strict=True):
            found = layer(each)
            times = finest // each.shape[-2]
            if times > 1:
                found = F.interpolate(found, scale_factor=times, mode="nearest")
            joined = joined + found
        hidden = F.relu(self.norms[0](joined))
        for inner, norm in zip(self.inner, list(self.norms)[1:], strict=True):
            hidden = hidden + F.relu(norm(inner(hidden)))
        last: Tensor = self.last(hidden)
        return last[:, 0]


class StudentTrunk(nn.Module):
    """Frame -> z: a frozen backbone and the decoder."""

    def __init__(self, backbone: Backbone, decoder: StudentDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: logarithms float32 [B, P], row by row."""
        maps = self.backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
        found: Tensor = self.decoder(maps)
        return found.flatten(1)


class StudentHead(MapHead):
    """Logarithms -> score and map.

    Args:
        grid: rows and columns of the trunk's cells.
        size: height and width of the engine's frame, in pixels.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        # The teacher's map is smooth already.
        super().__init__(grid, size, sigma=0.0)

    def forward(self, logarithms: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            logarithms: float32 [B, P].
            scale: float32 [1].

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W].
        """
        values = logarithms.clamp(-10.0, 10.0).exp() * scale
        return values.amax(1), self.upsampled(values)


def student_modules(backbone: Backbone, decoder: StudentDecoder, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    size = (preprocessing.height, preprocessing.width)
    grid = (size[0] // backbone.strides[0], size[1] // backbone.strides[0])
    return Modules(
        StudentTrunk(backbone, decoder),
        StudentHead(grid, size),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("logarithms", "float32", ("B", grid[0] * grid[1])),),
        knowledge=(KnowledgePort("map.scale", "float32", (1,)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


__all__ = ["METHOD", "StudentDecoder", "StudentHead", "StudentTrunk", "student_modules"]
