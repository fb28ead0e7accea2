"""The training loop: repeatable, stopped by what is held out, continued after an interruption as if there was none."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgead.runtime.errors import DetectorError, FailureError
from edgead.server_side.detectors.training import Schedule, batch_of, generator, train


class LineTask:
    """Fits a line to noisy points; validation losses may be given, and steps may be slow."""

    def __init__(
        self, *, seed: int = 0, validations: Sequence[float] = (), poison_at: int | None = None, pause: float = 0.0
    ) -> None:
        self.module = nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, -1)))
        self._points = torch.randn(20, 3, generator=generator(7, 0))
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=0.05)
        self.optimizers = [self._optimizer]
        self.identity: dict[str, Any] = {"seed": seed}
        self._seed, self._poison_at, self._pause = seed, poison_at, pause
        self._validations = list(validations)
        self.weights: list[list[float]] = []

    def _loss(self, places: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        points = self._points[places] + noise
        return (self.module(points)[:, 0] - points.sum(1)).square().mean()

    def step(self, number: int) -> dict[str, float]:
        time.sleep(self._pause)
        noise = torch.randn(6, 3, generator=generator(self._seed, number)) * 0.1
        loss = self._loss(batch_of(20, 6, self._seed, number), noise)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": math.nan if number == self._poison_at else float(loss.detach())}

    def validate(self) -> float:
        assert not self.module.training
        self.weights.append(self.module.weight.flatten().tolist())
        return self._validations.pop(0) if self._validations else float(self._loss(torch.arange(20), torch.zeros(3)))


def weights_of(task: LineTask) -> list[float]:
    found: list[float] = task.module.weight.detach().flatten().tolist()
    return found


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    tasks = [LineTask(seed=seed) for seed in (1, 1, 2)]
    for task in tasks:
        assert train(task, Schedule(30, validate_every=10), label="line").stopped == "end"
    assert weights_of(tasks[0]) == weights_of(tasks[1]) != weights_of(tasks[2])


def test_every_item_comes_once_before_any_comes_again_and_in_another_order_each_time() -> None:
    drawn = torch.cat([batch_of(10, 4, 3, step) for step in range(10)]).reshape(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in drawn)
    assert len({tuple(epoch.tolist()) for epoch in drawn}) == 4
    assert batch_of(3, 8, 0, 0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert batch_of(10, 4, 3, 7).tolist() == drawn.flatten()[28:32].tolist()


def test_training_ends_when_patience_does_and_the_best_weights_are_kept() -> None:
    task = LineTask(validations=[5.0, 3.0, 2.9999, 4.0, 3.5, 1.0])
    history = train(task, Schedule(100, validate_every=2, patience=3), label="line")
    assert (history.stopped, history.steps, history.best_step, history.best) == ("patience", 10, 4, 3.0)
    assert weights_of(task) == task.weights[1] != task.weights[-1]
    assert not task.module.training
    assert [step for step, _ in history.validations] == [2, 4, 6, 8, 10]
    assert history.facts()["kept_step"] == 4


def test_without_patience_training_goes_on_to_its_end() -> None:
    task = LineTask(validations=[1.0] + [2.0] * 9)
    history = train(task, Schedule(20, validate_every=2, patience=0), label="line")
    assert (history.stopped, history.steps, history.best_step) == ("end", 20, 2)


def test_the_last_step_is_validated_whatever_the_interval() -> None:
    history = train(LineTask(), Schedule(7, validate_every=5), label="line")
    assert [step for step, _ in history.validations] == [5, 7]


def test_losses_that_are_no_numbers_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="at step 3"):
        train(LineTask(poison_at=3), Schedule(20), label="line", checkpoint=tmp_path / "x.training")
    with pytest.raises(FailureError, match="validation loss"):
        train(LineTask(validations=[math.nan]), Schedule(20, validate_every=5), label="line")


INTERRUPTED = """
import runpy, sys, signal
from pathlib import Path
# As an interactive shell would have it.
signal.signal(signal.SIGINT, signal.default_int_handler)
LineTask = runpy.run_path(sys.argv[1])["LineTask"]
from edgead.server_side.detectors.training import Schedule, train
class Telling(LineTask):
    def step(self, number):
        if number == 13:
            print("at step 13", flush=True)
        return super().step(number)
try:
    train(Telling(seed=4, pause=0.02), Schedule(200, validate_every=10, patience=0), label="line",
          checkpoint=Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_training_goes_on_to_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = tmp_path / "line.training"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, __file__, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    steps = torch.load(checkpoint, weights_only=True)["history"]["steps"]
    assert 13 <= steps < 200
    schedule = Schedule(200, validate_every=10, patience=0)
    continued, whole = LineTask(seed=4), LineTask(seed=4)
    history = train(continued, schedule, label="line", checkpoint=checkpoint)
    expected = train(whole, schedule, label="line")
    assert weights_of(continued) == weights_of(whole)
    assert history.validations == expected.validations
    assert (history.best, history.best_step) == (expected.best, expected.best_step)
    assert history.seconds > 0.1


class StopsItself(LineTask):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, at: int, **more: Any) -> None:
        super().__init__(**more)
        self._at = at

    def step(self, number: int) -> dict[str, float]:
        if number == self._at:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


@pytest.mark.parametrize("at", [0, 9, 10, 24])
def test_a_step_is_finished_before_an_interruption_is_obeyed(at: int, tmp_path: Path) -> None:
    checkpoint, schedule = tmp_path / "x.training", Schedule(25, validate_every=10)
    with pytest.raises(KeyboardInterrupt):
        train(StopsItself(at), schedule, label="line", checkpoint=checkpoint)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    continued, whole = LineTask(), LineTask()
    train(continued, schedule, label="line", checkpoint=checkpoint)
    train(whole, schedule, label="line")
    assert weights_of(continued) == weights_of(whole)


def test_a_checkpoint_of_another_training_or_of_nothing_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.training"
    with pytest.raises(KeyboardInterrupt):
        train(StopsItself(3), Schedule(10), label="line", checkpoint=checkpoint)
    with pytest.raises(DetectorError, match="another training"):
        train(LineTask(seed=1), Schedule(10), label="line", checkpoint=checkpoint)
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(DetectorError, match="does not load"):
        train(LineTask(), Schedule(10), label="line", checkpoint=checkpoint)
