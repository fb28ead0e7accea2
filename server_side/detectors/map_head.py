"""What heads share whose map is their cells' values, upsampled and smoothed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgead.server_side.detectors.memory_bank import smoothing_matrix


class MapHead(nn.Module):
    """Base of heads with such a map.

    Args:
        grid: rows and columns of cells.
        size: height and width of the engine's frame, in pixels.
        sigma: standard deviation in pixels of the map's Gaussian blur.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], sigma: float = 4.0) -> None:
        super().__init__()
        self.up_rows: Tensor
        self.up_columns: Tensor
        self.grid = grid
        self.register_buffer("up_rows", torch.from_numpy(smoothing_matrix(grid[0], size[0], sigma)))
        columns = torch.from_numpy(smoothing_matrix(grid[1], size[1], sigma))
        self.register_buffer("up_columns", columns.T.contiguous())

    def upsampled(self, cells: Tensor) -> Tensor:
        """Args: cells: float32 [B, P], row by row. Returns: float32 [B, H, W]."""
        return self.up_rows @ cells.reshape(-1, *self.grid) @ self.up_columns


__all__ = ["MapHead"]
