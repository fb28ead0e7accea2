"""What text-guided heads share, against float64 references written from the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.server_side.detectors.text_heads import (
    HarmonicWindows,
    Upsample,
    anomalous_share,
    association,
    class_embeddings,
    prompt_likeness,
)

Array = NDArray[np.float64]
E = 12


def unit(rows: Array) -> Array:
    made: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def tensor(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def count(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@pytest.fixture
def table() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(7, E))), np.array([0, 1, 0, 1, 1, 0, 1.0])


def test_a_class_is_the_mean_of_its_prompts_at_length_one(table: tuple[Array, Array]) -> None:
    rows, state = table
    wanted = unit(np.stack([rows[state == 0].mean(0), rows[state == 1].mean(0)]))
    found = class_embeddings(tensor(rows), count(7), tensor(state))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("filler", [0.0, 1e30])
def test_padded_prompts_change_no_class(table: tuple[Array, Array], filler: float) -> None:
    rows, state = table
    padded = np.concatenate([rows, np.full((5, E), filler)])
    states = np.concatenate([state, [0, 1, 0, 1, 1]])
    plain = class_embeddings(tensor(rows), count(7), tensor(state))
    torch.testing.assert_close(class_embeddings(tensor(padded), count(7), tensor(states)), plain)


def test_a_class_without_prompts_is_like_nothing() -> None:
    found = class_embeddings(torch.ones(2, E), count(2), torch.zeros(2))
    assert found[1].abs().max() == 0


def test_the_share_of_the_anomalous_class_is_a_softmax_of_cosines(table: tuple[Array, Array]) -> None:
    rows, state = table
    features = np.random.default_rng(1).normal(size=(2, 5, E)) * 30
    classes = unit(np.stack([rows[state == 0].mean(0), rows[state == 1].mean(0)]))
    logits = unit(features) @ classes.T / 0.07
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = (powers / powers.sum(-1, keepdims=True))[..., 1]
    found = anomalous_share(tensor(features), class_embeddings(tensor(rows), count(7), tensor(state)), 0.07)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("pad", [0, 4])
def test_association_is_half_the_least_cosine_distance(pad: int) -> None:
    rng = np.random.default_rng(2)
    features, bank = rng.normal(size=(2, 9, E)) * 10, rng.normal(size=(20, E))
    cosine = unit(features) @ unit(bank).T
    padded = np.concatenate([bank, np.tile(features[0, 0], (pad, 1))])  # padding that would win
    found, index = association(tensor(features), tensor(padded), count(20))
    np.testing.assert_allclose(found, (1 - cosine.max(-1)) / 2, atol=1e-6)
    np.testing.assert_array_equal(index, cosine.argmax(-1))


def test_nothing_is_associated_with_an_empty_bank() -> None:
    found, index = association(torch.randn(1, 3, E), torch.zeros(1, E), count(0))
    assert found.tolist() == [[1.0, 1.0, 1.0]]
    assert index.tolist() == [[0, 0, 0]]


def test_a_row_of_the_bank_is_at_no_distance_and_never_below() -> None:
    bank = torch.randn(50, E, generator=torch.Generator().manual_seed(0)) * 7
    found, _ = association(bank[None], bank, count(50))
    assert found.min() >= 0
    assert found.max() < 1e-6


@pytest.mark.parametrize(("grid", "scale"), [((3, 3), 2), ((5, 4), 3), ((6, 6), 1), ((4, 5), 4)])
def test_a_patch_gets_the_harmonic_mean_of_its_windows(grid: tuple[int, int], scale: int) -> None:
    height, width = grid[0] - scale + 1, grid[1] - scale + 1
    windows = np.random.default_rng(3).uniform(0.01, 1, size=(2, height, width))
    wanted = np.zeros((2, *grid))
    for y in range(grid[0]):
        for x in range(grid[1]):
            over = windows[:, max(0, y - scale + 1) : y + 1, max(0, x - scale + 1) : x + 1].reshape(2, -1)
            wanted[:, y, x] = over.shape[1] / (1 / over).sum(1)
    found = HarmonicWindows(grid, scale)(tensor(windows.reshape(2, -1)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_window_without_any_anomaly_brings_its_patches_to_zero() -> None:
    found = HarmonicWindows((3, 3), 2)(torch.tensor([[0.0, 0.5, 0.5, 0.5]]))
    assert torch.isfinite(found).all()
    assert found[0, :2, :2].max() < 1e-8
    assert found[0, 2, 2] == pytest.approx(0.5)


def test_maps_are_upsampled_as_torch_does() -> None:
    grid = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1))
    wanted = torch.nn.functional.interpolate(grid[:, None], size=(40, 70), mode="bilinear")[:, 0]
    torch.testing.assert_close(Upsample((5, 7), (40, 70))(grid), wanted, rtol=0, atol=1e-6)


def test_prompts_are_evidence_by_their_likeness_to_the_image_and_padding_is_none() -> None:
    rng = np.random.default_rng(4)
    image, rows = rng.normal(size=(2, E)), rng.normal(size=(6, E))
    found = prompt_likeness(tensor(image), tensor(rows), count(4))
    np.testing.assert_allclose(found[:, :4], unit(image) @ unit(rows[:4]).T, atol=1e-6)
    assert (found[:, 4:] == -1).all()
