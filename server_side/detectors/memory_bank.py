"""PatchCore's method as a trunk and a head (Roth et al., "Towards Total Recall in Industrial Anomaly
Detection", CVPR 2022).

The trunk turns a frame into locally averaged patch embeddings of several layers. The head compares them with
a bank of normal rows and, if there is one, a bank of anomalous rows. Neither holds a row: the banks, the
weight of the anomalous one and every threshold are knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone

METHOD = "memory-bank"

EXCLUDED = -3.0e38
"""Similarity of a padded row: below that of any real one, and finite, so that no NaN can come of it."""

STEP = 352
"""Patches that are compared with a bank at a time: a third of 32 x 32. Smaller steps keep the table of likenesses
[STEP, N] small; larger ones repeat less work on the bank (`python -m benchmarks bank-search`, `footprint`)."""


class MemoryBankTrunk(nn.Module):
    """Frame -> patch embeddings (section 3.1 of the paper).

    Each layer's map is averaged over `patch` x `patch` neighbours, brought to the size of the finest layer,
    and concatenated.

    Args:
        backbone: gives maps [B, C_l, H / s_l, W / s_l] from RGB in 0..1.
        patch: side of the neighbourhood that is averaged (the paper's p), odd.
    """

    def __init__(self, backbone: Backbone, patch: int = 3) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch = patch

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: patches float32 [B, P, D], row by row."""
        pixels = image.permute(0, 3, 1, 2).float() * (1.0 / 255.0)
        maps = self.backbone(pixels)
        finest = maps[0].shape[-2:]
        layers = []
        for features in maps:
            # Neighbours outside the frame count as zeros, as in the authors' code.
            averaged = F.avg_pool2d(features, self.patch, stride=1, padding=self.patch // 2)
            if averaged.shape[-2:] != finest:
                averaged = F.interpolate(averaged, size=finest, mode="bilinear", align_corners=False)
            layers.append(averaged)
        return torch.cat(layers, dim=1).flatten(2).transpose(1, 2)


def smoothing_matrix(patches: int, pixels: int, sigma: float) -> NDArray[np.float32]:
    """Bilinear upsampling of `patches` values to `pixels`, then a Gaussian blur, as one matrix.

    Both steps are linear and separable, so a whole map is `A @ M @ B.T`: two small matrix products that
    every engine computes alike, where resize operators differ in their corner conventions.

    Args:
        patches: values along one side of the patch grid.
        pixels: values along the same side of the engine's frame.
        sigma: standard deviation of the blur in pixels; 0 leaves it out. The kernel reaches
            `int(4 * sigma + 0.5)` pixels to both sides and reflects at the border without repeating it.

    Returns:
        float32 [pixels, patches]; every row sums to 1.
    """
    centre = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    centre = centre.clip(0, patches - 1)
    low = np.floor(centre).astype(np.int64)
    high = np.minimum(low + 1, patches - 1)
    share = centre - low
    upsample = np.zeros((pixels, patches))
    np.add.at(upsample, (np.arange(pixels), low), 1.0 - share)
    np.add.at(upsample, (np.arange(pixels), high), share)
    if sigma <= 0:
        return upsample.astype(np.float32)
    radius = min(int(4.0 * sigma + 0.5), pixels - 1)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    blur = np.zeros((pixels, pixels))
    for offset, weight in zip(offsets, kernel, strict=True):
        source = np.abs(np.arange(pixels) + offset)
        source = np.where(source >= pixels, 2 * (pixels - 1) - source, source)
        np.add.at(blur, (np.arange(pixels), source), weight)
    return (blur @ upsample).astype(np.float32)


class MemoryBankHead(nn.Module):
    """Patch embeddings and banks -> image score, anomaly map, nearest rows.

    The distance of a patch is that to its nearest normal row. With an anomalous bank a patch that lies nearer
    to an anomalous row than to any normal one is raised:

        s = d_normal + weight * max(0, d_normal - d_anomalous)

    so no patch is ever lowered by it, and one that is nearer to the normal bank is untouched. The image
    score is the largest patch score; with `neighbours` > 0 it is re-weighted as in equation 7 of the paper.

    Args:
        grid: rows and columns of patches.
        size: height and width of the engine's frame, in pixels.
        sigma: standard deviation in pixels of the map's Gaussian blur.
        neighbours: the paper's b; 0 leaves re-weighting out.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], sigma: float = 4.0, neighbours: int = 0) -> None:
        super().__init__()
        self.up_rows: Tensor
        self.up_columns: Tensor
        self.grid = grid
        self.neighbours = neighbours
        rows = torch.from_numpy(smoothing_matrix(grid[0], size[0], sigma))
        columns = torch.from_numpy(smoothing_matrix(grid[1], size[1], sigma))
        self.register_buffer("up_rows", rows)
        self.register_buffer("up_columns", columns.T.contiguous())

    def forward(
        self,
        patches: Tensor,
        normal: Tensor,
        normal_rows: Tensor,
        anomalous: Tensor,
        anomalous_rows: Tensor,
        anomalous_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Args:
            patches: float32 [B, P, D].
            normal: float32 [N, D]; the first `normal_rows` [1] (int32) are valid.
            anomalous: float32 [M, D]; the first `anomalous_rows` [1] (int32) are valid, possibly none.
            anomalous_weight: float32 [1].

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W], nearest_row int32 [B, P],
            worst_patch int32 [B].
        """
        distance, nearest = nearest_rows(patches, normal, normal_rows)
        alarm, _ = nearest_rows(patches, anomalous, anomalous_rows)
        # Without a valid anomalous row `alarm` means nothing; the comparison then adds exactly zero.
        present = (anomalous_rows > 0).to(distance.dtype)
        patch_score = distance + anomalous_weight * present * (distance - alarm).clamp_min(0.0)
        score = patch_score.amax(dim=1)
        if self.neighbours:
            score = score * self._reweighting(patches, normal, normal_rows, patch_score, distance, nearest)
        grid = patch_score.reshape(-1, *self.grid)
        anomaly_map = self.up_rows @ grid @ self.up_columns
        worst = patch_score.argmax(dim=1).to(torch.int32)
        return score, anomaly_map, nearest.to(torch.int32), worst

    def _reweighting(
        self,
        patches: Tensor,
        normal: Tensor,
        normal_rows: Tensor,
        patch_score: Tensor,
        distance: Tensor,
        nearest: Tensor,
    ) -> Tensor:
        """Equation 7: 1 - softmax over the b nearest rows of the winning row, at that row. [B]."""
        worst = patch_score.argmax(dim=1, keepdim=True)  # [B, 1]
        patch = patches.gather(1, worst.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # [B, 1, D]
        row = F.embedding(nearest.gather(1, worst).squeeze(1), normal)  # [B, D]
        likeness = _likeness(row, normal, _bias(normal, normal_rows))  # [B, N]
        around = likeness.topk(self.neighbours, dim=1).indices
        support = (F.embedding(around, normal) - patch).square().sum(-1).sqrt()  # [B, b]
        won = distance.gather(1, worst)  # [B, 1]
        shift = torch.maximum(support.amax(1, keepdim=True), won)
        share = torch.exp(won - shift).squeeze(1) / torch.exp(support - shift).sum(1)
        return 1.0 - share


def _bias(bank: Tensor, rows: Tensor) -> Tensor:
    """-|b|^2 / 2 for every valid row b and `EXCLUDED` for the others, [N].

    From the norm, a single operator: as squares and their sum it would hold a second bank for a moment.
    """
    valid = torch.arange(bank.shape[0], device=bank.device, dtype=torch.int32) < rows
    return torch.where(valid, torch.linalg.vector_norm(bank, dim=1).square() * -0.5, EXCLUDED)


def _likeness(patches: Tensor, bank: Tensor, bias: Tensor) -> Tensor:
    """f.b - |b|^2 / 2 for every patch f [n, D] and row b, [n, N]: largest where the distance is smallest.

    The bank enters only through one matrix product and one bias, both constant while the knowledge is:
    |f|^2 changes no order and is left out.
    """
    return F.linear(patches, bank, bias)


def nearest_rows(patches: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest valid row and its index, both [B, P].

    The expansion |f|^2 + |b|^2 - 2 f.b loses small distances to cancellation, so it only chooses the row;
    the distance itself is computed directly from the difference, in float32. The patches are walked `STEP` at a
    time, so that an engine holds a small table of likenesses.
    """
    bias = _bias(bank, rows)
    found = []
    for some in torch.split(patches, STEP, dim=1):
        _, index = _likeness(some.flatten(0, 1), bank, bias).topk(1, dim=-1)
        found.append(index.reshape(-1, some.shape[1]))
    index = torch.cat(found, dim=1)
    difference = patches - F.embedding(index, bank)
    return difference.square().sum(-1).sqrt(), index


def memory_bank_ports(
    preprocessing: Preprocessing, grid: tuple[int, int], dimensions: int, neighbours: int = 0
) -> tuple[tuple[Port, ...], tuple[KnowledgePort, ...], tuple[Port, ...]]:
    """Features, knowledge and outputs of the detector, in graph order."""
    patches = grid[0] * grid[1]
    features = (Port("patches", "float32", ("B", patches, dimensions)),)
    knowledge = (
        KnowledgePort(
            "bank.normal",
            "float32",
            ("N", dimensions),
            rows="bank.normal.rows",
            min_rows=max(neighbours, 1),
        ),
        KnowledgePort("bank.anomalous", "float32", ("M", dimensions), rows="bank.anomalous.rows", empty_ok=True),
        KnowledgePort("anomalous.weight", "float32", (1,)),
    )
    outputs = (
        Port("score", "float32", ("B",)),
        Port("anomaly_map", "float32", ("B", preprocessing.height, preprocessing.width)),
        Port("nearest_row", "int32", ("B", patches)),
        Port("worst_patch", "int32", ("B",)),
    )
    return features, knowledge, outputs


def patch_grid(trunk: MemoryBankTrunk, preprocessing: Preprocessing) -> tuple[tuple[int, int], int]:
    """Rows and columns of the trunk's patch grid and the dimensions of a patch, by a trial run."""
    frame = torch.zeros(1, preprocessing.height, preprocessing.width, 3, dtype=torch.uint8)
    with torch.inference_mode():
        finest = trunk.backbone(frame.permute(0, 3, 1, 2).float())[0]
        dimensions = trunk(frame).shape[-1]
    return (finest.shape[-2], finest.shape[-1]), dimensions


def receptive_sigma(size: int, reference: int = 256, sigma: float = 4.0) -> float:
    """The blur for an engine frame of `size` pixels: 4 px at 224-256 px in the paper, in proportion."""
    return sigma * size / reference


__all__: Sequence[str] = (
    "METHOD",
    "MemoryBankHead",
    "MemoryBankTrunk",
    "memory_bank_ports",
    "nearest_rows",
    "patch_grid",
    "receptive_sigma",
    "smoothing_matrix",
)
