"""Text tables: the sentences of a prompt set as rows of a model's joint space, in one file.

A file is canonical safetensors with `text.table` float32 [T, E] (rows L2-normalised), `text.state` float32 [T]
(0 normal, 1 anomalous) and the note `text.table.text`, canonical JSON that says of each row which sentence it is and
who wrote it, and of the whole which model, weights and prompts made it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edgead.runtime.errors import InputError, KnowledgeError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.notes import encode_note
from edgead.runtime.spec import Digest, canonical_json
from edgead.runtime.tensors import decode_tensors, encode_tensors
from edgead.server_side.prompts import PromptSet

if TYPE_CHECKING:
    from edgead.server_side.vision_language.models import VisionLanguageModel

TABLE, STATE, NOTE = "text.table", "text.state", "text.table.text"
PART = ".part"
"""What the side file of an unfinished table is called by."""
BATCH = 64
"""Sentences per step. A constant, since the last bits of a row depend on it."""

_MARK = "edgead.text-table"
_PART_MARK = "edgead.text-table.part"
_FILE_BYTES = 2 * 2**30
_HEADER_BYTES = 2**20
_SAVE_INTERVAL = 2.0
"""Seconds of work that an interruption without warning may cost."""
_UNIT_TOLERANCE = 1e-3
_STATES = ("normal", "anomalous")


class Row(Struct, frozen=True, forbid_unknown_fields=True):
    """What one row of the table was made from."""

    text: str
    state: str
    author: str


class _Note(Struct, frozen=True, forbid_unknown_fields=True):
    rows: tuple[Row, ...]
    model: str
    weights: str
    weights_sha256: Digest
    prompts: Digest


@dataclass(frozen=True, eq=False)
class TextTable:
    """A checked text table.

    Attributes:
        table: float32 [T, E], rows L2-normalised.
        rows: T sentences with their state and author.
        model: name of the model.
        weights: what its weights were called: a tag, a file's name or 'random:SEED'.
        weights_sha256: hex SHA-256 of its weights, as `VisionLanguageModel.weights_sha256`.
        prompts: hex SHA-256 over sentences, states and authors.
    """

    table: NDArray[np.float32]
    rows: tuple[Row, ...]
    model: str
    weights: str
    weights_sha256: str
    prompts: str

    @property
    def state(self) -> NDArray[np.float32]:
        """float32 [T], 0 normal and 1 anomalous."""
        return np.array([_STATES.index(row.state) for row in self.rows], np.float32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The three arrays of the file, which are also those of a knowledge pack."""
        note = {name: getattr(self, name) for name in _Note.__struct_fields__}
        note["rows"] = [msgspec.to_builtins(row) for row in self.rows]
        return {TABLE: self.table, STATE: self.state, NOTE: encode_note(note)}


def make_table(
    model: VisionLanguageModel, prompts: PromptSet, *, part: Path | None = None, progress: bool = True
) -> TextTable:
    """Encode the sentences of a prompt set; those of added normalities are left out.

    Args:
        model: whose text tower encodes.
        prompts: the sentences.
        part: a side file that keeps encoded batches. One that an interrupted run of the same model, weights and
            sentences left is taken up, with the same bytes in the end. It stays until the caller has the table safe.
        progress: whether to show how far it has come.

    Raises:
        InputError: no sentences of one of the states, or `part` is a file of something else.
        BackboneError: the tokenizer is not reachable.
        StorageError: `part` cannot be written.
    """
    from edgead.server_side.vision_language.text import embed_dim, encoded_batches

    rows = tuple(Row(prompt.text, prompt.state, prompt.author) for prompt in prompts.class_prompts())
    for state in _STATES:
        if not any(row.state == state for row in rows):
            raise InputError(
                wanted=f"at least one sentence of the state '{state}'",
                got="none" if rows else "an empty prompt set",
                next_step="Add one: edgead prompts add FILE TEXT --state " + state,
            )
    digest = hashlib.sha256(canonical_json(rows)).hexdigest()
    key = _key(model.name, model.weights_sha256, digest)
    done = _taken_up(part, key, embed_dim(model), len(rows)) if part is not None else []
    start = sum(map(len, done))
    saved = -_SAVE_INTERVAL
    try:
        for batch in encoded_batches(model, [row.text for row in rows[start:]], BATCH, progress):
            done.append(batch)
            if part is not None and time.monotonic() - saved >= _SAVE_INTERVAL:
                _save(part, key, done)
                saved = time.monotonic()
    finally:
        if part is not None and done:
            _save(part, key, done)
    table = TextTable(np.concatenate(done), rows, model.name, model.weights, model.weights_sha256, digest)
    _check(table, "the encoded sentences")
    return table


def make_table_file(
    path: Path, model: VisionLanguageModel, prompts: PromptSet, *, force: bool = False, progress: bool = True
) -> TextTable:
    """Encode a prompt set into the file `path`, going on where an interrupted run for it stopped.

    Raises:
        OutputExistsError: `path` is there and `force` is false; see also `make_table` and `write_table`.
    """
    refuse_existing(path, force)
    part = path.with_name(path.name + PART)
    table = make_table(model, prompts, part=part, progress=progress)
    write_table(path, table, force=force)
    part.unlink(missing_ok=True)
    return table


def write_table(path: Path, table: TextTable, *, force: bool = False) -> None:
    """Write a text table: the same table is always the same bytes.

    Raises:
        KnowledgeError: the table does not hold together.
        OutputExistsError: `path` is there and `force` is false.
        StorageError: no permission, no space, or an I/O fault.
    """
    refuse_existing(path, force)
    _check(table, str(path))
    write_file(path, encode_tensors(table.arrays(), {_MARK: "1"}))


def read_table(path: Path) -> TextTable:
    """Read and check a text table.

    Raises:
        InputError: no such file.
        KnowledgeError: not a text table, damaged, of a newer edgead, or one that does not hold together.
        StorageError: the file cannot be read.
    """
    if not path.is_file():
        raise InputError(
            wanted=f"a text table at {path}",
            got="a folder" if path.is_dir() else "no such file",
            next_step="Make one: edgead text-table PROMPTS.json --model NAME --model-weights WEIGHTS -o FILE",
        )
    with storage_errors(path, "to read a text table"), path.open("rb") as stream:
        data = stream.read(_FILE_BYTES + 1)
    if len(data) > _FILE_BYTES:
        raise _damaged(path, f"more than {_FILE_BYTES >> 30} GiB")
    try:
        arrays, metadata = decode_tensors(data, header_limit=_HEADER_BYTES)
    except KnowledgeError as error:
        raise _damaged(path, error.got) from error
    if metadata.get(_MARK) != "1":
        raise _damaged(path, f"version {metadata[_MARK]!r}" if _MARK in metadata else "a file without its mark")
    if set(arrays) != {TABLE, STATE, NOTE} or arrays[NOTE].dtype != np.uint8:
        raise _damaged(path, f"arrays {', '.join(sorted(arrays)) or 'none'}")
    try:
        note = msgspec.json.decode(arrays[NOTE].tobytes(), type=_Note)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _damaged(path, f"a note that does not read ({error})") from error
    found = TextTable(arrays[TABLE], note.rows, note.model, note.weights, note.weights_sha256, note.prompts)
    _check(found, str(path))
    if not np.array_equal(arrays[STATE], found.state):
        raise _damaged(path, "states that differ from those of its sentences")
    return found


def check_table(table: TextTable, model: VisionLanguageModel) -> None:
    """Check that `table` lies in the joint space of `model`.

    Raises:
        KnowledgeError: another model, or other weights of it.
    """
    if table.model != model.name or table.weights_sha256 != model.weights_sha256:
        raise KnowledgeError(
            wanted=f"a text table made by {model.name} with the weights {model.weights} "
            f"({model.weights_sha256[:12]}), whose image tower is used",
            got=f"one by {table.model} with {table.weights} ({table.weights_sha256[:12]})",
            next_step="Encode the prompts again with that model: edgead text-table PROMPTS.json --model NAME ...",
        )


def _check(table: TextTable, where: str) -> None:
    array = table.table
    if array.dtype != np.float32 or array.ndim != 2 or len(array) != len(table.rows) or not array.size:
        raise _damaged(where, f"{array.dtype} {list(array.shape)} for {len(table.rows)} sentences")
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    if not np.isfinite(norms).all() or np.abs(norms - 1.0).max() > _UNIT_TOLERANCE:
        raise _damaged(where, "rows that are not of length 1")
    if {row.state for row in table.rows} != set(_STATES):
        raise _damaged(where, f"states {', '.join(sorted({row.state for row in table.rows}))}")


def _key(model: str, weights: str, prompts: str) -> str:
    return hashlib.sha256(canonical_json([model, weights, prompts, BATCH])).hexdigest()


def _save(part: Path, key: str, done: Sequence[NDArray[np.float32]]) -> None:
    write_file(part, encode_tensors({TABLE: np.concatenate(done)}, {_PART_MARK: key}))


def _taken_up(part: Path, key: str, width: int, total: int) -> list[NDArray[np.float32]]:
    """Whole batches that an interrupted run left, or none.

    Raises:
        InputError: the side file's place is taken by something else.
    """
    if not part.exists():
        return []
    try:
        with storage_errors(part, "to read an unfinished text table"):
            arrays, metadata = decode_tensors(part.read_bytes(), header_limit=_HEADER_BYTES)
        found: Mapping[str, str] = metadata
        rows = arrays[TABLE]
        if _PART_MARK not in found:
            raise KnowledgeError(wanted="its mark", got="none")
    except (KnowledgeError, KeyError) as error:
        raise InputError(
            wanted=f"{part} for the rows encoded so far",
            got="a file of something else there",
            next_step="Move or remove that file, or name another output.",
        ) from error
    whole = rows.ndim == 2 and rows.shape[1] == width and (len(rows) % BATCH == 0 or len(rows) == total)
    if found[_PART_MARK] != key or rows.dtype != np.float32 or not whole or len(rows) > total:
        return []
    return [rows.copy()]


def _damaged(where: Path | str, got: str) -> KnowledgeError:
    return KnowledgeError(
        wanted=f"a text table in {where}",
        got=got,
        next_step="Make it again: edgead text-table PROMPTS.json --model NAME --model-weights WEIGHTS -o FILE",
    )
