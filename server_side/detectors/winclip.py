"""WinCLIP as a trunk and a head (Jeong et al., "WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation",
CVPR 2023, https://arxiv.org/abs/2303.14814).

The trunk gives embeddings of the image, of its windows and of its patches. The head compares them with the prompts
(zero-shot) and with those of reference pictures, if there are any (few-shot). The prompts and the references are
knowledge: the same engine is zero-shot with empty banks and few-shot with filled ones.

Where the paper leaves something open (what zero- and few-shot maps are put together by, how a map is brought to
pixels) this does what the implementation in anomalib 2.7 does; `make parity` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.errors import InputError
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.detectors.text_fitting import (
    Features,
    most_unusual,
    open_tower,
    prompts_for,
    stacked,
    take_shots,
    text_facts,
    text_knowledge,
)
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
from edgead.server_side.learned import Arrays, Learned, Modules, base_card, calibrated, golden_frames
from edgead.server_side.prompts.ensembles import winclip
from edgead.server_side.vision_language import VisionTower
from edgead.server_side.vision_language.options import VisionLanguageOptions

METHOD = "winclip"
PAPER = "Jeong et al., WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation, CVPR 2023"
SCALES = (2, 3)
"""Patches along a window's side; the whole image is the third scale."""
TEMPERATURE = 0.07
"""Of the softmax over the two classes."""
EVEN_ODDS = 0.5
"""Zero-shot score of a picture that the prompts cannot tell: the threshold where no photograph sets one."""
UNLIKE = 0.1
"""Association at cosine 0.8: that threshold's share of the references."""
SCORE = (
    "WinCLIP's image score, not the maximum of its map; a normality that is added lowers it in proportion to the "
    "map's maximum."
)


class WinClipTrunk(nn.Module):
    """Frame -> embeddings of the image, of windows of 2 x 2 and 3 x 3 patches, and the patches.

    Args:
        tower: of a vision-language model.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Args: image: uint8 RGB [B, H, W, 3].

        Returns:
            global float32 [B, E], windows.2 [B, W2, E], windows.3 [B, W3, E], patches [B, P, D].
        """
        found = self.tower(image, windows=SCALES)
        return (found.pooled, *found.windows, found.patches)


class WinClipHead(nn.Module):
    """Embeddings, prompts and references -> image score, anomaly map, nearest reference patch, likeness of prompts.

    Zero-shot, with p(e) the softmax over both classes of cosines / 0.07 at the anomalous one (equation 1):

        A_0 = 3 / (1 / p(image) + 1 / H(p(windows.2)) + 1 / H(p(windows.3)))        s_0 = p(image)

    with H the harmonic mean over all windows that hold a patch. Few-shot, with a(e, R) = min over r in R of
    (1 - cos(e, r)) / 2 (equation 4):

        A_R = mean of a(patches), H(a(windows.2)), H(a(windows.3))
        A = (A_0 + A_R) / 2                                                     s = (s_0 + max A_R) / 2

    Scales whose bank is empty are left out of the mean; without any, A = A_0 and s = s_0.

    Args:
        grid: rows and columns of patches.
        size: height and width of the engine's frame, in pixels.
        temperature: of the softmax.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], temperature: float = TEMPERATURE) -> None:
        super().__init__()
        self.grid = grid
        self.temperature = temperature
        self.harmonic = nn.ModuleList(HarmonicWindows(grid, scale) for scale in SCALES)
        self.upsample = Upsample(grid, size)

    def forward(
        self,
        image: Tensor,
        windows_2: Tensor,
        windows_3: Tensor,
        patches: Tensor,
        bank: Tensor,
        bank_rows: Tensor,
        bank_2: Tensor,
        bank_2_rows: Tensor,
        bank_3: Tensor,
        bank_3_rows: Tensor,
        table: Tensor,
        table_rows: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Args:
            image, windows_2, windows_3, patches: as the trunk gives them.
            bank: float32 [N, D] of reference patches; the first `bank_rows` (int32 [1]) are valid, possibly none.
            bank_2, bank_3: float32 [N2, E], [N3, E] of reference windows, alike.
            table: float32 [T, E] of prompts; the first `table_rows` are valid.
            state: float32 [T], 1 for a prompt of a defect.

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W], nearest_row int32 [B, P] into `bank`,
            evidence float32 [B, T]: cosine of the image with each prompt, -1 for padding.
        """
        classes = class_embeddings(table, table_rows, state)
        whole = anomalous_share(image, classes, self.temperature)  # [B]
        distance, nearest = association(patches, bank, bank_rows)
        reciprocal = 1.0 / whole.clamp_min(FLOOR).reshape(-1, 1, 1)
        references = [distance.reshape(-1, *self.grid)]
        scales = zip(self.harmonic, (windows_2, windows_3), (bank_2, bank_3), (bank_2_rows, bank_3_rows), strict=True)
        for harmonic, windows, rows, count in scales:
            reciprocal = reciprocal + 1.0 / harmonic(anomalous_share(windows, classes, self.temperature))
            references.append(harmonic(association(windows, rows, count)[0]))
        zero_shot = (len(SCALES) + 1) / reciprocal
        few_shot, any_rows = mean_of_present(references, (bank_rows, bank_2_rows, bank_3_rows))
        half = 0.5 * any_rows
        grid = (1.0 - half) * zero_shot + half * few_shot
        score = (1.0 - half) * whole + half * few_shot.amax(dim=(-2, -1))
        evidence = prompt_likeness(image, table, table_rows)
        return score, self.upsample(grid), nearest.to(torch.int32), evidence


def winclip_ports(
    preprocessing: Preprocessing, tower: VisionTower
) -> tuple[tuple[Port, ...], tuple[KnowledgePort, ...], tuple[Port, ...]]:
    """Features, knowledge and outputs of the detector, in graph order."""
    patches = tower.grid[0] * tower.grid[1]
    features = (
        Port("global", "float32", ("B", tower.embed_dim)),
        *(Port(f"windows.{k}", "float32", ("B", tower.window_count(k), tower.embed_dim)) for k in SCALES),
        Port("patches", "float32", ("B", patches, tower.width)),
    )
    # Reference patches come first: they are what `nearest_row` counts.
    knowledge = (
        _bank("bank.patches", "N", tower.width),
        *(_bank(f"bank.windows.{k}", f"N{k}", tower.embed_dim) for k in SCALES),
        *text_ports(tower.embed_dim),
    )
    outputs = (
        Port("score", "float32", ("B",)),
        Port("anomaly_map", "float32", ("B", preprocessing.height, preprocessing.width)),
        Port("nearest_row", "int32", ("B", patches)),
        Port("evidence", "float32", ("B", "T")),
    )
    return features, knowledge, outputs


def _bank(name: str, symbol: str, dimensions: int) -> KnowledgePort:
    return KnowledgePort(name, "float32", (symbol, dimensions), rows=f"{name}.rows", empty_ok=True)


def reference_banks(features: Sequence[Features], tower: VisionTower) -> dict[str, NDArray[np.float32]]:
    """The three banks of reference pictures; without one they are empty."""
    return {
        "bank.patches": stacked(features, "patches", tower.width),
        **{f"bank.windows.{k}": stacked(features, f"windows.{k}", tower.embed_dim) for k in SCALES},
    }


def winclip_modules(tower: VisionTower, preprocessing: Preprocessing) -> Modules:
    """Trunk and head over a tower.

    Raises:
        BackboneError: a grid of fewer than 3 x 3 patches.
    """
    tower.check(SCALES, ())
    features, knowledge, outputs = winclip_ports(preprocessing, tower)
    return Modules(
        WinClipTrunk(tower),
        WinClipHead(tower.grid, tower.size),
        method=METHOD,
        preprocessing=preprocessing,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )


def learn(
    normal: Sequence[Path],
    options: VisionLanguageOptions,
    anomalous: Sequence[tuple[Path, Path | None]] = (),
) -> Learned:
    """A WinCLIP detector from prompts, and from reference pictures where `options.shots` asks for them.

    Args:
        normal: photographs of good parts, possibly none: shots and what calibrates the threshold (see `take_shots`).
        options: see `VisionLanguageOptions`.
        anomalous: none; WinCLIP has no place for pictures of defects.

    Raises:
        InputError: fewer normals than shots, no such file of prompts, or pictures of defects.
        ImageError: a file is no picture.
        PromptError: a class name that makes no prompts, or a file that is no prompt set of both states.
        BackboneError: unknown model or weights, or a grid of fewer than 3 x 3 patches.
    """
    if anomalous:
        raise InputError(
            wanted="no pictures of defects for WinCLIP, which has no place for them",
            got=f"{len(anomalous)}",
            next_step="Leave them out, or fit with --method anomalous-few-shot.",
        )
    model, tower, preprocessing = open_tower(options)
    modules = winclip_modules(tower, preprocessing)
    prompts = prompts_for(options, winclip)
    text = text_knowledge(model, prompts)
    shots = take_shots(modules, normal, options)

    def without(place: int) -> Arrays:
        return {**reference_banks(shots.others(place), tower), **text}

    by_hand = (EVEN_ODDS + UNLIKE) / 2 if shots.paths else EVEN_ODDS
    arrays: Arrays = {**reference_banks(shots.features, tower), **text}
    pack, scores = calibrated(
        modules,
        options.product,
        arrays,
        shots.held_out,
        false_alarm_rate=options.false_alarm_rate,
        without=without,
        by_hand=by_hand,
    )
    card = base_card(
        method=METHOD,
        paper=PAPER,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        **text_facts(model, prompts),
        shots=[path.name for path in shots.paths],
        bank={name: len(pack.arrays[name]) for name in pack.banks},
        score=SCORE,
        score_is_map_maximum=False,
        most_unusual=most_unusual(scores),
    )
    golden = golden_frames(normal, preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


__all__: Sequence[str] = (
    "METHOD",
    "SCALES",
    "WinClipHead",
    "WinClipTrunk",
    "learn",
    "reference_banks",
    "winclip_modules",
    "winclip_ports",
)
