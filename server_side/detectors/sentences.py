"""Prompt sets -> the knowledge arrays of text-guided detectors, and the features of added normalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import PromptError
from edgead.server_side.prompts.ensembles import normality
from edgead.server_side.prompts.prompt_set import PromptSet
from edgead.server_side.vision_language.models import VisionLanguageModel
from edgead.server_side.vision_language.text import encode_texts


def mean_feature(model: VisionLanguageModel, texts: Sequence[str]) -> NDArray[np.float32]:
    """The mean of sentences' embeddings at length 1, float32 [E].

    Raises:
        PromptError: no sentence.
    """
    if not texts:
        raise PromptError(wanted="at least one sentence", got="none", next_step="Add sentences to the prompt set.")
    mean = encode_texts(model, texts, progress=False).astype(np.float64).mean(0)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)


def class_features(model: VisionLanguageModel, prompts: PromptSet) -> NDArray[np.float32]:
    """Mean features of a class's normal and anomalous prompts, float32 [2, E].

    Raises:
        PromptError: a state without a sentence.
    """
    return np.stack([mean_feature(model, prompts.texts("normal")), mean_feature(model, prompts.texts("anomalous"))])


def normality_rows(
    model: VisionLanguageModel, prompts: PromptSet
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[dict[str, Any]]]:
    """The rows of every added normality of a prompt set.

    Args:
        model: of the normality detector that is to take them.
        prompts: with prompts of normalities, as of `edgead.server_side.prompts.normality`; its normal prompts make
            the feature that each is compared with.

    Returns:
        f_add float32 [K, E], f_nor float32 [K, E], and per row what its note says: `text`, the normality's name,
        `class`, `prompts`, the number of sentences, and `phrases`, those sentences' core if the set tells.

    Raises:
        PromptError: no added normality in the set, or no normal sentence.
    """
    names = prompts.normalities()
    if not names:
        raise PromptError(
            wanted=f"a normality in the prompt set of '{prompts.class_name}'",
            got="none",
            next_step="Make one with: edgead prompts normality",
        )
    added = np.stack([mean_feature(model, prompts.normality_texts(name)) for name in names])
    normal = np.repeat(mean_feature(model, prompts.texts("normal"))[None], len(names), axis=0)
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {
            "text": name,
            "class": prompts.class_name,
            "prompts": len(prompts.normality_texts(name)),
        }
        if len(names) == 1 and prompts.phrases:
            row["phrases"] = list(prompts.phrases)
        rows.append(row)
    return added, normal, rows


def normality_row(
    model: VisionLanguageModel, text: str, class_name: str, *, phrases: Sequence[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, Any]]:
    """One normality from its name: f_add float32 [E], f_nor float32 [E] and the note's row.

    Args:
        model: see `normality_rows`.
        text: what is normal from now on ("thread").
        class_name: the part ("carpet").
        phrases: descriptions of it, such as a language model's; curated ones if None.

    Raises:
        PromptError: a text, class name or phrase that is empty, too long or of odd characters.
    """
    added, normal, rows = normality_rows(model, normality(text, class_name, phrases=phrases))
    return added[0], normal[0], rows[0]


__all__: Sequence[str] = ("class_features", "mean_feature", "normality_row", "normality_rows")
