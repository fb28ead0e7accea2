"""CMDA: mixtures, interpolation and loss against float64 references, its training, its engines."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.detector_file import weights_digest
from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.server_side.detectors.cmda import (
    CmdaExtras,
    CmdaTask,
    balanced_loss,
    bridged,
    interpolated,
    learn,
    mixed,
    mixture_weights,
)
from edgead.server_side.detectors.trained import Samples
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.painting import paint_defect
from edgead.server_side.vision_language.options import VisionLanguageOptions

QUICK = CmdaExtras(steps=40, batch=8, hidden=8)


def unit(seed: int, count: int, dimensions: int = 6) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(count, dimensions))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def anomalies(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Four parts with a stain each."""
    folder = tmp_path_factory.mktemp("stains")
    for number, path in enumerate(list_images(painted_normals)[:4]):
        picture, _ = paint_defect(read_image(path), "stain", size=0.5, contrast=1, rng=np.random.default_rng(number))
        (folder / path.name).write_bytes(encode_png(picture))
    return [(path, None) for path in list_images(folder)]


@pytest.fixture(scope="module")
def learned(painted_normals: Path, anomalies: Samples, tiny_options: VisionLanguageOptions) -> Learned:
    return learn(list_images(painted_normals), tiny_options, anomalies, extras=QUICK)


def test_a_mixture_weighs_pictures_by_their_likeness_to_the_sentence() -> None:
    texts, images = unit(0, 2), unit(1, 3)
    for i in range(2):
        likeness = [abs(sum(float(texts[i, d] * images[j, d]) for d in range(6))) for j in range(3)]
        weights = [each / sum(likeness) for each in likeness]
        assert mixture_weights(texts, images)[i].tolist() == [pytest.approx(each, rel=1e-12) for each in weights]
        total = sum(weight * images[j] for j, weight in enumerate(weights))
        np.testing.assert_allclose(mixed(texts, images)[i].numpy(), (total / torch.linalg.norm(total)).numpy())


def test_an_anomaly_lies_between_a_picture_and_a_sentence() -> None:
    images, texts = unit(2, 3), unit(3, 3)
    share = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    found = interpolated(images, texts, share)
    assert torch.allclose(found[0], images[0])
    assert torch.allclose(found[2], texts[2])
    between = 0.75 * images[1] + 0.25 * texts[1]
    np.testing.assert_allclose(found[1].numpy(), (between / torch.linalg.norm(between)).numpy(), rtol=1e-12)


def test_a_bridged_sentence_lies_among_the_pictures() -> None:
    # Pictures around one axis, sentences around another: the gap between them says nothing about defects.
    images, texts = unit(4, 20) * 0.1, unit(5, 5) * 0.1
    images[:, 0] += 1.0
    texts[:, 1] += 1.0
    moved = bridged(texts, texts, images)
    assert (moved[:, 0] > 0.9).all()
    assert (moved[:, 1].abs() < 0.2).all()


def test_the_loss_gives_normals_and_anomalies_half_of_the_weight_each() -> None:
    good, bad = np.array([0.3, -2.0, 1.0]), np.array([0.5])
    expected = 0.5 * np.mean(-np.log(1 - 1 / (1 + np.exp(-good)))) + 0.5 * np.mean(-np.log(1 / (1 + np.exp(-bad))))
    assert float(balanced_loss(torch.from_numpy(good), torch.from_numpy(bad))) == pytest.approx(expected, rel=1e-12)


class Interrupted(CmdaTask):
    """Somebody presses Ctrl-C in step 15."""

    def step(self, number: int) -> dict[str, float]:
        if number == 15:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


def task(kind: type[CmdaTask] = CmdaTask, *, seed: int = 0) -> CmdaTask:
    parts = [unit(place, count).float() for place, count in enumerate((12, 4, 5, 6, 3, 2))]
    return kind(*parts, extras=QUICK, seed=seed)


def test_the_same_seed_gives_the_same_weights_also_after_an_interruption(tmp_path: Path) -> None:
    schedule = Schedule(30, validate_every=10)
    whole, other, resumed = task(), task(seed=1), task()
    train(whole, schedule, label="test")
    train(other, schedule, label="test")
    with pytest.raises(KeyboardInterrupt):
        train(task(Interrupted), schedule, label="test", checkpoint=tmp_path / "kept")
    train(resumed, schedule, label="test", checkpoint=tmp_path / "kept")
    assert weights_digest(resumed.module) == weights_digest(whole.module) != weights_digest(other.module)


def test_the_classifier_learns_to_tell_its_anomalies_from_normals() -> None:
    centre = torch.nn.functional.normalize(torch.ones(1, 6), dim=1)
    images = torch.nn.functional.normalize(centre + 0.05 * unit(0, 24).float(), dim=1)
    texts = unit(1, 8).float()
    none = images[:0]
    made = CmdaTask(images[:20], images[20:], centre, texts, none, none, extras=CmdaExtras(batch=16))
    with torch.no_grad():
        before = made.validate()
    history = train(made, Schedule(300, validate_every=50), label="test")
    assert history.best < 0.5 * before
    with torch.no_grad():
        assert float(made.module(images[20:]).max()) < float(made.module(texts).median())


def test_the_same_photographs_give_the_same_detector_and_anomalies_another(
    painted_normals: Path, anomalies: Samples, learned: Learned, tiny_options: VisionLanguageOptions
) -> None:
    paths = list_images(painted_normals)
    assert learn(paths, tiny_options, anomalies, extras=QUICK).pack.digest == learned.pack.digest
    without = learn(paths, tiny_options, extras=dataclasses.replace(QUICK, bridge=False))
    assert without.pack.digest != learned.pack.digest
    assert without.spec.fingerprint == learned.spec.fingerprint, "the classifier is knowledge, the trunk is not touched"
    assert without.card["anomalies_from_sentences"]["bridged"] is False
    assert learned.card["data"]["anomalies"] == 4


def test_two_photographs_give_a_threshold_that_nobody_vouches_for(
    painted_normals: Path, tiny_options: VisionLanguageOptions
) -> None:
    paths = list_images(painted_normals)
    found = learn(paths[:2], tiny_options, extras=QUICK)
    assert "set by hand" in found.card["calibration"]
    with pytest.raises(InputError, match="at least 2"):
        learn(paths[:1], tiny_options, extras=QUICK)


def test_every_engine_agrees_with_torch_and_has_no_map(
    learned: Learned,
    painted_normals: Path,
    bundle_of: Callable[[Learned, str], Path],
    as_modules: Callable[[Learned], Modules],
) -> None:
    opened = open_bundle(bundle_of(learned, "cmda"))
    assert not opened.manifest.detector.has_map
    frame = read_image(list_images(painted_normals)[0])
    modules = as_modules(learned)
    expected = float(modules.outputs(modules.embed(frame), learned.pack)["score"][0])
    for target in ("onnx", "openvino"):
        with Inspector(opened, target=target) as inspector:
            found = inspector.inspect(frame)
        assert found.anomaly_map is None
        assert found.score == pytest.approx(expected, rel=1e-3)
