"""Training of APRIL-GAN's projections (https://arxiv.org/abs/2305.17382, section 3.1).

The tower is frozen. Per layer the projected patches are compared with the mean features of normal and anomalous
prompts of the picture's class, the two similarities are brought to the frame's size, and the softmax over them is held
against the mask by focal and dice loss; the losses of all layers are added. Adam, as the authors' code sets it. That
is the paper's; what named types of defects add to it (`edgead.server_side.detectors.projection_types`) is ours.

Every random choice of epoch n depends on (seed, n) alone: an interrupted run, continued, ends in the same weights as
one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.files import write_file
from edgead.runtime.progress import Progress
from edgead.server_side.detectors.auxiliary import Auxiliary
from edgead.server_side.detectors.projection_types import NamedTypes
from edgead.server_side.detectors.projections import (
    TEMPERATURE,
    Projections,
    dice_loss,
    focal_loss,
    new_projections,
)
from edgead.server_side.vision_language.tower import TowerOutput, VisionTower

CACHE_BYTES = 2 * 2**30
"""Patch tokens of all pictures are kept in memory up to this size; beyond it the tower runs in every epoch."""
_ENCODED = 8
"""Pictures that the tower sees at once."""
_SPLIT, _ORDER, _WRONG, _HELD_WRONG = 1, 2, 3, 4


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the authors' settings, but for the held-out part and the named types.

    Attributes:
        epochs: passes over the pictures, at most.
        batch: pictures per step.
        learning_rate: Adam's.
        held_out: share of the pictures on which no step is made; the weights with the lowest loss there are kept.
        patience: epochs without a lower loss there after which the run ends.
        seed: decides start, split, order and wrong sentences.
        named: weight of the losses under sentences that name the type of a defect, beside the paper's losses, whose
            weight is 1. 0 is the authors' own recipe: sentences say good or damaged, and no more.
    """

    epochs: int = 15
    batch: int = 8
    learning_rate: float = 1e-3
    held_out: float = 0.2
    patience: int = 3
    seed: int = 0
    named: float = 0.3


def train_projections(
    tower: VisionTower,
    auxiliary: Auxiliary,
    text: NDArray[np.float32],
    options: TrainingOptions | None = None,
    *,
    layers: Sequence[int],
    types: NDArray[np.float32] | None = None,
    weights: str = "",
    checkpoint: Path | None = None,
    device: str | None = None,
) -> tuple[Projections, dict[str, Any]]:
    """Train projections on pictures with masks.

    Args:
        tower: frozen.
        auxiliary: the pictures, of the tower's size.
        text: float32 [C, 2, E], unit mean features of the normal and the anomalous prompts of each class.
        options: see `TrainingOptions`.
        layers: of the tower, counted from 1.
        types: float32 [N, E], unit mean features of the sentences that name each of `auxiliary.types`; without them
            no types are taught.
        weights: SHA-256 of the model's weights: a checkpoint of another model is refused.
        checkpoint: where the run is kept between epochs; continued from if it is there.
        device: a torch device; a GPU if there is one by default.

    Returns:
        the projections, frozen, on the CPU, and what the card says of the training.

    Raises:
        InputError: fewer than 2 pictures, text or types of another shape, or masks without an anomalous pixel.
        BackboneError: a checkpoint of another run, or a layer that the tower does not have.
        StorageError: the checkpoint cannot be written.
    """
    options = options or TrainingOptions()
    run = _Training(tower, auxiliary, text, types, options, tuple(layers), weights, checkpoint, device)
    home = next(tower.parameters()).device
    try:
        run.go()
    finally:
        tower.to(home)
    return run.best_projections(), run.record()


class _Training:
    """One run: pictures, projections, optimizer, epoch."""

    def __init__(
        self,
        tower: VisionTower,
        auxiliary: Auxiliary,
        text: NDArray[np.float32],
        types: NDArray[np.float32] | None,
        options: TrainingOptions,
        layers: tuple[int, ...],
        weights: str,
        checkpoint: Path | None,
        device: str | None,
    ) -> None:
        tower.check((), layers)
        if auxiliary.count < 2:
            raise InputError(
                wanted="at least 2 pictures with masks to train projections on",
                got=f"{auxiliary.count}",
                next_step="Name a larger auxiliary set.",
            )
        if text.shape != (len(auxiliary.classes), 2, tower.embed_dim):
            raise InputError(
                wanted=f"text features [{len(auxiliary.classes)}, 2, {tower.embed_dim}] of the auxiliary classes",
                got=str(list(text.shape)),
            )
        self.tower, self.auxiliary, self.options, self.layers = tower, auxiliary, options, layers
        self.checkpoint = checkpoint
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.text = torch.from_numpy(np.ascontiguousarray(text, np.float32)).to(self.device)
        taught = options.named > 0 and types is not None and len(types) > 0
        self.named = NamedTypes(auxiliary.types, types, text) if taught and types is not None else None
        order = np.random.default_rng([options.seed, _SPLIT]).permutation(auxiliary.count)
        held = min(max(1, round(options.held_out * auxiliary.count)), auxiliary.count - 1)
        self.held, self.taught = np.sort(order[:held]), np.sort(order[held:])
        widths = [tower.layer_widths[layer - 1] for layer in layers]
        self.projections = new_projections(layers, widths, tower.embed_dim, options.seed)
        self.projections.to(self.device).train().requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.projections.parameters(), lr=options.learning_rate, betas=(0.5, 0.999))
        self.identity = {
            "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in ("epochs", "patience")},
            "auxiliary": auxiliary.name,
            "layers": list(layers),
            "weights": weights,
            "text": hashlib.sha256(np.ascontiguousarray(text, np.float32).tobytes()).hexdigest(),
            "types": [] if self.named is None else [list(kind) for kind in auxiliary.types],
        }
        self.epoch = 0
        self.history: list[list[float]] = []
        self.best = self._state()
        self._resume()

    def go(self) -> None:
        """Train to the end."""
        if self._over():
            return
        self.tower.to(self.device)
        self._read_pictures()
        with Progress("training projections", self.options.epochs) as progress:
            progress.advance(self.epoch)
            while not self._over():
                taught = self._pass(self._shuffled(), self._wrong(_WRONG, self.epoch), learn=True)
                with torch.no_grad():
                    # The same wrong sentences in every epoch: its losses are compared.
                    held = self._pass(self.held, self._wrong(_HELD_WRONG), learn=False)
                if not np.isfinite(held):
                    raise InputError(
                        wanted="a training whose loss stays finite",
                        got=f"{held} in epoch {self.epoch + 1}",
                        next_step="Choose a smaller learning rate.",
                    )
                if held < min((row[1] for row in self.history), default=np.inf):
                    self.best = self._state()
                self.history.append([taught, held])
                self.epoch += 1
                self._write_checkpoint()
                progress.advance(note=f"loss {taught:.3f}, held out {held:.3f}")

    def best_projections(self) -> Projections:
        """Those of the epoch with the lowest held-out loss."""
        widths = [linear.in_features for linear in self.projections.fc if isinstance(linear, torch.nn.Linear)]
        made = Projections(self.layers, widths, self.tower.embed_dim)
        made.load_state_dict(self.best)
        return made.eval().requires_grad_(False)

    def record(self) -> dict[str, Any]:
        """What the card says."""
        held = [row[1] for row in self.history]
        return {
            "auxiliary": self.auxiliary.name,
            "pictures": self.auxiliary.count,
            "held_out": len(self.held),
            "epochs": self.epoch,
            "best_epoch": int(np.argmin(held)) + 1 if held else 0,
            "named_types": [] if self.named is None else sorted({word for _, word in self.auxiliary.types}),
            "loss": [[round(value, 5) for value in row] for row in self.history],
            "options": dataclasses.asdict(self.options),
        }

    def _over(self) -> bool:
        held = [row[1] for row in self.history]
        stale = len(held) - 1 - int(np.argmin(held)) if held else 0
        return self.epoch >= self.options.epochs or stale >= self.options.patience

    def _shuffled(self) -> NDArray[np.int64]:
        return np.random.default_rng([self.options.seed, _ORDER, self.epoch]).permutation(self.taught)

    def _wrong(self, *purpose: int) -> Tensor:
        """A type for each picture that it does not show, -1 for none; decided by the seed and the purpose."""
        if self.named is None:
            return torch.full_like(self.shown, -1)
        rng = np.random.default_rng([self.options.seed, *purpose])
        return torch.from_numpy(self.named.drawn(self.shown.numpy(), rng))

    def _read_pictures(self) -> None:
        """Masks, classes and types of all pictures, and their tokens if those have room."""
        tower, count = self.tower, self.auxiliary.count
        numbers = sum(
            tower.layer_grids[layer - 1][0] * tower.layer_grids[layer - 1][1] * tower.layer_widths[layer - 1]
            for layer in self.layers
        )
        kept: list[tuple[Tensor, ...]] = []
        masks, places = np.zeros((count, *tower.size), np.bool_), np.zeros(count, np.int64)
        shown = np.full(count, -1, np.int64)
        keep = 4 * numbers * count <= CACHE_BYTES
        with Progress("reading auxiliary pictures", count) as progress:
            for start in range(0, count, _ENCODED):
                indices = range(start, min(start + _ENCODED, count))
                pictures = [self.auxiliary.read(index) for index in indices]
                for index, picture in zip(indices, pictures, strict=True):
                    if picture.frame.shape != (*tower.size, 3) or picture.mask.shape != tower.size:
                        raise InputError(
                            wanted=f"frames and masks of {tower.size[1]} x {tower.size[0]} pixels to train on",
                            got=f"{list(picture.frame.shape)} and {list(picture.mask.shape)}",
                        )
                    masks[index], places[index], shown[index] = picture.mask, picture.place, picture.shown
                if keep:
                    kept.append(self._encode([picture.frame for picture in pictures]))
                progress.advance(len(pictures))
        if not masks.any():
            raise InputError(
                wanted=f"masks with at least one anomalous pixel in the auxiliary set ({self.auxiliary.name})",
                got="none",
                next_step="Add pictures of defects and masks of where they are.",
            )
        self.masks, self.places = torch.from_numpy(masks), torch.from_numpy(places)
        self.shown = torch.from_numpy(shown)
        self.tokens = [torch.cat(layer) for layer in zip(*kept, strict=True)] if keep else None

    def _encode(self, frames: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found: TowerOutput = self.tower(torch.from_numpy(np.stack(frames)).to(self.device), taps=self.layers)
        return found.layers

    def _pass(self, order: NDArray[np.int64], wrong: Tensor, *, learn: bool) -> float:
        """Mean loss over pictures, under these wrong sentences [count]; with `learn`, a step for each batch."""
        total = 0.0
        for start in range(0, len(order), self.options.batch):
            picks = torch.from_numpy(order[start : start + self.options.batch])
            loss = self._loss(picks, wrong[picks])
            if learn:
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            total += float(loss.detach()) * len(picks)
        return total / len(order)

    def _loss(self, picks: Tensor, wrong: Tensor) -> Tensor:
        if self.tokens is not None:
            tokens: Sequence[Tensor] = [layer[picks.to(layer.device)] for layer in self.tokens]
        else:
            tokens = self._encode([self.auxiliary.read(int(pick)).frame for pick in picks])
        grids = [self.tower.layer_grids[layer - 1] for layer in self.layers]
        mask = self.masks[picks].to(self.device, torch.float32)
        projected = self.projections(tokens)
        shares = anomalous_shares(projected, self.text[self.places[picks].to(self.device)], grids, self.tower.size)
        loss = torch.stack([focal_loss(share, mask) + dice_loss(share, mask) for share in shares]).sum()
        if self.named is None:
            return loss
        shown = self.shown[picks].to(self.device)
        return loss + self.options.named * self.named.loss(projected, grids, mask, shown, wrong.to(self.device))

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.projections.state_dict().items()}

    def _write_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "identity": self.identity,
                "epoch": self.epoch,
                "history": self.history,
                "projections": self._state(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
            },
            buffer,
        )
        write_file(self.checkpoint, buffer.getvalue())

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        try:
            found = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            same = found["identity"] == self.identity
            self.projections.load_state_dict(found["projections"] if same else self._state())
            self.optimizer.load_state_dict(found["optimizer"] if same else self.optimizer.state_dict())
        except Exception as error:  # torch's reader raises whatever its unpickler does
            raise BackboneError(
                wanted=f"a checkpoint of a training of projections at {self.checkpoint}",
                got="a file that does not load",
                next_step="Delete it, or name another file.",
            ) from error
        if not same:
            raise BackboneError(
                wanted=f"a checkpoint of this model, these pictures and these options at {self.checkpoint}",
                got="one of another run",
                next_step="Delete it, or name another file.",
            )
        self.epoch, self.history = int(found["epoch"]), found["history"]
        self.best = {name: tensor.cpu() for name, tensor in found["best"].items()}


def anomalous_shares(
    projected: Sequence[Tensor], text: Tensor, grids: Sequence[tuple[int, int]], size: tuple[int, int]
) -> list[Tensor]:
    """Per layer the softmax share of the anomalous class in every pixel, [B, H, W].

    Similarities are brought to the frame's size before the softmax, with aligned corners, as the authors train.

    Args:
        projected: per layer float32 [B, P_l, E] at length 1.
        text: float32 [B, 2, E], normal and anomalous features of each picture's class.
        grids: rows and columns of each layer's patches.
        size: height and width of the frame in pixels.
    """
    shares = []
    for layer, grid in zip(projected, grids, strict=True):
        likeness = (layer @ text.transpose(1, 2)).transpose(1, 2).reshape(-1, 2, *grid) / TEMPERATURE
        pixels = F.interpolate(likeness, size=size, mode="bilinear", align_corners=True)
        # Of two classes the softmax is the logistic function of their difference.
        shares.append(torch.sigmoid(pixels[:, 1] - pixels[:, 0]))
    return shares


__all__: Sequence[str] = ("TrainingOptions", "anomalous_shares", "train_projections")
