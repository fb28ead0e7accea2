"""Notes: what rows mean, for people, in one spelling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgead.runtime.errors import KnowledgeError
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import NOTE_BYTES, encode_note, read_note
from edgead.runtime.spec import Calibration


def pack(note: Any) -> Pack:
    return new_pack(
        product="bolt",
        fingerprint="ab" * 32,
        calibration=Calibration(threshold=1.0),
        arrays={"text.table": np.ones((2, 3), np.float32), "text.table.text": note},
    )


def test_a_note_is_these_bytes() -> None:
    note = encode_note({"rows": [{"text": "a thread"}, {"text": "Öl", "by": "Anna"}], "model": "tiny"})
    assert note.dtype == np.uint8
    assert note.tobytes() == (b'{"model":"tiny","rows":[{"text":"a thread"},{"by":"Anna","text":"\xc3\x96l"}]}')
    assert read_note(pack(note), "text.table")["rows"][1] == {"text": "Öl", "by": "Anna"}


@pytest.mark.parametrize(
    "data",
    [
        b'{"rows":[{"text":"a"}]}',
        b'{"rows": [{"text":"a"},{"text":"b"}]}',
        b'{"rows":[{"text":"a"},{"text":1}]}',
        b'[{"text":"a"},{"text":"b"}]',
        b"\xff",
        b"[" * 100_000,
        b" " * (NOTE_BYTES + 1),
    ],
    ids=["a row less", "white space", "a number", "a list", "no text", "deep", "large"],
)
def test_what_is_no_note_makes_no_pack(data: bytes) -> None:
    with pytest.raises(KnowledgeError):
        pack(np.frombuffer(data, np.uint8))


def test_a_note_needs_rows_that_it_is_about() -> None:
    note = encode_note({"rows": []})
    with pytest.raises(KnowledgeError):
        new_pack(
            product="bolt",
            fingerprint="ab" * 32,
            calibration=Calibration(threshold=1.0),
            arrays={"text.table.text": note},
        )
