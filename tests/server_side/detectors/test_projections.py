"""Projections: losses against float64 references, files of both kinds, a training that learns, resumes and refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.runtime.errors import BackboneError, InputError
from edgead.runtime.image import encode_png
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.auxiliary import (
    Auxiliary,
    MaskedPicture,
    folder_auxiliary,
    listed_auxiliary,
    painted_auxiliary,
)
from edgead.server_side.detectors.projection_training import TrainingOptions, anomalous_shares, train_projections
from edgead.server_side.detectors.projection_types import NamedTypes, type_features
from edgead.server_side.detectors.projections import (
    Projections,
    default_layers,
    dice_loss,
    focal_loss,
    new_projections,
    read_projections,
    write_projections,
)
from edgead.server_side.vision_language import VisionLanguageModel, VisionTower, tower_of

Array = NDArray[np.float64]
FITS: dict[str, Any] = {"layers": None, "depth": 4, "widths": (32, 32, 32, 32), "dimensions": 32}


@pytest.fixture(scope="module")
def tower(tiny_clip: VisionLanguageModel) -> VisionTower:
    return tower_of(tiny_clip)


@pytest.fixture(scope="module")
def text() -> NDArray[np.float32]:
    rows = np.random.default_rng(0).normal(size=(2, 2, 32))
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def painted(tower: VisionTower) -> Auxiliary:
    found = painted_auxiliary(tower.size, 24, seed=1, kinds=("hole",))
    return listed_auxiliary(found.name, found.classes, [found.read(place) for place in range(found.count)])


def shares_and_masks() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.uniform(0.001, 0.999, (3, 5, 7)), (rng.uniform(size=(3, 5, 7)) > 0.6).astype(float)


def test_focal_loss_is_its_equation() -> None:
    share, mask = shares_and_masks()
    # Labels are smoothed by 1e-5 and so is what is given to the true class; gamma is 2.
    label = np.stack([1 - mask, mask]).clip(1e-5, 1 - 1e-5)
    given = (label * np.stack([1 - share, share])).sum(0) + 1e-5
    wanted = np.mean(-((1 - given) ** 2) * np.log(given))
    found = focal_loss(torch.tensor(share, dtype=torch.float32), torch.tensor(mask, dtype=torch.float32))
    np.testing.assert_allclose(float(found), wanted, rtol=1e-5)


def test_dice_loss_is_its_equation() -> None:
    share, mask = shares_and_masks()
    each = [(2 * (s * m).sum() + 1) / (s.sum() + m.sum() + 1) for s, m in zip(share, mask, strict=True)]
    found = dice_loss(torch.tensor(share, dtype=torch.float32), torch.tensor(mask, dtype=torch.float32))
    np.testing.assert_allclose(float(found), 1 - np.mean(each), rtol=1e-5)


def test_losses_stay_finite_where_a_share_is_0_or_1() -> None:
    for share in (0.0, 1.0):
        for mask in (0.0, 1.0):
            values = torch.full((1, 4, 4), share, requires_grad=True)
            loss = focal_loss(values, torch.full((1, 4, 4), mask)) + dice_loss(values, torch.full((1, 4, 4), mask))
            loss.backward()  # type: ignore[no-untyped-call]
            assert values.grad is not None
            assert bool(torch.isfinite(loss))
            assert bool(torch.isfinite(values.grad).all())


def test_a_training_map_is_the_softmax_over_similarities_brought_to_pixels() -> None:
    rng = np.random.default_rng(3)
    projected, text = rng.normal(size=(1, 6, 4)), rng.normal(size=(1, 2, 4))
    projected /= 10 * np.linalg.norm(projected, axis=-1, keepdims=True)
    likeness = 100 * projected[0] @ text[0].T  # [6, 2] on a grid of 2 x 3
    rows, columns = np.linspace(0, 1, 4), np.linspace(0, 2, 5)
    pixels = np.stack(
        [[[interpolated(likeness[:, c].reshape(2, 3), y, x) for x in columns] for y in rows] for c in range(2)]
    )
    wanted = np.exp(pixels[1]) / np.exp(pixels).sum(0)
    (found,) = anomalous_shares(
        [torch.tensor(projected, dtype=torch.float32)], torch.tensor(text, dtype=torch.float32), [(2, 3)], (4, 5)
    )
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-5)


def interpolated(grid: Array, y: float, x: float) -> float:
    top, left = min(int(y), grid.shape[0] - 2), min(int(x), grid.shape[1] - 2)
    down, right = y - top, x - left
    upper = grid[top, left] * (1 - right) + grid[top, left + 1] * right
    lower = grid[top + 1, left] * (1 - right) + grid[top + 1, left + 1] * right
    return float(upper * (1 - down) + lower * down)


def test_projected_patches_are_linear_and_of_length_one() -> None:
    projections = new_projections((2, 4), (5, 6), 3, seed=1)
    tokens = [torch.randn(2, 7, 5), torch.randn(2, 7, 6)]
    for found, linear, layer in zip(projections(tokens), projections.fc, tokens, strict=True):
        weight, bias = (p.detach().double().numpy() for p in linear.parameters())
        wanted = layer.double().numpy() @ weight.T + bias
        wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
        np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-6)


def test_layers_at_the_quarters_are_compared_unless_chosen() -> None:
    assert default_layers(12) == (3, 6, 9, 12)
    assert default_layers(24) == (6, 12, 18, 24)
    assert default_layers(3) == (1, 2, 3)


def test_a_file_brings_back_the_same_projections(tmp_path: Path) -> None:
    made = new_projections((1, 3), (32, 32), 32, seed=2)
    write_projections(tmp_path / "p.safetensors", made, model="tiny", weights="ab" * 32, record={"epochs": 3})
    found, record = read_projections(tmp_path / "p.safetensors", **FITS, weights="ab" * 32)
    assert found.layers == (1, 3)
    assert record == {"epochs": 3}
    for one, other in zip(made.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_the_authors_is_read(tmp_path: Path) -> None:
    made = new_projections((1, 2, 3, 4), (32,) * 4, 32, seed=2)
    torch.save({"trainable_linearlayer": made.state_dict()}, tmp_path / "epoch_15.pth")
    found, _ = read_projections(tmp_path / "epoch_15.pth", **FITS)
    assert found.layers == (1, 2, 3, 4)
    assert torch.equal(found.fc[3].weight, made.fc[3].weight)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    torch.save({"trainable_linearlayer": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(BackboneError, match="something else"):
        read_projections(tmp_path / "trap.pth", **FITS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "cd" * 32}, "those for tiny with weights abab"),
        ({"layers": (2, 3)}, "for the layers 1, 3"),
        ({"depth": 2, "widths": (32, 32)}, "layers 1 to 2 of the image tower"),
        ({"widths": (64, 64, 64, 64)}, r"fc.0.weight \[32, 64\]; got fc.0.weight \[32, 32\]"),
    ],
)
def test_projections_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = new_projections((1, 3), (32, 32), 32)
    write_projections(tmp_path / "p.safetensors", made, model="tiny", weights="ab" * 32)
    with pytest.raises(BackboneError, match=message):
        read_projections(tmp_path / "p.safetensors", **{**FITS, "weights": "ab" * 32, **change})


def test_what_is_no_file_of_projections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="nothing there"):
        read_projections(tmp_path / "none.safetensors", **FITS)
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(BackboneError, match="something else"):
            read_projections(tmp_path / name, **FITS)
    broken = new_projections((1, 3), (32, 32), 32)
    broken.fc[0].weight[0, 0] = float("nan")
    write_projections(tmp_path / "nan.safetensors", broken, model="tiny", weights="")
    with pytest.raises(BackboneError, match="NaN or infinity"):
        read_projections(tmp_path / "nan.safetensors", **FITS)


def test_training_finds_what_the_masks_show(tower: VisionTower, painted: Auxiliary, text: NDArray[np.float32]) -> None:
    options = TrainingOptions(epochs=12, batch=6, learning_rate=3e-3, patience=12)
    projections, record = train_projections(tower, painted, text, options, layers=(2, 4), device="cpu")
    held = [row[1] for row in record["loss"]]
    assert min(held) < 0.9 * held[0]
    assert record["best_epoch"] == int(np.argmin(held)) + 1
    pictures = [painted.read(place) for place in range(1, painted.count, 2)]
    frames = torch.from_numpy(np.stack([picture.frame for picture in pictures]))
    with torch.inference_mode():
        projected = projections(tower(frames, taps=(2, 4)).layers)
    classes = torch.from_numpy(text[[picture.place for picture in pictures]])
    share = sum(anomalous_shares(projected, classes, [tower.grid] * 2, tower.size)).numpy()
    masks = np.stack([picture.mask for picture in pictures])
    assert share[masks].mean() > 1.5 * share[~masks].mean()


def test_an_interrupted_training_ends_in_the_same_weights(
    tower: VisionTower, painted: Auxiliary, text: NDArray[np.float32], tmp_path: Path
) -> None:
    options = TrainingOptions(epochs=4, batch=5, patience=9)
    whole, record = train_projections(tower, painted, text, options, layers=(3,), device="cpu")
    first = dataclasses.replace(options, epochs=2)
    train_projections(tower, painted, text, first, layers=(3,), checkpoint=tmp_path / "run", device="cpu")
    again, continued = train_projections(
        tower, painted, text, options, layers=(3,), checkpoint=tmp_path / "run", device="cpu"
    )
    assert continued["loss"] == record["loss"]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(BackboneError, match="one of another run"):
        train_projections(tower, painted, text, options, layers=(2,), checkpoint=tmp_path / "run", device="cpu")
    (tmp_path / "run").write_bytes(b"damaged")
    with pytest.raises(BackboneError, match="does not load"):
        train_projections(tower, painted, text, options, layers=(3,), checkpoint=tmp_path / "run", device="cpu")


TYPES = ((0, "hole"), (0, "thread"), (0, "fibre"), (1, "hole"))


@pytest.fixture(scope="module")
def named(text: NDArray[np.float32]) -> NDArray[np.float32]:
    """Features of `TYPES`; the text tower takes a fibre for a thread."""
    rows = np.random.default_rng(4).normal(size=(4, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[2] = rows[1]
    return np.asarray(rows, np.float32)


def test_a_sentence_that_names_another_type_must_give_an_empty_mask(
    text: NDArray[np.float32], named: NDArray[np.float32]
) -> None:
    types = NamedTypes(TYPES, named, text)
    # Another type of the same class, unless the sentences cannot be told apart.
    assert [list(wrong) for wrong in types.wrong] == [[1, 2], [0], [0], []]
    shown = np.array([0, 1, 3, -1] * 20)
    wrong = types.drawn(shown, np.random.default_rng(5))
    np.testing.assert_array_equal(wrong, types.drawn(shown, np.random.default_rng(5)))
    assert {(int(a), int(b)) for a, b in zip(shown, wrong, strict=True)} == {(0, 1), (0, 2), (1, 0), (3, -1), (-1, -1)}

    mask = torch.zeros(2, 8, 8)
    mask[0, 0, 3] = 1.0  # one pixel of a thin defect: its whole patch shows it
    target, texts, there = types.targets(mask, torch.tensor([1, 3]), torch.tensor([0, -1]), (2, 2))
    np.testing.assert_array_equal(target[0].numpy(), [[1, 0], [0, 0], [0, 0], [0, 0]])
    assert not bool(target[1].any())
    np.testing.assert_array_equal(texts[0].numpy(), [[text[0, 0], named[1]], [text[0, 0], named[0]]])
    assert there.tolist() == [1.0, 0.0]


def test_the_loss_of_named_types_is_its_equation(text: NDArray[np.float32], named: NDArray[np.float32]) -> None:
    types = NamedTypes(TYPES, named, text)
    rng = np.random.default_rng(6)
    patches = rng.normal(size=(3, 4, 32))
    patches /= 10 * np.linalg.norm(patches, axis=-1, keepdims=True)
    mask = (rng.uniform(size=(3, 2, 2)) > 0.5).astype(np.float32)
    feeds = torch.tensor(mask), torch.tensor([1, -1, 0]), torch.tensor([0, -1, 2])
    found = types.loss([torch.tensor(patches, dtype=torch.float32)], [(2, 2)], *feeds)

    def share(picture: int, kind: int) -> Array:
        difference = patches[picture] @ (named[kind].astype(float) - text[0, 0])
        return np.asarray(1 / (1 + np.exp(-100 * difference)))

    shares = np.stack([[share(0, 1), share(0, 0)], [share(2, 0), share(2, 2)]])
    masks = np.stack([[mask[picture].ravel(), np.zeros(4)] for picture in (0, 2)])
    given = [torch.tensor(array, dtype=torch.float32) for array in (shares, masks)]
    np.testing.assert_allclose(float(found), float(focal_loss(*given) + dice_loss(*given)), rtol=1e-4)
    nothing = torch.full((3,), -1)
    assert float(types.loss([torch.tensor(patches)], [(2, 2)], feeds[0].double(), nothing, nothing)) == 0.0


def test_named_types_are_learned_by_the_seed_resumed_and_can_be_left_out(
    tower: VisionTower, tiny_clip: VisionLanguageModel, text: NDArray[np.float32], tmp_path: Path
) -> None:
    made = painted_auxiliary(tower.size, 16, kinds=("hole", "thread"))
    assert made.types == ((0, "hole"), (0, "thread"), (1, "hole"), (1, "thread"))
    assert [made.read(place).shown for place in range(8)] == [-1, 0, -1, 2, -1, 1, -1, 3]
    pictures = [made.read(place) for place in range(made.count)]
    auxiliary = listed_auxiliary("named", made.classes, pictures, made.types)
    features = type_features(tiny_clip, auxiliary)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)

    def trained(epochs: int = 3, weight: float = 0.3, **other: Any) -> tuple[bytes, list[str]]:
        options = TrainingOptions(epochs=epochs, batch=5, patience=9, named=weight)
        found, record = train_projections(tower, auxiliary, text, options, layers=(3,), device="cpu", **other)
        return b"".join(p.detach().numpy().tobytes() for p in found.parameters()), record["named_types"]

    whole, said = trained(types=features)
    assert said == ["hole", "thread"]
    assert trained(types=features)[0] == whole
    trained(2, types=features, checkpoint=tmp_path / "run")
    assert trained(types=features, checkpoint=tmp_path / "run")[0] == whole
    with pytest.raises(BackboneError, match="one of another run"):
        trained(weight=0.0, types=features, checkpoint=tmp_path / "run")

    left_out, said = trained(weight=0.0, types=features)
    assert said == []
    assert left_out != whole
    assert left_out == trained()[0]
    auxiliary = listed_auxiliary("unnamed", made.classes, [picture._replace(shown=-1) for picture in pictures])
    assert left_out == trained()[0]
    with pytest.raises(InputError, match=r"features \[0, 32\]"):
        trained(types=features)


def test_training_stops_when_the_held_out_part_gets_no_better(
    tower: VisionTower, painted: Auxiliary, text: NDArray[np.float32]
) -> None:
    options = TrainingOptions(epochs=50, learning_rate=0.0, patience=2)
    _, record = train_projections(tower, painted, text, options, layers=(3,), device="cpu")
    assert record["epochs"] == 3
    assert record["best_epoch"] == 1


def test_masks_without_an_anomalous_pixel_cannot_teach(tower: VisionTower, text: NDArray[np.float32]) -> None:
    picture = MaskedPicture(np.zeros((*tower.size, 3), np.uint8), np.zeros(tower.size, np.bool_), 0)
    empty = listed_auxiliary("empty", ("a", "b"), [picture] * 4)
    with pytest.raises(InputError, match="at least one anomalous pixel"):
        train_projections(tower, empty, text, layers=(3,), device="cpu")
    with pytest.raises(InputError, match="at least 2 pictures"):
        train_projections(tower, listed_auxiliary("one", ("a", "b"), [picture]), text, layers=(3,), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two data sets in the MVTec layout, of pictures of 80 x 60."""
    for name in ("metal_nut", "tile"):
        for kind in ("good", "hole"):
            (tmp_path / "sets" / name / "test" / kind).mkdir(parents=True)
            picture = np.full((60, 80, 3), 90, np.uint8)
            (tmp_path / "sets" / name / "test" / kind / "000.png").write_bytes(encode_png(picture))
        masks = tmp_path / "sets" / name / "ground_truth" / "hole"
        masks.mkdir(parents=True)
        mask = np.zeros((60, 80), np.uint8)
        mask[:30, :40] = 255
        cv2.imwrite(str(masks / "000_mask.png"), mask)
    return tmp_path / "sets"


def test_an_auxiliary_folder_gives_frames_and_masks_of_the_engine(folder: Path) -> None:
    found = folder_auxiliary(folder, Preprocessing(40, 20))
    assert found.classes == ("metal nut", "tile")
    assert found.count == 4
    pictures = [found.read(place) for place in range(4)]
    assert [picture.place for picture in pictures] == [0, 0, 1, 1]
    assert all(picture.frame.shape == (20, 40, 3) for picture in pictures)
    marked = pictures[1].mask
    assert marked[:10, :20].all()
    assert marked.sum() == 200
    assert not pictures[0].mask.any()
    assert found.types == ((0, "hole"), (1, "hole"))
    assert [picture.shown for picture in pictures] == [-1, 0, -1, 1]
    assert folder_auxiliary(folder / "tile", Preprocessing(40, 20)).classes == ("tile",)


def test_a_folder_that_does_not_say_which_defect_names_no_type(folder: Path) -> None:
    for part in ("test", "ground_truth"):
        (folder / "tile" / part / "hole").rename(folder / "tile" / part / "bad")
    found = folder_auxiliary(folder, Preprocessing(40, 20))
    assert found.types == ((0, "hole"),)
    assert {found.read(place).shown for place in range(4)} == {-1, 0}


def test_an_auxiliary_folder_that_cannot_teach_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="MVTec layout"):
        folder_auxiliary(folder / "none", Preprocessing(40, 20))
    small = np.zeros((9, 9), np.uint8)
    cv2.imwrite(str(folder / "tile" / "ground_truth" / "hole" / "000_mask.png"), small)
    with pytest.raises(InputError, match="a mask of 80 x 60 pixels"):
        folder_auxiliary(folder, Preprocessing(40, 20)).read(3)
    (folder / "tile" / "ground_truth" / "hole" / "000_mask.png").unlink()
    with pytest.raises(InputError, match=r"a mask for .*tile"):
        folder_auxiliary(folder, Preprocessing(40, 20))


def test_projections_hold_only_what_is_compared() -> None:
    assert isinstance(new_projections((1,), (8,), 4), Projections)
    assert not any(parameter.requires_grad for parameter in new_projections((1,), (8,), 4).parameters())
