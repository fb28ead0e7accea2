"""APRIL-GAN's projections: one linear layer for each compared layer of the image tower, into the joint space.

The class token of CLIP's tower is trained to live beside sentences, its patch tokens are not: these layers bring
them there (Chen et al., "APRIL-GAN", https://arxiv.org/abs/2305.17382). The losses that they are trained by are
here too; `edgead.server_side.detectors.projection_training` trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgead.runtime.errors import BackboneError
from edgead.server_side.detectors.text_heads import unit
from edgead.server_side.tensor_files import ForeignFileError, read_checkpoint, read_tensors, write_tensors

TEMPERATURE = 0.01
"""Of every softmax over classes: the authors multiply cosines by 100."""
COMPARED = 4
"""Layers that are compared where nobody chooses them, as many as in the paper."""
SMOOTH = 1e-5
"""Of the focal loss: how far a label is from certainty."""
FOCUS = 2.0
"""The focal loss's gamma."""
SCHEMA = "1"
_KIND = "projections"
_AUTHORS = "trainable_linearlayer"
"""What the authors' checkpoints (`.pth`) call the layers."""


class Projections(nn.Module):
    """Patch tokens of tapped layers -> unit vectors of the joint space.

    Args:
        layers: of the tower, counted from 1, in the order of the linear layers.
        widths: channels of each.
        dimensions: of the joint space.
    """

    def __init__(self, layers: Sequence[int], widths: Sequence[int], dimensions: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        # The name that the authors' checkpoints use.
        self.fc = nn.ModuleList([nn.Linear(width, dimensions) for width in widths])

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Per layer [B, P_l, D_l] -> [B, P_l, E] at length 1."""
        return [unit(linear(layer)) for linear, layer in zip(self.fc, tokens, strict=True)]


def default_layers(depth: int) -> tuple[int, ...]:
    """The layers at each quarter of a tower, counted from 1: 3, 6, 9, 12 of 12 and 6, 12, 18, 24 of 24."""
    return tuple(sorted({max(1, round(depth * part / COMPARED)) for part in range(1, COMPARED + 1)}))


def new_projections(layers: Sequence[int], widths: Sequence[int], dimensions: int, seed: int = 0) -> Projections:
    """Untrained projections, decided by the seed; frozen, as everything that goes into a trunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Projections(layers, widths, dimensions).eval().requires_grad_(False)


def focal_loss(share: Tensor, mask: Tensor) -> Tensor:
    """The focal loss of Lin et al. (https://arxiv.org/abs/1708.02002) with smoothed labels, as the authors use it.

    With p the share given to the true class, p' = (1 - s) p + s (1 - p) + s: the mean of -(1 - p')^2 log p'.

    Args:
        share: float32 [B, H, W], softmax share of the anomalous class.
        mask: float32 [B, H, W], 1 where there is a defect, else 0.
    """
    true = torch.where(mask > 0.5, share, 1.0 - share)
    true = (1.0 - SMOOTH) * true + SMOOTH * (1.0 - true) + SMOOTH
    return -((1.0 - true).abs().pow(FOCUS) * true.log()).mean()


def dice_loss(share: Tensor, mask: Tensor) -> Tensor:
    """1 - mean over pictures of (2 sum(share * mask) + 1) / (sum(share) + sum(mask) + 1).

    Args:
        share, mask: as `focal_loss`.
    """
    share, mask = share.flatten(1), mask.flatten(1)
    overlap = 2.0 * (share * mask).sum(1) + 1.0
    return 1.0 - (overlap / (share.sum(1) + mask.sum(1) + 1.0)).mean()


def write_projections(
    path: Path, projections: Projections, *, model: str, weights: str, record: Mapping[str, Any] | None = None
) -> None:
    """Write trained projections as safetensors, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        projections: what to write.
        model: name of the vision-language model.
        weights: SHA-256 of its weights, 64 hex digits: the projections are of no use to another model.
        record: how they were trained, JSON-like.

    Raises:
        StorageError: the file system refused.
    """
    content = {"model": model, "weights": weights, "layers": list(projections.layers), "record": dict(record or {})}
    write_tensors(path, projections, _KIND, SCHEMA, content)


def read_projections(
    path: Path, *, layers: Sequence[int] | None, depth: int, widths: Sequence[int], dimensions: int, weights: str = ""
) -> tuple[Projections, dict[str, Any]]:
    """Read projections: our own file, or a checkpoint of the authors' code (`.pth`).

    Args:
        path: the file. The authors' kind is read as plain tensors only and does not say which layers it is of.
        layers: the tower's layers to compare; those that the file was trained for, or the default, if None.
        depth: number of the tower's layers.
        widths: channels of all the tower's layers; layer l is at l - 1.
        dimensions: of the joint space.
        weights: SHA-256 of the model's weights; a file that names others is refused. Empty leaves that out.

    Returns:
        the projections, frozen, and how they were trained as far as the file says.

    Raises:
        BackboneError: no such file, something else, another model's, or other layers or sizes than this tower's.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise BackboneError(
            wanted=f"trained projections at {path}",
            got="a folder" if path.is_dir() else "nothing there",
            next_step="Train them with: edgead projections --model MODEL -o FILE",
        )
    state: dict[str, Tensor]
    content: dict[str, Any] = {}
    try:
        if path.suffix in (".pth", ".pt"):
            state = read_checkpoint(path, _KIND, within=_AUTHORS)
        else:
            state, content = read_tensors(path, _KIND, SCHEMA)
    except ForeignFileError as error:
        raise BackboneError(
            wanted=f"trained projections in {path}: edgead's safetensors, or a checkpoint with '{_AUTHORS}'",
            got=f"something else ({error})",
            next_step="Train them with edgead, or fetch the file again.",
        ) from error
    if weights and content.get("weights", weights) != weights:
        raise BackboneError(
            wanted=f"projections for the model whose weights have the SHA-256 {weights[:12]}",
            got=f"those for {content.get('model')} with weights {str(content['weights'])[:12]} in {path}",
            next_step="Train them for this model, or name the model that they were trained for.",
        )
    trained = tuple(int(layer) for layer in content.get("layers", ()))
    chosen = tuple(layers) if layers else trained or default_layers(depth)
    if trained and chosen != trained:
        raise _unfit(path, f"the layers {_listed(chosen)}", f"for the layers {_listed(trained)}")
    if any(not 1 <= layer <= depth for layer in chosen):
        raise _unfit(path, f"layers 1 to {depth} of the image tower", f"for the layers {_listed(chosen)}")
    projections = Projections(chosen, [widths[layer - 1] for layer in chosen], dimensions)
    wanted = {name: list(tensor.shape) for name, tensor in projections.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = differing[0]
        raise _unfit(
            path,
            f"{len(chosen)} linear layers, {name} {wanted.get(name, 'not among them')}",
            f"{name} {found.get(name, 'missing')}",
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise _unfit(path, "finite numbers", "NaN or infinity")
    projections.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return projections.eval().requires_grad_(False), dict(content.get("record", {}))


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _unfit(path: Path, wanted: str, got: str) -> BackboneError:
    return BackboneError(
        wanted=f"projections with {wanted}",
        got=f"{got} in {path}",
        next_step="Name the model and the layers that they were trained for, or train them again.",
    )


__all__: Sequence[str] = (
    "TEMPERATURE",
    "Projections",
    "default_layers",
    "dice_loss",
    "focal_loss",
    "new_projections",
    "read_projections",
    "write_projections",
)
