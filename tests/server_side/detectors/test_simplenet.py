"""SimpleNet: its loss against the paper in float64, its training, its engines, and what anomalies add."""

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
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors import simplenet
from edgead.server_side.detectors.masked_cells import ANOMALOUS, NORMAL, UNKNOWN, cell_labels
from edgead.server_side.detectors.simplenet import PatchSet, SimpleNetHead, SimpleNetTask
from edgead.server_side.detectors.simplenet_network import Averaged, SimpleNetwork, anomalous_l1, truncated_l1
from edgead.server_side.detectors.trained import Anomalies, TrainedOptions
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.metrics import auroc
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import paint_part

Samples = list[tuple[Path, Path | None]]
D = 12


def quick(**changes: Any) -> TrainedOptions:
    return TrainedOptions(**{"preprocessing": Preprocessing(64, 64), "steps": 20, "batch": 8, **changes})


def test_the_loss_is_that_of_equations_7_and_8() -> None:
    rng = np.random.default_rng(0)
    normal, noisy = rng.normal(size=(3, 40)), rng.normal(size=(3, 40))
    total, above, below = 0.0, 0.5, -0.5
    for i in range(3):
        per_image = 0.0
        for patch in range(40):
            per_image += max(0.0, above - normal[i, patch]) + max(0.0, noisy[i, patch] - below)
        total += per_image / 40
    found = truncated_l1(torch.from_numpy(normal), torch.from_numpy(noisy))
    assert float(found) == pytest.approx(total / 3, abs=1e-12)


def test_what_is_beyond_the_truncation_pulls_no_more() -> None:
    normal = torch.tensor([0.4, 0.6], requires_grad=True)
    noisy = torch.tensor([-0.4, -0.6], requires_grad=True)
    truncated_l1(normal, noisy).backward()  # type: ignore[no-untyped-call]
    assert normal.grad is not None
    assert noisy.grad is not None
    assert normal.grad.tolist() == [-0.5, 0.0]
    assert noisy.grad.tolist() == [0.5, 0.0]


def test_given_anomalies_have_a_mean_of_their_own_and_none_cost_nothing() -> None:
    judged = torch.tensor([0.5, -0.25, -2.0], dtype=torch.float64)
    assert float(anomalous_l1(judged)) == pytest.approx((1.0 + 0.25 + 0.0) / 3)
    assert float(anomalous_l1(judged[:0])) == 0.0


def test_score_and_map_are_the_normalised_patches() -> None:
    rng = np.random.default_rng(1)
    scores, statistics = rng.normal(size=(2, 12)).astype(np.float32), np.array([0.3, 2.0], np.float32)
    head = SimpleNetHead((3, 4), (24, 32), sigma=0.0)
    score, anomaly_map = head(torch.from_numpy(scores), torch.from_numpy(statistics))
    expected = (scores.astype(np.float64) - 0.3) / 2.0
    np.testing.assert_allclose(score.numpy(), expected.max(1), rtol=1e-6)
    # Without a blur the map is the patches in between which it interpolates.
    assert anomaly_map.shape == (2, 24, 32)
    assert float(anomaly_map[0].max()) <= float(score[0]) + 1e-6
    np.testing.assert_allclose(anomaly_map[:, 0, 0].numpy(), expected[:, 0], rtol=1e-5)


def test_every_mask_has_an_anomalous_cell_and_a_seam_that_nobody_judges() -> None:
    masks = np.zeros((3, 32, 32), np.bool_)
    masks[0, 8:16, 8:16] = True
    masks[1, 17, 3] = True
    anomalies = Anomalies(np.zeros((3, 32, 32, 3), np.uint8), masks, np.array([True, True, False]))
    labels = cell_labels(anomalies, (4, 4))
    assert labels[0].tolist() == [
        [UNKNOWN, UNKNOWN, UNKNOWN, NORMAL],
        [UNKNOWN, ANOMALOUS, UNKNOWN, NORMAL],
        [UNKNOWN, UNKNOWN, UNKNOWN, NORMAL],
        [NORMAL, NORMAL, NORMAL, NORMAL],
    ]
    assert (labels[1] == ANOMALOUS).nonzero().tolist() == [[2, 0]]
    assert (labels[2] == UNKNOWN).all()


def gaussians(seed: int = 0) -> tuple[torch.Tensor, PatchSet, torch.Tensor, PatchSet]:
    """Patches of 10 normal images, 4 anomalies of which 2 have masks, and the same held out."""
    drawn = torch.Generator().manual_seed(seed)
    normals = torch.randn(14, 16, D, generator=drawn)
    odd = torch.randn(8, 16, D, generator=drawn)
    labels = torch.full((8, 16), UNKNOWN, dtype=torch.int8)
    known = torch.tensor([True, True, False, False] * 2)
    labels[known] = NORMAL
    labels[known, :3] = ANOMALOUS
    odd[:, :3] += 4
    halves = [PatchSet(odd[at : at + 4], labels[at : at + 4], known[at : at + 4]) for at in (0, 4)]
    return normals[:10], halves[0], normals[10:], halves[1]


def task(**changes: Any) -> SimpleNetTask:
    return SimpleNetTask(*gaussians(), **{"batch": 4, "patches": 32, "hidden": 16, **changes})


class Interrupted(SimpleNetTask):
    """Somebody presses Ctrl-C in step 25."""

    def step(self, number: int) -> dict[str, float]:
        if number == 25:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    made = [task(seed=seed) for seed in (1, 1, 2)]
    for each in made:
        train(each, Schedule(12, validate_every=4), label="test")
    digests = [weights_digest(each.module) for each in made]
    assert digests[0] == digests[1] != digests[2]


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    schedule = Schedule(40, validate_every=10)
    whole = task()
    train(whole, schedule, label="test")
    broken = Interrupted(*gaussians(), batch=4, patches=32, hidden=16)
    with pytest.raises(KeyboardInterrupt):
        train(broken, schedule, label="test", checkpoint=tmp_path / "kept")
    resumed = task()
    history = train(resumed, schedule, label="test", checkpoint=tmp_path / "kept")
    assert history.steps == 40
    assert weights_digest(resumed.module) == weights_digest(whole.module)


def test_looking_for_the_worst_patch_leaves_the_statistics_alone() -> None:
    made = task()
    made.module.train()
    before = made.module.current.norm.state_dict()["running_mean"].clone()
    worst = made._worst(torch.Generator().manual_seed(0))
    assert worst.shape == (4, D)
    assert torch.equal(made.module.current.norm.state_dict()["running_mean"], before)
    assert made.module.current.training


def test_the_weights_kept_are_a_mean_that_forgets_its_beginning() -> None:
    network = SimpleNetwork(D, 16)
    made = Averaged(network, window=10)
    for value, steps in ((5.0, 4), (1.0, 100)):
        torch.nn.init.constant_(network.last.weight, value)
        for _ in range(steps):
            made.update()
    kept = made.mean.last.weight
    assert 1.0 < float(kept.max()) < 1.001
    assert not any(each.requires_grad for each in made.mean.parameters())


def test_a_training_that_gains_nothing_stops_early() -> None:
    made = task(learning_rate=1e-12)
    history = train(made, Schedule(200, validate_every=2, patience=3, least_gain=0.5), label="test")
    assert history.stopped == "patience"
    assert history.steps < 20


@pytest.mark.parametrize("sides", [(64, 64), (96, 64)])
def test_four_small_photographs_are_enough(painted_normals: Path, sides: tuple[int, int]) -> None:
    learned = simplenet.learn(list_images(painted_normals)[:4], quick(steps=4, preprocessing=Preprocessing(*sides)))
    assert learned.pack.calibration.threshold > 0
    assert learned.pack.calibration.false_alarm_rate is None
    assert learned.card["data"]["anomalies"] == 0


def test_weights_are_features_and_statistics_are_knowledge(painted_normals: Path) -> None:
    learned = simplenet.learn(list_images(painted_normals), quick(steps=4))
    assert set(learned.pack.arrays) == {"map.statistics"}
    assert isinstance(learned.trunk, simplenet.SimpleNetTrunk)
    assert isinstance(learned.trunk.network, SimpleNetwork)
    assert not list(learned.head.parameters())


def fabrics(folder: Path, count: int, seed: int, kind: str | None = None) -> Samples:
    """Painted fabrics of 96 x 96 pixels, each with a defect of a kind, or none."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    made: Samples = []
    for number in range(count):
        image, path = paint_part("fabric", rng=rng, size=96).image, folder / f"{number:02d}.png"
        mask_path = None
        if kind is not None:
            image, mask = paint_defect(image, kind, size=0.3, contrast=0.35, rng=rng)
            mask_path = folder / f"{number:02d}_mask.png"
            mask_path.write_bytes(encode_png(np.repeat(mask[..., None], 3, 2)))
        path.write_bytes(encode_png(image))
        made.append((path, mask_path))
    return made


def found(modules: Modules, learned: Learned, normal: Samples, odd: Samples) -> float:
    """Image AUROC of odd against normal pictures."""
    scores = [
        float(modules.outputs(modules.embed(read_image(path)), learned.pack)["score"][0]) for path, _ in normal + odd
    ]
    area = auroc(np.arange(len(scores)) >= len(normal), np.array(scores))
    assert area is not None
    return area


def test_a_painted_kind_of_defect_is_found_better_by_who_has_seen_it(
    tmp_path: Path, as_modules: Callable[[Learned], Modules]
) -> None:
    normal, odd = fabrics(tmp_path / "train", 24, 0), fabrics(tmp_path / "odd", 12, 1, "stain")
    test, defects = fabrics(tmp_path / "test", 20, 2), fabrics(tmp_path / "defects", 20, 3, "stain")
    areas = []
    for anomalous in ([], odd):
        options = quick(steps=120, preprocessing=Preprocessing(96, 96))
        learned = simplenet.learn([path for path, _ in normal], options, anomalous)
        areas.append(found(as_modules(learned), learned, test, defects))
    assert areas[1] > areas[0] + 0.05


def test_engines_agree_with_torch(painted_normals: Path, bundle_of: Callable[[Learned, str], Path]) -> None:
    learned = simplenet.learn(list_images(painted_normals), quick())
    bundle = open_bundle(bundle_of(learned, "simplenet"))
    frame: NDArray[np.uint8] = learned.golden[1]
    scores = []
    for target in ("onnx", "openvino"):
        inspector = Inspector(bundle, target=target)
        inspection = inspector.inspect(frame)
        inspector.close()
        assert inspection.anomaly_map is not None
        scores.append(inspection.score)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0] == pytest.approx(bundle.manifest.golden[1].score, rel=1e-4)
