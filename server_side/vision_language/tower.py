"""What an image tower gives a detector, whatever network it is: embeddings of the image, its windows and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgead.runtime.errors import BackboneError


class TowerOutput(NamedTuple):
    """Everything float32; B images, P patches (row-major on the grid), E the joint space, D the tower's width.

    Attributes:
        pooled: [B, E] embedding of the image in the joint space, not normalised.
        patches: [B, P, D] patch features as open_clip gives them out beside `pooled` (a transformer's tokens
            after its final norm), which WinCLIP compares with those of good parts.
        windows: per scale k, [B, W, E] embeddings in the joint space of all k x k patch windows at stride 1.
        layers: per tapped layer, [B, P_l, D_l] patch features.
        values: [B, P, E] the last layer's value features in the joint space, without attention between
            patches (MaskCLIP, https://arxiv.org/abs/2112.01071); None if not asked for.
    """

    pooled: Tensor
    patches: Tensor
    windows: tuple[Tensor, ...]
    layers: tuple[Tensor, ...]
    values: Tensor | None


class VisionTower(nn.Module):
    """Frames in, `TowerOutput` out, of operators that every engine has.

    Attributes:
        size: height and width of the frame in pixels.
        grid: rows and columns of patches.
        embed_dim: E of the joint space.
        width: D of `TowerOutput.patches`.
        depth: number of layers that can be tapped; they count from 1.
        layer_grids: rows and columns of each layer's patches; layer l is at l - 1.
        layer_widths: channels of each layer.
    """

    mean: Tensor
    deviation: Tensor

    size: tuple[int, int]
    grid: tuple[int, int]
    embed_dim: int
    width: int
    depth: int
    layer_grids: tuple[tuple[int, int], ...]
    layer_widths: tuple[int, ...]

    def __init__(self, size: tuple[int, int], mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(
        self, image: Tensor, *, windows: Sequence[int] = (), taps: Sequence[int] = (), values: bool = False
    ) -> TowerOutput:
        """Encode frames.

        Args:
            image: uint8 [B, H, W, 3] RGB of the tower's size.
            windows: scales k of the windows wanted.
            taps: layers wanted, 1 to `depth`, in any order.
            values: whether `TowerOutput.values` is wanted.

        Raises:
            BackboneError: a window larger than the grid, or a layer that is not there.
        """
        self.check(windows, taps)
        # The cast comes first: TensorRT moves no axes of uint8.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255.0
        return self.encode((pixels - self.mean) / self.deviation, windows, taps, values)

    def encode(self, pixels: Tensor, windows: Sequence[int], taps: Sequence[int], values: bool) -> TowerOutput:
        """As `forward`, from float32 [B, 3, H, W] pixels after mean and standard deviation."""
        raise NotImplementedError

    def check(self, windows: Sequence[int], taps: Sequence[int]) -> None:
        """Check scales and layers against this tower.

        Raises:
            BackboneError: a window larger than the grid, or a layer that is not there.
        """
        for scale in windows:
            if not 1 <= scale <= min(self.grid):
                raise BackboneError(
                    wanted=f"windows of 1 to {min(self.grid)} patches, by the tower's grid {self.grid}",
                    got=f"{scale}",
                    next_step="Choose smaller windows.",
                )
        for layer in taps:
            if not 1 <= layer <= self.depth:
                raise BackboneError(
                    wanted=f"layers 1 to {self.depth} of the image tower",
                    got=f"{layer}",
                    next_step="Choose layers that the model has.",
                )

    def window_count(self, scale: int) -> int:
        """Number of `scale` x `scale` windows."""
        return (self.grid[0] - scale + 1) * (self.grid[1] - scale + 1)


def window_patches(grid: tuple[int, int], scale: int) -> list[list[int]]:
    """The patches of every `scale` x `scale` window at stride 1.

    Args:
        grid: rows and columns of patches.
        scale: patches along a window's side.

    Returns:
        W lists of `scale` squared patch numbers; windows and patches row-major.
    """
    rows, columns = grid
    return [
        [(top + y) * columns + left + x for y in range(scale) for x in range(scale)]
        for top in range(rows - scale + 1)
        for left in range(columns - scale + 1)
    ]
