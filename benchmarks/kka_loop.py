"""One run of key knowledge augmentation for the benchmark: its photographs, its author, its configuration.

What is run is `edgead.server_side.kka.rounds.run` with the makers of `edgead kka run`; nothing is replaced.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import note
from benchmarks.kka_author import make_author
from edgead.runtime.image import encode_png, list_images
from edgead.server_side.kka.config import read_config
from edgead.server_side.kka.grammar import Grammar
from edgead.server_side.kka.makers import opened_makers
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.painting_parts import paint_part

PROMPT = "{caption}\nOne defect of it:"
"""Short, as a model of a few words reads it at every step."""
CLASS_NAMES = {"flange": "steel flange", "fabric": "woven fabric"}
GRAMMAR = Grammar(
    colours=("", "black", "white", "grey", "dark grey", "light grey", "red", "dark brown", "light blue"),
    numbers=(1,),
)
"""What the author is taught: 14,400 sentences, among them ones that no painter should be asked for, and hard ones."""


@dataclass(frozen=True)
class LoopSettings:
    """What decides a run.

    Attributes:
        part: a material of `painting_parts`, or the folder of a data set in the MVTec layout.
        size: side of painted parts, and of the evaluator's input, in pixels.
        normals: photographs that the run sees.
        held_out: photographs that it does not see, for testing.
        reference: photographs that neither see, for the reference that says what is hard.
        captions: of each round.
        images: of each caption; one with hard and easy ones is neither chosen nor rejected.
        rounds: after round 0.
        mode: add or rep.
        author_steps: of teaching it the grammar. One that is half taught forgets it while preferences tune it.
        evaluator: each, or first: that of round 0 judges all rounds, so that their shares are of one measure.
        folds: of the evaluator.
        quantile: of the normals' distances up to which an anomaly is hard.
        floor: of visibility.
        evaluator_steps: of Deep SAD.
        evaluator_rate: its learning rate.
        top_p: of the author: without it each odd word of its tail comes up once in a hundred captions.
        pairs: preferences of a round.
        prefer_steps: of the preference training.
        prefer_likelihood: weight of the chosen captions' likelihood in it.
        prefer_rate: its learning rate; the published one is for a model with 10^5 times the parameters.
    """

    part: str = "flange"
    size: int = 128
    normals: int = 120
    held_out: int = 80
    reference: int = 120
    captions: int = 200
    images: int = 2
    rounds: int = 2
    mode: str = "add"
    author_steps: int = 600
    evaluator: str = "first"
    folds: int = 2
    quantile: float = 0.8
    floor: float = 8.0
    evaluator_steps: int = 500
    evaluator_rate: float = 5e-4
    top_p: float = 0.95
    pairs: int = 256
    prefer_steps: int = 70
    prefer_rate: float = 7e-4
    prefer_likelihood: float = 0.0

    @property
    def class_name(self) -> str:
        """What the part is, in words."""
        return CLASS_NAMES.get(self.part, Path(self.part).name.replace("_", " "))

    @property
    def prompt(self) -> str:
        """What the author is asked."""
        caption = f"a photograph of a flawless {self.class_name}"
        return PROMPT.format(class_name=self.class_name, caption=caption)


def normal_pictures(settings: LoopSettings, folder: Path, seed: int) -> None:
    """Good parts: `normals/` for the run, `held/` and `reference/` for testing. Made once.

    Those of a data set are links to photographs that the seed draws from its `train/good`, none in two places.
    """
    counts = {"normals": settings.normals, "held": settings.held_out, "reference": settings.reference}
    if all(len(list((folder / name).glob("*"))) == count for name, count in counts.items()):
        return
    rng = np.random.default_rng(seed)
    total = sum(counts.values())
    paths: list[Path] = []
    if settings.part not in CLASS_NAMES:
        paths = list_images(Path(settings.part) / "train" / "good")
        if len(paths) < total:
            raise SystemExit(f"{settings.part} has {len(paths)} photographs in train/good; {total} are wanted")
        paths = [paths[at] for at in rng.permutation(len(paths))[:total].tolist()]
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for place in range(count):
            if settings.part in CLASS_NAMES:
                picture = paint_part(settings.part, rng=rng, size=settings.size).image
                (folder / name / f"{place:04d}.png").write_bytes(encode_png(picture))
            else:
                photograph = paths.pop().absolute()
                link = folder / name / f"{place:04d}{photograph.suffix}"
                if not link.is_symlink():
                    link.symlink_to(photograph)


def author_folder(settings: LoopSettings, folder: Path, seed: int) -> Path:
    """The author of a seed, trained if it was not."""
    made = folder / "author"
    if not made.exists():
        facts = make_author(
            made, GRAMMAR, [settings.prompt], seed=seed, width=64, batch=32, steps=settings.author_steps
        )
        note(f"author: {json.dumps({name: round(value, 3) for name, value in facts.items()})}")
        (folder / "author.json").write_text(json.dumps(facts))
    return made


def run_loop(settings: LoopSettings, folder: Path, seed: int, name: str = "") -> WorkFolder:
    """A run from its beginning or from where it was ended, in `folder/name`.

    Args:
        settings: of the run.
        folder: of the seed; photographs and author are shared by the runs in it.
        seed: of everything.
        name: of the run's folder; the mode if empty.
    """
    normal_pictures(settings, folder, seed)
    author = author_folder(settings, folder, seed)
    path = folder / f"{name or settings.mode}.toml"
    path.write_text(configuration(settings, folder / "normals", author, seed))
    work = WorkFolder.create(path.with_suffix(".kka"), read_config(path), path.read_bytes())
    with work.locked(), opened_makers(work.config, say=note) as makers:
        run(work, makers)
    return work


def configuration(settings: LoopSettings, normals: Path, author: Path, seed: int) -> str:
    """The TOML of a run."""

    def text(value: str) -> str:
        return json.dumps(value)

    return f"""\
normals = {text(str(normals.resolve()))}
class_name = {text(settings.class_name)}
mode = {text(settings.mode)}
rounds = {settings.rounds}
captions = {settings.captions}
seed = {seed}

[imagine]
author = "local"
model = {text(str(author.resolve()))}
prompt = {text(PROMPT)}
max_tokens = 24
top_p = {settings.top_p}
batch = 40

[paint]
images = {settings.images}

[judge]
hard_quantile = {settings.quantile}
visible_floor = {settings.floor}
evaluator = {text(settings.evaluator)}
folds = {settings.folds}
steps = {settings.evaluator_steps}
learning_rate = {settings.evaluator_rate}
size = {settings.size}

[prefer]
learning_rate = {settings.prefer_rate}
likelihood = {settings.prefer_likelihood}
pairs = {settings.pairs}
steps = {settings.prefer_steps}
batch = 16
accumulate = 1
target_modules = ["c_attn", "c_proj", "c_fc"]
"""


def changed(settings: LoopSettings, words: dict[str, Any]) -> LoopSettings:
    """Settings with some of them from a command line; None leaves one as it is."""
    return replace(settings, **{name: value for name, value in words.items() if value is not None})


__all__ = ["GRAMMAR", "LoopSettings", "author_folder", "changed", "normal_pictures", "run_loop"]
