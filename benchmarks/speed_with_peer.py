"""Milliseconds per frame beside a peer (anomalib's PatchCore), in one run, the contenders taking turns.

    python -m benchmarks speed --peer-python .venv-peer/bin/python

The same ResNet-18 (random weights do for time), bank, frames and threads for everybody: the peer's
OpenVINOInferencer, its exported graph bare in OpenVINO and ONNX Runtime, and edgead's Inspector. The scores are
compared too, so that nobody is fast by answering something else: with 9 neighbours, the peer's default and the
paper's re-weighting, and with 1, the plain distance, where the peer's graph leaves out the nearest rows that
edgead still gives. Where the processor has bfloat16, the peer's inferencer chooses it by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    PAUSE,
    THREADS,
    Frame,
    PeerProcess,
    Rows,
    bank_detector,
    bank_pack,
    embeddings,
    exported,
    median,
    note,
    painted,
    report,
    spread_rows,
    table,
)
from edgead.runtime.bundle import Bundle
from edgead.runtime.inspector import Inspector
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.memory_bank import MemoryBankTrunk

SIZE = 256
SEED = 7
ROWS = (1_000, 10_000)
NEIGHBOURS = (9, 1)
ENGINES = {"edgead openvino": "openvino", "edgead onnx": "onnx"}
PEERS = {
    "peer OpenVINOInferencer": ("inferencer", "xml"),
    "peer OpenVINOInferencer, f32": ("inferencer-f32", "xml"),
    "peer graph, bare OpenVINO": ("openvino", "xml"),
    "peer graph, bare ONNX Runtime": ("onnxruntime", "onnx"),
}
STAGES = ("prepare", "trunk", "head", "regions")
SAME = 1e-3
"""Largest difference of an image score from the peer's, as a share of it, for float32 contenders."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks speed", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True, help="has anomalib[openvino]")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="keeps what is exported")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--neighbours", type=int, nargs="+", default=list(NEIGHBOURS))
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=4, help="timed frames in a turn")
    parser.add_argument("--prepare-only", action="store_true", help="export, measure nothing")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    work: Path = options.work.absolute() / "speed"
    with PeerProcess(options.peer_python, work) as peer:
        banks, frames = prepared_banks(peer, work, options.rows)
        cases = []
        for neighbours in options.neighbours:
            bundle = prepared_bundle(work, banks[options.rows[0]], frames, neighbours)
            for rows in options.rows:
                cases.append((neighbours, bundle, rows, peer_export(peer, work, rows, neighbours)))
        if options.prepare_only:
            return 0
        figures = []
        for neighbours, bundle, rows, model in cases:
            note(f"timing {rows} rows, {neighbours} neighbours ...")
            found = _measure(peer, work, bundle, model, banks[rows], frames, options.rounds, options.repeats)
            figures.append({"neighbours": neighbours, **found})
    for found in figures:
        _show(found)
    content = {"peer": peer.versions, "peer_import_seconds": peer.import_seconds, "banks": figures}
    report("speed", content, options.json)
    return 0 if all(found["same_scores"] for found in figures) else 1


def prepared_banks(peer: PeerProcess, work: Path, sizes: list[int]) -> tuple[dict[int, Rows], Frame]:
    """Weights, banks of the wanted sizes (also as `.npy` for the peer) and frames to inspect."""
    weights = work / "resnet18.safetensors"
    if not weights.exists():
        peer.ask("weights", path=weights, seed=SEED)
    frames = painted(8, size=SIZE, seed=SEED + 1, defects=True)
    np.save(work / "frames.npy", frames)
    rows = None
    banks: dict[int, Rows] = {}
    for size in sizes:
        file = work / f"bank-{size}.npy"
        if not file.exists():
            if rows is None:
                trunk = MemoryBankTrunk(load_backbone("resnet18", weights=weights)).eval()
                rows = embeddings(trunk, painted(12, size=SIZE, seed=SEED)).reshape(-1, 384)
            np.save(file, spread_rows(rows, size, SEED))
        banks[size] = np.load(file)
    return banks, frames


def prepared_bundle(work: Path, bank: Rows, frames: Frame, neighbours: int) -> Bundle:
    """edgead's bundle of the same network, exported anew."""
    note(f"edgead exports, {neighbours} neighbours ...")
    backbone = load_backbone("resnet18", weights=work / "resnet18.safetensors")
    detector = bank_detector(backbone, bank, frames[:2], threshold=1e9, neighbours=neighbours if neighbours > 1 else 0)
    return exported(detector, work / f"bundle-{neighbours}", ("openvino", "onnx"))


def peer_export(peer: PeerProcess, work: Path, rows: int, neighbours: int) -> dict[str, Any]:
    """The peer's export with a bank of so many rows; kept, because it takes as long as it does."""
    folder = work / f"peer-{rows}-{neighbours}"
    kept = folder / "export.json"
    if not kept.exists():
        note(f"the peer exports {rows} rows, {neighbours} neighbours ...")
        answer = peer.ask(
            "export",
            weights=work / "resnet18.safetensors",
            bank=work / f"bank-{rows}.npy",
            folder=folder,
            size=SIZE,
            neighbours=neighbours,
        )
        kept.write_text(json.dumps(answer))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _measure(
    peer: PeerProcess,
    work: Path,
    bundle: Bundle,
    model: dict[str, Any],
    bank: Rows,
    frames: Frame,
    rounds: int,
    repeats: int,
) -> dict[str, Any]:
    precisions = {}
    for name, (kind, file) in PEERS.items():
        answer = peer.ask("load", name=name, kind=kind, path=model[file], threads=THREADS)
        precisions[name] = answer["precision"]
    # A defect is outlined in every frame: the costlier case.
    pack = bank_pack(bundle.manifest.detector.fingerprint, bank, threshold=1e-6)
    inspectors = {
        name: Inspector(bundle, target=target, threads=THREADS, packs=[pack]) for name, target in ENGINES.items()
    }
    times: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ENGINES}
    scores: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in PEERS:
            time.sleep(PAUSE)
            answer = peer.ask("time", name=name, images=work / "frames.npy", repeats=repeats, warm=2)
            times[name] += answer["milliseconds"]
            scores[name] = answer["scores"]
        for name, inspector in inspectors.items():
            time.sleep(PAUSE)
            inspector.inspect(frames[0])
            results = [inspector.inspect(frames[place % len(frames)]) for place in range(-1, repeats)][1:]
            scores[name] = [float(result.score or 0.0) for result in results]
            times[name] += [result.timings["total"] for result in results]
            for stage in STAGES:
                stages[name][stage] += [result.timings[stage] for result in results]
    for inspector in inspectors.values():
        inspector.close()
    for name in PEERS:
        peer.ask("forget", name=name)
    reference = np.array(scores["peer graph, bare ONNX Runtime"])
    off = {name: float((np.abs(np.array(s) - reference) / reference).max()) for name, s in scores.items()}
    exact = [name for name in off if precisions.get(name) not in ("<Type: 'bfloat16'>",)]
    return {
        "rows": len(bank),
        "ms": {name: median(values) for name, values in times.items()},
        "fastest_ms": {name: min(values) for name, values in times.items()},
        "frames": rounds * repeats,
        "stages": {name: {s: median(v) for s, v in found.items()} for name, found in stages.items()},
        "score_off": off,
        "precision": precisions,
        "same_scores": all(off[name] <= SAME for name in exact),
        "peer_export": {key: model[key] for key in ("seconds", "bytes")},
    }


def _show(found: dict[str, Any]) -> None:
    ours = found["ms"]["edgead openvino"]
    lines = []
    for name, value in found["ms"].items():
        parts = found["stages"].get(name)
        detail = "" if parts is None else ", ".join(f"{stage} {parts[stage]:.1f}" for stage in STAGES)
        lines.append([name, value, found["fastest_ms"][name], value / ours, found["score_off"][name], detail])
    what = f"{found['rows']} rows, {found['neighbours']} neighbour{'s' * (found['neighbours'] > 1)}"
    print(f"\n{what}, {SIZE}x{SIZE}, {THREADS} threads, medians of {found['frames']} frames")
    print(table(["", "ms", "fastest", "of edgead's", "score off by", "stages, ms"], lines))
    native = found["precision"]["peer OpenVINOInferencer"]
    print(f"the peer's inferencer chose {native} here; its export: {found['peer_export']['seconds']:.1f} s,")
    print(f"{found['peer_export']['bytes'] / 1e6:.1f} MB; scores {'agree' if found['same_scores'] else 'DIFFER'}")


if __name__ == "__main__":
    raise SystemExit(main())
