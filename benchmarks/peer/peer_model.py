"""The peer's PatchCore (anomalib) with given weights and a given bank. Runs in the peer's environment only."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.models import Patchcore
from safetensors.torch import load_file, save_file

LAYERS = ("layer2", "layer3")
VERSIONS = ("anomalib", "torch", "torchmetrics", "timm", "openvino", "onnxruntime")


def versions() -> dict[str, str]:
    """Installed versions of what the peer's answers rest on."""
    return {name: metadata.version(name) for name in VERSIONS}


def write_resnet18(path: Path, seed: int) -> None:
    """A ResNet-18 with seeded random weights, its batch norms away from the identity, as safetensors."""
    torch.manual_seed(seed)
    network = timm.create_model("resnet18", pretrained=False)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.1)
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    save_file(network.state_dict(), path)


def patchcore(weights: Path, bank: Any = None, neighbours: int = 1, post_processor: bool = False) -> Patchcore:
    """The peer's model in evaluation mode; `bank` is float32 [N, D]."""
    model = Patchcore(
        backbone="resnet18",
        layers=LAYERS,
        pre_trained=False,
        num_neighbors=neighbours,
        post_processor=post_processor,
        evaluator=False,
        visualizer=False,
    )
    network = model.model.feature_extractor.feature_extractor
    state = load_file(weights)
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    if bank is not None:
        model.model.memory_bank = torch.from_numpy(np.ascontiguousarray(bank, np.float32))
    return model.eval()


def efficientad(weights: Path, quantiles: Any) -> Any:
    """The peer's EfficientAD small in evaluation mode, its weights from safetensors: nothing is downloaded.

    Args:
        weights: named as in the peer's model; its teacher is standardised already.
        quantiles: (q_a, q_b) of the local and of the global map.
    """
    from anomalib.models import EfficientAd

    model = EfficientAd(model_size="small", post_processor=False, evaluator=False, visualizer=False)
    state = load_file(weights)
    missing, unexpected = model.model.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith(("mean_std", "quantiles")) for name in missing):
        raise ValueError(f"weights that do not fit: {unexpected}, {missing}")
    for kind, (first, second) in zip(("st", "ae"), quantiles, strict=True):
        model.model.quantiles[f"qa_{kind}"].data.fill_(first)
        model.model.quantiles[f"qb_{kind}"].data.fill_(second)
    return model.eval()


def embed(model: Patchcore, images: Any) -> torch.Tensor:
    """Patch embeddings [G, P, D] of uint8 RGB [G, H, W, 3], through the peer's own preprocessing."""
    inner = model.model
    embeddings = []
    with torch.inference_mode():
        for image in images:
            pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255.0
            features = inner.feature_extractor(model.pre_processor.transform(pixels))
            features = {layer: inner.feature_pooler(feature) for layer, feature in features.items()}
            embeddings.append(inner.reshape_embedding(inner.generate_embedding(features))[None])
    return torch.cat(embeddings)


def answer(model: Patchcore, embedding: torch.Tensor, neighbours: int) -> dict[str, Any]:
    """Patch scores [G, P], nearest rows [G, P] and image scores [G] of embeddings [G, P, D]."""
    inner = model.model
    inner.num_neighbors = neighbours
    images, patches, dimensions = embedding.shape
    with torch.inference_mode():
        flat = embedding.reshape(-1, dimensions)
        scores, nearest = inner.nearest_neighbors(flat, n_neighbors=1)
        scores, nearest = scores.reshape(images, patches), nearest.reshape(images, patches)
        score = inner.compute_anomaly_score(scores, nearest, flat)
    return {"patch_score": scores.numpy(), "nearest": nearest.numpy(), "score": score.numpy()}
