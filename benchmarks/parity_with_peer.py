"""The same network, bank and images as a peer (anomalib's PatchCore): the same maps, scores and rows?

    python -m benchmarks parity --peer-python .venv-peer/bin/python

Exit code 1 if anything is off. Compared before smoothing: the peer upsamples its map by nearest neighbour and
blurs it with sigma 4 pixels, edgead upsamples bilinearly and blurs with the same sigma.

The peer computes distances as sqrt(|f|^2 + |b|^2 - 2 f.b) in float32, which cancels where they are small against
the rows themselves, and is then off from its own code in float64 by about the limit. So each figure is given
against both, and judged against the float64 run, or the float32 one where that is nearer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import (
    PEER,
    Frame,
    bank_detector,
    embeddings,
    exported,
    note,
    painted,
    peer_environment,
    report,
    table,
)
from edgead.detector_file import FittedDetector
from edgead.runtime.engines import open_engine
from edgead.runtime.image import list_images, prepare, read_image
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.memory_bank import MemoryBankTrunk

LIMIT = 1e-4
"""Largest difference allowed, as a share of the range of the peer's values."""
TARGETS = ("onnx", "openvino")
SIZE = 256
RECORD_SEED = 20260


@dataclass(frozen=True)
class Comparison:
    """One quantity by one engine, against the peer's."""

    engine: str
    quantity: str
    difference: float
    """Largest absolute difference as a share of the range; for rows the share that decided otherwise."""
    from_exact: float | None
    """The same against the peer's code run in float64, where there is such a run."""
    ok: bool


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    if options.record is not None:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        _peer(options.peer_python, "record", str(options.seed), options.record)
        note(f"recorded {options.record} ({options.record.stat().st_size} bytes)")
        return 0
    with tempfile.TemporaryDirectory(prefix="edgead-parity-") as scratch:
        folder = Path(scratch)
        normals, images = _images(options.data, options.images, options.seed)
        np.savez(folder / "request.npz", normals=normals, images=images, rows=options.rows, seed=options.seed)
        note("asking the peer ...")
        weights = folder / "resnet18.safetensors"
        versions = _peer(options.peer_python, "compare", folder / "request.npz", folder / "peer.npz", weights)
        with np.load(folder / "peer.npz") as file:
            peer = dict(file)
        comparisons = _compare(peer, images, load_backbone("resnet18", weights=weights), folder)
    rows = [[c.engine, c.quantity, c.difference, c.from_exact, LIMIT, "ok" if c.ok else "OFF"] for c in comparisons]
    print(f"{len(images)} images, bank of {len(peer['bank'])} rows, 'resnet18' layer2 and layer3; {versions}")
    head = ["engine", "quantity", "off by, of range", "from its float64", "allowed", ""]
    print(table(head, rows))
    own = _share(peer["patch_score"], peer["exact_patch_score"], peer)
    print(f"(the peer's own patch scores in float32 are {own:.2e} of the range off from its float64 ones)")
    good = all(c.ok for c in comparisons)
    print("equal" if good else "NOT equal", "to the peer before smoothing (the peer upsamples by nearest")
    print("neighbour and edgead bilinearly; both then blur with sigma 4, so smoothed maps differ by design)")
    figures = {"equal": good, "peer": versions, "comparisons": [vars(c) for c in comparisons]}
    report("parity", figures, options.json)
    return 0 if good else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks parity", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="interpreter of an environment with anomalib[openvino]"
    )
    parser.add_argument("--data", type=Path, help="a folder of pictures instead of painted ones")
    parser.add_argument("--images", type=int, default=6, help="pictures to compare (half as many make the bank)")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the bank")
    parser.add_argument("--seed", type=int, default=RECORD_SEED)
    parser.add_argument("--record", type=Path, help="write the small data of the tests instead")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def _peer(python: Path, *arguments: str | Path) -> str:
    """Run the peer's side and return the line it prints."""
    command = [python.absolute(), PEER / "patchcore_reference.py", *arguments]
    done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"the peer's side failed ({done.returncode})")
    return done.stdout.strip().splitlines()[-1]


def _images(data: Path | None, count: int, seed: int) -> tuple[Frame, Frame]:
    """Engine-sized frames for the bank and for the comparison, uint8 [G, 256, 256, 3]."""
    normals = max(2, count // 2)
    if data is None:
        return painted(normals, seed=seed), painted(count, seed=seed + 1, defects=True)
    paths = list_images(data)
    if len(paths) < normals + count:
        raise SystemExit(f"{normals + count} pictures wanted, {len(paths)} in {data}")
    chosen = np.random.default_rng(seed).permutation(len(paths))[: normals + count]
    spec = Preprocessing(SIZE, SIZE)
    frames = np.concatenate([prepare(read_image(paths[place]), spec) for place in chosen])
    return frames[:normals], frames[normals:]


def _compare(peer: dict[str, NDArray[Any]], images: Frame, backbone: Backbone, folder: Path) -> list[Comparison]:
    embedded = embeddings(MemoryBankTrunk(backbone).eval(), images)
    found = [_embeddings("torch", embedded, peer["embedding"])]
    # No threshold is of interest here; a decision far from every score keeps the parity gate on numbers.
    far = float(peer["patch_score"].max()) * 2
    for neighbours in (0, 9):
        detector = bank_detector(backbone, peer["bank"], images, threshold=far, neighbours=neighbours, smooth=False)
        found += _check("torch", _by_torch(detector, images), peer, neighbours)
        note(f"exporting with {neighbours or 1} neighbours ...")
        bundle = exported(detector, folder / f"bundle-{neighbours}", TARGETS)
        for target in TARGETS:
            with open_engine(bundle, target, threads=2) as engine:
                trunk, head = engine.trunk(), engine.head(bundle.pack())
                answers = []
                for image in images:
                    features = trunk.infer({"image": image[None]})
                    outputs = {name: array.copy() for name, array in head.infer(features).items()}
                    answers.append({**outputs, "patches": features["patches"].copy()})
            joined = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
            if not neighbours:
                found.append(_embeddings(target, joined["patches"], peer["embedding"]))
            found += _check(target, joined, peer, neighbours)
    return found


def _by_torch(detector: FittedDetector, images: Frame) -> dict[str, NDArray[Any]]:
    trunk, head = detector.trunk.module(), detector.head.module()
    knowledge = [torch.tensor(array) for array in head_feeds(detector.pack, detector.spec).values()]
    answers = []
    with torch.inference_mode():
        for image in images:
            answers.append(head(*trunk(torch.from_numpy(image[None].copy())), *knowledge))
    names = [port.name for port in detector.spec.outputs]
    return {name: torch.cat([a[place] for a in answers]).numpy() for place, name in enumerate(names)}


def _check(
    engine: str, ours: dict[str, NDArray[Any]], peer: dict[str, NDArray[Any]], neighbours: int
) -> list[Comparison]:
    if neighbours:
        return [_score(engine, "image score, 9 neighbours", ours["score"], peer, "score_9")]
    patch_score = ours["anomaly_map"].reshape(len(ours["anomaly_map"]), -1)
    return [
        _score(engine, "patch scores (map before smoothing)", patch_score, peer, "patch_score"),
        _score(engine, "image score, 1 neighbour", ours["score"], peer, "score_1"),
        _rows(engine, ours["nearest_row"], peer),
    ]


def _embeddings(engine: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Comparison:
    difference = float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))
    return Comparison(engine, "patch embeddings", difference, None, difference <= LIMIT)


def _score(engine: str, quantity: str, ours: NDArray[Any], peer: dict[str, NDArray[Any]], name: str) -> Comparison:
    difference, from_exact = (_share(ours, peer[prefix + name], peer) for prefix in ("", "exact_"))
    return Comparison(engine, quantity, difference, from_exact, min(difference, from_exact) <= LIMIT)


def _share(ours: NDArray[Any], theirs: NDArray[Any], peer: dict[str, NDArray[Any]]) -> float:
    """Largest difference as a share of the range of the peer's map."""
    scale = float(peer["patch_score"].max() - peer["patch_score"].min())
    return float(np.abs(ours.astype(np.float64) - theirs).max()) / scale


def _rows(engine: str, ours: NDArray[Any], peer: dict[str, NDArray[Any]]) -> Comparison:
    """Another row is right where it lies as near as the peer's, within the limit: rounding decides ties."""
    bank, embedding = peer["bank"].astype(np.float64), peer["embedding"].astype(np.float64)
    scale = float(peer["patch_score"].max() - peer["patch_score"].min())
    images, patches = np.nonzero(ours != peer["nearest"])
    patch = embedding[images, patches]
    mine = np.linalg.norm(patch - bank[ours[images, patches]], axis=-1)
    theirs = np.linalg.norm(patch - bank[peer["nearest"][images, patches]], axis=-1)
    wrong = int((np.abs(mine - theirs) > LIMIT * scale).sum())
    ties = len(images) - wrong
    name = f"nearest rows ({ties} ties decided otherwise)" if ties else "nearest rows"
    return Comparison(engine, name, wrong / ours.size, None, wrong == 0)


if __name__ == "__main__":
    raise SystemExit(main())
