"""SSD as a trunk and a head (Sehwag et al., "SSD: A Unified Framework for Self-Supervised Outlier Detection",
ICLR 2021, arXiv 2103.12051).

The features of a network, as vectors of unit length, are divided into clusters, one by default as in the paper; the
score of a frame is the smallest Mahalanobis distance to a cluster's mean under its covariance. There is no map. Means
and covariances, as W of `edgead.server_side.detectors.gaussian`, are knowledge.

Ours:
- The paper trains its network on the normals by contrast, without labels. Here it is the frozen pretrained backbone;
  a self-supervised one may be named instead of it.
- Maps of all layers are pooled to their means and their maxima, of which a mean alone would not show a small defect.
- Covariances are shrunk to a share of their mean variance, as photographs are fewer than dimensions.
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

from edgead.runtime.errors import missing_dependency
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.gaussian import Floats, Moments, gaussian_quantile, shrunk, whitening
from edgead.server_side.detectors.trained import Samples, TrainedOptions, refuse_anomalies, split_held_out
from edgead.server_side.devices import placed, torch_device
from edgead.server_side.learned import Learned, Modules, finished
from edgead.server_side.photographs import read_photograph

METHOD = "ssd"
PAPER = "Sehwag et al., SSD: A Unified Framework for Self-Supervised Outlier Detection, ICLR 2021, arXiv 2103.12051"

SHRINKAGE = 0.1
"""Share of the mean variance in a covariance."""


class SsdTrunk(nn.Module):
    """Frame -> pooled maps of a frozen backbone, as a vector of unit length."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: embedding float32 [B, D]."""
        maps = self.backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
        pooled = torch.cat([part for each in maps for part in (each.mean((2, 3)), each.amax((2, 3)))], 1)
        return F.normalize(pooled, dim=1)


class SsdHead(nn.Module):
    """Embedding and clusters -> the smallest Mahalanobis distance."""

    def forward(self, embedding: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        """Args:
            embedding: float32 [B, D].
            mean: float32 [K, D].
            factor: float32 [K, D, D], W.

        Returns:
            score float32 [B].
        """
        away = embedding[:, None] - mean  # [B, K, D]
        lengths = torch.matmul(factor, away.permute(1, 2, 0)).square().sum(1).sqrt()  # [K, B]
        return lengths.amin(0)


def ssd_modules(backbone: Backbone, clusters: int, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    dimensions = 2 * sum(backbone.channels)
    return Modules(
        SsdTrunk(backbone),
        SsdHead(),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("embedding", "float32", ("B", dimensions)),),
        knowledge=(
            KnowledgePort("gaussian.mean", "float32", (clusters, dimensions)),
            KnowledgePort("gaussian.factor", "float32", (clusters, dimensions, dimensions)),
        ),
        outputs=(Port("score", "float32", ("B",)),),
    )


def gaussians(features: NDArray[Any], clusters: int = 1, seed: int = 0) -> list[Moments]:
    """Moments of the clusters of some features, the largest cluster first.

    Args:
        features: [N, D].
        clusters: how many are wanted; there are fewer where fewer features differ.
        seed: of k-means.
    """
    count = min(clusters, len(np.unique(features, axis=0)))
    labels = _labels(features, count, seed)
    parts = [features[labels == label] for label in range(count)]
    found = []
    for part in sorted(parts, key=len, reverse=True):
        moments = Moments(1, features.shape[1])
        moments.add(part[:, None])
        found.append(moments)
    return found


def knowledge(moments: Sequence[Moments], shrinkage: float = SHRINKAGE) -> dict[str, NDArray[Any]]:
    """The arrays of a pack; all clusters are shrunk to the mean variance around their means of all together."""
    covariances: list[Floats] = [each.covariance()[0] for each in moments]
    weights = [each.count for each in moments]
    floor = float(np.average([np.trace(each) / len(each) for each in covariances], weights=weights)) or 1.0
    return {
        "gaussian.mean": np.concatenate([each.mean for each in moments]).astype(np.float32),
        "gaussian.factor": np.stack([whitening(shrunk(each, shrinkage, floor)) for each in covariances]).astype(
            np.float32
        ),
    }


def _labels(features: NDArray[Any], count: int, seed: int) -> NDArray[np.intp]:
    if count == 1:
        return np.zeros(len(features), np.intp)
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "scikit-learn", "export", "clusters of normals") from error
    found: NDArray[np.intp] = KMeans(count, n_init=10, random_state=seed).fit(features).labels_
    return found


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    clusters: int = 1,
    shrinkage: float = SHRINKAGE,
    checkpoint: Path | None = None,
) -> Learned:
    """An SSD detector from photographs of good parts.

    Args:
        normal: photographs of good parts.
        options: `steps`, `batch`, `learning_rate` and `patience` mean nothing here.
        anomalous: none; the method has no use for them.
        clusters: of normals.
        shrinkage: see the module.
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
    # Ports tell the number of clusters, which the features decide.
    modules = ssd_modules(backbone, 1, options.preprocessing)
    with placed(modules.trunk, device), Progress("normal features", len(known)) as progress:
        features = np.concatenate(
            [
                modules.embed_prepared(prepare(read_photograph(path), options.preprocessing))["embedding"]
                for path in progress.track(known)
            ]
        )
    moments = gaussians(features, clusters, options.seed)
    modules = ssd_modules(backbone, len(moments), options.preprocessing)
    return finished(
        modules,
        options,
        knowledge(moments, shrinkage),
        paper=PAPER,
        normal=normal,
        held_out=held_out,
        by_hand=2.0 * gaussian_quantile(features.shape[1]),
        backbone=options.backbone,
        clusters=[each.count for each in moments],
        shrinkage=shrinkage,
        data={"statistics_of": len(known), "frames": len(features), "calibrated_on": len(held_out)},
    )


__all__: Sequence[str] = ("METHOD", "PAPER", "SsdHead", "SsdTrunk", "gaussians", "knowledge", "learn", "ssd_modules")
