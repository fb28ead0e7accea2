"""What a backbone is: an image in, feature maps out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from edgead.runtime.errors import BackboneError


class Backbone(nn.Module):
    """A frozen feature network with its own normalisation inside.

    Attributes:
        name: what `load_backbone` was asked for.
        strides: pixels per cell of each map, finest first.
        channels: channels of each map.
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of an image.

        Args:
            image: [B, 3, H, W] float RGB in 0..1; H and W divisible by 32.

        Returns:
            [B, channels[i], H / strides[i], W / strides[i]] for each map i.
        """
        raise NotImplementedError


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors: safetensors, or a `.pth`/`.pt`/`.bin` file of plain tensors (never pickled code).

    A dictionary wrapped as `state_dict` or `model` is unwrapped. Floats become float32.

    Raises:
        BackboneError: no such file, or one that holds something else.
    """
    if not path.is_file():
        raise BackboneError(
            wanted=f"backbone weights at {path}",
            got="no such file",
            next_step="Check the path given as --backbone-weights.",
        )
    try:
        if path.suffix in (".pth", ".pt", ".bin", ".tar"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            for wrapper in ("state_dict", "model"):
                if isinstance(state.get(wrapper), dict):
                    state = state[wrapper]
        else:
            state = load_file(path)
        return {
            str(name): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        }
    except Exception as error:  # torch.load raises pickle's own classes for anything but plain tensors
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BackboneError(
        wanted=f"named tensors in {path} (safetensors, or .pth without pickled code)",
        got=f"a file that does not load: {reason}",
        next_step="Save the weights as safetensors.",
    )


def weights_mismatch(name: str, path: Path, reason: str) -> BackboneError:
    """The error for weights of another network."""
    return BackboneError(
        wanted=f"weights of '{name}' in {path}",
        got=f"a file that does not fit: {reason}",
        next_step="Name the backbone that these weights belong to, or other weights.",
    )
