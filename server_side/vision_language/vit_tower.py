"""Vision transformers as a tower, written out in plain operators.

open_clip's own modules call fused attention, which engines' parsers do not take, and give no access to what lies
between the layers. Here the same weights run through matrix products, softmax and layer norms only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgead.server_side.vision_language.tower import TowerOutput, VisionTower


class Block(nn.Module):
    """A pre-norm residual attention block.

    Args:
        norm_1: before attention.
        qkv: D -> 3 D, queries, keys and values one after the other.
        out: attention's output projection.
        scale_1: of the attention branch (layer scale or nothing).
        norm_2: before the perceptron.
        mlp: the perceptron.
        scale_2: of its branch.
        heads: of the attention.
    """

    def __init__(
        self,
        norm_1: nn.Module,
        qkv: nn.Linear,
        out: nn.Linear,
        scale_1: nn.Module,
        norm_2: nn.Module,
        mlp: nn.Module,
        scale_2: nn.Module,
        heads: int,
    ) -> None:
        super().__init__()
        self.norm_1, self.qkv, self.out, self.scale_1 = norm_1, qkv, out, scale_1
        self.norm_2, self.mlp, self.scale_2 = norm_2, mlp, scale_2
        self.heads = heads
        self.factor = (qkv.in_features // heads) ** -0.5

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        return self._finish(tokens, self._attend(*self.qkv(self.norm_1(tokens)).chunk(3, dim=-1)))

    def first(self, tokens: Tensor) -> Tensor:
        """The first token of `forward` alone, [N, 1, D]: all that the last block owes a pooled class token."""
        width = self.qkv.in_features
        normed = self.norm_1(tokens)
        bias = self.qkv.bias
        query = nn.functional.linear(normed[:, :1], self.qkv.weight[:width], None if bias is None else bias[:width])
        both = nn.functional.linear(normed, self.qkv.weight[width:], None if bias is None else bias[width:])
        return self._finish(tokens[:, :1], self._attend(query, *both.chunk(2, dim=-1)))

    def value(self, tokens: Tensor) -> Tensor:
        """What each token would give if it attended to itself only, [N, L, D], without the residual."""
        width = self.qkv.in_features
        bias = self.qkv.bias
        normed = self.norm_1(tokens)
        value = nn.functional.linear(normed, self.qkv.weight[2 * width :], None if bias is None else bias[2 * width :])
        return torch.as_tensor(self.scale_1(self.out(value)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (self._split(part) for part in (query, key, value))
        weights = torch.softmax((query * self.factor) @ key.transpose(-2, -1), dim=-1)  # [N, heads, L, L]
        return (weights @ value).transpose(1, 2).flatten(-2)

    def _split(self, part: Tensor) -> Tensor:
        """[N, L, D] -> [N, heads, L, D / heads]."""
        return part.reshape(-1, part.shape[1], self.heads, part.shape[2] // self.heads).transpose(1, 2)

    def _finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.scale_1(self.out(attended))
        return torch.as_tensor(tokens + self.scale_2(self.mlp(self.norm_2(tokens))))


class Stem(nn.Module):
    """Pixels -> tokens of an open_clip transformer: patches, class token in front, positions, first norm."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patches = visual.conv1
        self.class_token = nn.Parameter(visual.class_embedding.detach().view(1, 1, -1), requires_grad=False)
        self.positions = nn.Parameter(visual.positional_embedding.detach().unsqueeze(0), requires_grad=False)
        self.norm = plain_norm(visual.ln_pre)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + P, D]."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return torch.as_tensor(self.norm(tokens + self.positions))


class VitTower(VisionTower):
    """A vision transformer.

    Windows are WinCLIP's (https://arxiv.org/abs/2303.14814): the tokens that enter the first block, of the window's
    patches and the class token, go through all blocks by themselves; all windows of a scale as one batch.

    Args:
        size, mean, deviation: as `VisionTower`.
        stem: pixels -> [B, C + P, D] tokens, with C = 1 class token in front or none.
        blocks: the layers.
        norm: over every token after the last block.
        pooled_norm: over the pooled token.
        projection: D -> E.
        grid: rows and columns of patches.
        embed_dim: E.
        class_token: whether there is one.
        mean_pool: pool the mean of the patches rather than the class token.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        deviation: Sequence[float],
        *,
        stem: nn.Module,
        blocks: Sequence[Block],
        norm: nn.Module,
        pooled_norm: nn.Module,
        projection: nn.Module,
        grid: tuple[int, int],
        embed_dim: int,
        class_token: bool = True,
        mean_pool: bool = False,
    ) -> None:
        super().__init__(size, mean, deviation)
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pooled_norm = pooled_norm
        self.projection = projection
        self.grid = grid
        self.embed_dim = embed_dim
        self.width = blocks[0].qkv.in_features
        self.depth = len(blocks)
        self.layer_grids = (grid,) * self.depth
        self.layer_widths = (self.width,) * self.depth
        self._prefix = int(class_token)
        self._mean_pool = mean_pool

    def encode(self, pixels: Tensor, windows: Sequence[int], taps: Sequence[int], values: bool) -> TowerOutput:
        """As `VisionTower.encode`."""
        start = self.stem(pixels)
        tokens = before_last = start
        layers: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, start=1):
            before_last, tokens = tokens, block(tokens)
            if number in taps:
                layers[number] = tokens[:, self._prefix :]
        normed = self.norm(tokens)
        return TowerOutput(
            pooled=self._joint(self._pool(normed)),
            patches=normed[:, self._prefix :],
            windows=tuple(self._windows(start, scale) for scale in windows),
            layers=tuple(layers[number] for number in taps),
            values=self._joint(self.norm(self._last().value(before_last[:, self._prefix :]))) if values else None,
        )

    def _windows(self, start: Tensor, scale: int) -> Tensor:
        """[B, C + P, D] -> [B, W, E]."""
        rows, columns = self.grid[0] - scale + 1, self.grid[1] - scale + 1
        patches = start[:, self._prefix :].reshape(-1, *self.grid, self.width)
        # Shifted slices rather than an index: no gather for the engines, and no index to keep.
        parts = [patches[:, y : y + rows, x : x + columns].flatten(1, 2) for y in range(scale) for x in range(scale)]
        if self._prefix:
            parts.insert(0, start[:, :1].expand(-1, rows * columns, -1))
        tokens = torch.stack(parts, dim=2).flatten(0, 1)  # [B * W, C + k * k, D]
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last = self._last()
        tokens = last(tokens) if self._mean_pool else last.first(tokens)
        return self._joint(self._pool(self.norm(tokens))).reshape(-1, rows * columns, self.embed_dim)

    def _last(self) -> Block:
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last

    def _pool(self, normed: Tensor) -> Tensor:
        return normed[:, self._prefix :].mean(dim=1) if self._mean_pool else normed[:, 0]

    def _joint(self, features: Tensor) -> Tensor:
        return torch.as_tensor(self.projection(self.pooled_norm(features)))


def plain_norm(norm: nn.Module) -> nn.Module:
    """A layer norm with the parameters of `norm` and nothing of its subclass; anything else as it is."""
    if not isinstance(norm, nn.LayerNorm):
        return norm
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    plain.weight, plain.bias = norm.weight, norm.bias
    return plain


def shared_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer over given [out, in] parameters, without a copy."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def open_clip_blocks(transformer: Any) -> list[Block]:
    """The blocks of an open_clip `Transformer` of default blocks."""
    return [
        Block(
            plain_norm(block.ln_1),
            shared_linear(block.attn.in_proj_weight, block.attn.in_proj_bias),
            shared_linear(block.attn.out_proj.weight, block.attn.out_proj.bias),
            block.ls_1,
            plain_norm(block.ln_2),
            block.mlp,
            block.ls_2,
            int(block.attn.num_heads),
        )
        for block in transformer.resblocks
    ]


def open_clip_vit(visual: Any, size: tuple[int, int], mean: Sequence[float], deviation: Sequence[float]) -> VitTower:
    """The tower of an open_clip `VisionTransformer` with default blocks and no attentional pool.

    Args:
        visual: the model's image tower.
        size, mean, deviation: as `VisionTower`.
    """
    last = plain_norm(visual.ln_post)
    after_pool = bool(visual.final_ln_after_pool)
    projection = nn.Identity() if visual.proj is None else shared_linear(visual.proj.T.contiguous(), None)
    return VitTower(
        size,
        mean,
        deviation,
        stem=Stem(visual),
        blocks=open_clip_blocks(visual.transformer),
        norm=nn.Identity() if after_pool else last,
        pooled_norm=last if after_pool else nn.Identity(),
        projection=projection,
        grid=tuple(visual.grid_size),
        embed_dim=visual.ln_post.normalized_shape[0] if visual.proj is None else visual.proj.shape[1],
        mean_pool=visual.pool_type == "avg",
    )
