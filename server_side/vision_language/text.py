"""Sentences -> rows of the joint space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.progress import Progress
from edgead.server_side.vision_language.models import VisionLanguageModel

_SMALLEST_NORM = 1e-12


def encode_texts(
    model: VisionLanguageModel, texts: Sequence[str], *, batch: int = 64, progress: bool = True
) -> NDArray[np.float32]:
    """Embed sentences; the same sentence gives the same row in any batch of the same size.

    Args:
        model: whose text tower is used, on a GPU if there is one.
        texts: T sentences; beyond the tower's context length a sentence is cut.
        batch: sentences per step.
        progress: whether to show how far it has come.

    Returns:
        float32 [T, E], rows L2-normalised.

    Raises:
        InputError: an empty sentence, or a batch below 1.
        BackboneError: the tokenizer is not reachable, or the weights give rows that are not finite.
    """
    return np.concatenate(
        [np.empty((0, embed_dim(model)), np.float32), *encoded_batches(model, texts, batch, progress)]
    )


def encoded_batches(
    model: VisionLanguageModel, texts: Sequence[str], batch: int, progress: bool
) -> Iterator[NDArray[np.float32]]:
    """The rows of `encode_texts`, batch by batch.

    Every batch is filled to `batch` sentences, so that a row depends on its sentence alone and not on how many
    others were left to encode: matrix libraries choose other kernels for other sizes.
    """
    if batch < 1:
        raise InputError(wanted="at least 1 sentence per batch", got=f"{batch}", next_step="Leave the batch out.")
    for index, text in enumerate(texts):
        if not text.strip():
            raise InputError(
                wanted="sentences with words", got=f"an empty one (number {index})", next_step="Remove it."
            )
    module: Any = model.module
    home = next(module.parameters()).device
    device = torch.device("cuda") if torch.cuda.is_available() else home
    module.to(device)
    try:
        with Progress("encoding sentences", len(texts)) as shown:
            for start in range(0, len(texts), batch):
                part = list(texts[start : start + batch])
                tokens = model.tokenizer(part + [part[0]] * (batch - len(part)))
                with torch.inference_mode():
                    rows = module.encode_text(tokens.to(device))[: len(part)].float().cpu()
                norms = rows.norm(dim=1, keepdim=True)
                if not bool(torch.isfinite(rows).all()) or bool((norms < _SMALLEST_NORM).any()):
                    raise BackboneError(
                        wanted=f"finite text embeddings from '{model.name}'",
                        got="NaN, infinity or zero",
                        next_step="Check the weights.",
                    )
                yield (rows / norms).numpy().astype(np.float32)
                if progress:
                    shown.advance(len(part))
    finally:
        module.to(home)


def embed_dim(model: VisionLanguageModel) -> int:
    """E of the joint space."""
    module: Any = model.module
    projection = getattr(module, "text_projection", None)
    if projection is None:
        projection = getattr(module.text, "text_projection", None)
    if isinstance(projection, torch.nn.Linear):
        return projection.out_features
    if isinstance(projection, torch.Tensor):
        return int(projection.shape[1])
    return int(getattr(module.text, "output_dim", 0)) or int(module.visual.output_dim)
