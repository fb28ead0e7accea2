"""The recipe: resumable to the byte, and it learns; validation ranks backbones on painted defects."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgead.runtime.errors import BackboneError, InputError
from edgead.server_side.backbones import validation
from edgead.server_side.backbones.cli import backbone as command
from edgead.server_side.backbones.distillation import DistilConfig, Distillation, distil
from edgead.server_side.backbones.embedded import TAPS, load_embedded, random_embedded, start_from
from edgead.server_side.backbones.mobilenet_v2 import MobileNetV2
from edgead.server_side.backbones.targets import expected_maps, training_crop, view_of

TINY = DistilConfig(steps=6, batch=2, crop=64, warmup=1, channels=(8, 8), statistics=4, chapter=3, checkpoint_every=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = rng.integers(0, 256, (12, 14, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{'kept' if number else 'held'}_{number}.png"), cv2.resize(coarse, (110, 90)))
    return folder


@pytest.fixture(scope="module")
def teacher() -> MobileNetV2:
    """An untrained teacher whose activations neither vanish nor saturate."""
    model = MobileNetV2(TAPS)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
    return model.eval().requires_grad_(False)


def test_an_interrupted_run_ends_in_the_bytes_of_one_that_was_not(
    images: Path, teacher: MobileNetV2, tmp_path: Path
) -> None:
    distil(teacher, images, TINY, tmp_path / "straight.safetensors")
    checkpoint = tmp_path / "run.checkpoint"
    for stop in (1, 4):
        Distillation(teacher, images, TINY, checkpoint=checkpoint).run(until=stop)
    run = distil(teacher, images, TINY, tmp_path / "resumed.safetensors", checkpoint=checkpoint)
    assert run.step == TINY.steps
    straight = (tmp_path / "straight.safetensors").read_bytes()
    assert (tmp_path / "resumed.safetensors").read_bytes() == straight
    assert load_embedded(tmp_path / "resumed.safetensors").channels == (8, 8)


def test_another_seed_gives_other_weights(images: Path, teacher: MobileNetV2) -> None:
    runs = [Distillation(teacher, images, dataclasses.replace(TINY, seed=seed)) for seed in (0, 1)]
    for run in runs:
        run.run(until=1)
    assert runs[0].weights() != runs[1].weights()


def test_ctrl_c_finishes_the_step_and_keeps_it(images: Path, teacher: MobileNetV2, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    run = Distillation(
        teacher, images, dataclasses.replace(TINY, steps=500, checkpoint_every=500), checkpoint=checkpoint
    )
    # A job in the background of a shell starts with SIGINT ignored; a terminal's does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run()
        timer.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < run.step < 500
    assert torch.load(checkpoint, weights_only=True)["step"] == run.step


def test_a_checkpoint_of_another_run_is_refused(images: Path, teacher: MobileNetV2, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.checkpoint"
    Distillation(teacher, images, TINY, checkpoint=checkpoint).run(until=1)
    with pytest.raises(BackboneError, match="another run"):
        Distillation(teacher, images, dataclasses.replace(TINY, batch=1), checkpoint=checkpoint)
    with pytest.raises(BackboneError, match="another run"):
        Distillation(teacher, images, TINY, checkpoint=checkpoint, leave_out=("held",))
    checkpoint.write_bytes(b"garbage")
    with pytest.raises(BackboneError, match="does not load"):
        Distillation(teacher, images, TINY, checkpoint=checkpoint)


def test_training_explains_more_of_the_teacher(images: Path, teacher: MobileNetV2) -> None:
    config = dataclasses.replace(TINY, steps=30, learning_rate=1e-3, checkpoint_every=15)
    run = Distillation(teacher, images, config)
    run.run()
    first, last = run.losses[0], run.losses[-1]
    assert sum(last[1:]) < sum(first[1:])


def test_an_early_stop_cools_the_learning_rate_down(images: Path, teacher: MobileNetV2) -> None:
    config = dataclasses.replace(TINY, steps=100, stop_at=4, cooldown=2)
    run = Distillation(teacher, images, config)
    run.run()
    assert run.step == run.end == 4
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(run._learning_rate(1) / 2, rel=0.01)


def test_pictures_can_be_left_out_for_validation(images: Path, teacher: MobileNetV2) -> None:
    run = Distillation(teacher, images, TINY, leave_out=("held",))
    assert [path.name for path in run.paths] == [f"kept_{n}.png" for n in range(1, 6)]
    with pytest.raises(InputError, match="left out"):
        Distillation(teacher, images, TINY, leave_out=("held", "kept"))


def test_a_4x4_kernel_started_from_3x3_answers_a_flat_picture_alike(teacher: MobileNetV2) -> None:
    student = random_embedded()
    start_from(student, teacher.trunk)
    flat = torch.full((1, 3, 256, 256), 0.6)
    for mine, theirs in zip(student.expansions(flat), teacher(flat), strict=True):
        middle = mine.shape[-1] // 2
        torch.testing.assert_close(mine[..., middle, middle], theirs[..., middle, middle], rtol=1e-3, atol=1e-3)


def test_expected_maps_follow_a_mirrored_picture_exactly(teacher: MobileNetV2) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for straight, mirrored in zip(
        expected_maps(teacher, image), expected_maps(teacher, view_of(image, 3)), strict=True
    ):
        torch.testing.assert_close(view_of(mirrored, 3), straight, rtol=1e-3, atol=1e-4)


def test_training_crops_are_a_function_of_their_generator() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 110, 3)).astype(np.uint8)
    first, again = (training_crop(picture, np.random.default_rng(7), 64) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)


# --- validation --------------------------------------------------------------------------------------------


def test_auroc_counts_ties_as_one_half() -> None:
    assert validation.auroc(np.array([0.0, 1.0]), np.array([2.0])) == 1.0
    assert validation.auroc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert validation.auroc(np.array([0.0, 2.0]), np.array([1.0, 1.0])) == 0.5


def test_a_painted_defect_changes_the_picture_under_its_mask_only() -> None:
    picture = np.full((128, 128, 3), 120, dtype=np.uint8)
    picture[::4] = 90
    changed = 0
    for seed in range(40):
        painted, mask = validation.paint_defect(picture, np.random.default_rng(seed), strength=1.5)
        assert (painted.shape, mask.shape) == (picture.shape, picture.shape[:2])
        away = cv2.dilate(mask, np.ones((71, 71), np.uint8)) == 0
        assert np.array_equal(painted[away], picture[away]) or not mask.any()
        changed += bool((painted != picture).any())
    assert changed > 35


def test_a_greedy_coreset_takes_the_far_rows_first() -> None:
    rows = torch.tensor([[0.0], [0.1], [10.0], [5.0]])
    assert validation.greedy_coreset(rows, 3).flatten().tolist() == [0.0, 10.0, 5.0]
    assert len(validation.greedy_coreset(rows, 9)) == 4


def test_validation_tells_features_that_see_a_defect_from_those_that_do_not() -> None:
    rng = np.random.default_rng(0)
    flat = [np.clip(rng.normal(128, 2, (64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(20)]
    product = validation.Product("plate", tuple(flat[:8]), tuple(flat[8:]))

    def sees(image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(image, 4)]

    def blind(image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(image, 4) * 0 + image.mean((1, 2, 3), keepdim=True)]

    seeing = validation.score_product(sees, product)
    assert seeing == validation.score_product(sees, product)
    assert seeing.image_auroc > validation.score_product(blind, product).image_auroc
    assert seeing.patch_auroc > 0.7


def test_the_commands_validate_and_refuse_nothing_to_validate(images: Path, tmp_path: Path) -> None:
    texture = next(iter(sorted(images.iterdir())))
    options = ["--backbone", "random", "--bank", "5", "--probes", "4", "--json"]
    done = CliRunner().invoke(command, ["validate", "--texture", str(texture), *options])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["mean_image_auroc"] <= 1
    refused = CliRunner().invoke(command, ["validate"])
    assert isinstance(refused.exception, InputError)
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    arguments = ["distil", "--teacher", str(texture), "--images", str(images), "--out", str(taken)]
    assert "already there" in str(CliRunner().invoke(command, arguments).exception)
