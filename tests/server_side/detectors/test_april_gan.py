"""APRIL-GAN's head against float64 references; trunk, fitting, engines and knowledge that changes the next frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.detector_file import weights_digest
from edgead.runtime import Inspector
from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.image import encode_png
from edgead.runtime.knowledge import new_pack
from edgead.runtime.notes import encode_note, read_note
from edgead.server_side.detectors import april_gan
from edgead.server_side.detectors.april_gan import AprilGanHead, AprilGanTrunk, Score
from edgead.server_side.detectors.projection_training import TrainingOptions
from edgead.server_side.detectors.projections import new_projections, write_projections
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.prompts import april_gan as april_gan_prompts
from edgead.server_side.prompts import write_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel, encode_texts, tower_of
from edgead.server_side.vision_language.options import VisionLanguageOptions

Array = NDArray[np.float64]
E = 12
GRIDS, WIDTHS, SIZE = ((4, 4), (2, 3)), (7, 9), (32, 24)


def unit(rows: Array) -> Array:
    made: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def t32(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def count(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


@dataclasses.dataclass
class Sample:
    image: Array
    projected: list[Array]
    tokens: list[Array]
    banks: list[Array]
    table: Array
    state: Array


@pytest.fixture
def sample() -> Sample:
    rng = np.random.default_rng(0)
    counts = [rows * columns for rows, columns in GRIDS]
    return Sample(
        image=unit(rng.normal(size=(2, E))),
        # Short of the full spread, so that a softmax of 100 cosines is not all 0 and 1.
        projected=[unit(rng.normal(size=(2, n, E)) * 0.05 + np.eye(E)[0]) for n in counts],
        tokens=[unit(rng.normal(size=(2, n, width))) for n, width in zip(counts, WIDTHS, strict=True)],
        banks=[unit(rng.normal(size=(10 + width, width))) for width in WIDTHS],
        table=unit(rng.normal(size=(7, E)) * 0.05 + np.eye(E)[1]),
        state=np.array([0, 1, 0, 1, 1, 0, 1.0]),
    )


def run(
    sample: Sample,
    score: Score,
    *,
    with_banks: tuple[bool, bool] = (False, False),
    pad: int = 0,
    filler: float = 0.0,
) -> dict[str, NDArray[np.float32]]:
    def padded(rows: Array) -> torch.Tensor:
        return t32(np.concatenate([rows, np.full((pad, *rows.shape[1:]), filler)]))

    inputs = [t32(sample.image), *map(t32, sample.projected), *map(t32, sample.tokens)]
    for bank, there in zip(sample.banks, with_banks, strict=True):
        inputs += [padded(bank if there else bank[:1] * 0), count(len(bank) if there else 0)]
    inputs += [padded(sample.table), count(len(sample.table)), padded(sample.state)]
    with torch.inference_mode():
        outputs = AprilGanHead(GRIDS, SIZE, score).eval()(*inputs)
    names = ("score", "anomaly_map", "nearest_row", "evidence")
    return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


def share(features: Array, sample: Sample) -> Array:
    classes = unit(np.stack([sample.table[sample.state == s].mean(0) for s in (0, 1)]))
    odds = np.exp(100 * features @ classes.T)
    found: Array = odds[..., 1] / odds.sum(-1)
    return found


def upsampled(values: Array, grid: tuple[int, int]) -> Array:
    found: Array = torch.nn.functional.interpolate(
        torch.tensor(values.reshape(-1, 1, *grid)), size=SIZE, mode="bilinear", align_corners=False
    )[:, 0].numpy()
    return found


def reference(sample: Sample, with_banks: tuple[bool, bool]) -> Array:
    total = np.zeros((2, *SIZE))
    for place, grid in enumerate(GRIDS):
        values = share(sample.projected[place], sample)
        if with_banks[place]:
            values = values + 1 - (sample.tokens[place] @ sample.banks[place].T).max(-1)
        total += upsampled(values, grid)
    return total


@pytest.mark.parametrize("with_banks", [(False, False), (True, True), (True, False)])
def test_the_map_is_the_sum_over_layers_of_both_parts(sample: Sample, with_banks: tuple[bool, bool]) -> None:
    wanted = reference(sample, with_banks)
    outputs = run(sample, "map", with_banks=with_banks)
    np.testing.assert_allclose(outputs["anomaly_map"], wanted, atol=2e-5)
    np.testing.assert_allclose(outputs["score"], wanted.max((1, 2)), atol=2e-5)
    assert (outputs["score"] == outputs["anomaly_map"].max((1, 2))).all()
    if with_banks[0]:
        np.testing.assert_array_equal(outputs["nearest_row"], (sample.tokens[0] @ sample.banks[0].T).argmax(-1))


def test_the_text_score_is_the_images_own_and_with_references_the_mean_with_the_map(sample: Sample) -> None:
    text = share(sample.image, sample)
    np.testing.assert_allclose(run(sample, "text")["score"], text, atol=1e-5)
    wanted = (text + reference(sample, (True, True)).max((1, 2)) / len(GRIDS)) / 2
    np.testing.assert_allclose(run(sample, "text", with_banks=(True, True))["score"], wanted, atol=1e-5)


def test_evidence_is_each_prompts_cosine_with_the_image(sample: Sample) -> None:
    np.testing.assert_allclose(run(sample, "map")["evidence"], sample.image @ sample.table.T, atol=1e-6)


@pytest.mark.parametrize("filler", [0.0, 1e4])
@pytest.mark.parametrize("score", ["text", "map"])
@pytest.mark.parametrize("there", [False, True])
def test_padded_rows_change_nothing(sample: Sample, there: bool, score: Score, filler: float) -> None:
    exact = run(sample, score, with_banks=(there, there))
    padded = run(sample, score, with_banks=(there, there), pad=5, filler=filler)
    for name in ("score", "anomaly_map"):
        np.testing.assert_allclose(padded[name], exact[name], atol=1e-5)
    np.testing.assert_allclose(padded["evidence"][:, :7], exact["evidence"], atol=1e-6)
    assert (padded["evidence"][:, 7:] == -1).all()
    if there:
        np.testing.assert_array_equal(padded["nearest_row"], exact["nearest_row"])


def test_the_trunk_projects_the_tapped_layers(tiny_clip: VisionLanguageModel, frame: NDArray[np.uint8]) -> None:
    tower = tower_of(tiny_clip)
    projections = new_projections((2, 4), (32, 32), 32, seed=1)
    trunk = AprilGanTrunk(tower, projections)
    with torch.inference_mode():
        found = trunk(torch.from_numpy(frame[None]))
        plain = tower(torch.from_numpy(frame[None]), taps=(2, 4))
    assert [port.name for port in trunk.features()] == ["global", "layer.2", "layer.4", "tokens.2", "tokens.4"]
    np.testing.assert_allclose(found[0].numpy(), unit(plain.pooled.double().numpy()), atol=1e-6)
    for place, layer in enumerate(plain.layers):
        weight, bias = (p.double().numpy() for p in projections.fc[place].parameters())
        np.testing.assert_allclose(found[1 + place].numpy(), unit(layer.double().numpy() @ weight.T + bias), atol=1e-5)
        np.testing.assert_allclose(found[3 + place].numpy(), unit(layer.double().numpy()), atol=1e-6)


@pytest.fixture(scope="module")
def options(
    tiny_options: VisionLanguageOptions, tiny_clip: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> VisionLanguageOptions:
    """With a file of projections for the layers 2 and 4."""
    path = tmp_path_factory.mktemp("projections") / "p.safetensors"
    write_projections(
        path, new_projections((2, 4), (32, 32), 32, seed=1), model=tiny_clip.name, weights=tiny_clip.weights_sha256
    )
    return dataclasses.replace(tiny_options, projections=path)


@pytest.fixture(scope="module")
def normals(painted_normals: Path) -> list[Path]:
    return sorted(painted_normals.iterdir())


@pytest.fixture(scope="module")
def learned(options: VisionLanguageOptions, normals: list[Path]) -> Learned:
    return april_gan.learn(normals, dataclasses.replace(options, shots=2), score="map")


@pytest.fixture(scope="module")
def bundle(learned: Learned, bundle_of: Callable[[Learned, str], Path]) -> Path:
    return bundle_of(learned, "april-gan")


def test_learning_makes_prompts_banks_and_a_threshold(learned: Learned) -> None:
    assert len(learned.pack.arrays["text.table"]) == 420
    assert [len(learned.pack.arrays[f"bank.layer.{layer}"]) for layer in (2, 4)] == [72, 72]
    assert learned.pack.calibration.held_out == 10
    assert learned.card["score_is_map_maximum"] is True
    assert learned.card["projections"]["layers"] == [2, 4]


def test_without_photographs_it_learns_from_sentences_alone(options: VisionLanguageOptions) -> None:
    text, own = april_gan.learn([], options), april_gan.learn([], options, score="map")
    assert [len(text.pack.arrays[bank]) for bank in text.pack.banks] == [0, 0]
    assert (text.pack.calibration.threshold, own.pack.calibration.threshold) == (0.5, 1.0)
    assert "embedding" in text.card["score"]


def test_when_all_photographs_are_shots_each_is_scored_without_its_own_rows(
    options: VisionLanguageOptions, normals: list[Path]
) -> None:
    found = april_gan.learn(normals[:3], dataclasses.replace(options, shots=3), score="map")
    assert found.pack.calibration.held_out == 3
    assert len(found.pack.arrays["bank.layer.2"]) == 3 * 36
    # With its own rows the few-shot part of the map would be 0.
    zero_shot = april_gan.learn(normals[:3], options, score="map")
    assert found.pack.calibration.typical > zero_shot.pack.calibration.typical


def test_projections_are_trained_where_none_are_named(tiny_options: VisionLanguageOptions, tmp_path: Path) -> None:
    masks = tmp_path / "metal_nut" / "ground_truth" / "hole"
    masks.mkdir(parents=True)
    for kind in ("good", "hole"):
        folder = tmp_path / "metal_nut" / "test" / kind
        folder.mkdir(parents=True)
        for number in range(3):
            picture = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            mask = np.zeros((48, 48, 3), np.uint8)
            if kind == "hole":
                picture[8:24, 8:24], mask[8:24, 8:24] = 0, 255
                (masks / f"{number}_mask.png").write_bytes(encode_png(mask))
            (folder / f"{number}.png").write_bytes(encode_png(picture))
    options = dataclasses.replace(tiny_options, auxiliary=tmp_path / "metal_nut", seed=7)
    opened = april_gan.open_trunk(options, TrainingOptions(epochs=2), tmp_path / "run.training")
    assert opened.facts["layers"] == [1, 2, 3, 4]
    assert opened.facts["auxiliary"].startswith("metal_nut: 6 pictures")
    assert opened.facts["epochs"] == 2
    assert opened.facts["options"]["seed"] == 7
    # Kept after each epoch: the same training goes on from there, and has nothing left to do.
    again = april_gan.open_trunk(options, TrainingOptions(epochs=2), tmp_path / "run.training")
    assert weights_digest(again.trunk) == weights_digest(opened.trunk)


def test_what_does_not_fit_the_model_is_refused(
    options: VisionLanguageOptions, tiny_options: VisionLanguageOptions, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match="those for tiny"):
        april_gan.learn([], dataclasses.replace(options, weights="random:4"))
    with pytest.raises(BackboneError, match="layers 1 to 4"):
        april_gan.learn([], dataclasses.replace(tiny_options, layers=(5,)))
    with pytest.raises(BackboneError, match="nothing there"):
        april_gan.learn([], dataclasses.replace(options, projections=tmp_path / "epoch_15.pth"))
    with pytest.raises(InputError, match="no pictures of defects"):
        april_gan.learn([], options, [(tmp_path / "dent.png", None)])


def test_an_edited_prompt_set_takes_the_place_of_the_ensemble(options: VisionLanguageOptions, tmp_path: Path) -> None:
    prompts = april_gan_prompts("flange").add(["a flange with a blue blot"], "anomalous")
    write_prompt_set(tmp_path / "flange.json", prompts)
    found = april_gan.learn([], dataclasses.replace(options, prompts=tmp_path / "flange.json"))
    assert read_note(found.pack, "text.table")["rows"][-1]["text"] == "a flange with a blue blot"


def test_every_target_takes_it_and_a_sentence_changes_the_next_frame(
    bundle: Path, learned: Learned, tiny_clip: VisionLanguageModel, as_modules: Callable[[Learned], Modules]
) -> None:
    frame = learned.golden[1]
    modules = as_modules(learned)
    arrays = dict(learned.pack.arrays)
    sentence = "a blurry photo of a flange with a blue blot"
    note = read_note(learned.pack, "text.table")
    note["rows"].append({"text": sentence, "state": "anomalous"})
    arrays["text.table"] = np.concatenate([arrays["text.table"], encode_texts(tiny_clip, [sentence])])
    arrays["text.state"] = np.append(arrays["text.state"], np.float32(1))
    arrays["text.table.text"] = encode_note(note)
    empty = {name: array[:0] if name.startswith("bank.") else array for name, array in arrays.items()}
    packs = [learned.pack]
    packs += [
        new_pack(
            product=learned.pack.product,
            fingerprint=learned.pack.fingerprint,
            calibration=learned.pack.calibration,
            arrays=changed,
        )
        for changed in (arrays, empty)
    ]
    for target in ("onnx", "openvino"):
        with Inspector(bundle, target=target) as inspector:
            scores = [inspector.inspect(frame).score]
            for pack in packs[1:]:
                inspector.swap(pack)
                scores.append(inspector.inspect(frame).score)
        assert len(set(scores)) == 3
        for pack, score in zip(packs, scores, strict=True):
            wanted = modules.outputs(modules.embed_prepared(frame[None]), pack)["score"][0]
            np.testing.assert_allclose(score, wanted, rtol=1e-4)
