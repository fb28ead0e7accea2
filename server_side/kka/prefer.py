"""Direct preference optimisation of the author with LoRA: `trl`'s `DPOTrainer` on hard against easy captions.

The loss is equation (7) of Rafailov et al. 2023 (arXiv 2305.18290), beta and LoRA as KKA's authors published them:

    L = -log sigmoid(beta * [log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected)])

The adapter is carried from round to round: the first round makes one, and each later round trains the one before on.
The reference of a round is the author as that round found it: the bare model in the first, the model with the adapter
before in later ones (a frozen copy of it, which `trl` makes). So the loss of every first step is log 2, as long as
nothing is dropped out. `reference="base"` measures every round against the bare model instead.

Training works in a folder beside the adapter (`adapter.training`) with checkpoints, and goes on from the newest whole
one after a kill. On a CPU the adapter has the same bytes then; on a GPU, as far as its kernels repeat themselves.

With several GPUs it starts itself through `accelerate`, one process for each, and only the first one writes. So
`edgead kka prefer` is not to be started with `accelerate launch`: the lock of the work folder lets one process in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from edgead.runtime import errors
from edgead.runtime.errors import EdgeadError, FailureError, InputError
from edgead.runtime.files import refuse_existing
from edgead.server_side.hub import digest_of
from edgead.server_side.kka.causal import imported, source_of
from edgead.server_side.kka.config import Prefer
from edgead.server_side.kka.preference_task import (
    ADAPTER,
    PROGRESS,
    Task,
    before_digest,
    begin,
    digest_of_pairs,
    kept_failure,
    take_result,
    versions,
)
from edgead.server_side.kka.records import Preference
from edgead.server_side.kka.seams import Tuned

_TRAINING = "edgead.server_side.kka.preference_training"
_LAST_WORDS = 2000
_GRACE_S = 30.0
"""Seconds that processes are given to end theirs."""


class DpoTuner:
    """Teaches a causal model of `transformers` what to prefer. See the module.

    Args:
        model: folder or hub name of the author's model.
        settings: of the training.
        reference: what the reference of later rounds is: the adapter before, or the bare model.
        processes: that train together, a divisor of `settings.accumulate`, since together they take its batches of a
            step; None for as many as there are GPUs for.

    Raises:
        InputError: a number of processes that cannot share the batches of a step.
        MissingDependencyError: a package is missing.
    """

    def __init__(
        self,
        model: str,
        settings: Prefer,
        *,
        reference: Literal["before", "base"] = "before",
        processes: int | None = None,
    ) -> None:
        (torch, *_) = imported("torch", "transformers", "peft", "datasets", "accelerate", "trl")
        self._model, self._settings, self._reference = model, settings, reference
        self._gpus = int(torch.cuda.device_count())
        shared = [count for count in range(1, settings.accumulate + 1) if settings.accumulate % count == 0]
        if processes is not None and processes not in shared:
            raise InputError(
                wanted=f"processes that share prefer.accumulate = {settings.accumulate} batches: one of {shared}",
                got=f"{processes}",
                next_step="Take another number of them, or of batches.",
            )
        self._processes = processes or max(count for count in shared if count <= max(1, self._gpus))

    def tune(self, preferences: Sequence[Preference], before: Path | None, after: Path, *, seed: int) -> Tuned:
        """Train an adapter, or go on with a training that was interrupted. See `Tuner`.

        Raises:
            InputError: no preferences; a model or an adapter that cannot be loaded; layers that it has not.
            OutputExistsError: there is something at `after`.
            OutOfMemoryError: memory does not suffice.
            LanguageModelError: the training failed, or came to numbers that are none.
            StorageError: the file system refused.
        """
        if not preferences:
            raise InputError(
                wanted="pairs of a chosen and a rejected caption",
                got="none",
                next_step="A round with hard and with easy captions gives them.",
            )
        if before is not None and not before.is_dir():
            raise InputError(
                wanted=f"the adapter of the round before at {before}", got="no folder", next_step="Restore it."
            )
        refuse_existing(after, force=False)
        folder = after.with_name(f"{after.name}.training")
        task = Task(
            self._model,
            digest_of(Path(source_of(self._model, "imagine.model")[0])),
            self._settings,
            self._reference,
            "" if before is None else str(before.resolve()),
            before_digest(before),
            digest_of_pairs(preferences),
            seed,
            self._processes,
            versions(),
        )
        begin(folder, task, preferences)
        if not (folder / ADAPTER).is_dir():
            if self._processes == 1 and self._gpus <= 1:
                from edgead.server_side.kka.preference_training import train

                train(folder)
            else:
                self._launch(folder)
        return take_result(folder, after).tuned()

    def _launch(self, folder: Path) -> None:
        """Train in processes of their own, on GPUs as `accelerate` starts them.

        Without GPUs `accelerate` would start one process however many are asked for, unless there is MPI; what it uses
        for GPUs starts them then, and they talk over gloo.
        """
        environment = dict(os.environ)
        if self._gpus:
            command = [
                *("accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"),
                *("--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", str(self._processes)),
                *("--gpu_ids", ",".join(map(str, range(self._processes)))),
                *(["--multi_gpu"] if self._processes > 1 else []),
            ]
        else:
            command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self._processes)]
            environment["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-m", *command, "-m", _TRAINING, str(folder)]
        threads = str(max(1, (os.cpu_count() or 1) // self._processes))
        environment.setdefault("OMP_NUM_THREADS", threads)
        code, words = watched(command, environment)
        if code == 0 and (folder / ADAPTER).is_dir():
            return
        found = kept_failure(folder)
        if found is not None:
            kind = getattr(errors, found.pop("kind"), FailureError)
            raise (kind if isinstance(kind, type) and issubclass(kind, EdgeadError) else FailureError)(**found)
        raise FailureError(
            wanted=f"{self._processes} processes that train in {folder}",
            got=f"exit code {code}: {words}",
            next_step="Start again: the training goes on from its last checkpoint.",
        )


def watched(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run processes that train, and let their lines of progress through to standard error.

    With EDGEAD_DEBUG all that they say there goes through.

    Returns:
        Exit code, and the last of what else they said on standard error, as one line.
    """
    words: deque[str] = deque(maxlen=_LAST_WORDS)
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    )
    try:
        for line in child.stderr or ():
            progress = line.startswith(f"{PROGRESS}: ")
            if progress or os.environ.get("EDGEAD_DEBUG"):
                sys.stderr.write(line)
                sys.stderr.flush()
            if not progress:
                words.extend(line.split())
        return child.wait(), " ".join(words)[-_LAST_WORDS:]
    finally:
        # Nobody would wait for it after an interruption. Killed at once it would leave the processes that it started.
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stderr is not None:
            child.stderr.close()


__all__ = ["DpoTuner", "watched"]
