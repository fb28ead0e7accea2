"""Our WinCLIP against recorded answers of a peer (anomalib's), for 0 and 4 reference pictures.

`python -m benchmarks winclip-parity --peer-python PYTHON --record tests/data/peer_winclip.npz` made the data; seed,
versions and the model's config are in it. `make parity` compares live, on ViT-B-16-plus-240 and through the engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.detector_file import weights_digest
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.text_heads import HarmonicWindows, anomalous_share, association
from edgead.server_side.detectors.winclip import SCALES, TEMPERATURE, reference_banks, winclip_modules
from edgead.server_side.learned import Modules
from edgead.server_side.vision_language import VisionLanguageModel, VisionTower, encode_texts, load_model, tower_of

RECORDED = Path(__file__).parents[2] / "data" / "peer_winclip.npz"
LIMIT = 1e-4
"""Absolute, and of the range of the peer's values."""

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def peer() -> Arrays:
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(peer: Arrays, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """The peer's model: its weights are drawn again from the seed, as `benchmarks.winclip_parity` does."""
    about = json.loads(str(peer["about"]))
    path = tmp_path_factory.mktemp("model") / "tiny-winclip.json"
    path.write_text(json.dumps(about["config"]))
    model = load_model(str(path), "random:0")
    rng = np.random.default_rng(about["seed"])
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
    assert weights_digest(model.module).hex() == about["weights_sha256"], "other weights than the peer's"
    return model


@pytest.fixture(scope="module")
def tower(model: VisionLanguageModel) -> VisionTower:
    return tower_of(model)


@pytest.fixture(scope="module")
def modules(tower: VisionTower) -> Modules:
    return winclip_modules(tower, Preprocessing(width=tower.size[1], height=tower.size[0]))


@pytest.fixture(scope="module")
def features(modules: Modules, peer: Arrays) -> Arrays:
    return modules.embed_prepared(peer["images"])


@pytest.fixture(scope="module")
def banks(modules: Modules, tower: VisionTower, peer: Arrays) -> Arrays:
    return reference_banks([modules.embed_prepared(peer["shots"])], tower)


def agree(ours: NDArray[Any], theirs: NDArray[Any], scale: float | None = None) -> None:
    assert ours.shape == theirs.shape
    off = float(np.abs(ours.astype(np.float64) - theirs).max())
    values = float(theirs.max() - theirs.min()) if scale is None else scale
    assert off / max(values, 1.0) <= LIMIT
    assert off / values <= LIMIT


def test_prompts_are_encoded_as_the_peer_encodes_them(model: VisionLanguageModel, peer: Arrays) -> None:
    lengths = np.linalg.norm(peer["prompts"], axis=1, keepdims=True)
    agree(encode_texts(model, [str(text) for text in peer["text"]], progress=False), peer["prompts"] / lengths)


def test_the_banks_of_four_references_are_the_peers(banks: Arrays, peer: Arrays) -> None:
    agree(banks["bank.patches"], peer["bank_patches"])
    for scale in SCALES:
        agree(banks[f"bank.windows.{scale}"], peer[f"bank_{scale}"])


@pytest.mark.parametrize("scale", SCALES)
def test_harmonic_means_over_windows_are_the_peers(
    scale: int, features: Arrays, peer: Arrays, tower: VisionTower
) -> None:
    windows = torch.from_numpy(features[f"windows.{scale}"])
    bank = torch.from_numpy(peer[f"bank_{scale}"])
    classes = torch.nn.functional.normalize(torch.from_numpy(peer["classes"]), dim=-1)
    harmonic = HarmonicWindows(tower.grid, scale)
    agree(harmonic(anomalous_share(windows, classes, TEMPERATURE)).numpy(), peer[f"text_map_{scale}"])
    count = torch.tensor([len(bank)], dtype=torch.int32)
    agree(harmonic(association(windows, bank, count)[0]).numpy(), peer[f"reference_map_{scale}"])


@pytest.mark.parametrize("name", ["zero", "few"])
def test_image_scores_and_maps_are_the_peers(
    name: str, modules: Modules, features: Arrays, banks: Arrays, tower: VisionTower, peer: Arrays
) -> None:
    # The peer averages prompts as they come; its averages stand in the table for them.
    text = {"text.table": peer["classes"], "text.state": np.array([0, 1], np.float32)}
    used = banks if name == "few" else reference_banks([], tower)
    outputs = modules.outputs(features, modules.pack("part", {**used, **text}))
    peers_map = peer[f"{name}_map"]
    agree(outputs["anomaly_map"], peers_map)
    agree(outputs["score"], peer[f"{name}_score"], scale=float(peers_map.max() - peers_map.min()))
    assert np.ptp(peers_map) > 0.02, "the comparison must have something to see"


def test_the_table_of_every_prompt_gives_the_peers_score_but_for_the_length_of_prompts(
    model: VisionLanguageModel, modules: Modules, features: Arrays, tower: VisionTower, peer: Arrays
) -> None:
    """Rows as long as the peer's give its score to the digit; rows at length 1, as a table has them, nearly do."""
    scores = []
    for rows in (peer["prompts"], encode_texts(model, [str(text) for text in peer["text"]], progress=False)):
        text = {"text.table": rows, "text.state": peer["state"]}
        outputs = modules.outputs(features, modules.pack("part", {**reference_banks([], tower), **text}))
        scores.append(outputs["score"])
    np.testing.assert_allclose(scores[0], peer["zero_score"], atol=1e-6)
    np.testing.assert_allclose(scores[1], peer["zero_score"], atol=0.02)
