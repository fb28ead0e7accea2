"""PaDiM and SSD: statistics against float64 references, their maps and scores, their engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing, Tiling
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors import padim, ssd
from edgead.server_side.detectors.gaussian import Moments, shrunk, whitening
from edgead.server_side.detectors.trained import TrainedOptions, split_held_out
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import paint_part

SMALL = TrainedOptions(preprocessing=Preprocessing(64, 64))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """40 painted parts."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(2)
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encode_png(paint_part("flange", rng=rng, size=64).image))
    return list_images(folder)


def test_moments_in_batches_are_those_of_all_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(23, 3, 5)) * 3 + 100
    moments = Moments(3, 5)
    for part in (rows[:1], rows[1:9], rows[9:]):
        moments.add(part.astype(np.float64))
    assert moments.count == 23
    for position in range(3):
        assert np.allclose(moments.mean[position], rows[:, position].mean(0), rtol=1e-12)
        assert np.allclose(moments.covariance()[position], np.cov(rows[:, position].T), rtol=1e-9)
    alone = Moments(3, 5)
    alone.add(rows[:1])
    assert not alone.covariance().any()


def test_the_length_after_whitening_is_the_mahalanobis_distance() -> None:
    rng = np.random.default_rng(1)
    covariance = np.cov(rng.normal(size=(6, 40))) + 0.01 * np.eye(6)
    factor = whitening(covariance[None])[0]
    assert np.allclose(factor.T @ factor, np.linalg.inv(covariance), rtol=1e-9)
    assert np.array_equal(factor, np.tril(factor))
    mixed = shrunk(covariance, 0.25, 2.0)
    assert mixed[0, 1] == 0.75 * covariance[0, 1]
    assert mixed[2, 2] == pytest.approx(0.75 * covariance[2, 2] + 0.5)


def test_padims_scores_and_maps_are_those_of_the_paper_in_float64(many: list[Path]) -> None:
    learned = padim.learn(many, SMALL, dimensions=20)
    channels = np.sort(np.random.default_rng(0).permutation(192)[:20])
    backbone = load_backbone("embedded").eval()

    def embeddings(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        image = torch.from_numpy(prepare(read_image(path), SMALL.preprocessing)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            fine, coarse = (found[0].numpy().astype(np.float64) for found in backbone(image))
        coarse = coarse.repeat(2, axis=1).repeat(2, axis=2)
        return np.concatenate([fine, coarse])[channels].reshape(20, -1).T

    known, held = split_held_out(many, SMALL)
    normal = np.stack([embeddings(path) for path in known])
    modules = padim.padim_modules(backbone, channels, SMALL.preprocessing)
    for path in held[:3]:
        distances = []
        for position, found in enumerate(embeddings(path)):
            sigma = np.cov(normal[:, position].T) + 0.01 * np.eye(20)
            away = found - normal[:, position].mean(0)
            distances.append(np.sqrt(away @ np.linalg.inv(sigma) @ away))
        grid = np.array(distances).reshape(8, 8)
        place = ((np.arange(64) + 0.5) / 8 - 0.5).clip(0, 7)
        rows = np.stack([np.interp(place, np.arange(8), column) for column in grid.T], axis=1)
        both = np.stack([np.interp(place, np.arange(8), row) for row in rows])
        for axis in (0, 1):
            both = gaussian_filter1d(both, 1.0, axis=axis, mode="mirror", truncate=4.0)
        outputs = modules.outputs(modules.embed(read_image(path)), learned.pack)
        # W travels in float16: three digits.
        assert np.allclose(outputs["anomaly_map"][0], both, rtol=2e-3)
        assert outputs["score"][0] == pytest.approx(both.max(), rel=2e-3)
    assert learned.pack.arrays["gaussian.factor"].dtype == np.float16
    assert learned.pack.arrays["gaussian.factor"].shape == (64, 20, 20)


def test_padim_marks_a_painted_defect_where_it_is(many: list[Path], as_modules: Callable[[Learned], Modules]) -> None:
    learned = padim.learn(many, SMALL)
    modules = as_modules(learned)
    picture = read_image(many[0])
    painted, mask = paint_defect(
        picture, "stain", size=0.3, place=(0.5, 0.2), contrast=1, colour=(200, 30, 30), rng=np.random.default_rng(0)
    )
    maps = [modules.outputs(modules.embed(each), learned.pack)["anomaly_map"][0] for each in (picture, painted)]
    row, column = np.unravel_index(int((maps[1] - maps[0]).argmax()), maps[1].shape)
    assert mask[max(0, row - 6) : row + 7, max(0, column - 6) : column + 7].any()
    assert maps[1].max() > learned.pack.calibration.threshold


@pytest.mark.parametrize("clusters", [1, 2])
def test_ssds_score_is_the_smallest_distance_to_a_cluster_in_float64(
    clusters: int, many: list[Path], as_modules: Callable[[Learned], Modules]
) -> None:
    learned = ssd.learn(many, SMALL, clusters=clusters, shrinkage=0.2)
    modules = as_modules(learned)
    known, held = split_held_out(many, SMALL)
    normal = np.concatenate([modules.embed(read_image(path))["embedding"] for path in known]).astype(np.float64)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1)
    means = learned.pack.arrays["gaussian.mean"].astype(np.float64)
    assert means.shape == (clusters, 384)
    # Each normal belongs to the nearest mean, as k-means has it.
    labels = np.linalg.norm(normal[:, None] - means[None], axis=2).argmin(1)
    parts = [normal[labels == label] for label in range(clusters)]
    assert np.allclose(means, [part.mean(0) for part in parts], atol=1e-5)
    covariances = [np.cov(part.T) for part in parts]
    floor = np.average([np.trace(each) / 384 for each in covariances], weights=[len(part) for part in parts])
    mixed = [0.8 * each + 0.2 * floor * np.eye(384) for each in covariances]
    for path in held[:4]:
        found = modules.embed(read_image(path))["embedding"]
        away = [found[0].astype(np.float64) - mean for mean in means]
        expected = min(np.sqrt(each @ np.linalg.solve(sigma, each)) for each, sigma in zip(away, mixed, strict=True))
        assert modules.outputs({"embedding": found}, learned.pack)["score"][0] == pytest.approx(expected, rel=1e-3)


def test_clusters_are_no_more_than_pictures_that_differ(many: list[Path]) -> None:
    learned = ssd.learn([many[0], many[0], many[1], many[1]], SMALL, clusters=8)
    assert 1 <= len(learned.card["clusters"]) <= 2


@pytest.mark.parametrize("method", [padim, ssd])
def test_two_photographs_are_enough_and_anomalies_are_refused(method: ModuleType, many: list[Path]) -> None:
    found: Learned = method.learn(many[:2], SMALL)
    assert found.pack.calibration.false_alarm_rate is None
    assert found.pack.calibration.threshold > 0
    with pytest.raises(InputError, match="good parts alone"):
        method.learn(many[:2], SMALL, [(many[0], None)])
    tiled = TrainedOptions(preprocessing=Preprocessing(32, 32, tiles=Tiling(2, 1, 0.1)))
    assert method.learn(many[:6], tiled).card["data"]["frames"] == 10


@pytest.mark.parametrize("method", [padim, ssd])
def test_the_same_seed_gives_the_same_detector(method: ModuleType, many: list[Path]) -> None:
    first, again = (method.learn(many[:8], SMALL) for _ in range(2))
    assert first.pack.digest == again.pack.digest
    assert first.spec.fingerprint == again.spec.fingerprint


@pytest.mark.parametrize("method", [padim, ssd])
def test_every_engine_agrees_with_torch(
    method: ModuleType, many: list[Path], bundle_of: Callable[[Learned, str], Path], as_modules: Callable[..., Modules]
) -> None:
    learned: Learned = method.learn(many, TrainedOptions(preprocessing=Preprocessing(96, 64)))
    opened = open_bundle(bundle_of(learned, method.METHOD))
    frame = read_image(many[0])
    modules = as_modules(learned)
    expected = float(modules.outputs(modules.embed(frame), learned.pack)["score"].max())
    for target in ("onnx", "openvino"):
        with Inspector(opened, target=target) as inspector:
            found = inspector.inspect(frame)
            assert found.score == pytest.approx(expected, rel=1e-3)
            assert (found.anomaly_map is None) == (method is ssd)
