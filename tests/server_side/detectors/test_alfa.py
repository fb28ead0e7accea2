"""ALFA's scoring, aligner and maps against float64 references written from the equations; engines and knowledge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.runtime import Inspector
from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.knowledge import new_pack
from edgead.runtime.notes import encode_note, read_note
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors import alfa
from edgead.server_side.detectors.alfa import (
    AlfaHead,
    AlfaTrunk,
    aligned_likeness,
    contextual_scores,
    contextual_weights,
)
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.vision_language import VisionLanguageModel, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

Array = NDArray[np.float64]
E, D, GRID, SIZE = 12, 7, (4, 5), (32, 40)
TAU = 0.07


def unit(rows: Array) -> Array:
    made: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def t32(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def count(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@pytest.fixture
def sample() -> dict[str, Array]:
    rng = np.random.default_rng(4)
    image = unit(rng.normal(size=(2, E)))
    table = unit(rng.normal(size=(9, E)) + 0.8 * image.mean(0))
    return {
        "image": image,
        "table": table,
        "state": np.array([0, 1, 0, 1, 1, 0, 1, 0, 1.0]),
        "windows_2": unit(rng.normal(size=(2, 12, E)) + 0.3 * image[:, None]),
        "windows_3": unit(rng.normal(size=(2, 6, E)) + 0.3 * image[:, None]),
        "patches": rng.normal(size=(2, 20, D)),
        "bank": rng.normal(size=(11, D)),
        "bank_2": rng.normal(size=(8, E)),
        "bank_3": rng.normal(size=(5, E)),
    }


def reference_scores(image: Array, table: Array, state: Array) -> Array:
    """[B, T] by loops over the definition."""
    found = np.zeros((len(image), len(table)))
    for b, v in enumerate(image):
        d = 1 - table @ v
        ends = [(d[state == s].min(), d[state == s].max()) for s in (0, 1)]
        for t, own in enumerate(d):
            outside = [max(low - own, own - high, 0.0) for low, high in ends]
            gap = abs(outside[0] - outside[1])
            found[b, t] = gap / (gap + np.exp(-gap))
    return found


def reference_classes(sample: dict[str, Array]) -> Array:
    scores = reference_scores(sample["image"], sample["table"], sample["state"])
    classes = []
    for own in scores:
        for s in (0, 1):
            weight = own * (sample["state"] == s)
            weight = weight if weight.sum() > 0 else (sample["state"] == s).astype(float)
            classes.append(unit(weight @ sample["table"]))
    return np.array(classes).reshape(-1, 2, E)


def reference_shares(windows: Array, image: Array, classes: Array) -> Array:
    """[B, W], with W formed for every window."""
    found = np.zeros(windows.shape[:2])
    for b, v in enumerate(image):
        for w, local in enumerate(windows[b]):
            matrix = np.eye(E) + np.outer(local - v, v)
            np.testing.assert_allclose(matrix @ v, local, atol=1e-12)
            cosines = [unit(matrix @ c) @ local for c in classes[b]]
            found[b, w] = 1 / (1 + np.exp((cosines[0] - cosines[1]) / TAU))
    return found


def harmonic(scores: Array, scale: int) -> Array:
    rows, columns = GRID[0] - scale + 1, GRID[1] - scale + 1
    found = np.zeros((len(scores), *GRID))
    for b, own in enumerate(scores.reshape(-1, rows, columns)):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                around = own[max(0, y - scale + 1) : y + 1, max(0, x - scale + 1) : x + 1]
                found[b, y, x] = around.size / (1 / around).sum()
    return found


def nearest(features: Array, bank: Array) -> Array:
    found: Array = (1 - (unit(features) @ unit(bank).T).max(-1)) / 2
    return found


def run(sample: dict[str, Array], *, few: bool, pad: int = 0, filler: float = 0.0) -> dict[str, NDArray[np.float32]]:
    def padded(rows: Array) -> torch.Tensor:
        return t32(np.concatenate([rows, np.full((pad, *rows.shape[1:]), filler)]))

    banks: list[torch.Tensor] = []
    for name in ("bank", "bank_2", "bank_3"):
        rows = sample[name] if few else sample[name][:1] * 0
        banks += [padded(rows), count(len(rows) if few else 0)]
    features = [t32(sample[name]) for name in ("image", "windows_2", "windows_3", "patches")]
    with torch.inference_mode():
        outputs = AlfaHead(GRID, SIZE).eval()(
            *features, *banks, padded(sample["table"]), count(len(sample["table"])), padded(sample["state"])
        )
    names = ("score", "anomaly_map", "nearest_row", "evidence")
    return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


def test_contextual_scores_are_their_equation(sample: dict[str, Array]) -> None:
    wanted = reference_scores(sample["image"], sample["table"], sample["state"])
    assert (wanted == 0).any()
    assert (wanted > 0.01).any()
    found = contextual_scores(t32(sample["image"]), t32(sample["table"]), count(9), t32(sample["state"]))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_prompt_that_fits_both_classes_is_dropped() -> None:
    # Distances to the image 0.1, 0.3 normal; 0.2, 0.6 anomalous: 0.3 lies in the anomalous interval, 0.2 in the other.
    angles = np.arccos(1 - np.array([0.1, 0.3, 0.2, 0.6]))
    table = t32(np.stack([np.cos(angles), np.sin(angles)], 1))
    image, state = t32(np.array([[1.0, 0.0]])), t32(np.array([0, 0, 1, 1.0]))
    scores = contextual_scores(image, table, count(4), state)[0].numpy()
    gaps = np.array([0.1, 0.0, 0.0, 0.3])
    np.testing.assert_allclose(scores, gaps / (gaps + np.exp(-gaps)), atol=1e-6)
    assert scores[1] == scores[2] == 0
    weights = contextual_weights(contextual_scores(image, table, count(4), state), table, count(4), state)
    np.testing.assert_allclose(weights[0].numpy(), [[1, 0, 0, 0], [0, 0, 0, 1]], atol=1e-6)


def test_where_all_prompts_of_a_class_are_ambiguous_all_of_them_count_alike() -> None:
    angles = np.arccos(1 - np.array([0.3, 0.4, 0.2, 0.6]))
    table = t32(np.stack([np.cos(angles), np.sin(angles)], 1))
    image, state = t32(np.array([[1.0, 0.0]])), t32(np.array([0, 0, 1, 1.0]))
    weights = contextual_weights(contextual_scores(image, table, count(4), state), table, count(4), state)[0]
    np.testing.assert_allclose(weights[0].numpy(), [0.5, 0.5, 0, 0], atol=1e-6)
    assert (weights[1] > 0).tolist() == [False, False, True, True]


def test_the_aligner_is_the_identity_where_the_window_is_the_image(sample: dict[str, Array]) -> None:
    image, classes = t32(sample["image"]), t32(reference_classes(sample))
    found = aligned_likeness(image.unsqueeze(1), image, classes)
    torch.testing.assert_close(found, image.unsqueeze(1) @ classes.transpose(1, 2))


@pytest.mark.parametrize("few", [False, True])
def test_score_and_map_are_the_equations(sample: dict[str, Array], few: bool) -> None:
    classes = reference_classes(sample)
    difference = np.einsum("be,be->b", sample["image"], classes[:, 1] - classes[:, 0])
    whole = 1 / (1 + np.exp(-difference / TAU))
    maps = [harmonic(reference_shares(sample[f"windows_{k}"], sample["image"], classes), k) for k in (2, 3)]
    local = 2 / (1 / maps[0] + 1 / maps[1])
    score = (whole + local.max((1, 2))) / 2
    if few:
        references = [nearest(sample["patches"], sample["bank"]).reshape(-1, *GRID)]
        references += [harmonic(nearest(sample[f"windows_{k}"], sample[f"bank_{k}"]), k) for k in (2, 3)]
        mean = np.mean(references, axis=0)
        local, score = (local + mean) / 2, (score + mean.max((1, 2))) / 2
    outputs = run(sample, few=few)
    np.testing.assert_allclose(outputs["score"], score, rtol=2e-5)
    up = torch.nn.functional.interpolate(torch.tensor(local)[:, None], size=SIZE, mode="bilinear")[:, 0]
    np.testing.assert_allclose(outputs["anomaly_map"], up.numpy(), rtol=2e-5)
    if few:
        likeness = unit(sample["patches"]) @ unit(sample["bank"]).T
        np.testing.assert_array_equal(outputs["nearest_row"], likeness.argmax(-1))


@pytest.mark.parametrize("filler", [0.0, 1e4])
@pytest.mark.parametrize("few", [False, True])
def test_padded_rows_change_nothing(sample: dict[str, Array], few: bool, filler: float) -> None:
    exact, padded = run(sample, few=few), run(sample, few=few, pad=6, filler=filler)
    for name in ("score", "anomaly_map"):
        np.testing.assert_allclose(padded[name], exact[name], rtol=1e-5)
    if few:
        np.testing.assert_array_equal(padded["nearest_row"], exact["nearest_row"])
    np.testing.assert_allclose(padded["evidence"][:, :9], exact["evidence"], atol=1e-6)
    assert (padded["evidence"][:, 9:] == -1).all()


def test_the_strongest_evidence_are_the_descriptors_most_like_the_image(sample: dict[str, Array]) -> None:
    outputs = run(sample, few=False)
    kept = reference_scores(sample["image"], sample["table"], sample["state"]) > 0
    for s in (0, 1):  # where a class has nothing left, all of it counts
        kept |= (sample["state"] == s) & ~(kept & (sample["state"] == s)).any(1, keepdims=True)
    likeness = np.where(kept, sample["image"] @ sample["table"].T, -np.inf)
    for evidence, wanted, number in zip(outputs["evidence"], likeness, kept.sum(1), strict=True):
        top = min(5, int(number))
        np.testing.assert_array_equal(np.argsort(-evidence)[:top], np.argsort(-wanted)[:top])


def test_a_window_is_the_mean_of_its_patches_values(tiny_clip: VisionLanguageModel, frame: NDArray[np.uint8]) -> None:
    tower = tower_of(tiny_clip)
    with torch.inference_mode():
        values = tower(torch.from_numpy(frame[None]), values=True).values
        found = AlfaTrunk(tower)(torch.from_numpy(frame[None]))
    assert values is not None
    grid = values[0].double().numpy().reshape(6, 6, -1)
    for scale, windows in zip((2, 3), found[1:3], strict=True):
        side = 6 - scale + 1
        for place in (0, side + 1, side * side - 1):
            y, x = divmod(place, side)
            wanted = unit(grid[y : y + scale, x : x + scale].mean((0, 1)))
            np.testing.assert_allclose(windows[0, place].numpy(), wanted, atol=1e-5)


@pytest.fixture(scope="module")
def learned(tiny_options: VisionLanguageOptions, painted_normals: Path) -> Learned:
    return alfa.learn(sorted(painted_normals.iterdir()), dataclasses.replace(tiny_options, shots=2))


@pytest.fixture(scope="module")
def bundle(learned: Learned, bundle_of: Callable[[Learned, str], Path]) -> Path:
    return bundle_of(learned, "alfa")


def test_learning_makes_prompts_banks_and_a_threshold(learned: Learned) -> None:
    pack = learned.pack
    assert len(pack.arrays["text.table"]) == 72
    assert len(pack.arrays["bank.patches"]) == 2 * 36
    assert len(pack.arrays["bank.windows.3"]) == 2 * 16
    assert pack.calibration.held_out == 10
    assert learned.card["score_is_map_maximum"] is False
    assert len(read_note(pack, "text.table")["rows"]) == 72


def test_without_photographs_it_learns_from_sentences_alone(tiny_options: VisionLanguageOptions) -> None:
    found = alfa.learn([], tiny_options)
    assert len(found.pack.arrays["bank.patches"]) == 0
    assert found.pack.calibration.threshold == 0.5


def test_pictures_of_defects_are_refused(tiny_options: VisionLanguageOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures of defects"):
        alfa.learn([], tiny_options, [(tmp_path / "dent.png", None)])


def test_a_tower_of_few_patches_has_no_windows(tiny_clip: VisionLanguageModel) -> None:
    tower = tower_of(tiny_clip)
    tower.grid = (2, 2)
    with pytest.raises(BackboneError, match="windows of 1 to 2 patches"):
        alfa.alfa_modules(tower, Preprocessing(48, 48))


def test_every_target_takes_it_and_a_sentence_changes_the_next_frame(
    bundle: Path, learned: Learned, as_modules: Callable[[Learned], Modules]
) -> None:
    frame = learned.golden[1]
    modules = as_modules(learned)
    arrays = dict(learned.pack.arrays)
    # Random weights put all sentences on one side of all pictures, and an ambiguous one would change nothing: this
    # row stands for a sentence that says just what this frame shows.
    said = modules.embed_prepared(frame[None])["global"]
    note = read_note(learned.pack, "text.table")
    note["rows"].append({"text": "An industrial image of a flange with a blue blot", "state": "anomalous"})
    arrays["text.table"] = np.concatenate([arrays["text.table"], said])
    arrays["text.state"] = np.append(arrays["text.state"], np.float32(1))
    arrays["text.table.text"] = encode_note(note)
    taught = new_pack(
        product=learned.pack.product,
        fingerprint=learned.pack.fingerprint,
        calibration=learned.pack.calibration,
        arrays=arrays,
    )
    for target in ("onnx", "openvino"):
        with Inspector(bundle, target=target) as inspector:
            before = inspector.inspect(frame).score
            inspector.swap(taught)
            after = inspector.inspect(frame).score
        assert after > before + 0.1
        for pack, score in ((learned.pack, before), (taught, after)):
            wanted = modules.outputs(modules.embed_prepared(frame[None]), pack)["score"][0]
            np.testing.assert_allclose(score, wanted, rtol=1e-4)
