"""Whatever arrives is read as what it is or refused with a typed error, in bounded memory and time.

Each format is fuzzed in a process of its own, from sound files that are built here: deterministic by its seed, about a
minute for all of them. EDGEAD_FUZZ_FACTOR makes it longer, EDGEAD_FUZZ_SEED makes it another run; see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")
pytest.importorskip("onnx")

from edgead.runtime.candidates import CANDIDATE_BYTES, decode_candidate
from edgead.runtime.deltas import read_delta
from edgead.runtime.device_status import STATUS_BYTES, decode_status
from edgead.runtime.errors import EdgeadError
from edgead.runtime.knowledge import decode_pack
from edgead.runtime.pins import PIN_BYTES, decode_pin
from edgead.runtime.provenance import decode_provenance
from edgead.runtime.release import RELEASE_BYTES, decode_release
from edgead.runtime.rollout import RECORD_BYTES, decode_rollout
from edgead.runtime.spec import DEFAULT_LIMITS

FACTOR = float(os.environ.get("EDGEAD_FUZZ_FACTOR", "1"))
SEED = int(os.environ.get("EDGEAD_FUZZ_SEED", "0"))
CHILD = Path(__file__).with_name("child.py")
NAMES = (
    "bundle",
    "candidate",
    "delta",
    "image",
    "manifest",
    "metadata",
    "note",
    "pack",
    "pin",
    "prompts",
    "provenance",
    "release",
    "rollout",
    "status",
    "tensors",
)
ACCEPTING = {name for name in NAMES if name != "candidate"}
"""Formats of which some damaged inputs must be accepted, or the fuzzing would have tested the first check alone."""


@pytest.mark.parametrize("name", NAMES)
def test_row_39_whatever_arrives_is_read_or_refused_in_bounded_memory_and_time(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(CHILD), name, str(SEED), str(FACTOR), str(tmp_path)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=240 + 600 * FACTOR,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    current = tmp_path / "current"
    where = f"input {current.read_text().strip() if current.exists() else 'none'} of seed {SEED}"
    assert done.returncode == 0, f"the process ended with {done.returncode} at {where}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == [], f"seed {SEED}: {found['faults']}"
    assert found["inputs"] >= 1
    if FACTOR >= 1 and name in ACCEPTING:
        assert found["accepted"] >= 5, found


def test_every_format_is_fuzzed() -> None:
    text = CHILD.with_name("formats.py").read_text("utf-8")
    listed = text[text.index("FORMATS:") :].partition("}")[0]
    assert [line.split('"')[1] for line in listed.splitlines() if line.startswith('    "')] == list(NAMES)


def refused(read: Callable[[bytes], Any], data: bytes) -> EdgeadError:
    """The error; nothing that is much larger than what came was held in memory."""
    tracemalloc.start()
    try:
        with pytest.raises(EdgeadError) as caught:
            read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 4 * len(data)
    return caught.value


@pytest.mark.parametrize(
    ("read", "most"),
    [
        (decode_pin, PIN_BYTES),
        (decode_release, RELEASE_BYTES),
        (decode_rollout, RECORD_BYTES),
        (decode_status, STATUS_BYTES),
        (decode_candidate, CANDIDATE_BYTES),
    ],
    ids=["pin", "release", "rollout", "status", "candidate"],
)
def test_a_byte_over_the_limit_is_refused_for_its_size(read: Callable[[bytes], Any], most: int) -> None:
    assert str(most) in refused(read, b" " * (most + 1)).wanted
    assert str(most) not in refused(read, b" " * most).wanted


@pytest.mark.parametrize(
    "read", [decode_pack, decode_provenance, decode_candidate], ids=["pack", "provenance", "candidate"]
)
@pytest.mark.parametrize("length", [DEFAULT_LIMITS.pack_header_bytes + 1, 2**32, 2**63, 2**64 - 1])
def test_a_header_over_the_limit_is_refused_before_it_is_read(read: Callable[[bytes], Any], length: int) -> None:
    refused(read, length.to_bytes(8, "little") + b"{}" * 100)


@pytest.mark.parametrize("length", [DEFAULT_LIMITS.delta_bytes + 1, 2**40, 2**64 - 1])
def test_a_delta_that_would_unpack_to_more_than_the_limit_is_refused_before_it_is_unpacked(length: int) -> None:
    refused(read_delta, b"edgead.d" + length.to_bytes(8, "little") + b"x" * 100)


@pytest.mark.parametrize(
    "read",
    [decode_pin, decode_release, decode_rollout, decode_status],
    ids=["pin", "release", "rollout", "status"],
)
@pytest.mark.parametrize(
    "text", [b"[" * 8000, b'{"a":' * 2500, b"[" * 7999 + b"]" * 7999], ids=["list", "object", "closed"]
)
def test_json_that_is_nested_too_deeply_is_refused(read: Callable[[bytes], Any], text: bytes) -> None:
    refused(read, text)


@pytest.mark.parametrize(
    "read", [decode_pack, decode_provenance, decode_candidate], ids=["pack", "provenance", "candidate"]
)
def test_a_header_that_is_nested_too_deeply_is_refused(read: Callable[[bytes], Any]) -> None:
    for text in (b"[" * 30_000, b'{"a":' * 6000, b'{"__metadata__":' + b"[" * 12_000):
        refused(read, len(text).to_bytes(8, "little") + text)
