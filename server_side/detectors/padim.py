"""PaDiM as a trunk and a head (Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection
and Localization", ICPR 2021, arXiv 2011.08785).

Every position of the map has a Gaussian of its own over d channels, drawn at random, of all layers side by side; its
covariance has 0.01 I added (equation 1). The score of a position is its Mahalanobis distance (equation 2), the map is
that of all positions, upsampled and smoothed, and the frame's score is the map's maximum.

The channels are in the trunk. The statistics are knowledge: `gaussian.mean` and `gaussian.factor`, W of
`edgead.server_side.detectors.gaussian`, in float16, in which a pack is half as large: 8 MiB for 32 x 32 positions and
64 channels. The head counts in float32.

Parts have to lie in every frame alike. The tiles of a frame share one set of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.gaussian import Moments, gaussian_quantile, whitening
from edgead.server_side.detectors.map_head import MapHead
from edgead.server_side.detectors.memory_bank import receptive_sigma
from edgead.server_side.detectors.trained import Samples, TrainedOptions, refuse_anomalies, split_held_out
from edgead.server_side.devices import placed, torch_device
from edgead.server_side.learned import Learned, Modules, finished
from edgead.server_side.photographs import read_photograph

METHOD = "padim"
PAPER = "Defard et al., PaDiM: a Patch Distribution Modeling Framework, ICPR 2021, arXiv 2011.08785"

DIMENSIONS = 64
"""Channels that are drawn; the paper draws 100 of 448."""
REGULARISATION = 0.01
_BATCH = 8


class PadimTrunk(nn.Module):
    """Frame -> some channels of all layers at each position of the finest.

    Args:
        backbone: gives maps from RGB in 0..1.
        channels: which of all channels, int64 [d].
    """

    def __init__(self, backbone: Backbone, channels: NDArray[np.int64]) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels: Tensor
        self.register_buffer("channels", torch.from_numpy(channels))

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: embeddings float32 [B, P, d], row by row."""
        maps = self.backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
        finest = self.backbone.strides[0]
        # Each cell of a coarser layer stands for all finer ones in it, as in the authors' code.
        layers = [
            F.interpolate(each, scale_factor=stride // finest, mode="nearest") if stride > finest else each
            for each, stride in zip(maps, self.backbone.strides, strict=True)
        ]
        return torch.cat(layers, 1).index_select(1, self.channels).flatten(2).transpose(1, 2)


class PadimHead(MapHead):
    """Embeddings and Gaussians -> score and map; a cell is a position."""

    def forward(self, embeddings: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            embeddings: float32 [B, P, d].
            mean: float32 [P, d].
            factor: float16 [P, d, d], W.

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W].
        """
        away = (embeddings - mean).permute(1, 2, 0)  # [P, d, B]
        distance = torch.matmul(factor.float(), away).square().sum(1).sqrt()  # [P, B]
        anomaly_map = self.upsampled(distance.T)
        return anomaly_map.amax((1, 2)), anomaly_map


def padim_modules(
    backbone: Backbone, channels: NDArray[np.int64], preprocessing: Preprocessing, sigma: float | None = None
) -> Modules:
    """Trunk and head with their ports; `sigma` of the map's blur in pixels, by the frame's size if None."""
    size = (preprocessing.height, preprocessing.width)
    grid = (size[0] // backbone.strides[0], size[1] // backbone.strides[0])
    positions, dimensions = grid[0] * grid[1], len(channels)
    blur = receptive_sigma(min(size)) if sigma is None else sigma
    return Modules(
        PadimTrunk(backbone, channels),
        PadimHead(grid, size, blur),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("embeddings", "float32", ("B", positions, dimensions)),),
        knowledge=(
            KnowledgePort("gaussian.mean", "float32", (positions, dimensions)),
            KnowledgePort("gaussian.factor", "float16", (positions, dimensions, dimensions)),
        ),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


def gaussians(moments: Moments, regularisation: float = REGULARISATION) -> dict[str, NDArray[Any]]:
    """The knowledge of a detector: equation 1 of the paper, factored."""
    covariance = moments.covariance() + regularisation * np.eye(moments.mean.shape[-1])
    return {
        "gaussian.mean": moments.mean.astype(np.float32),
        "gaussian.factor": whitening(covariance).astype(np.float16),
    }


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    dimensions: int = DIMENSIONS,
    checkpoint: Path | None = None,
) -> Learned:
    """A PaDiM detector from photographs of good parts.

    Args:
        normal: photographs of good parts.
        options: `steps`, `batch`, `learning_rate` and `patience` mean nothing here.
        anomalous: none; the method has no use for them.
        dimensions: channels that are drawn, at most all.
        checkpoint: not written; statistics take one pass.

    Raises:
        InputError: fewer than 2 normals, anomalies, or no such device.
        ImageError: a file is no picture.
        BackboneError: an unknown backbone.
    """
    refuse_anomalies(METHOD, anomalous)
    device = torch_device(options.device)
    backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
    known, held_out = split_held_out(normal, options)
    total = sum(backbone.channels)
    rng = np.random.default_rng(options.seed)
    channels = np.sort(rng.permutation(total)[: min(dimensions, total)]).astype(np.int64)
    modules = padim_modules(backbone, channels, options.preprocessing)
    positions = modules.spec.features[0].shape[1]
    assert isinstance(positions, int)
    moments = Moments(positions, len(channels))
    with placed(modules.trunk, device), Progress("normal statistics", len(known)) as progress:
        for at in range(0, len(known), _BATCH):
            pictures = [prepare(read_photograph(path), options.preprocessing) for path in known[at : at + _BATCH]]
            # Frame by frame the sums of products would cost more than the network.
            moments.add(modules.embed_prepared(np.concatenate(pictures))["embeddings"])
            progress.advance(len(pictures))
    return finished(
        modules,
        options,
        gaussians(moments),
        paper=PAPER,
        normal=normal,
        held_out=held_out,
        by_hand=2.0 * gaussian_quantile(len(channels)),
        backbone=options.backbone,
        dimensions=len(channels),
        data={"statistics_of": len(known), "frames": moments.count, "calibrated_on": len(held_out)},
    )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "PadimHead",
    "PadimTrunk",
    "gaussians",
    "learn",
    "padim_modules",
)
