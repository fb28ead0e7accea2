"""Frames as vectors: the mean of a backbone's maps over the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.kka.alone import each_alone
from edgead.server_side.kka.seams import Frame


class BackboneEmbedder:
    """Global features of a backbone: each map averaged over the frame, all maps side by side.

    Args:
        name: see `edgead.server_side.backbones.load_backbone`; a worker of a cluster loads it by that name.
        size: side of the frame that the backbone sees, in pixels, a multiple of 32.

    Raises:
        BackboneError: an unknown backbone.
    """

    def __init__(self, name: str = "embedded", size: int = 256) -> None:
        self.name = name
        self._backbone = load_backbone(name).eval()
        self._preprocessing = Preprocessing(size, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return BackboneEmbedder, (self.name, self._preprocessing.width)

    def embed(self, frames: Sequence[Frame]) -> NDArray[np.float32]:
        """float32 [N, D] of N frames uint8 RGB [H, W, 3] of any size."""
        return np.stack(each_alone(self._vector, frames)).astype(np.float32)

    def _vector(self, frame: Frame) -> NDArray[np.float32]:
        # One at a time: a frame's vector must not depend on which others come with it.
        pixels = torch.from_numpy(np.ascontiguousarray(prepare(frame, self._preprocessing)))
        with torch.inference_mode():
            maps = self._backbone(pixels.permute(0, 3, 1, 2).float() / 255.0)
            found: NDArray[np.float32] = torch.cat([each.mean((2, 3)) for each in maps], dim=1)[0].numpy()
        return found


__all__ = ["BackboneEmbedder"]
