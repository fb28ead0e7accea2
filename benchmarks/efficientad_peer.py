"""Milliseconds per frame of EfficientAD small and SimpleNet beside a peer's EfficientAD (anomalib), in one run.

    python -m benchmarks efficientad --peer-python .venv-peer/bin/python

The contenders take turns on the same frames of 256 x 256 pixels with the same threads. Both EfficientADs have the very
same random weights and quantiles (random ones do for time; nothing is downloaded), and their scores are compared, so
that nobody is fast by answering something else. Maps differ at the rim, where the peer puts zeros.
"""

from __future__ import annotations

import argparse
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
    exported,
    median,
    note,
    painted,
    report,
    table,
)
from edgead.detector_file import FittedDetector, export_programs
from edgead.runtime.bundle import Bundle
from edgead.runtime.inspector import Inspector
from edgead.runtime.spec import Calibration, Preprocessing
from edgead.server_side.learned import Arrays, Modules

SIZE = 256
SEED = 7
ENGINES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
PEERS = {
    "peer EfficientAD, OpenVINOInferencer": ("inferencer", "xml"),
    "peer EfficientAD, OpenVINOInferencer, f32": ("inferencer-f32", "xml"),
    "peer EfficientAD, bare OpenVINO": ("openvino", "xml"),
    "peer EfficientAD, bare ONNX Runtime": ("onnxruntime", "onnx"),
}
SAME = 1e-3
"""Largest difference of a score, as a share of it, for float32 contenders."""
NEVER = 1e9
"""A threshold that no frame reaches: outlining regions is the same for every method."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks efficientad", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, required=True, help="has anomalib[openvino]")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="keeps what is exported")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=3, help="timed frames in a turn")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    work: Path = options.work.absolute() / "efficientad"
    work.mkdir(parents=True, exist_ok=True)
    frames = painted(6, size=SIZE, seed=SEED, defects=True)
    np.save(work / "frames.npy", frames)
    quantiles = write_networks(work / "networks.safetensors", frames)
    bundles = {
        "edgead EfficientAD": efficientad_bundle(work, frames, quantiles),
        "edgead SimpleNet": simplenet_bundle(work, frames),
    }
    with PeerProcess(options.peer_python, work) as peer:
        note("the peer exports ...")
        model = peer.ask(
            "export_efficientad",
            weights=work / "networks.safetensors",
            quantiles=quantiles.tolist(),
            folder=work / "peer",
            size=SIZE,
        )
        found = _measure(peer, work, bundles, model, frames, options.rounds, options.repeats)
        versions = peer.versions
    _show(found)
    report("efficientad", {"peer": versions, "size": SIZE, **found}, options.json)
    return 0 if found["same_scores"] else 1


def networks() -> Any:
    """EfficientAD's networks with seeded random weights."""
    from edgead.server_side.detectors.efficientad_training import EfficientAdNetworks

    return EfficientAdNetworks((SIZE, SIZE), SEED).eval().requires_grad_(False)


def write_networks(path: Path, frames: Frame) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Write the networks' weights by the peer's names; returns quantiles [2, 2] of their maps of the frames."""
    from safetensors.torch import save_file

    from edgead.server_side.detectors.efficientad import efficientad_modules, map_quantiles

    made = networks()
    save_file({_peer_name(name): value for name, value in made.state_dict().items() if name != "unexplained"}, path)
    modules = efficientad_modules(made, Preprocessing(SIZE, SIZE))
    features = [modules.embed_prepared(frame[None]) for frame in frames[:2]]
    return map_quantiles([(each["local"][0], each["whole"][0]) for each in features], (SIZE, SIZE))


def _peer_name(name: str) -> str:
    network, layer, *rest = name.split(".")
    if network in ("teacher", "student"):
        return ".".join([network, f"conv{('first', 'second', 'third', 'last').index(layer) + 1}", *rest])
    if layer in ("encoder", "decoder"):
        return f"ae.{layer}.{layer[:2]}conv{int(rest[0]) + 1}.{rest[1]}"
    return {
        "code": f"ae.encoder.enconv6.{rest[0]}",
        "smooth": f"ae.decoder.deconv7.{rest[0]}",
        "last": f"ae.decoder.deconv8.{rest[0]}",
    }[layer]


def efficientad_bundle(work: Path, frames: Frame, quantiles: np.ndarray[Any, np.dtype[np.float32]]) -> Bundle:
    """edgead's EfficientAD small of the same networks."""
    from edgead.server_side.detectors.efficientad import efficientad_modules

    modules = efficientad_modules(networks(), Preprocessing(SIZE, SIZE))
    return _exported(modules, {"map.quantiles": quantiles}, frames, work / "efficientad")


def simplenet_bundle(work: Path, frames: Frame) -> Bundle:
    """edgead's SimpleNet on the embedded backbone with an untrained network."""
    from edgead.server_side.backbones import load_backbone
    from edgead.server_side.detectors.memory_bank import MemoryBankTrunk, patch_grid
    from edgead.server_side.detectors.simplenet import simplenet_modules
    from edgead.server_side.detectors.simplenet_network import SimpleNetwork

    backbone = load_backbone().eval()
    preprocessing = Preprocessing(SIZE, SIZE)
    _, dimensions = patch_grid(MemoryBankTrunk(backbone), preprocessing)
    modules = simplenet_modules(backbone, SimpleNetwork(dimensions).eval(), preprocessing)
    return _exported(modules, {"map.statistics": np.array([0.0, 1.0], np.float32)}, frames, work / "simplenet")


def _exported(modules: Modules, arrays: Arrays, frames: Frame, path: Path) -> Bundle:
    note(f"edgead exports {path.name} ...")
    trunk, head = export_programs(modules.trunk, modules.head, modules.spec)
    pack = modules.pack("part", arrays, Calibration(NEVER, typical=NEVER / 2))
    detector = FittedDetector(modules.spec, trunk, head, pack, frames[:2], {"method": modules.spec.method})
    return exported(detector, path, tuple(ENGINES))


def _measure(
    peer: PeerProcess,
    work: Path,
    bundles: dict[str, Bundle],
    model: dict[str, Any],
    frames: Frame,
    rounds: int,
    repeats: int,
) -> dict[str, Any]:
    precisions = {}
    for name, (kind, file) in PEERS.items():
        precisions[name] = peer.ask("load", name=name, kind=kind, path=model[file], threads=THREADS)["precision"]
    inspectors = {
        f"{method}, {title}": Inspector(bundle, target=target, threads=THREADS)
        for method, bundle in bundles.items()
        for target, title in ENGINES.items()
    }
    times: dict[str, list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = {}
    for number in range(rounds):
        note(f"round {number + 1} of {rounds} ...")
        for name in PEERS:
            time.sleep(PAUSE)
            answer = peer.ask("time", name=name, images=work / "frames.npy", repeats=repeats, warm=1)
            times[name] += answer["milliseconds"]
            scores[name] = answer["scores"]
        for name, inspector in inspectors.items():
            time.sleep(PAUSE)
            inspector.inspect(frames[0])
            results = [inspector.inspect(frames[place % len(frames)]) for place in range(repeats)]
            times[name] += [result.timings["total"] for result in results]
            scores[name] = [float(result.score or 0.0) for result in results]
    for inspector in inspectors.values():
        inspector.close()
    reference = np.array(scores["peer EfficientAD, bare ONNX Runtime"])
    off = {
        name: float((np.abs(np.array(values) - reference) / np.abs(reference)).max())
        for name, values in scores.items()
        if "SimpleNet" not in name
    }
    exact = [name for name in off if precisions.get(name) != "<Type: 'bfloat16'>"]
    return {
        "ms": {name: median(values) for name, values in times.items()},
        "fastest_ms": {name: min(values) for name, values in times.items()},
        "frames": rounds * repeats,
        "score_off": off,
        "precision": precisions,
        "same_scores": all(off[name] <= SAME for name in exact),
        "peer_export": {key: model[key] for key in ("seconds", "bytes")},
    }


def _show(found: dict[str, Any]) -> None:
    ours = found["ms"]["edgead EfficientAD, OpenVINO"]
    lines = [
        [name, value, found["fastest_ms"][name], value / ours, found["score_off"].get(name)]
        for name, value in found["ms"].items()
    ]
    print(f"\n{SIZE}x{SIZE}, {THREADS} threads, medians of {found['frames']} frames, random weights")
    print(table(["", "ms", "fastest", "of edgead's", "score off by"], lines))
    print(f"the peer's inferencer chose {found['precision']['peer EfficientAD, OpenVINOInferencer']} here;")
    print(f"the EfficientADs' scores {'agree' if found['same_scores'] else 'DIFFER'}")


if __name__ == "__main__":
    raise SystemExit(main())
