"""NAND's suppression map against a float64 reference; its trunk, its knowledge, and engines that take both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.runtime import Inspector
from edgead.runtime.errors import InputError, PromptError
from edgead.runtime.knowledge import Pack
from edgead.runtime.notes import read_note
from edgead.server_side.detectors import april_gan, normality
from edgead.server_side.detectors.normality import NormalityHead, normality_arrays
from edgead.server_side.detectors.projections import new_projections, write_projections
from edgead.server_side.detectors.sentences import class_features, mean_feature, normality_row, normality_rows
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.prompts import normality as normality_prompts
from edgead.server_side.prompts import write_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel, encode_texts
from edgead.server_side.vision_language.options import VisionLanguageOptions

Array = NDArray[np.float64]
E, SIZE = 12, (32, 24)


def unit(rows: Array) -> Array:
    made: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def t32(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def run(
    layers: list[Array],
    grids: list[tuple[int, int]],
    table: Array,
    normal: Array,
    *,
    pad: int = 0,
    filler: float = 0.0,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    padding = np.full((pad if len(table) else max(pad, 1), E), filler)
    features = [t32(layers[0][:, 0]), *map(t32, layers), *(t32(layer[..., :5]) for layer in layers)]
    with torch.inference_mode():
        score, anomaly_map, nearest = NormalityHead(grids, SIZE).eval()(
            *features,
            t32(np.concatenate([table, padding])),
            torch.tensor([len(table)], dtype=torch.int32),
            t32(np.concatenate([normal, -padding])),
        )
    return score.numpy(), anomaly_map.numpy(), nearest.numpy()


@pytest.fixture
def sample() -> tuple[list[Array], list[tuple[int, int]], Array, Array]:
    rng = np.random.default_rng(1)
    grids = [(4, 3), (4, 3)]
    layers = [unit(rng.normal(size=(2, 12, E)) * 0.1 + np.eye(E)[0]) for _ in grids]
    table = unit(rng.normal(size=(3, E)) * 0.05 + np.eye(E)[1])
    normal = unit(rng.normal(size=(3, E)) * 0.05 + np.eye(E)[1])
    return layers, grids, table, normal


def reference(layers: list[Array], table: Array, normal: Array) -> Array:
    """[B, P, K]: mean over layers of the softmax over both features at the added one."""
    shares = []
    for layer in layers:
        added, beside = np.exp(100 * layer @ table.T), np.exp(100 * layer @ normal.T)
        shares.append(added / (added + beside))
    found: Array = np.mean(shares, axis=0)
    return found


def test_the_map_is_the_equation(sample: tuple[list[Array], list[tuple[int, int]], Array, Array]) -> None:
    layers, grids, table, normal = sample
    shares = reference(layers, table, normal)
    score, anomaly_map, nearest = run(layers, grids, table, normal)
    np.testing.assert_array_equal(nearest, shares.argmax(-1))
    wanted = torch.nn.functional.interpolate(
        torch.tensor(shares.max(-1).reshape(2, 1, 4, 3)), size=SIZE, mode="bilinear", align_corners=False
    )[:, 0].numpy()
    np.testing.assert_allclose(anomaly_map, wanted, atol=1e-5)
    np.testing.assert_array_equal(score, anomaly_map.max((1, 2)))
    assert anomaly_map.min() >= 0
    assert anomaly_map.max() <= 1


def test_layers_of_other_grids_are_brought_to_the_finest(
    sample: tuple[list[Array], list[tuple[int, int]], Array, Array],
) -> None:
    layers, _, table, normal = sample
    coarse = unit(np.random.default_rng(2).normal(size=(2, 2, E)) * 0.1 + np.eye(E)[0])
    shares = np.stack([reference([layer], table, normal) for layer in layers[:1]])[0]
    other = reference([coarse], table, normal).transpose(0, 2, 1).reshape(2, 3, 2, 1)
    resized = torch.nn.functional.interpolate(torch.tensor(other), size=(4, 3), mode="bilinear", align_corners=False)
    wanted = (shares + resized.numpy().reshape(2, 3, 12).transpose(0, 2, 1)) / 2
    _, _, nearest = run([layers[0], coarse], [(4, 3), (2, 1)], table, normal)
    np.testing.assert_array_equal(nearest, wanted.argmax(-1))


@pytest.mark.parametrize("filler", [0.0, 1e3])
def test_padded_rows_change_nothing(
    sample: tuple[list[Array], list[tuple[int, int]], Array, Array], filler: float
) -> None:
    layers, grids, table, normal = sample
    exact = run(layers, grids, table, normal)
    padded = run(layers, grids, table, normal, pad=4, filler=filler)
    for one, other in zip(exact, padded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("filler", [0.0, 1e3])
def test_without_normalities_nothing_is_suppressed(
    sample: tuple[list[Array], list[tuple[int, int]], Array, Array], filler: float
) -> None:
    layers, grids, table, normal = sample
    score, anomaly_map, nearest = run(layers, grids, table[:0], normal[:0], pad=3, filler=filler)
    assert (score == 0).all()
    assert (anomaly_map == 0).all()
    assert (nearest == -1).all()


def test_another_normality_never_lowers_the_map(
    sample: tuple[list[Array], list[tuple[int, int]], Array, Array],
) -> None:
    layers, grids, table, normal = sample
    one, two = run(layers, grids, table[:1], normal[:1])[1], run(layers, grids, table[:2], normal[:2])[1]
    assert (two >= one - 1e-6).all()
    assert (two > one + 1e-3).any()


def test_a_normality_is_the_mean_of_its_sentences_beside_the_normal_ones(tiny_clip: VisionLanguageModel) -> None:
    prompts = normality_prompts("thread", "carpet")
    added, normal, rows = normality_rows(tiny_clip, prompts)
    for found, texts in ((added[0], prompts.normality_texts("thread")), (normal[0], prompts.texts("normal"))):
        wanted = encode_texts(tiny_clip, texts, progress=False).astype(np.float64).mean(0)
        np.testing.assert_allclose(found, unit(wanted), atol=1e-6)
    assert rows[0]["text"] == "thread"
    assert rows[0]["class"] == "carpet"
    assert rows[0]["phrases"] == list(prompts.phrases)
    one, _, _ = normality_row(tiny_clip, "thread", "carpet")
    np.testing.assert_array_equal(one, added[0])
    other, _, row = normality_row(tiny_clip, "thread", "carpet", phrases=["loose fibre on the carpet"])
    assert not np.allclose(other, added[0])
    assert row["phrases"] == ["loose fibre on the carpet"]


def test_a_prompt_set_without_a_normality_makes_no_row(tiny_clip: VisionLanguageModel) -> None:
    from edgead.server_side.prompts import april_gan as plain

    with pytest.raises(PromptError, match="a normality in the prompt set"):
        normality_rows(tiny_clip, plain("carpet"))
    with pytest.raises(PromptError, match="at least one sentence"):
        mean_feature(tiny_clip, [])
    assert class_features(tiny_clip, plain("carpet")).shape == (2, 32)


@pytest.fixture(scope="module")
def options(
    tiny_options: VisionLanguageOptions, tiny_clip: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> VisionLanguageOptions:
    path = tmp_path_factory.mktemp("projections") / "p.safetensors"
    write_projections(
        path, new_projections((2, 4), (32, 32), 32, seed=1), model=tiny_clip.name, weights=tiny_clip.weights_sha256
    )
    return dataclasses.replace(tiny_options, projections=path)


@pytest.fixture(scope="module")
def learned(options: VisionLanguageOptions, painted_normals: Path) -> Learned:
    return normality.learn(sorted(painted_normals.iterdir()), options)


def test_it_shares_the_feature_space_of_april_gan(learned: Learned, options: VisionLanguageOptions) -> None:
    assert learned.spec.fingerprint == april_gan.learn([], options).spec.fingerprint
    other = dataclasses.replace(options, preprocessing=dataclasses.replace(options).preprocessing, layers=(2, 4))
    assert normality.learn([], other).spec.fingerprint == learned.spec.fingerprint


def test_it_begins_without_normalities_and_alarms_on_nothing(learned: Learned) -> None:
    assert learned.pack.arrays["normality.table"].shape == (0, 32)
    assert learned.pack.arrays["normality.normal"].shape == (0, 32)
    assert read_note(learned.pack, "normality.table")["rows"] == []
    assert learned.pack.calibration.threshold == 1.0


def test_normalities_of_a_prompt_set_are_there_from_the_start(options: VisionLanguageOptions, tmp_path: Path) -> None:
    write_prompt_set(tmp_path / "p.json", normality_prompts("thread", "carpet"))
    found = normality.learn([], dataclasses.replace(options, prompts=tmp_path / "p.json"))
    assert found.pack.arrays["normality.table"].shape == (1, 32)
    assert [row["text"] for row in read_note(found.pack, "normality.table")["rows"]] == ["thread"]


def test_pictures_of_defects_are_refused(options: VisionLanguageOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures of defects"):
        normality.learn([], options, [(tmp_path / "dent.png", None)])


def test_every_target_takes_it_and_a_sentence_changes_the_next_frame(
    learned: Learned,
    tiny_clip: VisionLanguageModel,
    bundle_of: Callable[[Learned, str], Path],
    as_modules: Callable[[Learned], Modules],
) -> None:
    frame = learned.golden[1]
    modules = as_modules(learned)
    packs = [learned.pack]
    rows = [normality_row(tiny_clip, text, "flange") for text in ("thread", "stain")]
    for known in (1, 2):
        added, normal = (np.stack([row[place] for row in rows[:known]]) for place in (0, 1))
        arrays = normality_arrays(tiny_clip, added, normal, [row[2] for row in rows[:known]])
        packs.append(modules.pack("part", arrays, learned.pack.calibration))
    bundle = bundle_of(learned, "normality")
    for target in ("onnx", "openvino"):
        maps = []
        with Inspector(bundle, target=target) as inspector:
            for pack in packs:
                inspector.swap(pack)
                seen = inspector.inspect(frame).anomaly_map
                assert seen is not None
                maps.append(np.array(seen))
                np.testing.assert_allclose(maps[-1], suppression(modules, frame, pack), atol=1e-4)
        assert (maps[0] == 0).all()
        assert maps[1].max() > 0.01
        assert (maps[2] >= maps[1] - 1e-6).all()


def suppression(modules: Modules, frame: NDArray[np.uint8], pack: Pack) -> NDArray[np.float32]:
    found: NDArray[np.float32] = modules.outputs(modules.embed_prepared(frame[None]), pack)["anomaly_map"][0]
    return found
