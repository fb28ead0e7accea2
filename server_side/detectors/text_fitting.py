"""What fitting a text-guided detector shares: model and tower, prompts as knowledge, shots and what calibrates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.learned import Arrays, Modules, split_normals
from edgead.server_side.photographs import read_photograph
from edgead.server_side.prompts.prompt_set import PromptSet, read_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel, VisionTower, load_model, make_table, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

Ensemble = Callable[[str, str], PromptSet]
"""(class name, domain) -> a method's own prompts."""
_UNUSUAL = 3
Features = dict[str, NDArray[np.float32]]


def open_tower(options: VisionLanguageOptions) -> tuple[VisionLanguageModel, VisionTower, Preprocessing]:
    """The model, its image tower, and the wanted preprocessing at the tower's size.

    Raises:
        BackboneError: unknown model or weights, or a tower that edgead cannot take apart.
    """
    model = load_model(options.model, options.weights)
    tower = tower_of(model)
    height, width = tower.size
    return model, tower, msgspec.structs.replace(options.preprocessing, height=height, width=width)


def prompts_for(options: VisionLanguageOptions, ensemble: Ensemble) -> PromptSet:
    """The prompt set of the options, or the method's own for the class.

    Raises:
        PromptError: a class name that makes no prompts, or a file that is no prompt set of both states.
        InputError: no such file.
    """
    if options.prompts is None:
        return ensemble(options.class_name, options.domain)
    return read_prompt_set(options.prompts)


def text_knowledge(model: VisionLanguageModel, prompts: PromptSet) -> dict[str, NDArray[Any]]:
    """`text.table` float32 [T, E], `text.state` float32 [T] and the note that says what the rows are."""
    return make_table(model, prompts).arrays()


def text_facts(model: VisionLanguageModel, prompts: PromptSet) -> dict[str, Any]:
    """For the card: the model with the digest of its weights, and who wrote the prompts."""
    return {
        "model": {"name": model.name, "weights": model.weights, "weights_sha256": model.weights_sha256},
        "prompts": {
            "class": prompts.class_name,
            "method": prompts.method,
            "normal": len(prompts.texts("normal")),
            "anomalous": len(prompts.texts("anomalous")),
            "authors": prompts.authors(),
        },
    }


@dataclass(frozen=True, eq=False)
class Shots:
    """Normals that become banks, and those that set the threshold.

    Attributes:
        paths: the shots, S of them.
        features: the trunk's features of each.
        held_out: normals that calibrate.
        shot_of: for each of `held_out` the shot that it is, or None: it is then scored without its own rows.
    """

    paths: tuple[Path, ...]
    features: tuple[Features, ...]
    held_out: tuple[Path, ...]
    shot_of: tuple[int | None, ...]

    def others(self, place: int) -> tuple[Features, ...]:
        """The features of the shots but for the one that `held_out[place]` is."""
        own = self.shot_of[place]
        return tuple(features for number, features in enumerate(self.features) if number != own)


def take_shots(modules: Modules, normal: Sequence[Path], options: VisionLanguageOptions) -> Shots:
    """Choose shots by the seed and embed them; the other normals calibrate.

    With fewer than 2 others each of two or more shots calibrates as well, scored without its own rows: one shot
    alone would then be scored without any, which says nothing of scores with it.

    Raises:
        InputError: fewer normals than shots, or a negative number of shots.
        ImageError: a file is no picture.
    """
    if options.shots < 0:
        raise InputError(wanted="0 shots or more", got=f"{options.shots}", next_step="Ask for 0 to use sentences only.")
    paths, others = split_normals(normal, options.shots, options.seed)
    features = []
    with Progress("reading reference images", len(paths)) as progress:
        for path in progress.track(paths):
            features.append(modules.embed(read_photograph(path)))
    held_out, shot_of = list(others), [None] * len(others)
    if len(others) < 2 <= len(paths):
        return Shots(tuple(paths), tuple(features), (*held_out, *paths), (*shot_of, *range(len(paths))))
    return Shots(tuple(paths), tuple(features), tuple(held_out), tuple(shot_of))


def stacked(features: Sequence[Features], name: str, dimensions: int) -> NDArray[np.float32]:
    """All rows [N, D] of one feature over several pictures and tiles; no picture, no row."""
    parts = [np.zeros((0, dimensions), np.float32), *(each[name].reshape(-1, dimensions) for each in features)]
    return np.concatenate(parts)


def most_unusual(scores: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """For the card: the held-out normals with the highest scores. One bad part among them raises the threshold."""
    highest = sorted(scores, key=lambda named: -named[1])[:_UNUSUAL]
    return [{"image": name, "score": score} for name, score in highest]


__all__: Sequence[str] = (
    "Arrays",
    "Ensemble",
    "Features",
    "Shots",
    "most_unusual",
    "open_tower",
    "prompts_for",
    "stacked",
    "take_shots",
    "text_facts",
    "text_knowledge",
)
