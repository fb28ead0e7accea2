"""Notes: what the rows of a knowledge array mean, for people. Never bound to a head.

A note is the array `<array>.text` of a pack: uint8 [bytes], canonical JSON in UTF-8 of an object with at least
`rows`, a list of one object per row of the array, each with at least a string `text` (the sentence, the prompt, the
descriptor). What else it holds, such as the model that embedded the rows, is up to whoever made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.spec import canonical_json

if TYPE_CHECKING:
    from edgead.runtime.knowledge import Pack

NOTE = ".text"
"""What the name of a note ends with."""
NOTE_BYTES = 4 * 2**20
"""Largest note."""

Note = dict[str, Any]


def encode_note(content: Mapping[str, Any]) -> NDArray[np.uint8]:
    """A note as the array of a pack: uint8 [bytes].

    Args:
        content: JSON-like; `rows` holds one object with a string `text` per row of the array that it is about.

    Raises:
        KnowledgeError: no such rows, or something that JSON cannot hold.
    """
    try:
        data = canonical_json(content)
    except (TypeError, ValueError) as error:
        raise _refusal("JSON", str(error)) from error
    _rows_of(dict(content), "the note")
    return np.frombuffer(data, np.uint8).copy()


def check_note(name: str, array: NDArray[Any], rows: int) -> None:
    """Check a note of a pack.

    Args:
        name: of the note's array, for messages.
        array: the note.
        rows: of the array that it is about.

    Raises:
        KnowledgeError: not uint8 [bytes] of canonical JSON, too large, or not one entry per row.
    """
    if array.dtype != np.uint8 or array.ndim != 1 or array.size > NOTE_BYTES:
        raise _refusal(f"uint8 [bytes] of at most {NOTE_BYTES} bytes in {name!r}", f"{array.dtype} {list(array.shape)}")
    content = _decoded(name, array)
    found = len(_rows_of(content, name))
    if found != rows:
        raise _refusal(f"one entry per row in {name!r}", f"{found} entries for {rows} rows")


def read_note(pack: Pack, array: str) -> Note:
    """The note about an array of a pack; without one, `{"rows": []}`.

    Raises:
        KnowledgeError: the pack has no such array.
    """
    if array not in pack.arrays:
        raise KnowledgeError(
            wanted=f"an array {array!r} in the pack of {pack.product!r}",
            got=", ".join(pack.arrays) or "none",
            next_step="Name one of these.",
        )
    note = pack.arrays.get(array + NOTE)
    return {"rows": []} if note is None else _decoded(array + NOTE, note)


def is_note(name: str) -> bool:
    """Whether an array's name is that of a note."""
    return name.endswith(NOTE)


def _decoded(name: str, array: NDArray[Any]) -> Note:
    data = array.tobytes()
    try:
        content = json.loads(data.decode())
        canonical = isinstance(content, dict) and canonical_json(content) == data
    except (ValueError, RecursionError) as error:
        raise _refusal(f"JSON in {name!r}", f"something else ({error})") from error
    if not canonical:
        raise _refusal(f"an object as canonical JSON in {name!r}", "another spelling or value")
    found: Note = content
    return found


def _rows_of(content: Note, name: str) -> list[dict[str, Any]]:
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows
    ):
        raise _refusal(f"a list 'rows' of objects with a string 'text' in {name!r}", repr(rows)[:200])
    return rows


def _refusal(wanted: str, got: str) -> KnowledgeError:
    return KnowledgeError(
        wanted=f"a note with {wanted}", got=got, next_step="Make the pack with edgead, or fetch it again."
    )
