"""A patch description network (PDN) that describes before it is trained.

Adam needs tens of thousands of steps to make one from random weights; a few hundred of them on a processor leave it
saying the same of everything. So the training starts from what two closed forms give in a minute:

- the filters of the first three convolutions are the principal components of the patches that reach them, whitened,
  and, as ReLU keeps half of each, their negatives (after PCANet: Chan et al., IEEE Transactions on Image Processing
  2015, arXiv 1404.3606). A student's are those of normals, so it does not see well what no normal has;
- the last convolution is the ridge regression of what is to be said on what the third gives. Where it is to say
  nothing, as on pictures that are no normals, the regression pulls it to 0 as the paper's penalty does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.runtime.progress import Progress
from edgead.server_side.detectors.efficientad_crops import (
    Place,
    crop_place,
    cropped,
    normalised,
    of_crop,
    place_around,
)
from edgead.server_side.detectors.efficientad_networks import PatchDescription
from edgead.server_side.detectors.training import batch_of, generator
from edgead.server_side.devices import device_of

CROPS = 160
"""Crops that a closed form looks at; where there are fewer frames, up to four of each."""
_TOGETHER = 8
"""Crops whose patches are multiplied in one product."""
_CELLS = 300
"""Patches of each crop."""
_WHITENED = 1e-2
"""Share of the mean variance of the components that is added to each, so that noise is not blown up to a signal."""
RIDGE = 0.1
"""Share of the mean square of the regressors that is added on the diagonal."""
PENALTY = 0.1
"""Weight of pictures that are no normals beside the normals; the paper's loss weighs them alike in 70,000 steps, and a
linear layer cannot obey it without forgetting normals (error on held-out magnetic tiles 0.24 without, 0.32 with 0.1,
0.51 with 1)."""


@dataclass(frozen=True)
class Example:
    """What a network is to say of a crop.

    Attributes:
        crop: uint8 [1, H, W, 3].
        said: float32 [C, cells(H), cells(W)]; None for 0 everywhere.
        where: bool [cells(H), cells(W)], the cells that count; all if None.
        weight: of each of them.
    """

    crop: NDArray[np.uint8]
    said: Tensor | None
    where: Tensor | None = None
    weight: float = 1.0


def crops_of(frames: NDArray[np.uint8], seed: int, count: int = CROPS) -> list[tuple[int, Place]]:
    """Frames and places of random crops; no frame comes a second time before all have come.

    Args:
        frames: uint8 [N, H, W, 3], possibly none.
        seed: decides.
        count: of the crops, at most four of a frame.
    """
    if not len(frames):
        return []
    drawn = generator(seed, 0)
    chosen = batch_of(len(frames), min(count, 4 * len(frames)), seed, 0)
    return [(frame, crop_place(frames.shape[1:3], drawn)) for frame in chosen.tolist()]


def component_filters(network: PatchDescription, frames: NDArray[np.uint8], seed: int = 0, label: str = "") -> None:
    """Make the first three convolutions principal components of what reaches them, and their negatives.

    Args:
        network: changed in place, where it is.
        frames: uint8 [N, H, W, 3], one at least.
        seed: of crops and patches, and of the mixtures that fill a layer with more filters than components.
        label: for the progress line.
    """
    drawn = generator(seed, 1)
    layers = (network.first, network.second, network.third)
    crops = crops_of(frames, seed)
    with torch.no_grad(), Progress(f"{label}filters", len(crops) * len(layers)) as progress:
        for depth, layer in enumerate(layers):
            count, shift = 0, torch.zeros(())
            total = squares = torch.zeros((), dtype=torch.float64)
            for at in range(0, len(crops), _TOGETHER):
                some = crops[at : at + _TOGETHER]
                pixels = np.concatenate([cropped(frames[frame : frame + 1], place) for frame, place in some])
                patches = _patches(_hidden(network, pixels, depth), layer.kernel_size[0]).cpu()
                found = torch.cat([each[_some(len(each), drawn)] for each in patches])
                # Away from their mean, squares in float32 would drown what differs between patches of an even part.
                shift = found.mean(0) if count == 0 else shift
                found = found - shift
                count += len(found)
                total = total + found.sum(0).double()
                squares = squares + (found.T @ found).double()
                progress.advance(len(some))
            mean = total / count
            filters = _filters(squares / count - torch.outer(mean, mean), layer.out_channels, drawn)
            assert layer.bias is not None
            layer.weight.copy_(filters.reshape(layer.weight.shape))
            layer.bias.copy_(-(filters @ (mean.float() + shift)))


def read_out(
    network: PatchDescription, examples: Iterable[Example], channels: int, seed: int = 0, label: str = ""
) -> None:
    """Make the last convolution the ridge regression of what is to be said; outputs from `channels` on say 0.

    Args:
        network: changed in place, where it is; the other convolutions stay.
        examples: one at least that says something.
        channels: that are said.
        seed: of the cells.
        label: for the progress line.
    """
    layer = network.last
    inputs = layer.weight[0].numel() + 1
    drawn = generator(seed, 2)
    gram, against, count = torch.zeros(inputs, inputs), torch.zeros(inputs, channels), 0.0
    rows: list[Tensor] = []
    wanted: list[Tensor] = []

    def add() -> None:
        # Some at a time: each product goes through a matrix of 67 MB.
        if rows:
            together = torch.cat(rows)
            gram.addmm_(together.T, together)
            against.addmm_(together.T, torch.cat(wanted))
        rows.clear()
        wanted.clear()

    with torch.no_grad(), Progress(f"{label}last layer") as progress:
        for example in examples:
            patches = _patches(_hidden(network, example.crop, 3), layer.kernel_size[0])[0].cpu()
            said = torch.zeros(len(patches), channels) if example.said is None else example.said.flatten(1).T.cpu()
            if example.where is not None:
                counted = example.where.flatten().cpu()
                patches, said = patches[counted], said[counted]
            chosen, root = _some(len(patches), drawn), example.weight**0.5
            rows.append(torch.cat([patches[chosen], torch.ones(len(chosen), 1)], 1) * root)
            wanted.append(said[chosen] * root)
            count += example.weight * len(chosen)
            if len(rows) == _TOGETHER:
                add()
            progress.advance()
        add()
        matrix = gram.double() / count
        # The constant is not shrunk, but for what keeps the matrix invertible.
        matrix.diagonal()[:-1] += RIDGE * matrix.diagonal()[:-1].mean()
        matrix.diagonal()[-1] += 1e-9
        solved = torch.cholesky_solve(against.double() / count, torch.linalg.cholesky(matrix)).T
        assert layer.bias is not None
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:channels].copy_(solved[:, :-1].reshape(channels, *layer.weight.shape[1:]))
        layer.bias[:channels].copy_(solved[:, -1])


def normal_examples(
    frames: NDArray[np.uint8], said: Callable[[NDArray[np.uint8], Place], Tensor], seed: int
) -> Iterator[Example]:
    """Crops of frames and what is to be said of them.

    Args:
        frames: uint8 [N, H, W, 3].
        said: (frame [1, H, W, 3], place of the crop) -> float32 [C, h, w].
        seed: of the crops.
    """
    for frame, place in crops_of(frames, seed):
        whole = frames[frame : frame + 1]
        yield Example(cropped(whole, place), said(whole, place))


def foreign_examples(
    generic: NDArray[np.uint8], anomalies: NDArray[np.uint8], marked: Tensor, seed: int
) -> Iterator[Example]:
    """Crops of pictures of which nothing is to be said: anything but the part, and anomalies where they are marked.

    Args:
        generic: uint8 [G, H, W, 3], possibly none.
        anomalies: uint8 [M, H, W, 3], possibly none.
        marked: bool [M, h, w], cells of the anomalies, one at least in each, as `place_around` wants it.
        seed: of crops.
    """
    for frame, place in crops_of(generic, seed, CROPS // 2):
        yield Example(cropped(generic[frame : frame + 1], place), None, weight=PENALTY)
    drawn = generator(seed, 3)
    for number in batch_of(max(len(anomalies), 1), min(CROPS, len(anomalies)), seed, 1).tolist():
        place = place_around(marked[number], anomalies.shape[1:3], drawn)
        yield Example(cropped(anomalies[number : number + 1], place), None, of_crop(marked[number], place), PENALTY)


def _hidden(network: PatchDescription, crop: NDArray[np.uint8], depth: int) -> Tensor:
    """What reaches a convolution: 0 the first, 3 the last."""
    hidden = normalised(crop).to(device_of(network))
    for layer, pooled in ((network.first, True), (network.second, True), (network.third, False))[:depth]:
        hidden = F.relu(layer(hidden))
        hidden = F.avg_pool2d(hidden, 2) if pooled else hidden
    return hidden


def _patches(hidden: Tensor, side: int) -> Tensor:
    """[B, C, h, w] -> rows for the places of a kernel, [B, n, C side side], in the order of a convolution's weights."""
    return F.unfold(hidden, side).transpose(1, 2)


def _some(count: int, drawn: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=drawn)[:_CELLS]


def _filters(covariance: Tensor, outputs: int, drawn: torch.Generator) -> Tensor:
    """Whitening filters float32 [outputs, n] of a covariance float64 [n, n]: components, negatives, mixtures."""
    extent = len(covariance)
    half = min(outputs // 2, extent)
    # torch computes all components, at three times the cost.
    values, vectors = scipy.linalg.eigh(covariance.numpy(), subset_by_index=(extent - half, extent - 1))
    largest = torch.from_numpy(values[::-1].copy()).clamp_min(0.0)
    # A picture of one colour has no variance at all.
    scale = (largest + _WHITENED * largest.mean()).sqrt().clamp_min(1e-6)
    white = (torch.from_numpy(vectors[:, ::-1].copy()) / scale).T
    mixed = torch.randn(outputs - 2 * half, half, generator=drawn, dtype=white.dtype)
    mixed = F.normalize(mixed, dim=1)
    return torch.cat([white, -white, mixed @ white]).float()


__all__ = [
    "CROPS",
    "PENALTY",
    "RIDGE",
    "Example",
    "component_filters",
    "crops_of",
    "foreign_examples",
    "normal_examples",
    "read_out",
]
