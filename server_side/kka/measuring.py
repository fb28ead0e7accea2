"""How good the anomalies of a round are: a detector trained with them, tried on labelled pictures.

Only where the configuration names such pictures (`evaluate.data`); nothing of a run depends on what is found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.datasets import test_samples
from edgead.server_side.detectors.deep_sad import embedded, maps_of, train_sphere
from edgead.server_side.detectors.trained import TrainedOptions, load_data
from edgead.server_side.kka.records import Normal
from edgead.server_side.kka.seams import seed_of
from edgead.server_side.kka.sets import samples
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.metrics import auroc

NO_ANOMALIES = "no anomalies"
_BATCH = 16


def measure_round(work: WorkFolder, number: int) -> dict[str, float] | None:
    """Image AUROC of Deep SAD with the set of a round; of round 0 also without any anomalies.

    Kept in `round-N/auroc.json` and made only once.

    Args:
        work: the run; the set of the round is collected.
        number: of the round.

    Returns:
        name -> AUROC, 0 to 1; None where the configuration names no labelled pictures.

    Raises:
        InputError: the labelled pictures are not good and bad ones.
    """
    settings = work.config.evaluate
    if not settings.data:
        return None
    path = work.round_folder(number) / "auroc.json"
    if path.exists():
        found: dict[str, float] = json.loads(path.read_bytes())
        return found
    tests = test_samples(Path(settings.data))
    labels = np.array([sample.anomalous for sample in tests])
    if not labels.any() or labels.all():
        raise InputError(
            wanted=f"good and bad pictures in {settings.data}/test",
            got=f"{len(labels)} of one kind",
            next_step="Name a folder in the MVTec layout as `evaluate.data`.",
        )
    sets: dict[str, Sequence[tuple[Path, Path | None]]] = {f"KKA({number})": samples(work, number)}
    if number == 0:
        sets[NO_ANOMALIES] = ()
    paths = [sample.path for sample in tests]
    with work.timed("measure", number, len(sets)):
        found = {name: round(_auroc(work, name, each, paths, labels), 6) for name, each in sets.items()}
    work.write(f"round-{number}/auroc.json", json.dumps(found, indent=1, sort_keys=True).encode() + b"\n")
    return found


def _auroc(
    work: WorkFolder,
    name: str,
    anomalous: Sequence[tuple[Path, Path | None]],
    tests: Sequence[Path],
    labels: NDArray[np.bool_],
) -> float:
    settings = work.config.evaluate
    preprocessing = Preprocessing(settings.size, settings.size)
    normals = [work.normals / record.file for record in work.records(Normal)]
    backbone = load_backbone(work.config.backbone).eval()
    # One seed for all rounds: they differ by their anomalies alone.
    data = load_data(
        normals, TrainedOptions(preprocessing=preprocessing, seed=seed_of(work.config.seed, "measure")), anomalous
    )
    network, centre, _ = train_sphere(
        backbone,
        data.train,
        data.stop,
        data.anomalies,
        data.stop_anomalies,
        steps=settings.steps,
        seed=work.config.seed,
        label=f"measuring {name}",
    )
    distances: list[float] = []
    with Progress(f"testing {name}", len(tests)) as progress:
        for at in range(0, len(tests), _BATCH):
            frames = np.concatenate([prepare(read_image(path), preprocessing) for path in tests[at : at + _BATCH]])
            vectors = embedded(network, maps_of(backbone, frames))
            distances += (vectors - centre).square().sum(1).tolist()
            progress.advance(len(frames))
    found = auroc(labels, np.array(distances, np.float32))
    assert found is not None, "there are pictures of both kinds"
    return found


__all__ = ["NO_ANOMALIES", "measure_round"]
