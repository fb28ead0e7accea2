"""The peer's answers on given images, or on small seeded data. Runs in the peer's environment only.

    python patchcore_reference.py compare REQUEST.npz ANSWER.npz WEIGHTS.safetensors
    python patchcore_reference.py record SEED FILE.npz

`compare` takes `images` and `normals` uint8 [G, H, W, 3], `rows` and `seed`; writes random ResNet-18 weights for
our side, takes its bank from the normal images, and answers for one and for nine neighbours, in float32 as it
always does and (`exact_...`) the same code on the same rows in float64. `record` writes what the tests compare
with: feature maps, bank, the peer's answers, and its metrics on random scores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.metrics.aupr import _AUPR
from anomalib.metrics.aupro import _AUPRO
from anomalib.metrics.auroc import _AUROC
from anomalib.metrics.f1_score import _F1Max
from peer_model import answer, embed, patchcore, versions, write_resnet18
from torchmetrics.classification import BinaryAveragePrecision

NEIGHBOURS = (1, 9)


def compare(request: Path, result: Path, weights: Path) -> None:
    asked = np.load(request)
    write_resnet18(weights, int(asked["seed"]))
    model = patchcore(weights)
    rows = embed(model, asked["normals"]).reshape(-1, 384).numpy()
    chosen = np.random.default_rng(int(asked["seed"])).permutation(len(rows))[: int(asked["rows"])]
    bank = rows[np.sort(chosen)]
    model.model.memory_bank = torch.from_numpy(bank)
    embedding = embed(model, asked["images"])
    answers = _answers(model, embedding)
    model.model.memory_bank = torch.from_numpy(bank).double()
    exact = _answers(model, embedding.double())
    np.savez(
        result,
        bank=bank,
        embedding=embedding.numpy(),
        **answers,
        **{f"exact_{name}": value for name, value in exact.items()},
    )


def record(seed: int, file: Path) -> None:
    rng = np.random.default_rng(seed)
    fine = rng.standard_normal((2, 12, 8, 8), np.float32)
    coarse = rng.standard_normal((2, 20, 4, 4), np.float32)
    bank = rng.standard_normal((40, 32), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "resnet18.safetensors"
        write_resnet18(weights, seed)
        model = patchcore(weights, bank)
    inner = model.model
    maps = {"layer2": torch.from_numpy(fine), "layer3": torch.from_numpy(coarse)}
    embedding = inner.generate_embedding({name: inner.feature_pooler(value) for name, value in maps.items()})
    embedding = inner.reshape_embedding(embedding).reshape(2, 64, 32)
    about = {"versions": versions(), "seed": seed, "command": "python -m benchmarks parity --record FILE"}
    np.savez_compressed(
        file,
        about=np.array(json.dumps(about, sort_keys=True)),
        fine=fine,
        coarse=coarse,
        bank=bank,
        embedding=embedding.numpy(),
        **_answers(model, embedding),
        **_metrics(rng),
    )


def _answers(model: Any, embedding: torch.Tensor) -> dict[str, Any]:
    found = {neighbours: answer(model, embedding, neighbours) for neighbours in NEIGHBOURS}
    return {
        "patch_score": found[1]["patch_score"],
        "nearest": found[1]["nearest"],
        **{f"score_{neighbours}": found[neighbours]["score"] for neighbours in NEIGHBOURS},
    }


def _metrics(rng: np.random.Generator) -> dict[str, Any]:
    """Scores of images and pixels, some of them tied, and what the peer's metrics say of them."""
    labels = rng.random(60) < 0.4
    scores = np.clip(0.35 * labels + rng.random(60) * 0.6, 0, 1).astype(np.float32)
    scores[::7] = np.float32(0.5)
    masks = np.zeros((6, 24, 32), np.bool_)
    masks[0, 3:9, 4:12] = masks[0, 15:20, 20:22] = masks[1, 2:4, 2:30] = True
    masks[2, 10, 10] = masks[3, 0:6, 26:32] = True  # one single pixel, one at the border
    masks[4, 5:8, 5:8] = masks[4, 8:13, 8:13] = True  # two that touch at a corner
    maps = (rng.random(masks.shape) * 0.7 + 0.25 * masks).astype(np.float32)
    maps = np.round(maps, 2)
    image_scores, image_labels = torch.from_numpy(scores), torch.from_numpy(labels).int()
    pixel_scores, pixel_labels = torch.from_numpy(maps), torch.from_numpy(masks).int()
    return {
        "metric_scores": scores,
        "metric_labels": labels,
        "metric_maps": maps,
        "metric_masks": masks,
        "auroc": _of(_AUROC(), image_scores, image_labels),
        "average_precision": _of(BinaryAveragePrecision(), image_scores, image_labels),
        "aupr": _of(_AUPR(), image_scores, image_labels),
        "f1_max": _of(_F1Max(), image_scores, image_labels),
        "pixel_auroc": _of(_AUROC(), pixel_scores.flatten(), pixel_labels.flatten()),
        "aupro": _of(_AUPRO(), pixel_scores, pixel_labels),
    }


def _of(metric: Any, scores: torch.Tensor, labels: torch.Tensor) -> Any:
    metric.update(scores, labels)
    return np.float64(metric.compute().item())


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        compare(*(Path(argument) for argument in sys.argv[2:5]))
    else:
        record(int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(versions()))
