"""What the sets of a run are worth: Deep SAD trained with each, on anomalies that were made apart from the run.

Test pictures are photographs that no run saw, and painted ones on more of them: sentences drawn uniformly from the
grammar by another seed. Which of these are hard is said by a reference: Deep SAD of another seed, trained on
photographs of its own and on sentences of its own. So neither the run nor one of its evaluators decides what it is
tried on; and as the reference was trained as KKA(0) is, hard means hard for what KKA(0) knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import Frame
from benchmarks.kka_loop import GRAMMAR, LoopSettings
from edgead.runtime.image import list_images, read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.deep_sad import SphereNetwork, SphereTask, embedded, maps_of
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.kka.procedural import GrammarAuthor, ProceduralPainter
from edgead.server_side.kka.records import Image, Judgement
from edgead.server_side.kka.sets import members
from edgead.server_side.kka.stages import hard_limit
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.metrics import auroc

PAINTED_TESTS = 160
TRAININGS = 2
"""Deep SAD is trained so often with each set, from different weights; means are reported."""
STEPS = 600
_HELD_OUT = 0.2


@dataclass(frozen=True, eq=False)
class Sphere:
    """A trained Deep SAD; distances of its held-out normals [V]."""

    network: SphereNetwork
    centre: Tensor
    held: NDArray[np.float32]

    def distances(self, maps: Tensor) -> NDArray[np.float32]:
        """Squared distances [N] of maps [N, C, h, w]."""
        found = (embedded(self.network, maps) - self.centre).square().sum(1)
        return found.numpy().astype(np.float32)


def sphere(normals: Tensor, anomalies: Tensor, settings: LoopSettings, seed: int) -> Sphere:
    """Train Deep SAD as a run's evaluator is trained, with a fifth of either kind held out."""
    rng = np.random.default_rng(seed)

    def split(maps: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.from_numpy(rng.permutation(len(maps)))
        held = round(_HELD_OUT * len(maps))
        return maps[order[held:]], maps[order[:held]]

    (learned, stop), (anomalous, stop_anomalous) = split(normals), split(anomalies)
    task = SphereTask(
        learned,
        anomalous,
        stop,
        stop_anomalous,
        learning_rate=settings.evaluator_rate,
        steps=STEPS,
        seed=seed,
    )
    train(task, Schedule(STEPS, validate_every=max(1, STEPS // 30), patience=8), label="Deep SAD")
    network, centre = task.module.network.eval(), task.module.centre.clone()
    distances = (embedded(network, stop) - centre).square().sum(1).numpy().astype(np.float32)
    return Sphere(network, centre, distances)


def painted_apart(folder: Path, count: int, floor: float, seed: int) -> list[Frame]:
    """Anomalies from uniform sentences of the grammar on the photographs of a folder, none fainter than the floor."""
    author, painter = GrammarAuthor(GRAMMAR), ProceduralPainter()
    paths = list_images(folder)
    found: list[Frame] = []
    for place in range(20 * count):
        number = seed * 1_000_003 + place
        normal = read_image(paths[place % len(paths)])
        painted = painter.paint(author.write([""], [number])[0], normal, seed=number)
        assert painted.mask is not None
        inside = painted.mask > 0
        if np.abs(painted.image[inside].astype(np.int16) - normal[inside]).mean() >= floor:
            found.append(painted.image)
        if len(found) == count:
            break
    return found


class Measures:
    """Everything that runs of one seed are measured with; maps are made once."""

    def __init__(self, settings: LoopSettings, folder: Path, seed: int) -> None:
        self._settings, self._seed, self._folder = settings, seed, folder
        self._backbone: Backbone = load_backbone("embedded").eval()
        self._normals = self._maps([read_image(path) for path in list_images(folder / "normals")])
        good = self._maps([read_image(path) for path in list_images(folder / "held")])
        bad = self._maps(painted_apart(folder / "held", PAINTED_TESTS, settings.floor, 10_000 + seed))
        apart = painted_apart(folder / "reference", 2 * settings.captions, settings.floor, 20_000 + seed)
        normals = self._maps([read_image(path) for path in list_images(folder / "reference")])
        self.reference = sphere(normals, self._maps(apart), settings, 30_000 + seed)
        self._limit = hard_limit(self.reference.held, settings.quantile)
        self._tests = torch.cat([good, bad])
        self._anomalous = np.arange(len(self._tests)) >= len(good)
        hard = self.reference.distances(self._tests) < self._limit
        self._hard_tests = ~self._anomalous | hard
        self.counts = {"good": len(good), "painted": len(bad), "hard": int((hard & self._anomalous).sum())}

    def hard_by_reference(self, work: WorkFolder, number: int) -> float | None:
        """Share of a round's visible images that the reference finds hard: one measure for all rounds and runs."""
        faint = {record.parent for record in work.records(Judgement, number) if record.faint}
        frames = [
            read_image(work.path / record.file) for record in work.records(Image, number) if record.id not in faint
        ]
        return float((self.reference.distances(self._maps(frames)) < self._limit).mean()) if frames else None

    def worth(self, works: dict[str, WorkFolder]) -> dict[str, dict[str, float]]:
        """Set -> images, AUROC on hard anomalies and on all, means of `TRAININGS` trainings.

        Args:
            works: the finished runs by mode.
        """
        sets: dict[str, Callable[[], Tensor]] = {"no anomalies": lambda: self._maps([])}
        for mode, work in works.items():
            for number in range(work.config.rounds + 1):
                name = f"KKA({number}) {mode}" if number else "KKA(0)"
                sets[name] = lambda work=work, number=number: self._set(work, number)  # type: ignore[misc]
        add = works.get("add")
        if add is not None:
            last = add.config.rounds
            sets["hard only, at equal number"] = lambda: self._equal(add, "hard")
            sets["easy only, at equal number"] = lambda: self._equal(add, "easy")
            # Sentences drawn uniformly again: what the number of images does by itself.
            sets[f"uniform, as many as KKA({last}) add"] = lambda: self._uniform(len(members(add, last)))
        (self._folder / "worth").mkdir(exist_ok=True)
        return {
            name: kept(
                self._folder / "worth" / f"{re.sub('[^a-zA-Z0-9]+', '-', name)}.json",
                lambda make=make: self._worth(make()),
            )
            for name, make in sets.items()
        }

    def _equal(self, work: WorkFolder, only: str) -> Tensor:
        """As many hard or easy images of the last set as there are of the rarer kind."""
        last = work.config.rounds
        count = min(len(members(work, last, only=kind)) for kind in ("hard", "easy"))
        maps = self._set(work, last, only)
        chosen = np.random.default_rng(self._seed).permutation(len(maps))[:count]
        return maps[torch.from_numpy(np.sort(chosen))]

    def _uniform(self, count: int) -> Tensor:
        return self._maps(painted_apart(self._folder / "normals", count, self._settings.floor, self._seed + 7))

    def _worth(self, anomalies: Tensor) -> dict[str, float]:
        found: dict[str, list[float]] = {"hard": [], "all": []}
        for training in range(TRAININGS):
            trained = sphere(self._normals, anomalies, self._settings, 100 * self._seed + training)
            distances = trained.distances(self._tests)
            for name, chosen in (("hard", self._hard_tests), ("all", np.ones(len(self._tests), bool))):
                area = auroc(self._anomalous[chosen], distances[chosen])
                if area is not None:
                    found[name].append(area)
        means = {f"auroc_{name}": float(np.mean(areas)) for name, areas in found.items() if areas}
        return {"images": float(len(anomalies)), **means}

    def _set(self, work: WorkFolder, number: int, only: str | None = None) -> Tensor:
        return self._maps([read_image(work.path / image.file) for image, _ in members(work, number, only=only)])

    def _maps(self, frames: Sequence[Frame]) -> Tensor:
        side = self._settings.size
        preprocessing = Preprocessing(side, side)
        shaped = [prepare(frame, preprocessing)[0] for frame in frames]
        return maps_of(self._backbone, np.stack(shaped) if shaped else np.zeros((0, side, side, 3), np.uint8))


def kept(path: Path, make: Any) -> Any:
    """The JSON at a path, or what `make()` gives, kept there."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


__all__ = ["TRAININGS", "Measures", "kept", "sphere"]
