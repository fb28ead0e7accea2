"""One preference training as a folder: what is to be trained, its checkpoints, and the adapter when it is whole.

task.json            all that decides the adapter; another task begins anew
preferences.jsonl    the pairs
checkpoint-N/        of the trainer; one without the file `whole` is what a kill left of it
adapter/             the result, there only when it is complete
failure.json         why a training in processes of its own ended
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from edgead.runtime.errors import EdgeadError, InputError, StorageError, storage_errors
from edgead.runtime.files import sync_folder, write_file
from edgead.server_side.hub import digest_of
from edgead.server_side.kka.config import Prefer
from edgead.server_side.kka.records import Preference, decode_record, encode_record
from edgead.server_side.kka.seams import Tuned

ADAPTER = "adapter"
FACTS = "training.json"
"""Beside the adapter's weights: steps, loss and margin of every step."""
PROGRESS = "preferences"
"""What lines of progress begin with."""
WHOLE = "whole"
_TASK, _PAIRS, _FAILURE = "task.json", "preferences.jsonl", "failure.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


class Task(Struct, frozen=True, forbid_unknown_fields=True):
    """What decides an adapter."""

    model: str
    """Folder or hub name, as in the configuration."""
    model_digest: str
    settings: Prefer
    reference: str
    before: str
    """Folder of the adapter that is trained on, or empty."""
    before_digest: str
    preferences: str
    """SHA-256 of the pairs' records."""
    seed: int
    processes: int
    versions: dict[str, str]


class Facts(Struct, frozen=True):
    """How a training went: loss and mean reward margin of each step."""

    steps: int
    loss: list[float]
    margin: list[float]

    def tuned(self) -> Tuned:
        """The first and the last of them."""
        return Tuned(self.steps, (self.loss[0], self.loss[-1]), (self.margin[0], self.margin[-1]))


def begin(folder: Path, task: Task, preferences: Sequence[Preference]) -> None:
    """Make the folder of a task, or leave it as it is if that task was begun before.

    Raises:
        StorageError: the file system refused.
    """
    data = msgspec.json.format(msgspec.json.encode(task))
    with storage_errors(folder, "to begin a preference training"):
        if (folder / _TASK).exists() and (folder / _TASK).read_bytes() == data:
            (folder / _FAILURE).unlink(missing_ok=True)
            return
        if folder.exists():
            shutil.rmtree(folder)
    write_file(folder / _PAIRS, b"".join(encode_record(pair) for pair in preferences))
    write_file(folder / _TASK, data)


def read(folder: Path) -> tuple[Task, list[Preference]]:
    """The task of a folder and its pairs.

    Raises:
        InputError: no such folder, or one that was changed.
        StorageError: it cannot be read.
    """
    with storage_errors(folder, "to read a preference training"):
        data, lines = (folder / _TASK).read_bytes(), (folder / _PAIRS).read_bytes()
    try:
        task = msgspec.json.decode(data, type=Task)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise _changed(folder, str(error)) from error
    if hashlib.sha256(lines).hexdigest() != task.preferences:
        raise _changed(folder, "other preferences")
    return task, [decode_record(line, Preference, f"{folder / _PAIRS}") for line in lines.splitlines()]


def digest_of_pairs(preferences: Sequence[Preference]) -> str:
    """SHA-256 of the records of pairs."""
    return hashlib.sha256(b"".join(encode_record(pair) for pair in preferences)).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that train."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; others are removed.

    Raises:
        StorageError: the file system refused.
    """
    found: list[tuple[int, Path]] = []
    with storage_errors(folder, "to look for checkpoints"):
        for path in folder.glob("checkpoint-*"):
            if (path / WHOLE).is_file():
                found.append((_step_of(path), path))
            else:
                shutil.rmtree(path)
    return max(found)[1] if found else None


def mark_whole(checkpoint: Path) -> None:
    """Note that a checkpoint is complete, after all of it is on the disk.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(checkpoint, "to write a checkpoint"):
        for path in checkpoint.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(checkpoint)
    write_file(checkpoint / WHOLE, b"")


def remove_older(checkpoint: Path) -> None:
    """Remove the checkpoints before one that is complete.

    The trainer's own way goes by the times of files, and warns where they say too little.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(checkpoint.parent, "to remove older checkpoints"):
        for path in checkpoint.parent.glob("checkpoint-*"):
            if _step_of(path) < _step_of(checkpoint):
                shutil.rmtree(path)


def take_result(folder: Path, after: Path) -> Facts:
    """Give the finished adapter its name and remove everything else.

    Raises:
        InputError: its facts were changed.
        StorageError: the file system refused.
    """
    with storage_errors(after, "to keep an adapter"):
        data = (folder / ADAPTER / FACTS).read_bytes()
        try:
            facts = msgspec.json.decode(data, type=Facts)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise _changed(folder, str(error)) from error
        os.replace(folder / ADAPTER, after)
        sync_folder(after.parent)
    shutil.rmtree(folder, ignore_errors=True)
    return facts


def keep_failure(folder: Path, error: EdgeadError) -> None:
    """Leave an error for the process that waits for this one."""
    content = {name: getattr(error, name) for name in ("wanted", "got", "next_step")}
    with contextlib.suppress(StorageError):
        write_file(folder / _FAILURE, json.dumps({"kind": type(error).__name__, **content}).encode())


def kept_failure(folder: Path) -> dict[str, str] | None:
    """The error that a process left, as its kind and its three parts."""
    try:
        content = json.loads((folder / _FAILURE).read_bytes())
        return {name: str(content[name]) for name in ("kind", "wanted", "got", "next_step")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def before_digest(before: Path | None) -> str:
    """SHA-256 of the adapter before, or empty."""
    return "" if before is None else digest_of(before)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _changed(folder: Path, got: str) -> InputError:
    return InputError(
        wanted=f"the preference training that was begun in {folder}",
        got=got[:300],
        next_step="Remove the folder; the training begins anew.",
    )
