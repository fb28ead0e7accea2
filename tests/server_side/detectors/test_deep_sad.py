"""Deep SAD: its loss and centre against float64 references written from the paper, its training, its engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from edgead.cli import cli
from edgead.runtime.bundle import open_bundle
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.spec import Preprocessing, Tiling
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.deep_sad import (
    SphereNetwork,
    SphereTask,
    embedded,
    first_centre,
    joined_maps,
    learn,
    maps_of,
    sphere_loss,
)
from edgead.server_side.detectors.trained import Samples, TrainedOptions
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.painting import paint_defect

SMALL = TrainedOptions(preprocessing=Preprocessing(64, 64), steps=30, learning_rate=1e-3, batch=8)


@pytest.fixture(scope="module")
def anomalies(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Six parts with a stain each."""
    folder = tmp_path_factory.mktemp("stains")
    found = []
    for number, path in enumerate(list_images(painted_normals)[:6]):
        picture, _ = paint_defect(read_image(path), "stain", size=0.4, contrast=1, rng=np.random.default_rng(number))
        (folder / path.name).write_bytes(encode_png(picture))
        found.append((folder / path.name, None))
    return found


@pytest.fixture(scope="module")
def learned(painted_normals: Path, anomalies: Samples) -> Learned:
    return learn(list_images(painted_normals), SMALL, anomalies)


def equation_7(
    embedding: NDArray[np.float64], anomalous: NDArray[np.bool_], centre: NDArray[np.float64], eta: float, eps: float
) -> float:
    """1 / (n + m) (sum over normals of |phi - c|^2 + eta sum over anomalies of (|phi - c|^2 + eps)^-1)."""
    total = 0.0
    for vector, bad in zip(embedding, anomalous, strict=True):
        distance = sum((a - b) ** 2 for a, b in zip(vector, centre, strict=True))
        total += eta / (distance + eps) if bad else distance
    return total / len(embedding)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_loss_is_equation_7(eta: float, share: float) -> None:
    rng = np.random.default_rng(1)
    embedding, centre = rng.normal(size=(20, 5)), rng.normal(size=5)
    anomalous = np.arange(20) < share * 20
    expected = equation_7(embedding, anomalous, centre, eta, 1e-6)
    arguments = (torch.from_numpy(anomalous), torch.from_numpy(centre))
    assert float(sphere_loss(torch.from_numpy(embedding), *arguments, eta=eta)) == pytest.approx(expected, rel=1e-12)
    single = sphere_loss(torch.from_numpy(embedding).float(), arguments[0], arguments[1].float()[None], eta=eta)
    assert float(single) == pytest.approx(expected, rel=1e-5)


def test_the_loss_draws_normals_to_the_centre_and_drives_anomalies_away() -> None:
    embedding = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    sphere_loss(embedding, torch.tensor([False, True]), torch.zeros(2)).backward()
    assert embedding.grad is not None
    assert (embedding.grad[0] > 0).all(), "a step against it goes to the centre"
    assert (embedding.grad[1] < 0).all(), "a step against it goes away"
    at_the_centre = torch.zeros(1, 2, requires_grad=True)
    loss = sphere_loss(at_the_centre, torch.tensor([True]), torch.zeros(2))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1e6)
    assert at_the_centre.grad is not None
    assert torch.isfinite(at_the_centre.grad).all()


def test_the_centre_is_the_mean_kept_away_from_zero() -> None:
    embeddings = torch.tensor([[0.5, 0.05, -0.05, 0.0, -0.3, 0.1, -0.1], [0.7, 0.07, -0.01, 0.0, -0.5, 0.1, -0.1]])
    expected = torch.tensor([0.6, 0.1, -0.1, 0.1, -0.4, 0.1, -0.1])
    assert torch.allclose(first_centre(embeddings), expected)
    cancelling = first_centre(torch.tensor([[1.0], [-1.0]]))
    assert cancelling.tolist() == [pytest.approx(0.1)]


def test_the_centre_does_not_move_while_the_network_is_trained() -> None:
    maps = torch.randn(12, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    task = SphereTask(maps[:8], maps[8:10] + 1, maps[10:], maps[:0], batch=4, learning_rate=1e-3, steps=10)
    untrained = SphereNetwork(6).eval()
    before = task.module.centre.clone()
    assert torch.allclose(before, first_centre(embedded(untrained, maps[:8])))
    weights = task.module.network.first.weight.clone()
    for number in range(10):
        assert set(task.step(number)) == {"loss"}
    assert torch.equal(task.module.centre, before)
    assert not torch.equal(task.module.network.first.weight, weights)
    assert task._optimizer.param_groups[0]["lr"] == pytest.approx(1e-4), "a tenth in the last quarter"


def test_no_bias_could_map_everything_to_the_centre() -> None:
    network = SphereNetwork(6)
    assert not any(name.endswith("bias") for name, _ in network.named_parameters())


def test_maps_in_batches_are_those_of_one_call() -> None:
    backbone = load_backbone("random")
    frames = np.random.default_rng(0).integers(0, 256, (19, 64, 96, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = joined_maps(backbone, torch.from_numpy(frames))
    assert expected.shape == (19, 192, 4, 6)
    assert torch.allclose(maps_of(backbone, frames), expected, atol=1e-5)
    assert maps_of(backbone, frames[:0]).shape == (0, 192, 4, 6)


def test_anomalies_that_were_learned_lie_farther_than_normals(
    painted_normals: Path, anomalies: Samples, as_modules: Callable[[Learned], Modules]
) -> None:
    options = TrainedOptions(preprocessing=SMALL.preprocessing, steps=60, learning_rate=1e-3, batch=8, patience=0)
    taught = learn(list_images(painted_normals), options, anomalies)
    modules = as_modules(taught)

    def score(path: Path) -> float:
        return float(modules.outputs(modules.embed(read_image(path)), taught.pack)["score"][0])

    normal = [score(path) for path in list_images(painted_normals)]
    assert min(score(path) for path, _ in anomalies) > np.median(normal)
    assert taught.card["data"]["anomalies"] == 6


def test_the_same_photographs_and_seed_give_the_same_detector(
    painted_normals: Path, anomalies: Samples, learned: Learned
) -> None:
    again = learn(list_images(painted_normals), SMALL, anomalies)
    assert again.pack.digest == learned.pack.digest
    assert again.spec.fingerprint == learned.spec.fingerprint, "the trunk's weights are in it"
    without = learn(list_images(painted_normals), SMALL)
    assert without.spec.fingerprint != learned.spec.fingerprint
    assert without.card["data"]["anomalies"] == 0


@pytest.mark.parametrize(("count", "side"), [(2, 32), (4, 64)])
def test_a_handful_of_photographs_gives_a_detector_whose_threshold_nobody_vouches_for(
    painted_normals: Path, count: int, side: int
) -> None:
    options = TrainedOptions(preprocessing=Preprocessing(side, side), steps=3)
    found = learn(list_images(painted_normals)[:count], options)
    assert found.pack.calibration.threshold > 0
    assert found.pack.calibration.false_alarm_rate is None
    assert "set by hand" in found.card["calibration"]


def test_a_checkpoint_fits_only_the_options_that_it_was_written_with() -> None:
    maps = torch.zeros(4, 6, 4, 4)
    changes: list[dict[str, float]] = [
        {},
        {"seed": 1},
        {"eta": 2.0},
        {"steps": 7},
        {"batch": 3},
        {"learning_rate": 1e-2},
    ]
    identities = [SphereTask(maps, maps[:0], maps[:1], maps[:0], **change).identity for change in changes]  # type: ignore[arg-type]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(changes)


@pytest.fixture(scope="module")
def bundle(learned: Learned, bundle_of: Callable[[Learned, str], Path]) -> Path:
    return bundle_of(learned, "deep-sad")


def test_every_engine_agrees_with_torch_and_has_no_map(bundle: Path, painted_normals: Path, learned: Learned) -> None:
    opened = open_bundle(bundle)
    assert {engine.target for engine in opened.manifest.engines} == {"onnx", "openvino", "tensorrt"}
    assert [engine.parity is not None for engine in opened.manifest.engines if engine.target != "tensorrt"] == [
        True
    ] * 2
    assert not opened.manifest.detector.has_map
    frame = read_image(list_images(painted_normals)[0])
    scores = []
    for target in ("onnx", "openvino"):
        with Inspector(opened, target=target) as inspector:
            found = inspector.inspect(frame)
            assert found.anomaly_map is None
            assert found.regions == ()
            scores.append(found.score)
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_a_detector_without_a_map_runs_is_evaluated_and_draws_overlays(
    bundle: Path, painted_normals: Path, anomalies: Samples, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for kind, paths in (("good", list_images(painted_normals)[:4]), ("stain", [path for path, _ in anomalies][:4])):
        (data / "test" / kind).mkdir(parents=True)
        for path in paths:
            (data / "test" / kind / path.name).write_bytes(path.read_bytes())
    runner = CliRunner()
    words = ["run", str(bundle), str(data / "test" / "stain"), "--overlays", str(tmp_path / "out")]
    done = runner.invoke(cli, words, catch_exceptions=False)
    assert "000.png" in done.output
    assert len(list((tmp_path / "out").iterdir())) == 4
    words = ["evaluate", str(bundle), "--data", str(data), "--html", str(tmp_path / "report.html"), "--json"]
    done = runner.invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    kinds = json.loads(done.stdout.splitlines()[0])["kinds"]
    assert kinds["all"]["auroc"] is not None
    assert kinds["all"]["pixel_auroc"] is None
    assert (tmp_path / "report.html").stat().st_size > 1000
    text = runner.invoke(cli, ["evaluate", str(bundle), "--data", str(data)], catch_exceptions=False)
    assert "stain" in text.output


def test_the_worst_tile_of_a_frame_is_its_score(
    painted_normals: Path, as_modules: Callable[[Learned], Modules]
) -> None:
    spec = Preprocessing(32, 32, tiles=Tiling(2, 2, 0.0))
    found = learn(list_images(painted_normals), TrainedOptions(preprocessing=spec, steps=5))
    modules = as_modules(found)
    outputs = modules.outputs(modules.embed(read_image(list_images(painted_normals)[0])), found.pack)
    assert outputs["score"].shape == (4,)
    assert found.card["data"]["trained_on"] == 40
