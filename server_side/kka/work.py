"""The work folder of a run: plain files that say what was made, and never half a record.

    kka.toml             the configuration as it was given
    run.json             what the run is; a folder of another run is refused
    normals.jsonl, representatives.jsonl, costs.jsonl
    round-N/             captions.jsonl, images.jsonl, judgements.jsonl, preferences.jsonl, set.jsonl; images/, masks/;
                         evaluator-K.safetensors and .json of each fold; adapter/; metrics.json, auroc.json
    round-N/STAGE.done   the stage is complete; those of the whole run are noted in round-0
    lock                 held by the process that works here
    report.html

A line is written and synced before anything rests on it. What a kill or a full disk leaves of a last line is cut off at
the next start, and that item is made again, with the same bytes. One process works in a folder at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgead.runtime.disk import RealDisk
from edgead.runtime.errors import InputError, OutputExistsError, StorageError, storage_errors
from edgead.runtime.files import sync_folder, write_file
from edgead.server_side.kka.config import CONFIG_BYTES, Config, parse_config
from edgead.server_side.kka.records import (
    AnyRecord,
    Caption,
    Cost,
    Image,
    Judgement,
    Normal,
    Record,
    Representative,
    decode_record,
    encode_record,
)

SCHEMA = 1
_TOML = "kka.toml"
_RUN = "run.json"
_LOCK = "lock"
_OF_THE_RUN = (Normal, Representative, Cost)
_PART = ".*.part"
"""What `edgead.runtime.files` leaves of a file when it is killed."""


class WorkFolder:
    """The files of one run. See the module.

    Args:
        path: the folder, which `create` made.

    Raises:
        InputError: no work folder, or one that a newer version made.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads((path / _RUN).read_bytes())
            self.config = parse_config(self._read(_TOML), str(path / _TOML))
            schema, self.normals = int(content["schema"]), Path(content["normals"])
            digests = (content["config"], content.get("before", ""))
        except FileNotFoundError as error:
            raise InputError(
                wanted=f"the work folder of a run at {path}",
                got=f"a folder without {Path(error.filename or _RUN).name}" if path.is_dir() else "nothing there",
                next_step="Begin one with: edgead kka run CONFIG",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                wanted=f"the work folder of a run at {path}",
                got=str(error)[:300] or type(error).__name__,
                next_step="Begin one with: edgead kka run CONFIG",
            ) from error
        if schema > SCHEMA:
            raise InputError(
                wanted=f"a work folder of schema {SCHEMA}", got=f"schema {schema}", next_step="Update edgead."
            )
        self._digest = hashlib.sha256(self._read(_TOML)).hexdigest()
        if self._digest not in digests:
            raise InputError(
                wanted=f"the configuration that {path} was begun with",
                got=f"another {_TOML}",
                next_step="Put the old one back, or begin in another folder: a run that changes in the middle of "
                "it is neither the one nor the other.",
            )

    @classmethod
    def create(cls, path: Path, config: Config, toml: bytes) -> WorkFolder:
        """Begin a run, or go on with the one that is there, which may be given more rounds.

        Args:
            path: the folder; made if it is not there.
            config: checked, with absolute paths.
            toml: the file's bytes.

        Raises:
            OutputExistsError: the folder holds something else, or another run.
            StorageError: the file system refused.
        """
        if (path / _RUN).exists():
            work = cls(path)
            # Comments and spaces may change: they decide nothing.
            if work.config.digest == parse_config(toml).digest:
                # With paths that are right from here, wherever the run was begun.
                work.config, work.normals = config, Path(config.normals)
                return work
            longer = parse_config(toml).rounds > work.config.rounds
            more = longer and work._with_rounds(parse_config(toml).rounds) == parse_config(toml).digest
            if any(work._lines()) and not more:
                raise OutputExistsError(
                    wanted=f"a new folder, or the run that is in {path}",
                    got=f"another configuration than it was begun with: {_difference(work.config, parse_config(toml))}",
                    next_step="Name another folder with -o, or restore the configuration. Only `rounds` may be raised.",
                )
        elif path.exists() and any(name not in (_LOCK, _TOML) for name in _names(path)):
            raise OutputExistsError(
                wanted=f"an empty folder, or one of a run, at {path}",
                got=f"one with other files: {', '.join(_names(path)[:3])}",
                next_step="Name another folder with -o.",
            )
        with storage_errors(path, "to begin a run"):
            path.mkdir(parents=True, exist_ok=True)
        # What was made stays as it would have been made; nobody may be about to make something after the old words.
        with _lock(path):
            run = {"schema": SCHEMA, "config": hashlib.sha256(toml).hexdigest(), "normals": config.normals}
            if (path / _RUN).exists():
                # A kill between the two files leaves the old configuration or the new one.
                run["before"] = hashlib.sha256((path / _TOML).read_bytes()).hexdigest()
                write_file(path / _RUN, json.dumps(run, indent=1, sort_keys=True).encode() + b"\n")
                del run["before"]
            write_file(path / _TOML, toml)
            write_file(path / _RUN, json.dumps(run, indent=1, sort_keys=True).encode() + b"\n")
        work = cls(path)
        work.config = config
        return work

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out for the block, and cut off what an earlier one left half-written.

        Raises:
            StorageError: another process works here.
            InputError: another process has begun another run here meanwhile.
        """
        with _lock(self.path):
            if WorkFolder(self.path)._digest != self._digest:
                raise InputError(
                    wanted=f"the run that is in {self.path}",
                    got="another one that has taken its place",
                    next_step="Name another folder with -o.",
                )
            self._mend()
            yield

    def records(self, kind: type[AnyRecord], round_number: int = 0) -> list[AnyRecord]:
        """All records of a kind, in the order in which they were made; of one round, but for those of the whole run.

        Raises:
            InputError: a line that is none of them.
            StorageError: the file cannot be read.
        """
        path = self._file(kind, round_number)
        if not path.exists():
            return []
        with storage_errors(path, "to read records"):
            lines = path.read_bytes().split(b"\n")
        # Without a newline at its end a last line was not written to its end.
        return [decode_record(line, kind, f"{path}, line {at}") for at, line in enumerate(lines[:-1], 1)]

    def append(self, record: Record, round_number: int = 0) -> None:
        """Add a record; it is on the disk when this returns. See `append_all`."""
        self.append_all([record], round_number)

    def append_all(self, records: Sequence[Record], round_number: int = 0) -> None:
        """Add records of one kind; they are on the disk when this returns.

        Raises:
            StorageError: the file system refused; the file is then as it was.
        """
        if not records:
            return
        path = self._file(type(records[0]), round_number)
        data = b"".join(encode_record(record) for record in records)
        with storage_errors(path, "to add records"):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with open(path, "ab", buffering=0) as stream:
                size = stream.tell()
                try:
                    if stream.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(stream.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        stream.truncate(size)
                    raise
            if new:
                sync_folder(path.parent)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the folder, whole or not at all.

        Raises:
            StorageError: the file system refused.
        """
        write_file(self.path / name, data)
        return self.path / name

    def round_folder(self, round_number: int) -> Path:
        """Folder of a round."""
        return self.path / f"round-{round_number}"

    def is_done(self, stage: str, round_number: int = 0) -> bool:
        """Whether a stage is complete."""
        return self._mark(stage, round_number).exists()

    def set_done(self, stage: str, round_number: int = 0) -> None:
        """Note that a stage is complete.

        Raises:
            StorageError: the file system refused.
        """
        write_file(self._mark(stage, round_number), b"")

    @contextlib.contextmanager
    def timed(self, what: str, round_number: int, items: int) -> Iterator[None]:
        """Count what is no stage of its own towards the cost of a round, however it ends."""
        start = time.monotonic()
        try:
            yield
        finally:
            with contextlib.suppress(StorageError):
                self.append(Cost(what, round_number, items, round(time.monotonic() - start, 3)))

    @contextlib.contextmanager
    def stage(self, name: str, round_number: int = 0) -> Iterator[list[int]]:
        """Run a stage: count its cost however it ends, and note that it is complete if it does.

        Yields:
            a list to which the number of items that were made is appended.
        """
        start = time.monotonic()
        made: list[int] = []
        try:
            yield made
            self.set_done(name, round_number)
        finally:
            if sum(made):
                with contextlib.suppress(StorageError):
                    self.append(Cost(name, round_number, sum(made), round(time.monotonic() - start, 3)))

    def _file(self, kind: type[Record], round_number: int) -> Path:
        folder = self.path if kind in _OF_THE_RUN else self.round_folder(round_number)
        return folder / f"{kind.kind}.jsonl"

    def _mark(self, stage: str, round_number: int) -> Path:
        return self.round_folder(round_number) / f"{stage}.done"

    def _read(self, name: str) -> bytes:
        with open(self.path / name, "rb") as stream:
            return stream.read(CONFIG_BYTES + 1)

    def _with_rounds(self, rounds: int) -> str:
        """Digest of the configuration in the folder if it had so many rounds."""
        return msgspec.structs.replace(self.config, rounds=rounds).digest

    def _lines(self) -> Iterator[Path]:
        """Files of records."""
        yield from self.path.glob("*.jsonl")
        yield from self.path.glob("round-*/*.jsonl")

    def _mend(self) -> None:
        """Cut off last lines that were not written to their end, and remove files that were not."""
        for part in [*self.path.glob(f"round-*/{_PART}"), *self.path.glob(f"round-*/*/{_PART}")]:
            with storage_errors(part, "to remove half a file"):
                if part.is_file():
                    part.unlink(missing_ok=True)
        for path in self._lines():
            with storage_errors(path, "to mend a file of records"), open(path, "r+b") as stream:
                data = stream.read()
                whole = data.rfind(b"\n") + 1
                if whole != len(data):
                    stream.truncate(whole)
                    os.fsync(stream.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    disk = RealDisk()
    with storage_errors(path, "to lock the work folder"):
        lock = disk.try_lock(path / _LOCK)
    if lock is None:
        raise StorageError(
            wanted=f"to work in {path}",
            got="another process that does",
            next_step="Wait for it, or end it; nothing that it made is lost.",
        )
    try:
        yield
    finally:
        disk.unlock(lock)


def _names(path: Path) -> list[str]:
    """What is in a folder but for what a kill left of a file."""
    with storage_errors(path, "to look into a folder"):
        return sorted(name for name in os.listdir(path) if not fnmatch.fnmatchcase(name, _PART))


def _difference(old: Config, new: Config) -> str:
    """The first fields in which two configurations differ."""
    before, after = _fields(msgspec.to_builtins(old)), _fields(msgspec.to_builtins(new))
    found = [f"{name} was {before[name]!r}, is {after[name]!r}" for name in before if before[name] != after[name]]
    return "; ".join(found[:3])[:300]


def _fields(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def trace(work: WorkFolder, image: str) -> list[Record]:
    """Where an image comes from: image, judgement if there is one, caption, representative, normal.

    Args:
        work: the run.
        image: id, as in the name of its file.

    Raises:
        InputError: no such image, or a record that names one that is not there.
    """
    found: list[Record] = []
    for number in range(work.config.rounds + 1):
        images = {item.id: item for item in work.records(Image, number)}
        if image not in images:
            continue
        found.append(images[image])
        found += [item for item in work.records(Judgement, number) if item.parent == image]
        caption = _named(work.records(Caption, number), images[image].parent)
        representative = _named(work.records(Representative), caption.parent)
        return [*found, caption, representative, _named(work.records(Normal), representative.parent)]
    raise InputError(
        wanted=f"an image of the run in {work.path}", got=image[:100], next_step="Ids are in round-N/images.jsonl."
    )


def _named(records: list[AnyRecord], name: str) -> AnyRecord:
    for record in records:
        if getattr(record, "id", None) == name:
            return record
    raise InputError(
        wanted=f"a record named {name}", got="none", next_step="A file of the work folder was changed; restore it."
    )


__all__ = ["WorkFolder", "trace"]
