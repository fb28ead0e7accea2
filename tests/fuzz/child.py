"""Fuzz one format in a process of its own, whose memory is bounded: python child.py FORMAT SEED FACTOR FOLDER [NUMBER].

Prints one line of JSON. The number of the input that is being read stands in FOLDER/current, so that a crash of the
process names it; NUMBER reads that input alone. See CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

_ROOM = 512 * 2**20
"""Bytes of address space beyond what the libraries took: a parser that wants more ends in a MemoryError, and fails."""


def main(name: str, seed: int, factor: float, folder: Path, only: int | None) -> None:
    spec = importlib.util.spec_from_file_location("edgead_tests_formats", Path(__file__).with_name("formats.py"))
    assert spec is not None
    assert spec.loader is not None
    formats = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = formats
    spec.loader.exec_module(formats)
    subject = formats.FORMATS[name]()
    for sound in subject.corpus:
        found = subject.read(sound)  # warms up whatever is imported on first use; and sound files are accepted
        if subject.again is not None:
            assert subject.again(found) == sound, "a sound file is encoded differently"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM,) * 2)
    current = os.open(folder / "current", os.O_WRONLY | os.O_CREAT)
    count = max(1, round(subject.inputs * factor))
    result: dict[str, Any] = {
        "inputs": 0,
        "accepted": 0,
        "seconds": 0.0,
        "slowest": 0.0,
        "peak": 0,
        "bytes": 0,
        "faults": [],
    }
    begin_from = [*subject.corpus, *subject.seeds]
    tracemalloc.start(1)
    for number in range(count + len(subject.extra)) if only is None else [only]:
        if number < len(subject.extra):
            data = subject.extra[number]
        else:
            rng = formats.generator(name, seed, number)
            data = formats.mutations.mutated(rng.choice(begin_from), begin_from, rng, subject.rewrite, subject.layer)
        os.pwrite(current, b"%-20d" % number, 0)
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        begin = time.process_time()
        fault = ""
        try:
            found = subject.read(data)
            result["accepted"] += 1
            if subject.again is not None and subject.again(found) != data:
                fault = "accepted, and encoded differently"
        except BaseException as error:
            if not formats.allowed(error):
                fault = f"{type(error).__name__}: {error}"[:300]
        spent = time.process_time() - begin
        found = None
        peak = tracemalloc.get_traced_memory()[1] - base
        result["inputs"] += 1
        result["seconds"] += spent
        result["slowest"] = max(result["slowest"], spent)
        result["bytes"] = max(result["bytes"], len(data))
        # Besides a few megabytes, what a parser holds is a multiple of what came.
        if peak > 16 * 2**20 + 60 * len(data):
            fault = fault or f"{peak} bytes of memory for {len(data)}"
        result["peak"] = max(result["peak"], peak)
        if spent > 10.0:
            fault = fault or f"{spent:.1f} s"
        if fault and len(result["faults"]) < 20:
            (folder / f"{name}-{number}").write_bytes(data)
            result["faults"].append([number, fault])
    print(json.dumps(result))


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], int(words[1]), float(words[2]), Path(words[3]), int(words[4]) if len(words) > 4 else None)
