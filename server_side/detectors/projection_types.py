"""Sentences that name the type of a defect, in the training of APRIL-GAN's projections.

This part is ours. The paper trains on sentences that say good or damaged (https://arxiv.org/abs/2305.17382, section
3.1); nothing then teaches the projections to tell a thread from a hole, and a sentence that declares threads normal
(NAND, https://arxiv.org/abs/2407.19849) suppresses every defect alike. So where the auxiliary set names its defects,
two more maps are made of a picture of a named defect: under the sentences that name it, which must give its mask, and
under those that name another type of the same class, drawn by the seed, which must give nothing.

Both are held against the masks by the paper's focal and dice loss, as one map of twice the height: an empty mask alone
has a dice loss that falls only in the last pixel, and that silences every named sentence. They are compared in patches,
not in pixels: a patch that shows a thread is one that shows a thread, however thin it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.runtime.errors import InputError
from edgead.server_side.detectors.auxiliary import Auxiliary
from edgead.server_side.detectors.projections import TEMPERATURE, dice_loss, focal_loss
from edgead.server_side.detectors.sentences import mean_feature
from edgead.server_side.detectors.text_heads import unit
from edgead.server_side.prompts.ensembles import normality
from edgead.server_side.vision_language import VisionLanguageModel

TEMPLATES = ("{}.", "a photo of the {}.", "a close-up photo of a {}.")
"""For the phrases that name a defect. The mean over all of APRIL-GAN's 35 is nearly the same, and takes ten times as
long for every type of every class."""
ALIKE = 0.9
"""Cosine between two types' directions from the normal sentences above which the text tower does not tell them apart:
one is then no wrong sentence for the other."""


def type_features(model: VisionLanguageModel, auxiliary: Auxiliary) -> NDArray[np.float32]:
    """Mean features of the sentences that name each of the set's types, float32 [N, E], N possibly 0.

    Raises:
        PromptError: a class or type whose name makes no sentence.
    """
    rows = []
    for place, word in auxiliary.types:
        prompts = normality(word, auxiliary.classes[place], templates=TEMPLATES)
        rows.append(mean_feature(model, prompts.normality_texts(word)))
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


class NamedTypes:
    """The types of an auxiliary set, and which of them are wrong for which.

    Args:
        types: as `Auxiliary.types`.
        features: float32 [N, E] of `type_features`.
        text: float32 [C, 2, E], normal and anomalous features of the classes.

    Raises:
        InputError: features of another number or length.
    """

    def __init__(
        self, types: Sequence[tuple[int, str]], features: NDArray[np.float32], text: NDArray[np.float32]
    ) -> None:
        if features.shape != (len(types), text.shape[2]):
            raise InputError(
                wanted=f"features [{len(types)}, {text.shape[2]}] of the auxiliary set's types",
                got=str(list(features.shape)),
            )
        classes = [place for place, _ in types]
        normal = torch.from_numpy(np.ascontiguousarray(text[classes, 0]))
        named = torch.from_numpy(np.ascontiguousarray(features))
        self.pairs = torch.stack([normal, named], dim=1)  # [N, 2, E]
        directions = unit(named - normal)
        alike = (directions @ directions.T > ALIKE).numpy()
        self.wrong = [
            np.array([j for j, other in enumerate(classes) if other == classes[i] and not alike[i, j]], np.int64)
            for i in range(len(types))
        ]

    def drawn(self, shown: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """A wrong type for every picture [n] of the shown ones [n]; -1 for none."""
        chances = rng.random(len(shown))
        found = np.full(len(shown), -1, np.int64)
        for place, (own, chance) in enumerate(zip(shown, chances, strict=True)):
            wrong = self.wrong[own] if own >= 0 else ()
            if len(wrong):
                found[place] = wrong[int(chance * len(wrong))]
        return found

    def targets(
        self, mask: Tensor, shown: Tensor, wrong: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What pictures of named defects must give under the right sentence, and under the wrong one.

        Args:
            mask: float32 [B, H, W], 1 where there is a defect.
            shown: int64 [B], the type of each picture.
            wrong: int64 [B], the drawn other type, -1 for none.
            grid: rows and columns of patches.

        Returns:
            float32 [B, 2 rows, columns], the mask above nothing; both sentences' features and those of the normal
            ones, float32 [B, 2, 2, E]; float32 [B], 1 where there is a wrong sentence.
        """
        patches = F.adaptive_max_pool2d(mask.unsqueeze(1), grid)[:, 0]
        pairs = self.pairs.to(mask.device)
        texts = torch.stack([pairs[shown], pairs[wrong.clamp_min(0)]], dim=1)
        return torch.cat([patches, torch.zeros_like(patches)], dim=1), texts, (wrong >= 0).to(mask.dtype)

    def loss(
        self,
        projected: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        mask: Tensor,
        shown: Tensor,
        wrong: Tensor,
    ) -> Tensor:
        """Focal and dice loss, added over the layers; 0 without a picture of a named defect.

        Args:
            projected: per layer float32 [B, P_l, E] at length 1.
            grids: rows and columns of each layer's patches.
            mask, shown, wrong: as `targets`; `shown` is -1 for a picture of none.
        """
        chosen = shown >= 0
        total = mask.new_zeros(())
        if not bool(chosen.any()):
            return total
        for layer, grid in zip(projected, grids, strict=True):
            target, texts, there = self.targets(mask[chosen], shown[chosen], wrong[chosen], grid)
            direction = (texts[:, :, 1] - texts[:, :, 0]) / TEMPERATURE  # [B, 2, E]
            share = torch.sigmoid(layer[chosen] @ direction.transpose(1, 2))  # [B, P, 2]
            right, other = share[..., 0], share[..., 1] * there.unsqueeze(1)
            both = torch.cat([right, other], dim=1).reshape(target.shape)
            total = total + focal_loss(both, target) + dice_loss(both, target)
        return total


__all__: Sequence[str] = ("ALIKE", "TEMPLATES", "NamedTypes", "type_features")
