"""EfficientAD: its losses against float64 references written from the paper, its training, its engines."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgead.detector_file import weights_digest
from edgead.exporter.export import export_bundle
from edgead.runtime.bundle import open_bundle
from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.inspector import Inspector
from edgead.runtime.spec import Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.efficientad import (
    EfficientAdExtras,
    EfficientAdHead,
    learn,
    map_quantiles,
    normalised_map,
    upsampling,
)
from edgead.server_side.detectors.efficientad_crops import normalised, reached
from edgead.server_side.detectors.efficientad_networks import (
    Autoencoder,
    PatchDescription,
    cells,
    difference_maps,
    hard_feature_loss,
    penalty_loss,
    reconstruction_loss,
)
from edgead.server_side.detectors.efficientad_teacher import (
    described,
    distil_teacher,
    generic_frames,
    standardise,
)
from edgead.server_side.detectors.efficientad_teacher_file import write_teacher
from edgead.server_side.detectors.efficientad_training import (
    EfficientAdNetworks,
    EfficientAdTask,
    changed,
)
from edgead.server_side.detectors.trained import Anomalies, Samples, TrainedOptions
from edgead.server_side.detectors.training import Schedule, generator, train
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.painting import paint_defect

SIDE = 64
OPTIONS = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=4)


@pytest.fixture(scope="module")
def anomalies(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Three parts with a stain and its mask, and one without a mask."""
    folder = tmp_path_factory.mktemp("stains")
    found: list[tuple[Path, Path | None]] = []
    for number, path in enumerate(list_images(painted_normals)[:4]):
        rng = np.random.default_rng(number)
        picture, mask = paint_defect(read_image(path), "stain", size=0.4, contrast=1, rng=rng)
        (folder / path.name).write_bytes(encode_png(picture))
        (folder / f"{path.stem}_mask.png").write_bytes(encode_png(np.repeat(mask[..., None], 3, 2)))
        found.append((folder / path.name, folder / f"{path.stem}_mask.png" if number else None))
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> EfficientAdExtras:
    """Without the seconds that closed forms take."""
    path = tmp_path_factory.mktemp("teacher") / "random.teacher"
    write_teacher(path, PatchDescription(seed=5), {"unexplained": 1.0})
    return EfficientAdExtras(teacher=path, start="random")


@pytest.fixture(scope="module")
def extras(painted_normals: Path) -> EfficientAdExtras:
    """As it comes, but for few generic pictures and few steps."""
    return EfficientAdExtras(penalty=tuple(list_images(painted_normals)[:2]), teacher_steps=3)


@pytest.fixture(scope="module")
def paths(painted_normals: Path) -> list[Path]:
    """Few, since a closed form takes the time of its crops, and they are up to four of each photograph."""
    return list_images(painted_normals)[:6]


@pytest.fixture(scope="module")
def learned(paths: list[Path], anomalies: Samples, extras: EfficientAdExtras) -> Learned:
    return learn(paths, OPTIONS, anomalies, extras=extras)


def descriptions(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def test_the_hard_loss_averages_what_is_at_or_above_the_quantile() -> None:
    teacher, student = descriptions(0, 1, 8, 6, 5), descriptions(1, 1, 8, 6, 5)
    squared = sorted(((teacher - student) ** 2).ravel())
    for p_hard in (0.0, 0.9, 0.999):
        # The quantile lies between two values where p (n - 1) is no whole number.
        first = int(np.ceil(p_hard * (len(squared) - 1)))
        expected = sum(squared[first:]) / len(squared[first:])
        found = hard_feature_loss(torch.from_numpy(teacher), torch.from_numpy(student), p_hard)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_only_hard_features_pull_the_student() -> None:
    teacher = torch.zeros(1, 10, 10, 10)
    student = torch.linspace(0, 1, 1000).reshape(1, 10, 10, 10).requires_grad_()
    hard_feature_loss(teacher, student).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert int((student.grad != 0).sum()) == 1


def test_the_other_losses_are_the_paper_s_means() -> None:
    a, b = descriptions(2, 2, 4, 3, 3), descriptions(3, 2, 4, 3, 3)
    mean = sum((x - y) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)) / a.size
    assert float(reconstruction_loss(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(mean, rel=1e-12)
    assert float(penalty_loss(torch.from_numpy(a))) == pytest.approx(float((a**2).mean()), rel=1e-12)


def test_the_penalty_on_an_anomaly_counts_the_cells_of_its_mask_alone() -> None:
    a = descriptions(4, 1, 4, 3, 3)
    where = torch.zeros(1, 3, 3, dtype=torch.bool)
    where[0, 1, 2] = where[0, 0, 0] = True
    expected = ((a[0, :, 1, 2] ** 2).mean() + (a[0, :, 0, 0] ** 2).mean()) / 2
    assert float(penalty_loss(torch.from_numpy(a), where)) == pytest.approx(expected, rel=1e-12)
    assert float(penalty_loss(torch.from_numpy(a), torch.zeros_like(where))) == 0.0


def test_maps_are_channel_means_of_squared_differences() -> None:
    teacher, student, rebuilt = descriptions(5, 1, 4, 3, 2), descriptions(6, 1, 8, 3, 2), descriptions(7, 1, 4, 3, 2)
    local, whole = difference_maps(*(torch.from_numpy(each) for each in (teacher, student, rebuilt)))
    np.testing.assert_allclose(local.numpy(), ((teacher - student[:, :4]) ** 2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(whole.numpy(), ((rebuilt - student[:, 4:]) ** 2).mean(1), rtol=1e-12)


def test_the_quantiles_of_validation_maps_become_0_and_a_tenth() -> None:
    rng = np.random.default_rng(8)
    maps = [tuple(rng.gamma(2.0, scale, (8, 8)).astype(np.float32) for scale in (1.0, 50.0)) for _ in range(3)]
    quantiles = map_quantiles(maps, (SIDE, SIDE))  # type: ignore[arg-type]
    up = upsampling(SIDE).astype(np.float64)
    for kind in range(2):
        values = np.concatenate([(up @ pair[kind].astype(np.float64) @ up.T).ravel() for pair in maps])
        ordered = np.sort(values)
        for column, share in enumerate((0.9, 0.995)):
            place = share * (len(ordered) - 1)
            low = int(place)
            expected = ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])
            assert quantiles[kind, column] == pytest.approx(expected, rel=1e-5)
        brought = normalised_map(torch.from_numpy(quantiles[kind].copy()), torch.from_numpy(quantiles[kind]))
        assert brought.tolist() == [pytest.approx(0.0, abs=1e-7), pytest.approx(0.1, rel=1e-5)]
    flat = map_quantiles([(np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32))], (SIDE, SIDE))
    assert (flat[:, 1] > flat[:, 0]).all(), "maps without spread divide by nothing"


def test_the_score_is_the_maximum_of_the_two_maps_halves() -> None:
    rng = np.random.default_rng(9)
    local, whole = rng.random((2, 1, 8, 8)).astype(np.float32)
    quantiles = np.array([[0.2, 0.7], [0.1, 0.3]], np.float32)
    score, anomaly_map = EfficientAdHead((SIDE, SIDE))(*(torch.from_numpy(each) for each in (local, whole, quantiles)))
    up = upsampling(SIDE).astype(np.float64)
    first = 0.1 * (up @ local[0] @ up.T - 0.2) / 0.5
    second = 0.1 * (up @ whole[0] @ up.T - 0.1) / 0.2
    np.testing.assert_allclose(anomaly_map[0].numpy(), 0.5 * first + 0.5 * second, atol=1e-6)
    assert float(score) == pytest.approx((0.5 * first + 0.5 * second).max(), rel=1e-5)


def test_upsampling_keeps_constants_and_puts_a_cell_in_the_middle_of_its_field() -> None:
    up = upsampling(256)
    assert up.shape == (256, 56)
    np.testing.assert_allclose(up.sum(1), 1.0, rtol=1e-6)
    for cell in (5, 30):
        middle = float((up[:, cell] * np.arange(256)).sum() / up[:, cell].sum())
        assert abs(middle - (4 * cell + 16)) <= 2


def test_a_cell_sees_33_pixels_and_there_are_56_of_them_at_256() -> None:
    assert cells(256) == 56
    network = PatchDescription(4).eval()
    assert [layer.out_channels for layer in (network.first, network.second, network.third)] == [128, 256, 256]
    pixels = torch.rand(1, 3, 65, 65, requires_grad=True)
    network(pixels)[0, :, 3, 2].sum().backward()
    assert pixels.grad is not None
    seen = (pixels.grad[0].abs().sum(0) > 0).nonzero()
    assert seen.min(0).values.tolist() == [12, 8]
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [33, 33]


def test_a_crop_has_the_cells_of_the_frame() -> None:
    network = PatchDescription(4).eval()
    pixels = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        whole = network(pixels)
        part = network(pixels[..., 16:80, 8:72])
    assert torch.allclose(part, whole[..., 4:12, 2:10], atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (256, 256), (320, 288)])
def test_the_autoencoder_gives_a_description_of_any_size(size: tuple[int, int]) -> None:
    network = Autoencoder(size, channels=3)
    pixels = torch.rand(1, 3, *size)
    with torch.inference_mode():
        assert network(pixels).shape == (1, 3, cells(size[0]), cells(size[1]))
        first, second = (network(pixels, generator(1, step)) for step in (0, 0))
        assert torch.equal(first, second), "dropout has a generator of its own"
        assert not torch.equal(first, network(pixels, generator(1, 1)))
    if size == (256, 256):
        assert network.sizes == ((3, 3), (8, 8), (15, 15), (32, 32), (63, 63), (127, 127)), "table 8"


def test_a_mask_makes_the_cells_anomalous_in_whose_middle_it_lies() -> None:
    masks = np.zeros((1, SIDE, SIDE), bool)
    masks[0, 30, 34] = True
    rows, columns = (each.tolist() for each in torch.nonzero(reached(masks)[0], as_tuple=True))
    for row, column in zip(rows, columns, strict=True):
        assert abs(4 * row + 16 - 30) <= 8
        assert abs(4 * column + 16 - 34) <= 8
    assert len(rows) == 16


def test_a_change_of_light_stays_small_and_is_repeatable() -> None:
    frame = np.random.default_rng(0).integers(60, 180, (1, 8, 8, 3), dtype=np.uint8)
    pixels = normalised(frame)
    found = [changed(pixels, generator(0, step)) for step in range(6)]
    assert torch.equal(found[0], changed(pixels, generator(0, 0)))
    assert all(0 < float((each - pixels).abs().max()) < 0.8 for each in found)


def test_the_teacher_says_what_the_backbone_sees_standardised() -> None:
    backbone = load_backbone("random")
    frames = generic_frames(Preprocessing(SIDE, SIDE), seed=3, count=6)
    assert frames.shape == (6, SIDE, SIDE, 3)
    assert np.array_equal(frames, generic_frames(Preprocessing(SIDE, SIDE), seed=3, count=6))
    assert described(backbone, frames).shape == (6, 384, 16, 16)
    assert described(load_backbone("random", layers=(8,)), frames[:1]).shape == (1, 384, 16, 16), "averaged to 384"
    teacher, history = distil_teacher(backbone, frames[:4], frames[4:5], frames[5:], steps=12, closed=False)
    standardise(teacher, frames[:4])
    with torch.inference_mode():
        said = teacher(normalised(frames[:4]))
    np.testing.assert_allclose(said.mean((0, 2, 3)).numpy(), 0.0, atol=1e-3)
    np.testing.assert_allclose(said.std((0, 2, 3)).numpy(), 1.0, atol=0.02)
    first, last = history.losses[0][1]["unexplained"], history.losses[-1][1]["unexplained"]
    assert last < first, "it learns"


class Frames:
    """What a task of the tests is made of."""

    normal = generic_frames(Preprocessing(SIDE, SIDE), seed=1, count=4)
    generic = generic_frames(Preprocessing(SIDE, SIDE), seed=2, count=2)


def task(kind: type[EfficientAdTask] = EfficientAdTask, *, generic: bool = True, steps: int = 4) -> EfficientAdTask:
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 20:40, 20:40] = True
    known = np.array([True, False])
    anomalies = Anomalies(Frames.generic, masks, known)
    return kind(
        EfficientAdNetworks((SIDE, SIDE), seed=0),
        Frames.normal,
        Frames.generic if generic else Frames.generic[:0],
        anomalies,
        Frames.normal[:2],
        steps=steps,
    )


def with_marks(masks: NDArray[np.bool_], *, known: bool = True) -> EfficientAdTask:
    """Two anomalies with masks [2, S, S], if they are known, and no generic pictures."""
    anomalies = Anomalies(Frames.generic, masks, np.full(2, known))
    return EfficientAdTask(
        EfficientAdNetworks((SIDE, SIDE)), Frames.normal, Frames.normal[:0], anomalies, Frames.normal
    )


class Interrupted(EfficientAdTask):
    """Somebody presses Ctrl-C in step 2."""

    def step(self, number: int) -> dict[str, float]:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return super().step(number)


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    schedule = Schedule(4, validate_every=2)
    whole = task()
    untaught = weights_digest(whole.module.teacher)
    train(whole, schedule, label="test")
    assert weights_digest(whole.module.teacher) == untaught, "the teacher stays"
    with pytest.raises(KeyboardInterrupt):
        train(task(Interrupted), schedule, label="test", checkpoint=tmp_path / "kept")
    resumed = task()
    train(resumed, schedule, label="test", checkpoint=tmp_path / "kept")
    assert weights_digest(resumed.module) == weights_digest(whole.module)


def test_anomalies_are_penalised_every_second_step_and_without_generic_pictures_in_all() -> None:
    both, only = task(), task(generic=False)
    assert all(both.step(number)["penalty"] > 0 for number in range(2))
    assert all(only.step(number)["penalty"] > 0 for number in range(2))
    bare = with_marks(np.zeros((2, SIDE, SIDE), bool), known=False)
    assert bare.step(0)["penalty"] == 0.0, "an anomaly without a mask teaches nothing"


def test_a_mask_that_only_the_rim_shows_teaches_nothing_and_breaks_nothing() -> None:
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, :4], masks[1, 30:40, 30:40] = True, True
    rim = with_marks(masks)
    assert all(rim.step(number)["penalty"] > 0 for number in range(3))


def test_a_student_begins_by_saying_little_of_what_is_no_normal() -> None:
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[:, 24:40, 24:40] = True
    said = {}
    for known in (True, False):
        begun = with_marks(masks, known=known)
        standardise(begun.module.teacher, Frames.normal)
        begun.start()
        with torch.inference_mode():
            found = begun.module.student(normalised(Frames.generic))[:, :384].square().mean(1)
        said[known] = float(found[reached(masks)].mean())
    assert said[True] < 0.8 * said[False]


def test_a_fit_that_is_interrupted_anywhere_and_continued_gives_the_same_detector(
    paths: list[Path], anomalies: Samples, extras: EfficientAdExtras, learned: Learned, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "fit.training"
    # Faster than the whole fit, so that starts are cut off in different places.
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    found, starts, seconds = None, 0, 0.4
    try:
        while found is None:
            starts += 1
            signal.setitimer(signal.ITIMER_REAL, seconds if starts < 4 else 0.0)
            try:
                found = learn(paths, OPTIONS, anomalies, extras=extras, checkpoint=checkpoint)
            except KeyboardInterrupt:
                seconds *= 2
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert starts > 1
    assert found.pack.digest == learned.pack.digest
    assert found.spec.fingerprint == learned.spec.fingerprint
    assert found.card["teacher"] == learned.card["teacher"]
    assert not (tmp_path / "fit.training.teacher").exists()


def test_the_card_says_what_is_not_the_paper_s(learned: Learned, paths: list[Path], quick: EfficientAdExtras) -> None:
    assert learned.card["paper_steps"] == 70_000
    assert learned.card["training"]["steps"] == 4
    assert learned.card["start"] == "closed"
    assert learned.card["penalty"] == {"pictures": 2, "kind": "own pictures"}
    assert learned.card["data"]["anomalies_with_masks"] == 3
    one = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    without = learn(paths[:2], one, extras=dataclasses.replace(quick, penalty=()))
    assert without.card["start"] == "random"
    assert without.card["penalty"] == {"pictures": 0, "kind": "left out"}
    assert "set by hand" in without.card["calibration"]
    assert learn(paths[:4], one, extras=quick).card["penalty"] == {"pictures": 48, "kind": "painted"}


@pytest.mark.parametrize("side", [32, 72])
def test_a_frame_that_the_networks_cannot_take_is_refused(side: int, painted_normals: Path) -> None:
    options = TrainedOptions(preprocessing=Preprocessing(side, side), steps=1)
    with pytest.raises(InputError, match="divisible by 32"):
        learn(list_images(painted_normals), options)


def test_every_engine_agrees_with_torch(
    learned: Learned,
    painted_normals: Path,
    bundle_of: Callable[[Learned, str], Path],
    as_modules: Callable[[Learned], Modules],
) -> None:
    opened = open_bundle(bundle_of(learned, "efficientad"))
    assert {engine.target for engine in opened.manifest.engines} == {"onnx", "openvino", "tensorrt"}
    frame = read_image(list_images(painted_normals)[0])
    modules = as_modules(learned)
    expected = modules.outputs(modules.embed(frame), learned.pack)
    for target in ("onnx", "openvino"):
        with Inspector(opened, target=target) as inspector:
            found = inspector.inspect(frame)
        assert found.score == pytest.approx(float(expected["score"][0]), rel=1e-3)
        assert found.anomaly_map is not None


def test_half_precision_passes_the_parity_gate(learned: Learned, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    learned.write(tmp_path / "half.detector")
    bundle = export_bundle(tmp_path / "half.detector", tmp_path / "half.bundle", ["openvino:fp16", "onnx:fp16"])
    figures = [engine.parity for engine in bundle.manifest.engines]
    assert all(found is not None and found.decisions_changed == 0 for found in figures)
