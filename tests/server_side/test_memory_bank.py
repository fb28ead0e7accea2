"""The head against float64 references written from the paper, and the promises of its docstrings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from edgead.server_side.detectors.memory_bank import MemoryBankHead, MemoryBankTrunk, smoothing_matrix

GRID, SIZE, D = (4, 4), (32, 32), 6
Array = NDArray[np.float64]


def head(neighbours: int = 0) -> MemoryBankHead:
    return MemoryBankHead(GRID, SIZE, sigma=0.5, neighbours=neighbours).eval()


def run(
    module: MemoryBankHead,
    patches: Array,
    normal: Array,
    anomalous: Array | None = None,
    weight: float = 1.0,
    pad: int = 0,
    filler: float = 0.0,
) -> dict[str, NDArray[np.float32]]:
    defects = np.zeros((1, D)) if anomalous is None else anomalous
    rows = np.concatenate([normal, np.full((pad, D), filler)])
    known = np.concatenate([defects, np.full((pad, D), filler)])
    with torch.inference_mode():
        outputs = module(
            torch.tensor(patches, dtype=torch.float32),
            torch.tensor(rows, dtype=torch.float32),
            torch.tensor([len(normal)], dtype=torch.int32),
            torch.tensor(known, dtype=torch.float32),
            torch.tensor([0 if anomalous is None else len(anomalous)], dtype=torch.int32),
            torch.tensor([weight]),
        )
    names = ("score", "anomaly_map", "nearest_row", "worst_patch")
    return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


@pytest.fixture
def sample() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 16, D)), rng.normal(size=(40, D)), rng.normal(size=(5, D))


def distances(patches: Array, rows: Array) -> Array:
    found: Array = np.sqrt(((patches[:, :, None, :] - rows) ** 2).sum(-1))
    return found


def test_score_and_rows_are_those_of_the_nearest_neighbour(sample: tuple[Array, Array, Array]) -> None:
    patches, normal, _ = sample
    outputs = run(head(), patches, normal)
    reference = distances(patches, normal)
    np.testing.assert_array_equal(outputs["nearest_row"], reference.argmin(-1))
    np.testing.assert_allclose(outputs["score"], reference.min(-1).max(-1), rtol=1e-6)
    np.testing.assert_array_equal(outputs["worst_patch"], reference.min(-1).argmax(-1))


def test_reweighting_is_equation_7(sample: tuple[Array, Array, Array]) -> None:
    patches, normal, _ = sample
    outputs = run(head(neighbours=9), patches, normal)
    for batch, reference in enumerate(distances(patches, normal)):
        nearest = reference.min(-1)
        worst = int(nearest.argmax())
        winner = normal[int(reference[worst].argmin())]
        around = np.argsort(((normal - winner) ** 2).sum(-1))[:9]
        support = np.sqrt(((normal[around] - patches[batch, worst]) ** 2).sum(-1))
        weight = 1.0 - np.exp(nearest[worst]) / np.exp(support).sum()
        np.testing.assert_allclose(outputs["score"][batch], weight * nearest[worst], rtol=1e-5)


@pytest.mark.parametrize("filler", [0.0, 1e4])
@pytest.mark.parametrize("neighbours", [0, 9])
def test_padded_rows_change_nothing(sample: tuple[Array, Array, Array], filler: float, neighbours: int) -> None:
    patches, normal, anomalous = sample
    exact = run(head(neighbours), patches, normal, anomalous)
    padded = run(head(neighbours), patches, normal, anomalous, pad=30, filler=filler)
    np.testing.assert_array_equal(exact["nearest_row"], padded["nearest_row"])
    np.testing.assert_allclose(exact["score"], padded["score"], rtol=1e-6)
    np.testing.assert_allclose(exact["anomaly_map"], padded["anomaly_map"], rtol=1e-5, atol=1e-6)


def test_an_empty_anomalous_bank_changes_nothing_whatever_its_weight(
    sample: tuple[Array, Array, Array],
) -> None:
    patches, normal, _ = sample
    for weight in (0.0, 1.0, 100.0):
        outputs = run(head(), patches, normal, None, weight)
        np.testing.assert_allclose(outputs["score"], distances(patches, normal).min(-1).max(-1), rtol=1e-6)


def test_a_patch_nearer_to_a_known_defect_is_raised_and_no_other_moves(
    sample: tuple[Array, Array, Array],
) -> None:
    patches, normal, anomalous = sample
    outputs = run(head(), patches, normal, anomalous, weight=2.0)
    ordinary, alarm = distances(patches, normal).min(-1), distances(patches, anomalous).min(-1)
    raised = ordinary + 2.0 * np.maximum(ordinary - alarm, 0.0)
    assert (raised > ordinary).any()
    assert (raised == ordinary).any()
    np.testing.assert_allclose(outputs["score"], raised.max(-1), rtol=1e-6)


def test_small_distances_survive_large_rows() -> None:
    # |f|^2 + |b|^2 - 2 f.b in float32 would give 0 or noise here.
    normal = np.full((3, D), 1000.0) + np.arange(3)[:, None] * 10
    patches = np.repeat(normal[:1, None, :] + 1e-3, 16, axis=1)
    outputs = run(head(), patches, normal)
    wanted = np.sqrt(((patches.astype(np.float32) - normal[0].astype(np.float32)) ** 2).sum(-1)).max()
    np.testing.assert_allclose(outputs["score"][0], wanted, rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
def test_smoothing_is_bilinear_upsampling_and_a_gaussian(sigma: float) -> None:
    rng = np.random.default_rng(1)
    coarse = rng.normal(size=(8, 8))
    matrix = smoothing_matrix(8, 64, sigma).astype(np.float64)
    up = torch.nn.functional.interpolate(
        torch.tensor(coarse)[None, None], size=(64, 64), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    # OpenCV and SciPy call this border "reflect 101" and "mirror".
    wanted = ndimage.gaussian_filter(up, sigma, mode="mirror", truncate=4.0) if sigma else up
    np.testing.assert_allclose(matrix @ coarse @ matrix.T, wanted, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-5)


def test_the_trunk_averages_neighbours_and_aligns_layers() -> None:
    class Maps(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
            fine = torch.nn.functional.avg_pool2d(pixels, 8)
            return [fine, torch.nn.functional.avg_pool2d(pixels, 16)]

    frame = np.random.default_rng(2).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    patches = MemoryBankTrunk(Maps())(torch.from_numpy(frame)).numpy()  # type: ignore[arg-type]
    assert patches.shape == (1, 64, 6)
    fine = frame[0].reshape(8, 8, 8, 8, 3).mean((1, 3)) / 255.0
    padded = np.pad(fine, ((1, 1), (1, 1), (0, 0)))
    averaged = sum(padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)) / 9.0
    np.testing.assert_allclose(patches[0, :, :3].reshape(8, 8, 3), averaged, atol=1e-6)
