"""One loop for everything that is trained here: seeded, validated, stopped early, kept and continued.

Every random choice of step n depends on (seed, n) alone, so a run that was interrupted and continued ends with the
weights of one that was not, on the same machine and with the same number of threads. They are drawn on the CPU wherever
the module is; a checkpoint names no device, and a run can be continued on another one.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from edgead.runtime.errors import DetectorError, FailureError
from edgead.runtime.files import write_file
from edgead.runtime.progress import Progress
from edgead.server_side.devices import computing_on, device_of, on_cpu
from edgead.server_side.interruption import interruption

_KEEP_S = 30.0
"""Seconds between two checkpoints."""
_STEP_PRIME = 1_000_003


class Task(Protocol):
    """What is trained. All that has to be kept between interruptions is in `module` and `optimizers`."""

    @property
    def module(self) -> nn.Module:
        """Everything that changes, statistics included, as one module."""
        ...

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """Every optimizer; the loop sets no learning rate."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in: options, digests of the data; plain values."""
        ...

    def step(self, number: int) -> dict[str, float]:
        """Train one step and return its losses by name; random choices come from `generator(seed, number)`."""
        ...

    def validate(self) -> float:
        """The loss on what is held out, lower is better; leaves no trace in the module."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long to train.

    Attributes:
        steps: at most.
        validate_every: steps between validations.
        patience: validations without a better loss after which training ends; 0 for never.
        least_gain: share by which a loss has to be lower to be better.
        from_start: whether what training begins with may be what is kept.
    """

    steps: int
    validate_every: int = 100
    patience: int = 5
    least_gain: float = 1e-3
    from_start: bool = False


@dataclass
class History:
    """How a training went.

    Attributes:
        steps: that were made.
        best_step: whose weights were kept.
        best: the validation loss there.
        validations: (step, loss) of each.
        losses: (step, means of the losses since the validation before).
        stopped: 'end' or 'patience'.
        seconds: of all runs together.
    """

    steps: int = 0
    best_step: int = 0
    best: float = math.inf
    validations: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For the card of a detector."""
        return {
            "steps": self.steps,
            "kept_step": self.best_step,
            "validation_loss": self.best,
            "stopped": self.stopped,
            "seconds": round(self.seconds, 1),
        }


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, the same whatever was drawn before."""
    return torch.Generator().manual_seed((seed * 4 + 3) * _STEP_PRIME + step)


def batch_of(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices int64 [batch] of a step: every item once before any comes again, in an order that differs by epoch.

    Args:
        count: items, at least 1.
        batch: how many are wanted.
        seed: of the training.
        step: its number.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs, within = places // count, places % count
    found = torch.empty(batch, dtype=torch.int64)
    for epoch in sorted(set(epochs.tolist())):
        order = torch.randperm(count, generator=torch.Generator().manual_seed((seed * 4 + 1) * _STEP_PRIME + epoch))
        chosen = epochs == epoch
        found[chosen] = order[within[chosen]]
    return found


def train(task: Task, schedule: Schedule, *, label: str, checkpoint: Path | None = None) -> History:
    """Train, keep the weights of the best validation, and load them into the module at the end.

    Args:
        task: what, with its module where it is to be trained.
        schedule: how long.
        label: for the progress line.
        checkpoint: file that the run is kept in between interruptions; continued from if it is there. Whoever called
            removes it once the result is safe.

    Raises:
        DetectorError: a checkpoint of another run, or a file that is none.
        FailureError: the loss is no number any more.
        StorageError: the checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C; the checkpoint is written first.
    """
    history, best = _begin(task, checkpoint)
    started, kept = time.monotonic(), time.monotonic()
    before = history.seconds
    recent: list[dict[str, float]] = []
    with (
        computing_on(device_of(task.module)),
        interruption() as interrupted,
        Progress(label, schedule.steps) as progress,
    ):
        progress.advance(history.steps)
        if schedule.from_start and not history.validations:
            best = _validated(task, schedule, history, best, recent)
        while history.steps < schedule.steps and not history.stopped:
            task.module.train()
            losses = task.step(history.steps)
            if not all(math.isfinite(value) for value in losses.values()):
                raise FailureError(
                    wanted="losses that are numbers",
                    got=f"{losses} at step {history.steps}",
                    next_step="Use a smaller learning rate.",
                )
            recent.append(losses)
            history.steps += 1
            if history.steps % schedule.validate_every == 0 or history.steps == schedule.steps:
                best = _validated(task, schedule, history, best, recent)
                recent = []
            history.seconds = before + time.monotonic() - started
            progress.advance(note=", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
            if checkpoint is not None and (interrupted.is_set() or time.monotonic() - kept > _KEEP_S):
                _keep(task, history, best, checkpoint)
                kept = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    history.stopped = history.stopped or "end"
    if best is not None:
        task.module.load_state_dict(best)
    task.module.eval()
    return history


def _validated(
    task: Task, schedule: Schedule, history: History, best: dict[str, Any] | None, recent: list[dict[str, float]]
) -> dict[str, Any] | None:
    task.module.eval()
    with torch.no_grad():
        loss = float(task.validate())
    if not math.isfinite(loss):
        raise FailureError(
            wanted="a validation loss that is a number",
            got=f"{loss} at step {history.steps}",
            next_step="Use a smaller learning rate.",
        )
    means = {name: sum(each[name] for each in recent) / len(recent) for name in recent[0]} if recent else {}
    history.losses.append((history.steps, means))
    history.validations.append((history.steps, loss))
    margin = abs(history.best) * schedule.least_gain if math.isfinite(history.best) else 0.0
    if loss < history.best - margin:
        history.best, history.best_step = loss, history.steps
        return copy.deepcopy(task.module.state_dict())
    since = sum(step > history.best_step for step, _ in history.validations)
    if schedule.patience and since >= schedule.patience:
        history.stopped = "patience"
    return best


def _begin(task: Task, checkpoint: Path | None) -> tuple[History, dict[str, Any] | None]:
    if checkpoint is None or not checkpoint.is_file():
        return History(), None
    try:
        # A checkpoint is our own file, yet nothing in it is executed.
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        identity, state, history = found["identity"], found["module"], History(**found["history"])
    except Exception as error:  # torch.load raises pickle's own classes for anything but plain tensors
        raise DetectorError(
            wanted=f"a checkpoint of a training at {checkpoint}",
            got="a file that does not load",
            next_step="Delete it; training then begins anew.",
        ) from error
    if identity != task.identity:
        raise DetectorError(
            wanted=f"a checkpoint of these options and photographs at {checkpoint}",
            got="one of another training",
            next_step="Delete it, or name another output.",
        )
    task.module.load_state_dict(state)
    for optimizer, kept in zip(task.optimizers, found["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    history.validations = [(int(step), float(loss)) for step, loss in history.validations]
    return history, found["best"]


def _keep(task: Task, history: History, best: dict[str, Any] | None, checkpoint: Path) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "identity": task.identity,
            "module": on_cpu(task.module.state_dict()),
            "optimizers": [on_cpu(optimizer.state_dict()) for optimizer in task.optimizers],
            "history": vars(history),
            "best": on_cpu(best),
        },
        buffer,
    )
    write_file(checkpoint, buffer.getvalue())


__all__ = ["History", "Schedule", "Task", "batch_of", "generator", "train"]
