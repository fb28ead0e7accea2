"""ALFA as a trunk and a head (Zhu et al., "Do LLMs Understand Visual Anomalies? Uncovering LLM's Capabilities in
Zero-shot Anomaly Detection", ACM Multimedia 2024, https://arxiv.org/abs/2404.09654).

Two ideas over WinCLIP: for every image the prompts that say nothing about it are left out (contextual scoring), and
windows are compared with sentences in a space of their own (the fine-grained aligner). Both are in the graph, so the
prompts stay knowledge.

What the paper leaves open is decided here. Distances are 1 - cos. A class embedding is the mean of its prompts
weighted by their contextual scores; where all prompts of a class score 0, all of them count alike. The aligner is the
smallest change of the identity that takes the image's embedding to the window's. The temperature, the harmonic mean
over windows and the reference banks are WinCLIP's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.april_gan import refuse_anomalous
from edgead.server_side.detectors.text_fitting import open_tower, prompts_for, take_shots, text_facts, text_knowledge
from edgead.server_side.detectors.text_heads import (
    ANOMALOUS,
    LEAST_LIKE,
    NORMAL,
    HarmonicWindows,
    Upsample,
    association,
    mean_of_present,
    unit,
    valid_rows,
)
from edgead.server_side.detectors.winclip import (
    EVEN_ODDS,
    SCALES,
    TEMPERATURE,
    UNLIKE,
    reference_banks,
    winclip_ports,
)
from edgead.server_side.learned import Arrays, Learned, Modules, base_card, calibrated, golden_frames
from edgead.server_side.prompts.ensembles import alfa
from edgead.server_side.vision_language import VisionTower
from edgead.server_side.vision_language.options import VisionLanguageOptions

METHOD = "alfa"
PAPER = "Zhu et al., Do LLMs Understand Visual Anomalies?, ACM Multimedia 2024"
STEEPNESS = 1.0
"""The paper's k."""
SCORE = (
    "ALFA's image score, the mean of the image's and of the most anomalous patch's; not the maximum of its map. A "
    "normality that is added lowers it in proportion to the map's maximum."
)
_ROUNDING = 1e-6
"""Distances this close are equal: an engine may round the bound of an interval and the distance that made it apart."""
_FAR = 1e4
"""Beyond any distance of 0..2: the interval of a class without prompts lies there."""


class AlfaTrunk(nn.Module):
    """Frame -> embeddings of the image, of windows of 2 x 2 and 3 x 3 patches, and the patches.

    A window's embedding is the mean of its patches' value features in the last layer, at length 1: what is in the
    window, without what attention brings in from elsewhere.

    Args:
        tower: of a vision-language model.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        tower.check(SCALES, ())
        self.tower = tower

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Args: image: uint8 RGB [B, H, W, 3].

        Returns:
            global [B, E] at length 1, windows.2 [B, W2, E] and windows.3 [B, W3, E] alike, patches [B, P, D].
        """
        found = self.tower(image, values=True)
        values = found.values.transpose(1, 2).reshape(-1, self.tower.embed_dim, *self.tower.grid)
        windows = [F.avg_pool2d(values, scale, stride=1).flatten(2).transpose(1, 2) for scale in SCALES]
        return (unit(found.pooled), *(unit(window) for window in windows), found.patches)


def contextual_scores(image: Tensor, table: Tensor, rows: Tensor, state: Tensor) -> Tensor:
    """How much each prompt says about an image: S_c(t) = D / (D + exp(-k D)), 0 for a prompt that fits both classes.

    D = | dist(d(t), [min d+, max d+]) - dist(d(t), [min d-, max d-]) | with d(t) the distance of prompt and image and
    the intervals over all normal and all anomalous prompts.

    Args:
        image: float32 [B, E] at length 1.
        table: float32 [T, E]; the first `rows` (int32 [1]) are valid.
        state: float32 [T], 1 for a prompt of a defect.

    Returns:
        float32 [B, T], 0..1; padding has 0.
    """
    valid = valid_rows(table, rows)
    distance = 1.0 - torch.matmul(image, unit(torch.where(valid.unsqueeze(1), table, 0.0)).T)
    outside = []
    for members in (valid & (state <= 0.5), valid & (state > 0.5)):
        low = torch.where(members, distance, _FAR).amin(1, keepdim=True)
        high = torch.where(members, distance, -_FAR).amax(1, keepdim=True)
        outside.append(torch.maximum(low - distance, distance - high).clamp_min(0.0))
    gap = (outside[NORMAL] - outside[ANOMALOUS]).abs()
    gap = torch.where(gap > _ROUNDING, gap, 0.0)
    return torch.where(valid, gap / (gap + torch.exp(-STEEPNESS * gap)), 0.0)


def contextual_weights(scores: Tensor, table: Tensor, rows: Tensor, state: Tensor) -> Tensor:
    """What share each prompt has in its class's embedding, [B, 2, T]: its score's, or equal shares if all are 0."""
    valid = valid_rows(table, rows)
    anomalous = state > 0.5
    members = torch.stack([valid & ~anomalous, valid & anomalous]).to(scores.dtype)  # [2, T]
    kept = scores.unsqueeze(1) * members  # [B, 2, T]
    kept = torch.where(kept.sum(-1, keepdim=True) > 0.0, kept, members)
    return kept / kept.sum(-1, keepdim=True).clamp_min(1e-30)


def aligned_likeness(windows: Tensor, image: Tensor, classes: Tensor) -> Tensor:
    """cos(v_L, W t) of every window v_L with every class embedding t, taken into that window's space: [B, W, 2].

    W is the smallest change of the identity (in the Frobenius norm) with W v_G = v_L, v_G being the image:
    W = I + (v_L - v_G) v_G^T. With a = v_L . t, g = v_G . t and c = v_L . v_G, all vectors of length 1,

        v_L . W t = a + (1 - c) g        |W t|^2 = 1 + 2 (a - g) g + 2 (1 - c) g^2

    so no W is ever formed.

    Args:
        windows: float32 [B, W, E] at length 1.
        image: float32 [B, E] at length 1.
        classes: float32 [B, 2, E] at length 1, or zero: it is then like nothing.
    """
    a = windows @ classes.transpose(1, 2)
    g = image.unsqueeze(1) @ classes.transpose(1, 2)  # [B, 1, 2]
    off = 1.0 - windows @ image.unsqueeze(2)  # [B, W, 1]
    square = 1.0 + 2.0 * (a - g) * g + 2.0 * off * g * g
    return (a + off * g) / square.clamp_min(1e-12).sqrt()


class AlfaHead(nn.Module):
    """Embeddings, prompts and references -> image score, anomaly map, nearest reference patch, likeness of prompts.

    With p the softmax over both classes of cosines / 0.07 at the anomalous one, H the harmonic mean over all windows
    that hold a patch, and classes of the prompts that the image keeps,

        A_0 = 2 / (1 / H(p(windows.2)) + 1 / H(p(windows.3)))        s_0 = (p(image) + max A_0) / 2

    The windows are compared through the aligner. Reference banks add what they add to WinCLIP.

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
            evidence float32 [B, T]: cosine of the image with each prompt that it keeps, -1 for all others.
        """
        weights = contextual_weights(contextual_scores(image, table, table_rows, state), table, table_rows, state)
        rows = unit(torch.where(valid_rows(table, table_rows).unsqueeze(1), table, 0.0))
        classes = unit(weights @ rows)  # [B, 2, E]
        whole = self._share((image.unsqueeze(1) @ classes.transpose(1, 2)).squeeze(1))  # [B]
        distance, nearest = association(patches, bank, bank_rows)
        references = [distance.reshape(-1, *self.grid)]
        reciprocal = torch.zeros_like(references[0])
        scales = zip(self.harmonic, (windows_2, windows_3), (bank_2, bank_3), (bank_2_rows, bank_3_rows), strict=True)
        for harmonic, windows, known, count in scales:
            reciprocal = reciprocal + 1.0 / harmonic(self._share(aligned_likeness(windows, image, classes)))
            references.append(harmonic(association(windows, known, count)[0]))
        local = len(SCALES) / reciprocal
        few_shot, any_rows = mean_of_present(references, (bank_rows, bank_2_rows, bank_3_rows))
        half = 0.5 * any_rows
        score = (1.0 - half) * 0.5 * (whole + local.amax(dim=(-2, -1))) + half * few_shot.amax(dim=(-2, -1))
        kept = weights.sum(1) > 0.0
        evidence = torch.where(kept, torch.matmul(image, rows.T), LEAST_LIKE)
        grid = (1.0 - half) * local + half * few_shot
        return score, self.upsample(grid), nearest.to(torch.int32), evidence

    def _share(self, likeness: Tensor) -> Tensor:
        """Softmax over the last dimension (2 classes) at the anomalous one."""
        return torch.sigmoid((likeness[..., ANOMALOUS] - likeness[..., NORMAL]) / self.temperature)


def alfa_modules(tower: VisionTower, preprocessing: Preprocessing) -> Modules:
    """Trunk and head over a tower. The ports are those of WinCLIP; the features behind them are not.

    Raises:
        BackboneError: a grid of fewer than 3 x 3 patches.
    """
    features, knowledge, outputs = winclip_ports(preprocessing, tower)
    return Modules(
        AlfaTrunk(tower),
        AlfaHead(tower.grid, tower.size),
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
    """An ALFA detector from prompts, and from reference pictures where `options.shots` asks for them.

    Args:
        normal: photographs of good parts, possibly none: shots and what calibrates the threshold.
        options: see `VisionLanguageOptions`.
        anomalous: must be empty; the method has no place for them.

    Raises:
        InputError: pictures of defects, fewer normals than shots, or prompts of one state only.
        ImageError: a file is no picture.
        PromptError: a class name or a file that makes no prompts.
        BackboneError: unknown model or weights, or a grid of fewer than 3 x 3 patches.
    """
    refuse_anomalous(METHOD, anomalous)
    model, tower, preprocessing = open_tower(options)
    modules = alfa_modules(tower, preprocessing)
    prompts = prompts_for(options, alfa)
    text = text_knowledge(model, prompts)
    shots = take_shots(modules, normal, options)

    def without(place: int) -> Arrays:
        return {**reference_banks(shots.others(place), tower), **text}

    arrays: Arrays = {**reference_banks(shots.features, tower), **text}
    pack, scores = calibrated(
        modules,
        options.product,
        arrays,
        shots.held_out,
        false_alarm_rate=options.false_alarm_rate,
        without=without,
        by_hand=(EVEN_ODDS + UNLIKE) / 2 if shots.paths else EVEN_ODDS,
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
        held_out_scores=[{"image": name, "score": value} for name, value in scores],
    )
    golden = golden_frames(normal, preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


__all__: Sequence[str] = (
    "METHOD",
    "AlfaHead",
    "AlfaTrunk",
    "alfa_modules",
    "aligned_likeness",
    "contextual_scores",
    "contextual_weights",
    "learn",
)
