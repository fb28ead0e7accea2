"""The peer's WinCLIP (anomalib) on given weights and images. Runs in the peer's environment only.

    python winclip_reference.py REQUEST.npz CONFIG.json WEIGHTS.safetensors ANSWER.npz

The peer builds one named model and fetches its weights; here its two constants name a model of the given open_clip
config without weights, and the state dict is loaded from the file. The request holds `images` and `shots`, uint8 RGB
[G, H, W, 3] of the model's size, `mean`, `std` and `class_name`.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from anomalib.models.image.winclip import torch_model
from anomalib.models.image.winclip.prompting import create_prompt_ensemble
from anomalib.models.image.winclip.utils import class_scores, harmonic_aggregation, visual_association_score
from open_clip.tokenizer import tokenize
from safetensors.torch import load_file

VERSIONS = ("anomalib", "torch", "open_clip_torch")


def main(request: Path, config: Path, weights: Path, result: Path) -> None:
    asked = np.load(request)
    open_clip.add_model_config(config)
    torch_model.BACKBONE, torch_model.PRETRAINED = config.stem, None
    model = torch_model.WinClipModel().eval()
    model.clip.load_state_dict(load_file(weights), strict=True)
    pixels = {name: _pixels(asked, name) for name in ("images", "shots")}
    normal, anomalous = create_prompt_ensemble(str(asked["class_name"]))
    with torch.inference_mode():
        prompts = torch.cat([model.clip.encode_text(tokenize(texts)) for texts in (normal, anomalous)])
        model.setup(class_name=str(asked["class_name"]))
        zero_shot = model(pixels["images"])
        _, windows, _ = model.encode_image(pixels["images"])
        model.setup(reference_images=pixels["shots"])
        few_shot = model(pixels["images"])
        answer: dict[str, Any] = {
            "text": np.array([*normal, *anomalous]),
            "state": np.repeat([0.0, 1.0], [len(normal), len(anomalous)]).astype(np.float32),
            "prompts": prompts.numpy(),
            "classes": model.text_embeddings.numpy(),
            "bank_patches": model.patch_embeddings.flatten(0, 1).numpy(),
        }
        for scale, embeddings, bank, masks in zip(
            model.scales, windows, model.visual_embeddings, model.masks, strict=True
        ):
            text_scores = class_scores(embeddings, model.text_embeddings, model.temperature, target_class=1)
            association = visual_association_score(embeddings, bank)
            answer |= {
                f"windows_{scale}": embeddings.numpy(),
                f"bank_{scale}": bank.flatten(0, 1).numpy(),
                f"text_map_{scale}": harmonic_aggregation(text_scores, model.grid_size, masks).numpy(),
                f"reference_map_{scale}": harmonic_aggregation(association, model.grid_size, masks).numpy(),
            }
        for name, found in (("zero", zero_shot), ("few", few_shot)):
            answer |= {f"{name}_score": found.pred_score.numpy(), f"{name}_map": found.anomaly_map.numpy()}
    about = {"versions": {name: metadata.version(name) for name in VERSIONS}}
    np.savez_compressed(result, about=np.array(json.dumps(about, sort_keys=True)), **answer)
    print(", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS))


def _pixels(asked: Any, name: str) -> torch.Tensor:
    """float32 [G, 3, H, W], normalised."""
    frames = torch.from_numpy(asked[name]).permute(0, 3, 1, 2).float() / 255.0
    mean, std = (torch.from_numpy(asked[part]).float().view(1, 3, 1, 1) for part in ("mean", "std"))
    return (frames - mean) / std


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*(Path(argument) for argument in sys.argv[1:]))
