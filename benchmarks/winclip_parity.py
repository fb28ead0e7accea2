"""The same vision-language model and images as a peer (anomalib's WinCLIP): the same scores and maps?

    python -m benchmarks winclip-parity --peer-python .venv-peer/bin/python

The model is the one that the peer is built on, ViT-B-16-plus-240, with random weights from a seed that both load from
one file. Compared for 0 and 4 reference pictures: the embeddings of prompts and windows, the references' banks, the
harmonic means of every scale, image scores and maps, through torch and through the engines. Exit code 1 if anything
is off by more than 1e-4, as a share of the range of the peer's values too, so that a flat map proves nothing; that of
an image score is its map's, as two scores may happen to be close.

The peer averages a class's prompts as they come; edgead's table holds them at length 1, as CLIP's authors do. The
comparison puts the peer's averages into the table; how far the usual table moves the scores is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import PEER, Frame, exported, note, painted, peer_environment, report, table
from edgead.detector_file import FittedDetector, export_programs, weights_digest
from edgead.runtime.engines import open_engine
from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import Calibration, Preprocessing
from edgead.server_side.detectors.text_heads import HarmonicWindows, anomalous_share, association
from edgead.server_side.detectors.winclip import SCALES, TEMPERATURE, reference_banks, winclip_modules
from edgead.server_side.learned import Modules
from edgead.server_side.vision_language import VisionLanguageModel, encode_texts, load_model, tower_of

LIMIT = 1e-4
SEED = 20261
SHOTS = 4
CLASS_NAME = "flange"
MODEL = "ViT-B-16-plus-240"
TARGETS = ("onnx", "openvino")
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
"""The model of the recorded answers."""

KINDS = {0: "zero", SHOTS: "few"}
"""Reference pictures -> the peer's name of the answers."""
UNDECIDED = Calibration(threshold=2.0, typical=1.0)
"""No threshold is of interest here; a decision far from every score keeps the parity gate on numbers."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Comparison:
    """One quantity against the peer's: the largest difference, and that as a share of the peer's range."""

    engine: str
    quantity: str
    difference: float
    of_range: float

    @property
    def ok(self) -> bool:
        return max(self.difference, self.of_range) <= LIMIT


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgead-winclip-") as scratch:
        folder = Path(scratch)
        small = options.record is not None
        config = folder / f"{'tiny-winclip' if small else 'shared-winclip'}.json"
        config.write_text(json.dumps(TINY if small else _built_in(MODEL)))
        model = lively(load_model(str(config), "random:0"), options.seed)
        frames = parts(options.images + SHOTS, model.size[0], options.seed)
        images, shots = frames[: options.images], frames[options.images :]
        note("asking the peer ...")
        versions = _peer(options.peer_python, model, config, images, shots, folder / "peer.npz")
        with np.load(folder / "peer.npz") as file:
            peer = dict(file)
        if small:
            _record(options.record, peer, model, images, shots, options.seed)
            return 0
        targets = [target for target in options.targets.split(",") if target]
        comparisons, usual = _compare(model, peer, images, shots, targets, folder)
    rows = [[c.engine, c.quantity, c.difference, c.of_range, LIMIT, "ok" if c.ok else "OFF"] for c in comparisons]
    print(f"{len(images)} images, {SHOTS} references, {MODEL} with random weights; {versions}")
    print(table(["engine", "quantity", "off by", "of its range", "allowed", ""], rows))
    print(f"(prompts averaged at length 1, as a table holds them, move zero-shot scores by {usual:.2e})")
    good = all(c.ok for c in comparisons)
    print("equal to the peer" if good else "NOT equal to the peer")
    figures = {"equal": good, "peer": versions, "comparisons": [vars(c) for c in comparisons], "usual_table": usual}
    report("winclip-parity", figures, options.json)
    return 0 if good else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks winclip-parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="interpreter of an environment with anomalib and open_clip"
    )
    parser.add_argument("--images", type=int, default=2, help="pictures to compare")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="engines beside torch, comma-separated; may be empty"
    )
    parser.add_argument("--record", type=Path, help="write the small data of the tests instead")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def _built_in(name: str) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def lively(model: VisionLanguageModel, seed: int) -> VisionLanguageModel:
    """`model` with seeded weights under which pictures, windows and prompts differ, which fresh ones hardly do.

    Drawn by numpy, whose streams stay the same from version to version.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.module.named_parameters()):
            if name == "logit_scale":
                continue
            drawn = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
            inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * drawn)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * drawn)
            else:
                parameter.copy_(drawn * (1.0 if "embedding" in name else inputs**-0.5))
    return model


def parts(count: int, size: int, seed: int) -> Frame:
    """Painted parts, every second one with a defect, uint8 [count, size, size, 3]."""
    good, bad = painted(count, size=size, seed=seed), painted(count, size=size, seed=seed + 1, defects=True)
    return np.stack([bad[place] if place % 2 == 0 else good[place] for place in range(count)])


def _peer(python: Path, model: VisionLanguageModel, config: Path, images: Frame, shots: Frame, answer: Path) -> str:
    """Run the peer's side and return the line it prints."""
    from safetensors.torch import save_file

    weights, request = answer.with_name("weights.safetensors"), answer.with_name("request.npz")
    save_file({name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}, weights)
    np.savez(request, images=images, shots=shots, mean=model.mean, std=model.std, class_name=CLASS_NAME)
    command = [python.absolute(), PEER / "winclip_reference.py", request, config, weights, answer]
    done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"the peer's side failed ({done.returncode})")
    return done.stdout.strip().splitlines()[-1]


def _record(path: Path, peer: Arrays, model: VisionLanguageModel, images: Frame, shots: Frame, seed: int) -> None:
    kept = {name: array for name, array in peer.items() if not name.startswith("windows_")}
    about = {
        **json.loads(str(kept.pop("about"))),
        "seed": seed,
        "weights_sha256": weights_digest(model.module).hex(),
        "config": TINY,
        "class_name": CLASS_NAME,
        "command": "python -m benchmarks winclip-parity --record FILE",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about, sort_keys=True)), images=images, shots=shots, **kept)
    note(f"recorded {path} ({path.stat().st_size} bytes)")


def _compare(
    model: VisionLanguageModel, peer: Arrays, images: Frame, shots: Frame, targets: Sequence[str], folder: Path
) -> tuple[list[Comparison], float]:
    tower = tower_of(model)
    modules = winclip_modules(tower, Preprocessing(width=tower.size[1], height=tower.size[0]))
    note("embedding by torch ...")
    features, references = modules.embed_prepared(images), modules.embed_prepared(shots)
    texts = [str(text) for text in peer["text"]]
    rows = encode_texts(model, texts, progress=False)
    lengths = np.linalg.norm(peer["prompts"], axis=1, keepdims=True)
    banks = {0: reference_banks([], tower), SHOTS: reference_banks([references], tower)}
    found = [
        difference("torch", "prompt embeddings at length 1", rows, peer["prompts"] / lengths),
        difference("torch", "bank of patches", banks[SHOTS]["bank.patches"], peer["bank_patches"]),
    ]
    for scale in SCALES:
        found += _windows(scale, features, banks[SHOTS], peer, tower.grid)
    text = {"text.table": peer["classes"], "text.state": np.array([0.0, 1.0], np.float32)}
    usual = {"text.table": rows, "text.state": peer["state"]}
    packs = {count: modules.pack("part", {**banks[count], **text}, UNDECIDED) for count in banks}
    for count, name in KINDS.items():
        found += _answers("torch", count, modules.outputs(features, packs[count]), peer, name)
    if targets:
        found += _by_engines(modules, packs, images, peer, targets, folder)
    table_scores = modules.outputs(features, modules.pack("part", {**banks[0], **usual}))["score"]
    return found, float(np.abs(table_scores - peer["zero_score"]).max())


def _by_engines(
    modules: Modules, packs: Mapping[int, Pack], images: Frame, peer: Arrays, targets: Sequence[str], folder: Path
) -> list[Comparison]:
    """One export serves both packs: banks are knowledge."""
    found: list[Comparison] = []
    note("exporting ...")
    trunk, head = export_programs(modules.trunk, modules.head, modules.spec)
    detector = FittedDetector(modules.spec, trunk, head, packs[SHOTS], images, {})
    bundle = exported(detector, folder / "bundle", targets)
    for target in targets:
        note(f"running on {target} ...")
        with open_engine(bundle, target, threads=2) as engine, engine.trunk() as running:
            seen = [_copied(running.infer({"image": image[None]})) for image in images]
            for count, name in KINDS.items():
                with engine.head(packs[count]) as compared:
                    answers = [_copied(compared.infer(each)) for each in seen]
                joined = {key: np.concatenate([answer[key] for answer in answers]) for key in answers[0]}
                found += _answers(target, count, joined, peer, name)
    return found


def _windows(scale: int, features: Arrays, banks: Arrays, peer: Arrays, grid: tuple[int, int]) -> list[Comparison]:
    windows = torch.from_numpy(features[f"windows.{scale}"])
    bank = torch.from_numpy(banks[f"bank.windows.{scale}"])
    classes = torch.nn.functional.normalize(torch.from_numpy(peer["classes"]), dim=-1)
    harmonic = HarmonicWindows(grid, scale)
    by_text = harmonic(anomalous_share(windows, classes, TEMPERATURE))
    by_bank = harmonic(association(windows, bank, torch.tensor([len(bank)], dtype=torch.int32))[0])
    name = f"windows of {scale} x {scale}"
    return [
        difference("torch", f"{name}: embeddings", windows.numpy(), peer[f"windows_{scale}"]),
        difference("torch", f"{name}: bank", bank.numpy(), peer[f"bank_{scale}"]),
        difference("torch", f"{name}: harmonic mean by text", by_text.numpy(), peer[f"text_map_{scale}"]),
        difference("torch", f"{name}: harmonic mean by bank", by_bank.numpy(), peer[f"reference_map_{scale}"]),
    ]


def _copied(outputs: Arrays) -> dict[str, NDArray[Any]]:
    """An engine's outputs, which it writes over with the next frame."""
    return {name: array.copy() for name, array in outputs.items()}


def _answers(engine: str, count: int, outputs: Arrays, peer: Arrays, name: str) -> list[Comparison]:
    score, map_ = peer[f"{name}_score"], peer[f"{name}_map"]
    scale = float(map_.max() - map_.min())
    return [
        difference(engine, f"image score, {count} references", outputs["score"], score, scale),
        difference(engine, f"map, {count} references", outputs["anomaly_map"], map_),
    ]


def difference(
    engine: str, quantity: str, ours: NDArray[Any], theirs: NDArray[Any], scale: float | None = None
) -> Comparison:
    """Largest difference, of values that go beyond 1 as a share of the range, which is `scale` or the peer's."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"{quantity}: {ours.shape} here, {theirs.shape} at the peer")
    off = float(np.abs(ours.astype(np.float64) - theirs).max())
    scale = float(theirs.max() - theirs.min()) if scale is None else scale
    return Comparison(engine, quantity, off / max(scale, 1.0), off / scale)


if __name__ == "__main__":
    raise SystemExit(main())
