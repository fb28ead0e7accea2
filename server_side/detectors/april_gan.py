"""APRIL-GAN's method as a trunk and a head (Chen et al., "APRIL-GAN: A Zero-/Few-Shot Anomaly Classification and
Segmentation Method for CVPR 2023 VAND Workshop Challenge", https://arxiv.org/abs/2305.17382).

The trunk gives the embedding of the image, and per compared layer the patches projected into the joint space and the
patches as they are. The head compares the projected ones with the mean features of normal and anomalous prompts, and
the others with banks of good parts if there are any: the same engine becomes few-shot by knowledge alone.

Where this differs from the authors' code: the softmax is over patches, whose shares are then brought to the frame's
size (they do it the other way round), and corners are not aligned; and a few-shot image score takes the map's maximum
as it is, where theirs is stretched to 0..1 over the whole test set, which a camera does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.runtime.errors import InputError
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.banks import greedy_coreset
from edgead.server_side.detectors.auxiliary import folder_auxiliary, painted_auxiliary
from edgead.server_side.detectors.projection_training import TrainingOptions, train_projections
from edgead.server_side.detectors.projection_types import type_features
from edgead.server_side.detectors.projections import (
    TEMPERATURE,
    Projections,
    default_layers,
    read_projections,
)
from edgead.server_side.detectors.sentences import class_features
from edgead.server_side.detectors.text_fitting import (
    Features,
    open_tower,
    prompts_for,
    stacked,
    take_shots,
    text_facts,
    text_knowledge,
)
from edgead.server_side.detectors.text_heads import (
    Upsample,
    anomalous_share,
    class_embeddings,
    most_like,
    present,
    prompt_likeness,
    text_ports,
    unit,
)
from edgead.server_side.learned import Arrays, Learned, Modules, base_card, calibrated, golden_frames
from edgead.server_side.prompts.ensembles import april_gan
from edgead.server_side.vision_language import VisionLanguageModel, VisionTower
from edgead.server_side.vision_language.options import VisionLanguageOptions

METHOD = "april-gan"
PAPER = "Chen et al., APRIL-GAN, VAND challenge at CVPR 2023"
BANK = "bank.layer."
"""What the name of a bank begins with; the layer's number follows."""
MOST_ROWS = 10_000
"""Rows of a layer's bank; more patches than that are represented by their coreset."""
EVEN_ODDS = 0.5
"""Share of the anomalous class that the prompts cannot tell from the normal one: the threshold, per layer for the
map's maximum, where no photograph sets one."""

Score = Literal["text", "map"]
"""How the image score is made: 'text' as the authors do, 'map' as the maximum of the map, which NAND uses."""
SCORES: dict[Score, str] = {
    "text": "The image's own embedding between the classes, with reference pictures the mean of that and of the map's "
    "maximum per layer; a normality that is added lowers it in proportion to the map's maximum.",
    "map": "The maximum of the map.",
}
"""What the card says of it."""


class AprilGanTrunk(nn.Module):
    """Frame -> embedding of the image, projected patches and patches of each compared layer, all of length 1.

    The normality detector (`edgead.server_side.detectors.normality`) has this trunk too: made of the same model,
    projections and preprocessing it is the same feature space, and one engine serves both.

    Args:
        tower: of the vision-language model.
        projections: of the layers that are compared.
    """

    def __init__(self, tower: VisionTower, projections: Projections) -> None:
        super().__init__()
        tower.check((), projections.layers)
        self.tower = tower
        self.projections = projections
        self.layers = projections.layers
        self.grids = [tower.layer_grids[layer - 1] for layer in self.layers]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: [B, E]; per layer [B, P_l, E]; per layer [B, P_l, D_l]."""
        found = self.tower(image, taps=self.layers)
        return (unit(found.pooled), *self.projections(found.layers), *(unit(tokens) for tokens in found.layers))

    def features(self) -> tuple[Port, ...]:
        """The ports of `forward`'s outputs."""
        tower = self.tower
        counts = [rows * columns for rows, columns in self.grids]
        places = list(zip(self.layers, counts, strict=True))
        return (
            Port("global", "float32", ("B", tower.embed_dim)),
            *(Port(f"layer.{layer}", "float32", ("B", count, tower.embed_dim)) for layer, count in places),
            *(
                Port(f"tokens.{layer}", "float32", ("B", count, tower.layer_widths[layer - 1]))
                for layer, count in places
            ),
        )


class AprilGanHead(nn.Module):
    """Features, prompts and banks -> image score, anomaly map, nearest rows, evidence.

    With q the projected patches of layer l, f the class embeddings, v the patches as they are and b a bank's rows,

        A = sum over l of softmax(100 q . f) at the anomalous class + sum over l of (1 - max over b of cos(v, b))

    The second sum is over the layers whose bank has rows. The image score is A's maximum (`score` 'map'), or the
    softmax of the image's own embedding over the classes ('text'); then, if a bank has rows, the mean of that and of
    A's maximum divided by the number of layers.

    Args:
        grids: rows and columns of each compared layer's patches.
        size: height and width of the engine's frame in pixels.
        score: see `Score`.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], size: tuple[int, int], score: Score = "text") -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.score = score
        self.upsamples = nn.ModuleList([Upsample(grid, size) for grid in self.grids])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Args:
            inputs: the trunk's features; per layer bank.layer.<l> [N_l, D_l] with its count of valid rows [1]
                (int32), possibly 0; text.table [T, E] with its count and text.state [T].

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W], nearest_row int32 [B, P] of the first layer's bank,
            evidence float32 [B, T], each prompt's cosine with the image.
        """
        layers = len(self.grids)
        image, projected, tokens = inputs[0], inputs[1 : 1 + layers], inputs[1 + layers : 1 + 2 * layers]
        banks, (table, table_rows, state) = inputs[1 + 2 * layers : -3], inputs[-3:]
        classes = class_embeddings(table, table_rows, state)
        maps, nearest, known = [], [], []
        for place, (grid, upsample) in enumerate(zip(self.grids, self.upsamples, strict=True)):
            bank, rows = banks[2 * place], banks[2 * place + 1]
            cosine, index = most_like(tokens[place], bank, rows)
            known.append(present(rows))
            values = anomalous_share(projected[place], classes, TEMPERATURE) + known[-1] * (1.0 - cosine)
            maps.append(upsample(values.reshape(-1, *grid)))
            nearest.append(index)
        anomaly_map = torch.stack(maps).sum(0)
        highest = anomaly_map.flatten(1).amax(1)
        score = highest
        if self.score == "text":
            text = anomalous_share(image, classes, TEMPERATURE)
            few = 0.5 * torch.stack(known).amax(0)
            score = (1.0 - few) * text + few * highest / layers
        evidence = prompt_likeness(image, table, table_rows)
        return score, anomaly_map, nearest[0].to(torch.int32), evidence


def april_gan_ports(
    trunk: AprilGanTrunk, preprocessing: Preprocessing
) -> tuple[tuple[Port, ...], tuple[KnowledgePort, ...], tuple[Port, ...]]:
    """Features, knowledge and outputs of the detector, in graph order."""
    tower = trunk.tower
    # The first layer's bank comes first: it is what `nearest_row` counts.
    banks = (
        KnowledgePort(
            f"{BANK}{layer}",
            "float32",
            (f"N{layer}", tower.layer_widths[layer - 1]),
            rows=f"{BANK}{layer}.rows",
            empty_ok=True,
        )
        for layer in trunk.layers
    )
    outputs = (
        Port("score", "float32", ("B",)),
        Port("anomaly_map", "float32", ("B", preprocessing.height, preprocessing.width)),
        Port("nearest_row", "int32", ("B", trunk.grids[0][0] * trunk.grids[0][1])),
        Port("evidence", "float32", ("B", "T")),
    )
    return trunk.features(), (*banks, *text_ports(tower.embed_dim)), outputs


def april_gan_modules(trunk: AprilGanTrunk, preprocessing: Preprocessing, score: Score = "text") -> Modules:
    """Trunk and head.

    Args:
        trunk: of the tower's size.
        preprocessing: of that size too.
        score: see `Score`.
    """
    features, knowledge, outputs = april_gan_ports(trunk, preprocessing)
    head = AprilGanHead(trunk.grids, trunk.tower.size, score)
    return Modules(
        trunk,
        head,
        method=METHOD,
        preprocessing=preprocessing,
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )


@dataclass(frozen=True, eq=False)
class OpenTrunk:
    """What fitting starts from.

    Attributes:
        model: the vision-language model.
        trunk: over its tower.
        preprocessing: the wanted one at the tower's size.
        facts: of the projections, for the card.
    """

    model: VisionLanguageModel
    trunk: AprilGanTrunk
    preprocessing: Preprocessing
    facts: dict[str, Any]


def open_trunk(
    options: VisionLanguageOptions, training: TrainingOptions | None = None, checkpoint: Path | None = None
) -> OpenTrunk:
    """The trunk of the options; without a file of projections, these are trained.

    Args:
        options: `model`, `weights`, `layers`, `projections`, `auxiliary`, `preprocessing` and `seed` decide. The same
            ones make the same trunk on the same machine and thread count; a file of projections makes it anywhere.
        training: how to train projections; the seed is that of the options.
        checkpoint: where the training is kept between epochs; continued from if it is there.

    Raises:
        BackboneError: unknown model or weights, a layer that it does not have, projections that do not fit it.
        InputError: an auxiliary set that cannot be trained on.
        PromptError: its folders' names make no sentences.
    """
    model, tower, preprocessing = open_tower(options)
    if options.projections is not None:
        projections, record = read_projections(
            options.projections,
            layers=options.layers,
            depth=tower.depth,
            widths=tower.layer_widths,
            dimensions=tower.embed_dim,
            weights=model.weights_sha256,
        )
        facts = {"from": options.projections.name, **record}
    else:
        layers = options.layers or default_layers(tower.depth)
        tower.check((), layers)
        if options.auxiliary is not None:
            auxiliary = folder_auxiliary(options.auxiliary, preprocessing)
        else:
            auxiliary = painted_auxiliary(tower.size, seed=options.seed)
        text = np.stack([class_features(model, april_gan(name, options.domain)) for name in auxiliary.classes])
        settings = dataclasses.replace(training or TrainingOptions(), seed=options.seed)
        projections, record = train_projections(
            tower,
            auxiliary,
            text,
            settings,
            layers=layers,
            types=type_features(model, auxiliary) if settings.named > 0 else None,
            weights=model.weights_sha256,
            checkpoint=checkpoint,
        )
        facts = {"from": "trained here", **record}
    facts["layers"] = list(projections.layers)
    return OpenTrunk(model, AprilGanTrunk(tower, projections).eval(), preprocessing, facts)


def layer_banks(shots: Sequence[Features], trunk: AprilGanTrunk, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The bank of every compared layer from the features of reference pictures; without one they are empty."""
    banks = {}
    for layer in trunk.layers:
        rows = stacked(shots, f"tokens.{layer}", trunk.tower.layer_widths[layer - 1])
        if len(rows) > MOST_ROWS:
            rows = rows[np.sort(greedy_coreset(rows, MOST_ROWS, seed=seed))]
        banks[f"{BANK}{layer}"] = rows
    return banks


def learn(
    normal: Sequence[Path],
    options: VisionLanguageOptions,
    anomalous: Sequence[tuple[Path, Path | None]] = (),
    *,
    score: Score = "text",
    training: TrainingOptions | None = None,
    checkpoint: Path | None = None,
) -> Learned:
    """An APRIL-GAN detector from prompts, and from reference pictures where `options.shots` asks for them.

    Args:
        normal: photographs of good parts, possibly none: shots and what calibrates the threshold.
        options: see `VisionLanguageOptions`.
        anomalous: must be empty; the method has no place for them.
        score: how the image score is made, see `Score`; the card says which.
        training, checkpoint: see `open_trunk`.

    Raises:
        InputError: pictures of defects, fewer normals than shots, prompts of one state only, or an auxiliary set that
            cannot be trained on.
        ImageError: a file is no picture.
        PromptError: a class name or a file that makes no prompts.
        BackboneError: unknown model or weights, a layer that it does not have, projections that do not fit it.
    """
    refuse_anomalous(METHOD, anomalous)
    opened = open_trunk(options, training, checkpoint)
    modules = april_gan_modules(opened.trunk, opened.preprocessing, score)
    prompts = prompts_for(options, april_gan)
    text = text_knowledge(opened.model, prompts)
    shots = take_shots(modules, normal, options)

    def without(place: int) -> Arrays:
        return {**layer_banks(shots.others(place), opened.trunk, options.seed), **text}

    arrays: Arrays = {**layer_banks(shots.features, opened.trunk, options.seed), **text}
    pack, scores = calibrated(
        modules,
        options.product,
        arrays,
        shots.held_out,
        false_alarm_rate=options.false_alarm_rate,
        without=without,
        by_hand=EVEN_ODDS * (len(opened.trunk.layers) if score == "map" else 1),
    )
    card = base_card(
        method=METHOD,
        paper=PAPER,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        **text_facts(opened.model, prompts),
        projections=opened.facts,
        shots=[path.name for path in shots.paths],
        bank={name: len(pack.arrays[name]) for name in pack.banks},
        score=SCORES[score],
        score_is_map_maximum=score == "map",
        held_out_scores=[{"image": name, "score": value} for name, value in scores],
    )
    golden = golden_frames(normal, opened.preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


def refuse_anomalous(method: str, anomalous: Sequence[tuple[Path, Path | None]]) -> None:
    """Refuse pictures of defects where a method would do nothing with them.

    Raises:
        InputError: there are some.
    """
    if anomalous:
        raise InputError(
            wanted=f"no pictures of defects: the method '{method}' learns from sentences and good parts",
            got=f"{len(anomalous)}",
            next_step="Leave them out, or fit with the method anomalous-few-shot or memory-bank.",
        )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "AprilGanHead",
    "AprilGanTrunk",
    "OpenTrunk",
    "Score",
    "april_gan_modules",
    "april_gan_ports",
    "layer_banks",
    "learn",
    "open_trunk",
    "refuse_anomalous",
)
