"""Few-shot with an anomalous bank: the head against a float64 reference, masks, weights, fitting, engines."""

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
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import new_pack
from edgead.runtime.spec import Preprocessing, Region
from edgead.server_side.detectors.anomalous_few_shot import learn, marked_windows, read_sample
from edgead.server_side.detectors.anomalous_few_shot_head import AnomalousFewShotHead, window_scales
from edgead.server_side.detectors.score_weights import augmented, choose_weights
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.painting import paint_defect
from edgead.server_side.vision_language.options import VisionLanguageOptions

Array = NDArray[np.float64]
GRID, SIZE, E = (5, 6), (20, 24), 8
SCALES = (1, 2, 3, 4)
MEAN = (1 / 3, 1 / 3, 1 / 3)


class Case:
    """Random features of two pictures, banks and prompts, float64."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.image = rng.normal(size=(2, E))
        self.windows = {k: rng.normal(size=(2, (GRID[0] - k + 1) * (GRID[1] - k + 1), E)) for k in SCALES}
        self.normal = {k: rng.normal(size=(20 + k, E)) for k in SCALES}
        self.anomalous = {k: rng.normal(size=(3 + k, E)) for k in SCALES}
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


def cosine(features: Array, bank: Array) -> Array:
    found: Array = (unit(features) @ unit(bank).T).max(-1)
    return found


def reference(
    case: Case, weights: tuple[float, ...], normal: tuple[int, ...], anomalous: tuple[int, ...]
) -> tuple[Array, Array]:
    """Score and map before upsampling; `normal` and `anomalous` are the scales whose banks have rows."""
    whole = by_prompts(case.image, case)
    zero = 5 / (1 / whole[:, None, None] + sum(1 / harmonic(by_prompts(case.windows[k], case), k) for k in SCALES))
    scores, maps, used = [whole], [zero], [weights[0]]
    if normal:
        far = [harmonic((1 - cosine(case.windows[k], case.normal[k])) / 2, k) for k in normal]
        maps.append(np.mean(far, axis=0))
        used.append(weights[1])
    if anomalous:
        near = [harmonic((1 + cosine(case.windows[k], case.anomalous[k])) / 2, k) for k in anomalous]
        maps.append(np.mean(near, axis=0))
        used.append(weights[2])
    scores += [each.max((1, 2)) for each in maps[1:]]
    shares = np.array(used) / sum(used)
    return np.tensordot(shares, np.stack(scores), 1), np.tensordot(shares, np.stack(maps), 1)


def run(
    case: Case,
    weights: tuple[float, ...] = MEAN,
    normal: tuple[int, ...] = SCALES,
    anomalous: tuple[int, ...] = SCALES,
    pad: int = 0,
    filler: float = 0.0,
) -> dict[str, Any]:
    def padded(rows: Array) -> torch.Tensor:
        return torch.tensor(np.concatenate([rows, np.full((pad, rows.shape[1]), filler)]), dtype=torch.float32)

    def bank(rows: Array, used: bool) -> list[torch.Tensor]:
        if used:
            return [padded(rows), torch.tensor([len(rows)], dtype=torch.int32)]
        return [torch.zeros(1, rows.shape[1]), torch.zeros(1, dtype=torch.int32)]

    features = [torch.tensor(part).float() for part in (case.image, *case.windows.values())]
    banks = [part for k in SCALES for part in bank(case.normal[k], k in normal)]
    banks += [part for k in SCALES for part in bank(case.anomalous[k], k in anomalous)]
    state = torch.tensor(np.concatenate([case.state, np.ones(pad)])).float()
    text = [padded(case.table), torch.tensor([len(case.table)], dtype=torch.int32), state]
    with torch.inference_mode():
        found = AnomalousFewShotHead(GRID, SIZE, SCALES)(*features, *banks, *text, torch.tensor(weights).float())
    return dict(zip(("score", "anomaly_map", "nearest_row", "evidence"), (part.numpy() for part in found), strict=True))


def upsampled(grid: Array) -> Array:
    up = torch.nn.functional.interpolate(torch.tensor(grid)[:, None], size=SIZE, mode="bilinear", align_corners=False)
    return np.asarray(up[:, 0].numpy())


@pytest.mark.parametrize("weights", [MEAN, (0.2, 0.3, 0.5), (4.0, 0.0, 1.0)])
@pytest.mark.parametrize("normal", [(), (3,), SCALES])
@pytest.mark.parametrize("anomalous", [(), (1, 4), SCALES])
def test_score_and_map_are_weighted_means_over_what_is_there(
    weights: tuple[float, ...], normal: tuple[int, ...], anomalous: tuple[int, ...]
) -> None:
    case = Case()
    score, grid = reference(case, weights, normal, anomalous)
    found = run(case, weights, normal, anomalous)
    np.testing.assert_allclose(found["score"], score, atol=1e-6)
    np.testing.assert_allclose(found["anomaly_map"], upsampled(grid), atol=2e-6)


@pytest.mark.parametrize("filler", [0.0, 1e4])
def test_rows_that_pad_banks_and_prompts_change_nothing(filler: float) -> None:
    case = Case(1)
    plain, padded = run(case), run(case, pad=9, filler=filler)
    for name in ("score", "anomaly_map"):
        np.testing.assert_allclose(padded[name], plain[name], rtol=1e-6)
    np.testing.assert_array_equal(padded["nearest_row"], plain["nearest_row"])


def test_a_window_of_a_known_defect_raises_its_place_and_the_score() -> None:
    case = Case(2)
    before = run(case)
    for k in SCALES:  # the first picture shows the defect that the bank now knows
        case.anomalous[k] = np.concatenate([case.anomalous[k], case.windows[k][0]])
    after = run(case)
    assert after["score"][0] > before["score"][0] + 0.05
    assert (after["anomaly_map"][0] > before["anomaly_map"][0]).all()


@pytest.mark.parametrize(
    ("grid", "scales"),
    [((14, 14), (1, 2, 3, 7)), ((15, 15), (1, 2, 3, 8)), ((28, 28), (2, 4, 6, 14)), ((8, 9), (1, 2, 3, 4))],
)
def test_windows_take_the_papers_share_of_the_frame(grid: tuple[int, int], scales: tuple[int, ...]) -> None:
    assert window_scales(grid) == scales


def test_a_grid_too_small_for_four_windows_is_refused() -> None:
    assert window_scales((4, 4)) == (1, 2, 3, 4)
    with pytest.raises(BackboneError, match="4 x 4 patches"):
        window_scales((3, 8))


def test_windows_count_as_anomalous_where_the_mask_covers_them_as_well_as_any() -> None:
    mask = np.zeros((1, 40, 40), np.float32)
    mask[0, 0:10, 0:15] = 1  # all of patch (0, 0) and half of (0, 1), on a grid of 4 x 4
    assert np.flatnonzero(marked_windows(mask, (4, 4), 1)).tolist() == [0, 1]
    # Of the windows of 2 x 2 patches the first holds 1.5 patches of it, the second 0.5: less than half as much.
    assert np.flatnonzero(marked_windows(mask, (4, 4), 2)).tolist() == [0]
    assert marked_windows(mask, (4, 4), 4).all()


Sample = tuple[Path, Path]


@pytest.fixture(scope="module")
def samples(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two pictures with a hole and their masks."""
    folder = tmp_path_factory.mktemp("holes")
    rng = np.random.default_rng(1)
    made = []
    for place, path in enumerate(list_images(painted_normals)[:2]):
        image, mask = paint_defect(read_image(path), "hole", contrast=0.9, rng=rng)
        made.append((folder / f"{place}.png", folder / f"{place}_mask.png"))
        made[-1][0].write_bytes(encode_png(image))
        made[-1][1].write_bytes(encode_png(np.repeat((mask[..., None] > 0).astype(np.uint8) * 255, 3, axis=2)))
    return made


def painted_mask(path: Path, height: int, width: int, value: int) -> Path:
    path.write_bytes(encode_png(np.full((height, width, 3), value, np.uint8)))
    return path


def test_masks_that_say_nothing_are_refused(samples: list[Sample], tmp_path: Path) -> None:
    picture, whole = samples[0][0], Preprocessing(48, 48)
    with pytest.raises(InputError, match="anomalous pixels in"):
        read_sample(picture, painted_mask(tmp_path / "black.png", 96, 96, 0), whole)
    with pytest.raises(InputError, match="96 x 96 pixels"):
        read_sample(picture, painted_mask(tmp_path / "small.png", 96, 48, 255), whole)
    with pytest.raises(InputError, match="where the defect"):
        read_sample(picture, None, whole)
    corner = np.zeros((96, 96, 3), np.uint8)
    corner[:8, :8] = 255
    (tmp_path / "corner.png").write_bytes(encode_png(corner))
    elsewhere = Preprocessing(48, 48, roi=Region(48, 48, 48, 48))
    with pytest.raises(InputError, match="region of interest"):
        read_sample(picture, tmp_path / "corner.png", elsewhere)


def test_the_weights_are_those_of_the_score_that_tells_the_pictures_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([False, True], 10)
    scores = rng.normal(size=(20, 3)).astype(np.float32)
    scores[:, 1] += np.where(labels, 1.5, 0.0)
    scores[:, 2] -= np.where(labels, 1.5, 0.0)  # one that misleads
    chosen = choose_weights(scores, labels)
    assert chosen.auroc > chosen.auroc_of_mean
    assert chosen.weights.argmax() == 1
    assert chosen.weights.sum() == pytest.approx(1)
    again = choose_weights(scores, labels)
    np.testing.assert_array_equal(chosen.weights, again.weights)


def test_equal_weights_stay_where_no_draw_is_better() -> None:
    labels = np.repeat([False, True], 5)
    scores = np.repeat(labels[:, None], 3, axis=1).astype(np.float32)
    np.testing.assert_allclose(choose_weights(scores, labels).weights, 1 / 3)


def test_augmented_pictures_differ_and_repeat_with_the_seed(painted_normals: Path) -> None:
    frame = read_image(list_images(painted_normals)[0])
    first, second = (augmented(frame, np.random.default_rng(seed)) for seed in (0, 1))
    assert first.shape == frame.shape
    assert first.dtype == np.uint8
    assert np.abs(first.astype(int) - second).mean() > 1
    np.testing.assert_array_equal(first, augmented(frame, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def shallow_options(
    tiny_options: VisionLanguageOptions, tmp_path_factory: pytest.TempPathFactory
) -> VisionLanguageOptions:
    """A CLIP of one layer: windows of four sizes are four more towers in the graph."""
    config = Path(tiny_options.model).read_text().replace('"layers": 4', '"layers": 1')
    path = tmp_path_factory.mktemp("shallow") / "shallow.json"
    path.write_text(config)
    return dataclasses.replace(tiny_options, model=str(path))


@pytest.fixture(scope="module")
def learned(shallow_options: VisionLanguageOptions, painted_normals: Path, samples: list[Sample]) -> Learned:
    return learn(list_images(painted_normals)[2:], dataclasses.replace(shallow_options, shots=2), samples)


def test_a_fit_has_banks_of_both_kinds_and_chosen_weights(learned: Learned) -> None:
    sizes = {name: len(learned.pack.arrays[name]) for name in learned.pack.banks}
    assert [sizes[f"bank.normal.{k}"] for k in SCALES] == [2 * (7 - k) ** 2 for k in SCALES]
    assert all(2 <= sizes[f"bank.anomalous.{k}"] < 2 * (7 - k) ** 2 for k in SCALES)
    assert learned.card["weights_auroc"] >= learned.card["weights_auroc_of_mean"]
    assert learned.card["weights_pictures"] == 20
    assert learned.pack.arrays["score.weights"].sum() == pytest.approx(1)
    assert learned.pack.calibration.held_out == 8


def test_without_pictures_the_three_scores_weigh_alike(shallow_options: VisionLanguageOptions) -> None:
    zero_shot = learn([], shallow_options)
    np.testing.assert_allclose(zero_shot.pack.arrays["score.weights"], 1 / 3)
    assert zero_shot.pack.calibration.threshold == pytest.approx(0.5)


def test_every_engine_is_within_the_parity_gate_and_takes_an_anomalous_bank_while_running(
    learned: Learned,
    bundle_of: Callable[[Learned, str], Path],
    as_modules: Callable[[Learned], Modules],
    samples: list[Sample],
) -> None:
    path = bundle_of(learned, "anomalous")
    opened = open_bundle(path)
    for name in ("onnx", "openvino"):
        parity = opened.engine(name).parity
        assert parity is not None
        assert max(parity.score, parity.map) < 1e-3
        assert parity.decisions_changed == 0
    assert opened.engine("tensorrt").trunk.endswith(".plan")
    pack = learned.pack
    empty = {name: array[:0] if name.startswith("bank.anomalous") else array for name, array in pack.arrays.items()}
    empty["score.weights"] = np.full(3, 1 / 3, np.float32)
    arrays = {**pack.arrays, "score.weights": empty["score.weights"]}
    without, knowing = (
        new_pack(product=pack.product, fingerprint=pack.fingerprint, calibration=pack.calibration, arrays=each)
        for each in (empty, arrays)
    )
    modules = as_modules(learned)
    frame = read_image(samples[0][0])
    with Inspector(path, target="onnx", threads=1) as inspector:
        inspector.swap(without)
        before = inspector.inspect(frame)
        inspector.swap(knowing)
        after = inspector.inspect(frame)
    assert before.score is not None
    assert after.score is not None
    assert after.score > before.score
    wanted = float(modules.outputs(modules.embed(frame), knowing)["score"][0])
    assert after.score == pytest.approx(wanted, abs=1e-5)
