"""What the sets of a run are worth: Deep SAD and SimpleNet trained with each, on anomalies made apart from the run.

Test pictures are photographs that no run saw, and painted ones on more of them: sentences drawn uniformly from the
grammar by another seed. Which of these are hard is said by a reference: Deep SAD of another seed, trained on
photographs of its own and on sentences of its own. So neither the run nor one of its evaluators decides what it is
tried on; and as the reference was trained as KKA(0) is, hard means hard for what KKA(0) knows.

SimpleNet is the second opinion: it learns from the masks, patch by patch, where Deep SAD learns from whole images.
"""

from __future__ import annotations

import functools
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
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors import simplenet
from edgead.server_side.detectors.deep_sad import SphereNetwork, SphereTask, embedded, maps_of
from edgead.server_side.detectors.trained import Samples, TrainedOptions
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.kka.procedural import GrammarAuthor, ProceduralPainter
from edgead.server_side.kka.records import Image, Judgement
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.kka.sets import members, samples
from edgead.server_side.kka.stages import hard_limit
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.metrics import auroc

PAINTED_TESTS = 160
TRAININGS = 2
"""Deep SAD is trained so often with each set, from different weights; means are reported. SimpleNet once."""
STEPS = 600
METHODS = {"": "Deep SAD", "_simplenet": "SimpleNet"}
"""Endings of the names of figures -> the detector that they are of."""
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


def painted_apart(folder: Path, count: int, floor: float, seed: int) -> list[tuple[Frame, Frame]]:
    """Anomalies from uniform sentences of the grammar on the photographs of a folder, none fainter than the floor.

    Returns:
        picture uint8 [H, W, 3] and mask uint8 [H, W] of each.
    """
    author, painter = GrammarAuthor(GRAMMAR), ProceduralPainter()
    paths = list_images(folder)
    found: list[tuple[Frame, Frame]] = []
    for place in range(20 * count):
        number = seed * 1_000_003 + place
        normal = read_image(paths[place % len(paths)])
        try:
            painted = painter.paint(author.write([""], [number])[0], normal, seed=number)
        except UndrawableCaptionError:
            continue
        assert painted.mask is not None
        inside = painted.mask > 0
        if np.abs(painted.image[inside].astype(np.int16) - normal[inside]).mean() >= floor:
            found.append((painted.image, painted.mask))
        if len(found) == count:
            break
    return found


class Measures:
    """Everything that runs of one seed are measured with; maps are made once."""

    def __init__(self, settings: LoopSettings, folder: Path, seed: int) -> None:
        self._settings, self._seed, self._folder = settings, seed, folder
        self._backbone: Backbone = load_backbone("embedded").eval()
        self._normals = self._maps([read_image(path) for path in list_images(folder / "normals")])
        good = [read_image(path) for path in list_images(folder / "held")]
        bad = _pictures(painted_apart(folder / "held", PAINTED_TESTS, settings.floor, 10_000 + seed))
        apart = _pictures(painted_apart(folder / "reference", 2 * settings.captions, settings.floor, 20_000 + seed))
        normals = self._maps([read_image(path) for path in list_images(folder / "reference")])
        self.reference = sphere(normals, self._maps(apart), settings, 30_000 + seed)
        self._test_frames = [*good, *bad]
        self._limit = hard_limit(self.reference.held, settings.quantile)
        self._tests = self._maps(self._test_frames)
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
        sets: dict[str, Callable[[], Samples]] = {"no anomalies": list}
        for mode, work in works.items():
            for number in range(work.config.rounds + 1):
                name = f"KKA({number}) {mode}" if number else "KKA(0)"
                sets[name] = functools.partial(samples, work, number)
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
                functools.partial(self._worth, make),
            )
            for name, make in sets.items()
        }

    def _equal(self, work: WorkFolder, only: str) -> Samples:
        """As many hard or easy images of the last set as there are of the rarer kind."""
        last = work.config.rounds
        count = min(len(members(work, last, only=kind)) for kind in ("hard", "easy"))
        found = samples(work, last, only=only)
        chosen = np.random.default_rng(self._seed).permutation(len(found))[:count]
        return [found[place] for place in sorted(chosen.tolist())]

    def _uniform(self, count: int) -> Samples:
        """Painted anew, into a folder, as detectors take files."""
        folder = self._folder / "uniform"
        folder.mkdir(exist_ok=True)
        found: list[tuple[Path, Path | None]] = []
        made = painted_apart(self._folder / "normals", count, self._settings.floor, self._seed + 7)
        for place, (picture, mask) in enumerate(made):
            paths = folder / f"{place:05d}.png", folder / f"{place:05d}_mask.png"
            paths[0].write_bytes(encode_png(picture))
            paths[1].write_bytes(encode_png(np.repeat(mask[..., None], 3, 2)))
            found.append(paths)
        return found

    def _worth(self, make: Callable[[], Samples]) -> dict[str, float]:
        anomalous = make()
        anomalies = self._maps([read_image(path) for path, _ in anomalous])
        found: dict[str, list[float]] = {}
        for training in range(TRAININGS):
            seed = 100 * self._seed + training
            trained = sphere(self._normals, anomalies, self._settings, seed)
            scores = {"": trained.distances(self._tests)}
            if not training:  # it differs little from seed to seed
                scores["_simplenet"] = self._simplenet(anomalous, seed)
            for method, each in scores.items():
                for name, chosen in (("hard", self._hard_tests), ("all", np.ones(len(self._tests), bool))):
                    area = auroc(self._anomalous[chosen], each[chosen])
                    if area is not None:
                        found.setdefault(f"auroc_{name}{method}", []).append(area)
        return {"images": float(len(anomalies)), **{name: float(np.mean(areas)) for name, areas in found.items()}}

    def _simplenet(self, anomalous: Samples, seed: int) -> NDArray[np.float32]:
        """Scores [N] of the test pictures by SimpleNet, trained with a set and its masks."""
        side = self._settings.size
        options = TrainedOptions(preprocessing=Preprocessing(side, side), seed=seed, device="cpu")
        learned = simplenet.learn(list_images(self._folder / "normals"), options, anomalous)
        statistics = torch.from_numpy(learned.pack.arrays["map.statistics"])
        found = []
        with torch.inference_mode():
            for frame in self._test_frames:
                shaped = torch.from_numpy(prepare(frame, options.preprocessing))
                found.append(float(learned.head(learned.trunk(shaped), statistics)[0][0]))
        return np.array(found, np.float32)

    def _maps(self, frames: Sequence[Frame]) -> Tensor:
        side = self._settings.size
        preprocessing = Preprocessing(side, side)
        shaped = [prepare(frame, preprocessing)[0] for frame in frames]
        return maps_of(self._backbone, np.stack(shaped) if shaped else np.zeros((0, side, side, 3), np.uint8))


def _pictures(painted: Sequence[tuple[Frame, Frame]]) -> list[Frame]:
    return [picture for picture, _ in painted]


def kept(path: Path, make: Any) -> Any:
    """The JSON at a path, or what `make()` gives, kept there."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


__all__ = ["METHODS", "TRAININGS", "Measures", "kept", "sphere"]
