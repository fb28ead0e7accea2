"""WinCLIP's head against a float64 reference written from the paper, its fitting, and its engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.image import list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import encode_note, read_note
from edgead.server_side.detectors.winclip import WinClipHead, learn
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.prompts.ensembles import winclip
from edgead.server_side.prompts.prompt_set import Prompt, PromptSet, write_prompt_set
from edgead.server_side.vision_language import VisionLanguageModel, encode_texts
from edgead.server_side.vision_language.options import VisionLanguageOptions

Array = NDArray[np.float64]
GRID, SIZE, E, D = (5, 4), (20, 16), 8, 6
SCALES = (2, 3)


class Case:
    """Random features of two pictures, banks and prompts, float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.image = rng.normal(size=(2, E))
        self.windows = {k: rng.normal(size=(2, (GRID[0] - k + 1) * (GRID[1] - k + 1), E)) for k in SCALES}
        self.patches = rng.normal(size=(2, GRID[0] * GRID[1], D))
        self.bank = rng.normal(size=(30, D))
        self.banks = {k: rng.normal(size=(20, E)) for k in SCALES}
        self.table = unit(rng.normal(size=(6, E)))
        self.state = np.array([0, 0, 1, 0, 1, 1.0])


def unit(rows: Array) -> Array:
    made: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def harmonic(scores: Array, k: int) -> Array:
    grid = scores.reshape(-1, GRID[0] - k + 1, GRID[1] - k + 1)
    found = np.zeros((len(grid), *GRID))
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            over = grid[:, max(0, y - k + 1) : y + 1, max(0, x - k + 1) : x + 1].reshape(len(grid), -1)
            found[:, y, x] = over.shape[1] / (1 / over).sum(1)
    return found


def by_prompts(features: Array, case: Case) -> Array:
    classes = unit(np.stack([case.table[case.state == s].mean(0) for s in (0, 1)]))
    powers = np.exp(unit(features) @ classes.T / 0.07)
    share: Array = powers[..., 1] / powers.sum(-1)
    return share


def by_bank(features: Array, bank: Array) -> Array:
    found: Array = (1 - unit(features) @ unit(bank).T).min(-1) / 2
    return found


def reference(case: Case, shots: bool, scales: tuple[int, ...] = SCALES) -> tuple[Array, Array]:
    """Score and map before upsampling. `scales` are those whose bank has rows; the patches' has them with `shots`."""
    whole = by_prompts(case.image, case)
    zero = 3 / (1 / whole[:, None, None] + sum(1 / harmonic(by_prompts(case.windows[k], case), k) for k in SCALES))
    if not shots:
        return whole, zero
    maps = [by_bank(case.patches, case.bank).reshape(-1, *GRID)]
    maps += [harmonic(by_bank(case.windows[k], case.banks[k]), k) for k in scales]
    few = np.mean(maps, axis=0)
    return (whole + few.max((1, 2))) / 2, (zero + few) / 2


def run(case: Case, shots: bool, scales: tuple[int, ...] = SCALES, pad: int = 0, filler: float = 0.0) -> dict[str, Any]:
    def padded(rows: Array) -> torch.Tensor:
        return torch.tensor(np.concatenate([rows, np.full((pad, rows.shape[1]), filler)]), dtype=torch.float32)

    def bank(rows: Array, used: bool) -> list[torch.Tensor]:
        if used:
            return [padded(rows), torch.tensor([len(rows)], dtype=torch.int32)]
        return [torch.zeros(1, rows.shape[1]), torch.zeros(1, dtype=torch.int32)]

    features = [case.image, *(case.windows[k] for k in SCALES), case.patches]
    banks = [*bank(case.bank, shots), *(part for k in SCALES for part in bank(case.banks[k], shots and k in scales))]
    state = np.concatenate([case.state, np.ones(pad)])
    text = [padded(case.table), torch.tensor([len(case.table)], dtype=torch.int32), torch.tensor(state).float()]
    with torch.inference_mode():
        found = WinClipHead(GRID, SIZE)(*(torch.tensor(part).float() for part in features), *banks, *text)
    return dict(zip(("score", "anomaly_map", "nearest_row", "evidence"), (part.numpy() for part in found), strict=True))


def upsampled(grid: Array) -> Array:
    up = torch.nn.functional.interpolate(torch.tensor(grid)[:, None], size=SIZE, mode="bilinear", align_corners=False)
    return np.asarray(up[:, 0].numpy())


@pytest.mark.parametrize("shots", [False, True])
def test_score_and_map_are_those_of_the_paper(shots: bool) -> None:
    case = Case()
    score, grid = reference(case, shots)
    found = run(case, shots)
    np.testing.assert_allclose(found["score"], score, atol=1e-6)
    np.testing.assert_allclose(found["anomaly_map"], upsampled(grid), atol=2e-6)


@pytest.mark.parametrize("scales", [(), (2,), (3,)])
def test_a_scale_whose_bank_is_empty_is_left_out_of_the_mean(scales: tuple[int, ...]) -> None:
    case = Case(1)
    score, grid = reference(case, True, scales)
    found = run(case, True, scales)
    np.testing.assert_allclose(found["score"], score, atol=1e-6)
    np.testing.assert_allclose(found["anomaly_map"], upsampled(grid), atol=2e-6)


@pytest.mark.parametrize("filler", [0.0, 1e4])
@pytest.mark.parametrize("shots", [False, True])
def test_rows_that_pad_banks_and_prompts_change_nothing(shots: bool, filler: float) -> None:
    case = Case(2)
    plain, padded = run(case, shots), run(case, shots, pad=9, filler=filler)
    for name in ("score", "anomaly_map"):
        np.testing.assert_allclose(padded[name], plain[name], rtol=1e-6)
    np.testing.assert_array_equal(padded["nearest_row"], plain["nearest_row"])
    np.testing.assert_array_equal(padded["evidence"][:, :6], plain["evidence"])


def test_a_patch_names_the_reference_that_it_is_most_like_and_the_image_its_prompts() -> None:
    case = Case(3)
    found = run(case, True)
    np.testing.assert_array_equal(found["nearest_row"], (unit(case.patches) @ unit(case.bank).T).argmax(-1))
    np.testing.assert_allclose(found["evidence"], unit(case.image) @ case.table.T, atol=1e-6)


@pytest.fixture(scope="module")
def zero_shot(tiny_options: VisionLanguageOptions) -> Learned:
    return learn([], tiny_options)


@pytest.fixture(scope="module")
def few_shot(tiny_options: VisionLanguageOptions, painted_normals: Path) -> Learned:
    return learn(list_images(painted_normals), dataclasses.replace(tiny_options, shots=4))


def test_sentences_alone_make_a_detector(zero_shot: Learned, tiny_clip: VisionLanguageModel) -> None:
    prompts = winclip("flange")
    note = read_note(zero_shot.pack, "text.table")
    assert [row["text"] for row in note["rows"]] == [prompt.text for prompt in prompts.class_prompts()]
    assert note["weights_sha256"] == tiny_clip.weights_sha256
    rows = encode_texts(tiny_clip, [prompts.prompts[-1].text], progress=False)
    np.testing.assert_array_equal(zero_shot.pack.arrays["text.table"][-1:], rows)
    assert set(np.unique(zero_shot.pack.arrays["text.state"])) == {0.0, 1.0}
    assert [len(zero_shot.pack.arrays[name]) for name in zero_shot.pack.banks] == [0, 0, 0]
    assert zero_shot.pack.calibration.threshold == 0.5
    assert zero_shot.card["model"]["weights"] == "random:3"
    assert zero_shot.card["score_is_map_maximum"] is False


def test_shots_become_banks_and_the_others_set_the_threshold(few_shot: Learned) -> None:
    sizes = {name: len(few_shot.pack.arrays[name]) for name in few_shot.pack.banks}
    assert sizes == {"bank.patches": 4 * 36, "bank.windows.2": 4 * 25, "bank.windows.3": 4 * 16}
    assert few_shot.pack.calibration.held_out == 12 - 4
    assert len(few_shot.card["shots"]) == 4


def test_where_all_are_shots_each_is_scored_without_its_own_rows(
    tiny_options: VisionLanguageOptions, painted_normals: Path, as_modules: Callable[[Learned], Modules]
) -> None:
    paths = list_images(painted_normals)[:3]
    learned = learn(paths, dataclasses.replace(tiny_options, shots=3))
    assert learned.pack.calibration.held_out == 3
    modules = as_modules(learned)
    others = learn(paths[1:], dataclasses.replace(tiny_options, shots=2))
    score = float(modules.outputs(modules.embed(read_image(paths[0])), others.pack)["score"].max())
    own = float(modules.outputs(modules.embed(read_image(paths[0])), learned.pack)["score"].max())
    by_name = {item["image"]: item["score"] for item in learned.card["most_unusual"]}
    assert by_name[paths[0].name] == pytest.approx(score, abs=1e-6)
    assert own < score


def test_one_shot_alone_sets_no_threshold(tiny_options: VisionLanguageOptions, painted_normals: Path) -> None:
    learned = learn(list_images(painted_normals)[:1], dataclasses.replace(tiny_options, shots=1))
    assert learned.pack.calibration.false_alarm_rate is None
    assert len(learned.pack.arrays["bank.patches"]) == 36


@pytest.mark.parametrize("shots", [-1, 13])
def test_shots_that_are_not_there_are_refused(
    shots: int, tiny_options: VisionLanguageOptions, painted_normals: Path
) -> None:
    with pytest.raises(InputError):
        learn(list_images(painted_normals), dataclasses.replace(tiny_options, shots=shots))


def test_pictures_of_defects_are_refused_as_they_would_change_nothing(tiny_options: VisionLanguageOptions) -> None:
    with pytest.raises(InputError, match="no place for them"):
        learn([], tiny_options, [(Path("dent.png"), None)])


def test_a_file_of_prompts_takes_the_place_of_the_ensemble(tiny_options: VisionLanguageOptions, tmp_path: Path) -> None:
    prompts = PromptSet("flange", (Prompt("a good flange", "normal"), Prompt("a bent flange", "anomalous", "person")))
    write_prompt_set(tmp_path / "own.json", prompts)
    learned = learn([], dataclasses.replace(tiny_options, prompts=tmp_path / "own.json"))
    assert learned.pack.arrays["text.state"].tolist() == [0, 1]
    assert learned.card["prompts"]["authors"] == {"template": 1, "person": 1}
    with pytest.raises(InputError, match="no such file"):
        learn([], dataclasses.replace(tiny_options, prompts=tmp_path / "none.json"))


def test_a_grid_that_holds_no_windows_is_refused(tiny_options: VisionLanguageOptions, tmp_path: Path) -> None:
    config = Path(tiny_options.model).read_text().replace('"patch_size": 8', '"patch_size": 24')
    (tmp_path / "coarse.json").write_text(config)
    with pytest.raises(BackboneError, match="windows of 1 to 2 patches"):
        learn([], dataclasses.replace(tiny_options, model=str(tmp_path / "coarse.json")))


@pytest.fixture(scope="module")
def bundle(few_shot: Learned, bundle_of: Callable[[Learned, str], Path]) -> Path:
    return bundle_of(few_shot, "winclip")


def test_every_engine_is_within_the_parity_gate_and_tensorrt_builds(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for name in ("onnx", "openvino"):
        parity = opened.engine(name).parity
        assert parity is not None
        assert parity.images == 8
        assert max(parity.score, parity.map) < 1e-4
        assert parity.decisions_changed == 0
    assert opened.engine("tensorrt").trunk.endswith(".plan")


def with_prompt(pack: Pack, rows: NDArray[np.float32], text: str, state: int) -> Pack:
    """The pack with one more prompt."""
    note = read_note(pack, "text.table")
    arrays = {
        **pack.arrays,
        "text.table": np.concatenate([pack.arrays["text.table"], rows]),
        "text.state": np.append(pack.arrays["text.state"], np.float32(state)),
        "text.table.text": encode_note({**note, "rows": [*note["rows"], {"text": text}]}),
    }
    return new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=pack.calibration, arrays=arrays)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_prompt_that_is_added_while_running_changes_the_next_frame(
    engine: str,
    bundle: Path,
    tiny_clip: VisionLanguageModel,
    few_shot: Learned,
    as_modules: Callable[[Learned], Modules],
    frame: NDArray[np.uint8],
) -> None:
    text = "a photo of a flange with a thread"
    more = with_prompt(few_shot.pack, encode_texts(tiny_clip, [text], progress=False), text, 1)
    modules = as_modules(few_shot)
    with Inspector(bundle, target=engine, threads=1) as inspector:
        before = inspector.inspect(frame)
        inspector.swap(more)
        after = inspector.inspect(frame)
    assert before.score is not None
    assert after.score is not None
    assert after.score != before.score
    wanted = float(modules.outputs(modules.embed(frame), more)["score"][0])
    assert after.score == pytest.approx(wanted, abs=1e-5)
    assert len(after.sentences) == 5
    assert {item.text for item in after.sentences} <= {row["text"] for row in read_note(more, "text.table")["rows"]}


def test_the_same_engine_is_zero_shot_with_empty_banks(
    bundle: Path,
    few_shot: Learned,
    zero_shot: Learned,
    as_modules: Callable[[Learned], Modules],
    frame: NDArray[np.uint8],
) -> None:
    assert zero_shot.pack.fingerprint == few_shot.pack.fingerprint
    modules = as_modules(zero_shot)
    outputs = modules.outputs(modules.embed(frame), zero_shot.pack)
    with Inspector(bundle, target="onnx", threads=1) as inspector:
        inspector.swap(zero_shot.pack)
        found = inspector.inspect(frame)
    assert found.score == pytest.approx(float(outputs["score"][0]), abs=1e-5)
    assert found.anomaly_map is not None
    np.testing.assert_allclose(found.anomaly_map, outputs["anomaly_map"][0], atol=1e-5)
