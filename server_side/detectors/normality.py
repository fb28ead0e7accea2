"""Normality detection of NAND as a head over APRIL-GAN's trunk (Yi et al., "Normality Addition via Normality
Detection in Industrial Image Anomaly Detection Models", https://arxiv.org/abs/2407.19849).

The map that it makes is A_sup: where the frame shows something that was declared normal by a sentence. It belongs over
another detector's map, A_final = A (1 - A_sup); by itself it alarms on nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.notes import NOTE, encode_note
from edgead.runtime.spec import Calibration, KnowledgePort, Port, Preprocessing
from edgead.server_side.detectors.april_gan import EVEN_ODDS, AprilGanTrunk, open_trunk, refuse_anomalous
from edgead.server_side.detectors.memory_bank import smoothing_matrix
from edgead.server_side.detectors.projection_training import TrainingOptions
from edgead.server_side.detectors.projections import TEMPERATURE
from edgead.server_side.detectors.sentences import normality_rows
from edgead.server_side.detectors.text_heads import Upsample, valid_rows
from edgead.server_side.learned import Learned, Modules, base_card, golden_frames
from edgead.server_side.prompts.prompt_set import read_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel
from edgead.server_side.vision_language.options import VisionLanguageOptions
from edgead.server_side.vision_language.text import embed_dim

METHOD = "normality"
PAPER = "Yi et al., Normality Addition via Normality Detection in Industrial Image Anomaly Detection Models, 2024"
TABLE, NORMAL, TABLE_ROWS = "normality.table", "normality.normal", "normality.table.rows"
"""The features of what was declared normal [K, E], the normal feature each is compared with [K, E], how many [1]."""


class NormalityHead(nn.Module):
    """Features and added normalities -> suppression map in 0..1 and which normality is strongest where.

    With q the projected patches of layer l, t_k the feature of normality k and n_k the normal feature beside it,

        A_sup = max over k of mean over l of softmax over {t_k, n_k} of 100 q . {t_k, n_k}, at t_k

    APRIL-GAN adds the layers' maps; their mean stays in 0..1, as A_final = A (1 - A_sup) needs it. Without
    normalities the map is 0 everywhere.

    Args:
        grids: rows and columns of each compared layer's patches.
        size: height and width of the engine's frame in pixels.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.grid = max(self.grids, key=lambda grid: grid[0] * grid[1])
        self.aligned = nn.ModuleList(
            [nn.Identity() if grid == self.grid else _Resample(grid, self.grid) for grid in self.grids]
        )
        self.upsample = Upsample(self.grid, size)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            inputs: the trunk's features; normality.table [K, E] with its count of valid rows [1] (int32), possibly
                0; normality.normal [K, E].

        Returns:
            score float32 [B], the map's maximum; anomaly_map float32 [B, H, W], A_sup; nearest_row int32 [B, P], the
            strongest normality of each patch of the finest layer, -1 if there is none.
        """
        table, rows, normal = inputs[-3:]
        valid = valid_rows(table, rows)
        # Padding may hold anything finite; of two classes the softmax is the logistic function of their difference.
        direction = torch.where(valid.unsqueeze(1), table - normal, 0.0) / TEMPERATURE
        shares = [
            aligned(torch.sigmoid(projected @ direction.T))
            for projected, aligned in zip(inputs[1 : 1 + len(self.grids)], self.aligned, strict=True)
        ]
        # -1 is below every share, so padding is never the strongest where there is a row; without any it becomes 0.
        likely = torch.where(valid, torch.stack(shares).mean(0), -1.0)  # [B, P, K]
        strongest, place = likely.topk(1, dim=-1)
        nearest = torch.where(rows > 0, place.squeeze(-1), -1).to(torch.int32)
        anomaly_map = self.upsample(strongest.reshape(-1, *self.grid)).clamp(0.0, 1.0)
        score = anomaly_map.flatten(1).amax(1)
        # Every input has a use, so that no engine drops one that the spec names.
        unused = torch.stack([inputs[0][:, 0], *(part[:, 0, 0] for part in inputs[1 + len(self.grids) : -3])]).sum(0)
        return score + 0.0 * unused, anomaly_map, nearest


class _Resample(nn.Module):
    """Patch values [B, P, K] from one grid to a finer one, bilinear."""

    matrix: Tensor

    def __init__(self, grid: tuple[int, int], finer: tuple[int, int]) -> None:
        super().__init__()
        rows = torch.from_numpy(smoothing_matrix(grid[0], finer[0], 0.0))
        columns = torch.from_numpy(smoothing_matrix(grid[1], finer[1], 0.0))
        self.register_buffer("matrix", torch.kron(rows, columns))

    def forward(self, values: Tensor) -> Tensor:
        """[B, P, K] -> [B, P', K]."""
        return self.matrix @ values


def normality_ports(
    trunk: AprilGanTrunk, preprocessing: Preprocessing
) -> tuple[tuple[Port, ...], tuple[KnowledgePort, ...], tuple[Port, ...]]:
    """Features, knowledge and outputs of the detector, in graph order."""
    dimensions = trunk.tower.embed_dim
    knowledge = (
        KnowledgePort(TABLE, "float32", ("K", dimensions), rows=TABLE_ROWS, empty_ok=True),
        KnowledgePort(NORMAL, "float32", ("K", dimensions), empty_ok=True),
    )
    finest = max(rows * columns for rows, columns in trunk.grids)
    outputs = (
        Port("score", "float32", ("B",)),
        Port("anomaly_map", "float32", ("B", preprocessing.height, preprocessing.width)),
        Port("nearest_row", "int32", ("B", finest)),
    )
    return trunk.features(), knowledge, outputs


def normality_modules(trunk: AprilGanTrunk, preprocessing: Preprocessing) -> Modules:
    """Trunk and head.

    Args:
        trunk: of the tower's size.
        preprocessing: of that size too.
    """
    features, knowledge, outputs = normality_ports(trunk, preprocessing)
    return Modules(
        trunk,
        NormalityHead(trunk.grids, trunk.tower.size),
        method=METHOD,
        preprocessing=preprocessing,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )


def normality_arrays(
    model: VisionLanguageModel,
    added: NDArray[np.float32] | None = None,
    normal: NDArray[np.float32] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
) -> dict[str, NDArray[Any]]:
    """The knowledge of added normalities, and its note.

    Args:
        model: that made the rows.
        added, normal, rows: as `edgead.server_side.detectors.sentences.normality_rows` gives them; nothing is added
            if they are left out.
    """
    empty = np.zeros((0, embed_dim(model)), np.float32)
    note = {
        "rows": [dict(row) for row in rows],
        "model": model.name,
        "weights": model.weights,
        "weights_sha256": model.weights_sha256,
    }
    return {
        TABLE: empty if added is None else added,
        NORMAL: empty if normal is None else normal,
        TABLE + NOTE: encode_note(note),
    }


def learn(
    normal: Sequence[Path],
    options: VisionLanguageOptions,
    anomalous: Sequence[tuple[Path, Path | None]] = (),
    *,
    training: TrainingOptions | None = None,
    checkpoint: Path | None = None,
) -> Learned:
    """A normality detector that knows no normality yet, unless the prompt set of the options names some.

    Args:
        normal: photographs of good parts, possibly none: golden frames are made of them.
        options: see `VisionLanguageOptions`. The same model, projections, layers and preprocessing as those of an
            APRIL-GAN detector make the same feature space.
        anomalous: must be empty.
        training, checkpoint: see `edgead.server_side.detectors.april_gan.open_trunk`.

    Raises:
        InputError: pictures of defects, or an auxiliary set that cannot be trained on.
        ImageError: a file is no picture.
        PromptError: a prompt set that is not well formed.
        BackboneError: unknown model or weights, a layer that it does not have, projections that do not fit it.
    """
    refuse_anomalous(METHOD, anomalous)
    opened = open_trunk(options, training, checkpoint)
    modules = normality_modules(opened.trunk, opened.preprocessing)
    arrays = normality_arrays(opened.model)
    prompts = None if options.prompts is None else read_prompt_set(options.prompts)
    if prompts is not None and prompts.normalities():
        arrays = normality_arrays(opened.model, *normality_rows(opened.model, prompts))
    # A share of 0..1 is never above 1: by itself this detector calls nothing NG.
    pack = modules.pack(options.product, arrays, Calibration(threshold=1.0, map_threshold=EVEN_ODDS))
    card = base_card(
        method=METHOD,
        paper=PAPER,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        model={
            "name": opened.model.name,
            "weights": opened.model.weights,
            "weights_sha256": opened.model.weights_sha256,
        },
        projections=opened.facts,
        normalities=list(prompts.normalities()) if prompts is not None else [],
        score="The maximum of the map.",
        score_is_map_maximum=True,
    )
    golden = golden_frames(normal, opened.preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


__all__: Sequence[str] = (
    "METHOD",
    "NORMAL",
    "PAPER",
    "TABLE",
    "TABLE_ROWS",
    "NormalityHead",
    "learn",
    "normality_arrays",
    "normality_modules",
    "normality_ports",
)
