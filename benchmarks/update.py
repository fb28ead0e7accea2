"""Teaching 100 rows to a running inspector with a bank of 10,000: bytes, seconds, and the frames meanwhile.

    python -m benchmarks update
    python -m benchmarks update --peer-python .venv-peer/bin/python

A camera runs at full rate while the knowledge changes several times, to and fro. Every frame's score must be that
of the knowledge it names (none mixed), and every frame must be answered (none lost). The peer, anomalib, has no
such update: its way is another export of the whole model, which is measured beside it.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    THREADS,
    Frame,
    PeerProcess,
    median,
    note,
    painted,
    product_bundle,
    report,
    table,
)
from edgead.runtime.inspection import Inspection
from edgead.runtime.inspector import Inspector, Verdict
from edgead.runtime.knowledge import Pack, encode_pack, new_pack

ENGINES = ("onnx", "openvino")
ADDED = 100
WANTED_SECONDS = 0.3
SAME = 1e-5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks update", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, help="has anomalib[openvino]; measures its export too")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=6)
    parser.add_argument("--backbone", default="resnet18:random", help="the peer's, so that rows are as wide")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"rows": options.rows, "added": ADDED, "engines": {}}
    with tempfile.TemporaryDirectory(prefix="edgead-update-") as scratch:
        note("exporting ...")
        bundle, pack = product_bundle(Path(scratch) / "bundle", options.rows, backbone=options.backbone)
        frames = list(painted(6, seed=9, defects=True))
        with Inspector(bundle, target=ENGINES[0], threads=THREADS, packs=[pack]) as inspector:
            taught = _taught(pack, inspector, frames[0])
        figures["bytes"] = _bytes(pack, taught)
        for engine in ENGINES:
            note(f"a stream through {engine} ...")
            with Inspector(bundle, target=engine, threads=THREADS, packs=[pack]) as inspector:
                figures["engines"][engine] = _stream(inspector, frames, pack, taught, options.swaps)
        if options.peer_python is not None:
            note("the peer exports ...")
            figures["peer"] = peer_export(options.peer_python, Path(scratch), options.rows + ADDED)
    _show(figures)
    report("update", figures, options.json)
    good = all(not f["lost"] and not f["mixed"] for f in figures["engines"].values())
    return 0 if good else 1


def _taught(pack: Pack, inspector: Inspector, frame: Frame) -> Pack:
    """The pack with `ADDED` rows more, patches of a frame around its most anomalous one; the rows that it had
    keep their bytes and ids."""
    rows = pack.arrays["bank.normal"]
    patches = inspector.embed(frame)["patches"].reshape(-1, rows.shape[1])
    point = inspector.inspect(frame).evidence[0].point
    assert point is not None
    side = round(len(patches) ** 0.5)
    worst = point[1] * side // frame.shape[0] * side + point[0] * side // frame.shape[1]
    nearest = np.argsort(np.linalg.norm(patches - patches[worst], axis=1), kind="stable")
    news = patches[nearest[:ADDED]]
    ids = pack.ids("bank.normal")
    later = np.arange(ids[-1] + 1, ids[-1] + 1 + ADDED, dtype=np.uint64)
    arrays = dict(pack.arrays)
    arrays["bank.normal"] = np.concatenate([rows, news])
    arrays["bank.normal.ids"] = np.concatenate([ids, later])
    return new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=pack.calibration, arrays=arrays)


def _bytes(pack: Pack, taught: Pack) -> dict[str, int]:
    news = taught.arrays["bank.normal"][-ADDED:].tobytes() + taught.ids("bank.normal")[-ADDED:].tobytes()
    return {
        "whole pack": len(encode_pack(taught)),
        "added rows and ids": len(news),
        "added rows and ids, deflated": len(zlib.compress(news, 9)),
        "pack before": len(encode_pack(pack)),
    }


def _stream(inspector: Inspector, frames: list[Frame], pack: Pack, taught: Pack, swaps: int) -> dict[str, Any]:
    expected = _expected(inspector, (taught, pack), frames)
    answers: list[tuple[int, float, float, Inspection]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def camera() -> None:
        place = 0
        try:
            while not stop.is_set():
                start = time.perf_counter()
                result = inspector.inspect(frames[place % len(frames)])
                answers.append((place % len(frames), start, time.perf_counter(), result))
                place += 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=camera)
    thread.start()
    seconds, windows = [], []
    for place in range(swaps):
        time.sleep(2.0)
        start = time.perf_counter()
        inspector.swap(taught if place % 2 == 0 else pack)
        windows.append((start, time.perf_counter()))
        seconds.append(windows[-1][1] - start)
    time.sleep(1.0)
    stop.set()
    thread.join()
    # What a swap costs when nothing else wants the processor.
    alone = []
    for place in range(swaps):
        start = time.perf_counter()
        inspector.swap(taught if place % 2 == 0 else pack)
        alone.append(time.perf_counter() - start)
    lost = len(failures) + sum(result.verdict is Verdict.NOT_INSPECTED for _, _, _, result in answers)
    mixed = sum(
        abs((result.score or 0.0) - expected[result.knowledge][frame]) > SAME * expected[result.knowledge][frame]
        for frame, _, _, result in answers
    )
    gaps = [after[2] - before[2] for before, after in itertools.pairwise(answers)]
    during = [
        gap
        for gap, answer in zip(gaps, answers[1:], strict=True)
        if any(answer[1] < end and answer[2] > start for start, end in windows)
    ]
    quiet = [gap for gap in gaps if gap not in during]
    return {
        "frames": len(answers),
        "lost": lost,
        "mixed": mixed,
        "versions_seen": len({result.knowledge for _, _, _, result in answers}),
        "swap_s": median(seconds),
        "swap_alone_s": median(alone),
        "frame_ms": median(quiet) * 1e3,
        "longest_gap_ms": max(quiet) * 1e3,
        "longest_gap_in_swap_ms": max(during, default=0.0) * 1e3,
    }


def _expected(inspector: Inspector, packs: tuple[Pack, Pack], frames: list[Frame]) -> dict[str, list[float]]:
    """Each frame's score under each version; the last pack stays active."""
    scores = {}
    for pack in packs:
        inspector.swap(pack)
        scores[pack.version] = [float(inspector.inspect(frame).score or 0.0) for frame in frames]
    first, second = scores.values()
    if not any(abs(a - b) > 10 * SAME * b for a, b in zip(first, second, strict=True)):
        raise SystemExit("the added rows change no score: a mixed frame could not be told")
    return scores


def peer_export(python: Path, folder: Path, rows: int) -> dict[str, Any]:
    """The peer's way to other knowledge: its import, and another export of a model with so many rows."""
    np.save(folder / "bank.npy", np.random.default_rng(0).standard_normal((rows, 384), np.float32))
    with PeerProcess(python, folder / "peer") as peer:
        peer.ask("weights", path=folder / "weights.safetensors", seed=0)
        answer = peer.ask(
            "export",
            weights=folder / "weights.safetensors",
            bank=folder / "bank.npy",
            folder=folder / "export",
            size=256,
            neighbours=9,
        )
        return {
            "import_s": peer.import_seconds,
            "export_s": answer["seconds"],
            "bytes": answer["bytes"],
            "versions": peer.versions,
        }


def _show(figures: dict[str, Any]) -> None:
    sizes = figures["bytes"]
    print(f"{figures['added']} rows added to {figures['rows']}, {THREADS} threads")
    lines: list[list[Any]] = [[name, size / 1e6] for name, size in sizes.items()]
    if "peer" in figures:
        lines.append(["the peer's export of everything", figures["peer"]["bytes"] / 1e6])
    print(table(["", "MB"], lines))
    head = ["engine", "swap, s", "swap alone, s", "wanted", "frames", "lost", "mixed", "frame, ms"]
    rows = [
        [
            name,
            found["swap_s"],
            found["swap_alone_s"],
            f"{WANTED_SECONDS} {'ok' if found['swap_alone_s'] <= WANTED_SECONDS else 'above'}",
            *(found[key] for key in ("frames", "lost", "mixed", "frame_ms", "longest_gap_ms")),
            found["longest_gap_in_swap_ms"],
        ]
        for name, found in figures["engines"].items()
    ]
    print(table([*head, "longest gap", "in a swap"], rows))
    print("('swap' shares the processor with the stream at full rate; 'swap alone' has it for itself)")
    if "peer" in figures:
        peer = figures["peer"]
        print(f"the peer: import {peer['import_s']:.1f} s, export {peer['export_s']:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
