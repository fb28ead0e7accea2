"""Our memory bank and metrics against recorded answers of a peer (anomalib's PatchCore and metrics).

`python -m benchmarks parity --peer-python PYTHON --record tests/data/peer_patchcore.npz` made the data, from a
fixed seed; the versions are in it. `make parity` compares live, on whole images and through the engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.server_side.backbones import Backbone
from edgead.server_side.detectors.memory_bank import MemoryBankHead, MemoryBankTrunk, nearest_rows
from edgead.server_side.metrics import PixelCounter, auroc, average_precision, f1_max

RECORDED = Path(__file__).parents[1] / "data" / "peer_patchcore.npz"
LIMIT = 1e-4
"""Of the range of the peer's map."""

Recorded = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def peer() -> Recorded:
    with np.load(RECORDED) as file:
        return dict(file)


class RecordedBackbone(Backbone):
    """Gives the recorded feature maps, whatever the image."""

    def __init__(self, maps: list[torch.Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.maps


def head_answer(peer: Recorded, neighbours: int, bank: NDArray[np.float32]) -> tuple[torch.Tensor, ...]:
    """The head on the recorded embedding, its map without upsampling or blur; `bank` may be padded."""
    head = MemoryBankHead(grid=(8, 8), size=(8, 8), sigma=0.0, neighbours=neighbours)
    rows = torch.tensor([len(peer["bank"])], dtype=torch.int32)
    nothing, none = torch.zeros(1, bank.shape[1]), torch.zeros(1, dtype=torch.int32)
    with torch.inference_mode():
        answer: tuple[torch.Tensor, ...] = head(
            torch.from_numpy(peer["embedding"]), torch.from_numpy(bank), rows, nothing, none, torch.ones(1)
        )
    return answer


def off_by(ours: torch.Tensor, peer: Recorded, name: str) -> float:
    """Largest difference from a recorded array, as a share of the range of the peer's map."""
    scale = float(peer["patch_score"].max() - peer["patch_score"].min())
    return float(np.abs(ours.numpy().reshape(peer[name].shape).astype(np.float64) - peer[name]).max()) / scale


def test_patch_embeddings_of_the_same_feature_maps_are_the_peers(peer: Recorded) -> None:
    maps = [torch.from_numpy(peer["fine"]), torch.from_numpy(peer["coarse"])]
    with torch.inference_mode():
        patches = MemoryBankTrunk(RecordedBackbone(maps))(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    np.testing.assert_allclose(patches.numpy(), peer["embedding"], rtol=0, atol=1e-5)


def test_the_map_before_smoothing_is_the_peers(peer: Recorded) -> None:
    _, anomaly_map, _, _ = head_answer(peer, 0, peer["bank"])
    assert off_by(anomaly_map, peer, "patch_score") <= LIMIT


def test_the_image_score_with_one_neighbour_is_the_peers(peer: Recorded) -> None:
    score, _, _, _ = head_answer(peer, 0, peer["bank"])
    assert off_by(score, peer, "score_1") <= LIMIT


def test_the_image_score_weighted_by_nine_neighbours_is_the_peers(peer: Recorded) -> None:
    score, _, _, _ = head_answer(peer, 9, peer["bank"])
    assert off_by(score, peer, "score_9") <= LIMIT
    assert np.abs(peer["score_9"] - peer["score_1"]).max() > 0.1, "the weighting must be seen in the data"


def test_the_nearest_rows_are_the_peers(peer: Recorded) -> None:
    _, _, nearest, worst = head_answer(peer, 0, peer["bank"])
    np.testing.assert_array_equal(nearest.numpy(), peer["nearest"])
    np.testing.assert_array_equal(worst.numpy(), peer["patch_score"].argmax(1))


@pytest.mark.parametrize("neighbours", [0, 9])
def test_rows_that_pad_the_bank_change_nothing(peer: Recorded, neighbours: int) -> None:
    padded = np.concatenate([peer["bank"], np.zeros((24, peer["bank"].shape[1]), np.float32)])
    plain = head_answer(peer, neighbours, peer["bank"])
    for ours, wanted in zip(head_answer(peer, neighbours, padded), plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_distances_of_rows_in_the_bank_are_zero(peer: Recorded) -> None:
    bank = torch.from_numpy(peer["bank"])
    distance, nearest = nearest_rows(bank[None], bank, torch.tensor([len(bank)], dtype=torch.int32))
    assert distance.max() == 0, "computed directly, not as a difference of large numbers"
    assert nearest[0].tolist() == list(range(len(bank)))


def test_image_metrics_are_the_peers(peer: Recorded) -> None:
    labels, scores = peer["metric_labels"], peer["metric_scores"]
    assert auroc(labels, scores) == pytest.approx(float(peer["auroc"]), abs=1e-6)
    assert average_precision(labels, scores) == pytest.approx(float(peer["average_precision"]), abs=1e-6)
    best = f1_max(labels, scores)
    assert best is not None
    assert best[0] == pytest.approx(float(peer["f1_max"]), abs=1e-6)


def test_average_precision_is_the_peers_aupr_but_for_its_straight_lines(peer: Recorded) -> None:
    # The peer joins the points of the curve by straight lines, which is known to flatter (Davis and
    # Goadrich, ICML 2006); average precision is the sum of steps.
    ours = average_precision(peer["metric_labels"], peer["metric_scores"])
    assert ours == pytest.approx(float(peer["aupr"]), abs=0.02)


def test_pixel_metrics_are_the_peers(peer: Recorded) -> None:
    counter = PixelCounter()
    for anomaly_map, mask in zip(peer["metric_maps"], peer["metric_masks"], strict=True):
        counter.add(anomaly_map, mask)
    found = counter.result()
    assert found.auroc == pytest.approx(float(peer["pixel_auroc"]), abs=1e-6)
    assert found.pro == pytest.approx(float(peer["aupro"]), abs=1e-5)
