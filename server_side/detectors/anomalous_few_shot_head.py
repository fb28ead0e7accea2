"""Trunk and head of few-shot detection with an anomalous bank (Abdali et al., "Anomalous Samples for Few-Shot Anomaly
Detection", 2025, https://arxiv.org/abs/2507.23712).

The trunk gives embeddings of the image and of its windows at four scales. The head puts three scores together: how
the prompts see the image (zero-shot), how far its windows are from those of good parts, and how near they are to
those of known defects. Prompts, both banks and the weights of the three are knowledge, and each bank may be empty.

Where the paper's text leaves the formula open, WinCLIP's is taken: the harmonic mean over the windows that hold a
patch, the mean over scales, and the largest value of the map as the image's score. See `AnomalousFewShotHead`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgead.runtime.errors import BackboneError
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.detectors.text_heads import (
    FLOOR,
    HarmonicWindows,
    Upsample,
    anomalous_share,
    association,
    class_embeddings,
    mean_of_present,
    prompt_likeness,
    text_ports,
)
from edgead.server_side.detectors.winclip import TEMPERATURE
from edgead.server_side.learned import Modules
from edgead.server_side.vision_language import VisionTower

METHOD = "anomalous-few-shot"
WINDOW_PIXELS = (16, 32, 48, 112)
"""Sides of the windows in a frame of 224 pixels."""
FRAME_PIXELS = 224
WEIGHTS = "score.weights"


def window_scales(grid: tuple[int, int]) -> tuple[int, ...]:
    """Patches along the sides of the four kinds of windows: 1, 2, 3 and 7 on a grid of 14.

    A window takes the share of the frame that it has in the paper, rounded to whole patches, and at least one patch
    more than the next smaller kind.

    Raises:
        BackboneError: the largest does not fit the grid.
    """
    side = min(grid)
    scales: list[int] = []
    for pixels in WINDOW_PIXELS:
        scales.append(max(int(pixels * side / FRAME_PIXELS + 0.5), scales[-1] + 1 if scales else 1))
    if scales[-1] > side:
        raise BackboneError(
            wanted=f"a model of at least {scales[-1]} x {scales[-1]} patches, for windows of {len(scales)} sizes",
            got=f"{grid[0]} x {grid[1]}",
            next_step="Choose a model with smaller patches or a larger frame.",
        )
    return tuple(scales)


class AnomalousFewShotTrunk(nn.Module):
    """Frame -> embeddings of the image and of its windows.

    Args:
        tower: of a vision-language model.
        scales: patches along the windows' sides.
    """

    def __init__(self, tower: VisionTower, scales: Sequence[int]) -> None:
        super().__init__()
        self.tower = tower
        self.scales = tuple(scales)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Args: image: uint8 RGB [B, H, W, 3].

        Returns:
            global float32 [B, E], and for each scale windows.<k> [B, W, E].
        """
        found = self.tower(image, windows=self.scales)
        return (found.pooled, *found.windows)


class AnomalousFewShotHead(nn.Module):
    """Embeddings, prompts, normal and anomalous windows -> image score, anomaly map, nearest window, likeness.

    With p, H and a as in `WinClipHead`, k over the scales, N_k and M_k the banks:

        zero-shot      Z = (K + 1) / (1 / p(image) + sum over k of 1 / H(p(windows.k)))   z = p(image)
        normal bank    D = mean over k of H(a(windows.k, N_k))                            d = max D
        anomalous bank S = mean over k of H(1 - a(windows.k, M_k))                        s = max S

    1 - a = max over r of (1 + cos(e, r)) / 2 is a similarity in 0..1: the paper takes the similarity to anomalous
    rows where it takes the distance to normal ones. Score and map are weighted means of the three,

        score = (w_0 z + w_1 d + w_2 s) / (w_0 + w_1 + w_2)      map = (w_0 Z + w_1 D + w_2 S) / (w_0 + w_1 + w_2)

    each sum over those only whose bank has a row, and each mean over k over the scales that have one. So with empty
    banks this is zero-shot, and only ratios of weights count.

    Args:
        grid: rows and columns of patches.
        size: height and width of the engine's frame, in pixels.
        scales: patches along the windows' sides.
        temperature: of the softmax over the two classes.
    """

    def __init__(
        self, grid: tuple[int, int], size: tuple[int, int], scales: Sequence[int], temperature: float = TEMPERATURE
    ) -> None:
        super().__init__()
        self.grid = grid
        self.temperature = temperature
        self.harmonic = nn.ModuleList(HarmonicWindows(grid, scale) for scale in scales)
        self.upsample = Upsample(grid, size)

    def forward(self, image: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Args:
            image: float32 [B, E].
            arrays: K times windows float32 [B, W, E]; K times a normal bank float32 [N, E] and its count int32 [1];
                K times an anomalous one and its count; the prompts' table [T, E], its count and state [T]; the
                weights float32 [3], of which negative ones count as 0.

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W], nearest_row int32 [B, W] into the first normal bank,
            evidence float32 [B, T]: cosine of the image with each prompt, -1 for padding.
        """
        count = len(self.harmonic)
        windows, banks = arrays[:count], arrays[count : 5 * count]
        normal, normal_rows = banks[0 : 2 * count : 2], banks[1 : 2 * count : 2]
        anomalous, anomalous_rows = banks[2 * count :: 2], banks[2 * count + 1 :: 2]
        table, table_rows, state, weights = arrays[5 * count :]
        classes = class_embeddings(table, table_rows, state)
        whole = anomalous_share(image, classes, self.temperature)  # [B]
        reciprocal = 1.0 / whole.clamp_min(FLOOR).reshape(-1, 1, 1)
        far, near, nearest = [], [], []
        for place, harmonic in enumerate(self.harmonic):
            reciprocal = reciprocal + 1.0 / harmonic(anomalous_share(windows[place], classes, self.temperature))
            distance, index = association(windows[place], normal[place], normal_rows[place])
            far.append(harmonic(distance))
            near.append(harmonic(1.0 - association(windows[place], anomalous[place], anomalous_rows[place])[0]))
            nearest.append(index)
        distances, any_normal = mean_of_present(far, normal_rows)
        similarities, any_anomalous = mean_of_present(near, anomalous_rows)
        maps = torch.stack([(count + 1) / reciprocal, distances, similarities])  # [3, B, rows, columns]
        scores = torch.stack([whole, distances.amax(dim=(-2, -1)), similarities.amax(dim=(-2, -1))])  # [3, B]
        shares = weights.clamp_min(0.0) * torch.cat([torch.ones_like(any_normal), any_normal, any_anomalous])
        shares = shares / shares.sum().clamp_min(1e-12)
        grid = (shares.reshape(3, 1, 1, 1) * maps).sum(0)
        score = (shares.reshape(3, 1) * scores).sum(0)
        return score, self.upsample(grid), nearest[0].to(torch.int32), prompt_likeness(image, table, table_rows)


def anomalous_few_shot_ports(
    preprocessing: Preprocessing, tower: VisionTower, scales: Sequence[int]
) -> tuple[tuple[Port, ...], tuple[KnowledgePort, ...], tuple[Port, ...]]:
    """Features, knowledge and outputs of the detector, in graph order."""
    dimensions = tower.embed_dim
    features = (
        Port("global", "float32", ("B", dimensions)),
        *(Port(f"windows.{k}", "float32", ("B", tower.window_count(k), dimensions)) for k in scales),
    )
    banks = (
        KnowledgePort(name, "float32", (symbol, dimensions), rows=f"{name}.rows", empty_ok=True)
        for kind, letter in (("normal", "N"), ("anomalous", "M"))
        for name, symbol in ((f"bank.{kind}.{k}", f"{letter}{k}") for k in scales)
    )
    knowledge = (*banks, *text_ports(dimensions), KnowledgePort(WEIGHTS, "float32", (3,)))
    outputs = (
        Port("score", "float32", ("B",)),
        Port("anomaly_map", "float32", ("B", preprocessing.height, preprocessing.width)),
        Port("nearest_row", "int32", ("B", tower.window_count(scales[0]))),
        Port("evidence", "float32", ("B", "T")),
    )
    return features, knowledge, outputs


def anomalous_few_shot_modules(tower: VisionTower, preprocessing: Preprocessing) -> Modules:
    """Trunk and head over a tower.

    Raises:
        BackboneError: too few patches for four kinds of windows.
    """
    scales = window_scales(tower.grid)
    features, knowledge, outputs = anomalous_few_shot_ports(preprocessing, tower, scales)
    return Modules(
        AnomalousFewShotTrunk(tower, scales),
        AnomalousFewShotHead(tower.grid, tower.size, scales),
        method=METHOD,
        preprocessing=preprocessing,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )


__all__: Sequence[str] = (
    "METHOD",
    "WEIGHTS",
    "AnomalousFewShotHead",
    "AnomalousFewShotTrunk",
    "anomalous_few_shot_modules",
    "anomalous_few_shot_ports",
    "window_scales",
)
