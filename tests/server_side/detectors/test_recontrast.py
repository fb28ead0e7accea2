"""ReContrast: its losses and their gradients against the paper in float64, its networks, training and engines."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.detector_file import weights_digest
from edgead.runtime.bundle import open_bundle
from edgead.runtime.image import list_images
from edgead.runtime.inspector import Inspector
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors import recontrast
from edgead.server_side.detectors.masked_cells import ANOMALOUS, NORMAL, UNKNOWN
from edgead.server_side.detectors.recontrast import ReContrastHead, ReContrastTask, ReContrastTrunk
from edgead.server_side.detectors.recontrast_losses import alpha_at, cell_distance, global_cosine, push
from edgead.server_side.detectors.recontrast_network import ReContrastNetwork
from edgead.server_side.detectors.trained import Anomalies, TrainedOptions
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.learned import Learned

Array = NDArray[np.float64]
SHAPES = ((3, 5, 4, 6), (3, 7, 2, 3))


def maps(seed: int) -> list[Array]:
    """Two maps of 3 frames each."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in SHAPES]


def tensors(arrays: list[Array], *, gradient: bool = False) -> list[torch.Tensor]:
    return [torch.from_numpy(array).requires_grad_(gradient) for array in arrays]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def distances(encoded: Array, decoded: Array) -> Array:
    """M of the paper, cell by cell."""
    frames, _, rows, columns = encoded.shape
    found = np.zeros((frames, rows, columns))
    for place in np.ndindex(frames, rows, columns):
        n, y, x = place
        found[place] = 1 - cosine(encoded[n, :, y, x], decoded[n, :, y, x])
    return found


def reference(encoded: list[Array], decoded: list[Array]) -> float:
    """The global cosine distance of the paper."""
    return sum(
        sum(1 - cosine(e.ravel(), d.ravel()) for e, d in zip(a, b, strict=True)) / len(a)
        for a, b in zip(encoded, decoded, strict=True)
    )


def reference_gradient(encoded: Array, decoded: Array) -> Array:
    """d (mean over frames of 1 - cos(e, d)) / d d, written out."""
    found = np.zeros_like(decoded)
    for n, (e, d) in enumerate(zip(encoded, decoded, strict=True)):
        size_e, size_d = np.linalg.norm(e), np.linalg.norm(d)
        along = (e * d).sum()
        found[n] = -(e / (size_e * size_d) - along * d / (size_e * size_d**3)) / len(decoded)
    return found


def test_the_cell_distance_is_that_of_the_paper() -> None:
    encoded, decoded = maps(0)[0], maps(1)[0]
    found = cell_distance(torch.from_numpy(encoded), torch.from_numpy(decoded))
    np.testing.assert_allclose(found.numpy(), distances(encoded, decoded), atol=1e-12)


@pytest.mark.parametrize("alpha", [None, -3.0, 0.0, 1.0])
def test_the_global_cosine_distance_is_that_of_the_paper_mined_or_not(alpha: float | None) -> None:
    encoded, decoded = maps(0), maps(1)
    found = global_cosine(tensors(encoded), tensors(decoded), alpha=alpha)
    assert float(found) == pytest.approx(reference(encoded, decoded), abs=1e-12)


def test_without_mining_every_cell_gets_the_gradient_and_targets_get_none() -> None:
    encoded, decoded = maps(0), maps(1)
    targets, made = tensors(encoded, gradient=True), tensors(decoded, gradient=True)
    global_cosine(targets, made).backward()  # type: ignore[no-untyped-call]
    for e, d, target, tensor in zip(encoded, decoded, targets, made, strict=True):
        assert target.grad is None
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), reference_gradient(e, d), atol=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0])
def test_mining_takes_the_gradient_from_cells_below_the_mean_and_alpha_deviations(alpha: float) -> None:
    encoded, decoded = maps(0), maps(1)
    made = tensors(decoded, gradient=True)
    global_cosine(tensors(encoded), made, alpha=alpha).backward()  # type: ignore[no-untyped-call]
    for e, d, tensor in zip(encoded, decoded, made, strict=True):
        distance = distances(e, d)
        hard = distance >= distance.mean() + alpha * distance.std(ddof=1)
        assert 0 < hard.sum() < hard.size
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), reference_gradient(e, d) * hard[:, None], atol=1e-12)


def test_cells_that_do_not_count_change_nothing() -> None:
    encoded, decoded = maps(0), maps(1)
    counted = [torch.from_numpy(np.random.default_rng(2).random((s[0], *s[2:])) < 0.7) for s in SHAPES]
    spoiled = [array.copy() for array in decoded]
    for array, cells in zip(spoiled, counted, strict=True):
        array.transpose(0, 2, 3, 1)[~cells.numpy()] += 5.0
    for alpha in (None, 0.5):
        results = []
        for made in (decoded, spoiled):
            inputs = tensors(made, gradient=True)
            loss = global_cosine(tensors(encoded), inputs, alpha=alpha, counted=counted)
            loss.backward()  # type: ignore[no-untyped-call]
            results.append((float(loss.detach()), [each.grad for each in inputs]))
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
        for one, other in zip(results[0][1], results[1][1], strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one == 0, other == 0)


def test_masked_cells_are_pushed_to_the_margin_and_of_an_unmasked_picture_the_farthest() -> None:
    encoded, decoded = maps(0), maps(1)
    labels = [np.full((s[0], *s[2:]), NORMAL, np.int8) for s in SHAPES]
    for label in labels:
        label[0, 0, :2], label[2] = ANOMALOUS, UNKNOWN
    known = np.array([True, True, False])
    expected = 0.0
    for e, d in zip(encoded, decoded, strict=True):
        distance = distances(e, d)
        chosen = [distance[0, 0, 0], distance[0, 0, 1], distance[2].max()]
        expected += sum(max(0.0, 1.2 - value) for value in chosen) / 3
    found = push(
        tensors(encoded), tensors(decoded), [torch.from_numpy(each) for each in labels], torch.from_numpy(known), 1.2
    )
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_mining_begins_with_all_cells_and_is_full_after_a_tenth_of_the_steps() -> None:
    assert [alpha_at(step, 1000) for step in (0, 50, 100, 999)] == [-3.0, -1.0, 1.0, 1.0]


def test_the_map_is_the_weighted_sum_of_all_distances_and_the_score_its_maximum() -> None:
    rng = np.random.default_rng(3)
    fine, coarse = (rng.random((2, 2, *grid)).astype(np.float32) for grid in ((4, 6), (2, 3)))
    head = ReContrastHead([(4, 6), (2, 3)], (4, 6), sigma=0.0)
    weights = torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    score, anomaly_map = head(torch.from_numpy(fine), torch.from_numpy(coarse), weights)
    # The corner cell of the coarse map is the corner of the fine one.
    corner = fine[:, 0, 0, 0] + 0.5 * fine[:, 1, 0, 0] + 2.0 * coarse[:, 0, 0, 0]
    np.testing.assert_allclose(anomaly_map[:, 0, 0].numpy(), corner, rtol=1e-5)
    np.testing.assert_allclose(score.numpy(), anomaly_map.amax((1, 2)).numpy())


@pytest.mark.parametrize("layers", [None, (8,), (16,)])
def test_both_encoders_begin_as_the_backbone(layers: tuple[int, ...] | None) -> None:
    backbone = load_backbone("random", layers=layers).eval()
    network = ReContrastNetwork(backbone).eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = network.shared(image)
        for encoder in (network.frozen, network.encoder):
            for mine, theirs in zip(encoder(hidden), backbone(image), strict=True):
                torch.testing.assert_close(mine, theirs)
        rebuilt = network.decoder(network.frozen(hidden))
    assert [each.shape for each in rebuilt] == [each.shape for each in backbone(image)]


def test_a_backbone_of_another_kind_is_trained_whole() -> None:
    pytest.importorskip("timm")
    backbone = load_backbone("timm:resnet18:random").eval()
    network = ReContrastNetwork(backbone)
    network.train()
    hidden = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = weights_digest(network.encoder)
    encoded, decoded = network.pairs(network.shared(hidden), network.frozen(hidden))
    global_cosine(encoded, decoded).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in network.frozen.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.encoder.parameters())
    assert weights_digest(network.encoder) == before, "normalisation statistics moved"


def frames(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def anomalies(count: int, seed: int) -> Anomalies:
    """Half of them with a mask."""
    masks = np.zeros((count, 64, 64), np.bool_)
    known = np.arange(count) % 2 == 0
    masks[known, 10:30, 20:40] = True
    return Anomalies(frames(count, seed), masks, known)


def task(kind: type[ReContrastTask] = ReContrastTask, seed: int = 0, **changes: Any) -> ReContrastTask:
    network = ReContrastNetwork(load_backbone("random"), width=8, seed=seed)
    data = (frames(6, 0), anomalies(4, 1), frames(3, 2), anomalies(2, 3))
    return kind(network, *data, **{"steps": 5, "batch": 2, "seed": seed, **changes})


class Interrupted(ReContrastTask):
    """Somebody presses Ctrl-C in step 3."""

    def step(self, number: int) -> dict[str, float]:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


def test_an_interrupted_training_ends_with_the_weights_of_its_seed(tmp_path: Path) -> None:
    schedule = Schedule(5, validate_every=2)
    whole, other = task(), task(seed=1)
    for each in (whole, other):
        train(each, schedule, label="test")
    with pytest.raises(KeyboardInterrupt):
        train(task(Interrupted), schedule, label="test", checkpoint=tmp_path / "kept")
    resumed = task()
    assert train(resumed, schedule, label="test", checkpoint=tmp_path / "kept").steps == 5
    assert weights_digest(resumed.module) == weights_digest(whole.module) != weights_digest(other.module)


def test_only_the_frozen_parts_stay_as_they_were() -> None:
    made = task()
    network = made.module
    before = [weights_digest(part) for part in (network.shared, network.frozen, network.encoder, network.decoder)]
    train(made, Schedule(2), label="test")
    after = [weights_digest(part) for part in (network.shared, network.frozen, network.encoder, network.decoder)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def test_a_training_that_gains_nothing_stops_early() -> None:
    history = train(task(learning_rate=1e-12), Schedule(100, 1, patience=2, least_gain=0.5), label="test")
    assert history.stopped == "patience"


def test_a_batch_of_anomalies_that_nobody_marked_says_nothing_of_normal_cells() -> None:
    made = task(margin=2.0)
    made._anomalies.known[:] = False
    for label in made._anomalies.labels:
        label[:] = UNKNOWN
    losses = made.step(0)
    assert np.isfinite(list(losses.values())).all()
    assert losses["anomalies"] > 0


def quick(**changes: Any) -> TrainedOptions:
    return TrainedOptions(**{"preprocessing": Preprocessing(64, 64), "steps": 6, "batch": 4, **changes})


@pytest.mark.parametrize("sides", [(64, 64), (96, 64)])
def test_four_small_photographs_are_enough(painted_normals: Path, sides: tuple[int, int]) -> None:
    learned = recontrast.learn(list_images(painted_normals)[:4], quick(steps=3, preprocessing=Preprocessing(*sides)))
    assert learned.pack.calibration.threshold > 0
    assert learned.pack.calibration.false_alarm_rate is None
    assert set(learned.pack.arrays) == {"map.weights"}
    assert isinstance(learned.trunk, ReContrastTrunk)
    assert not list(learned.head.parameters())


def test_engines_agree_with_torch(painted_normals: Path, bundle_of: Callable[[Learned, str], Path]) -> None:
    learned = recontrast.learn(list_images(painted_normals), quick())
    bundle = open_bundle(bundle_of(learned, "recontrast"))
    scores = []
    for target in ("onnx", "openvino"):
        inspector = Inspector(bundle, target=target)
        inspection = inspector.inspect(learned.golden[1])
        inspector.close()
        assert inspection.anomaly_map is not None
        scores.append(inspection.score)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0] == pytest.approx(bundle.manifest.golden[1].score, rel=1e-4)
