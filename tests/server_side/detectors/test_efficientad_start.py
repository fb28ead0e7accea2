"""The closed forms that a patch description network begins with, against references and in a training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgead.runtime.image import encode_png, list_images, read_image
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.efficientad import EfficientAdExtras, learn
from edgead.server_side.detectors.efficientad_crops import crop_place, normalised, of_crop, place_around
from edgead.server_side.detectors.efficientad_networks import PatchDescription, cells
from edgead.server_side.detectors.efficientad_start import (
    PENALTY,
    RIDGE,
    Example,
    component_filters,
    crops_of,
    foreign_examples,
    read_out,
)
from edgead.server_side.detectors.efficientad_teacher import generic_frames
from edgead.server_side.detectors.trained import TrainedOptions
from edgead.server_side.detectors.training import generator

SIDE = 64
FRAMES = generic_frames(Preprocessing(SIDE, SIDE), seed=4, count=12)


@pytest.fixture(scope="module")
def started() -> PatchDescription:
    network = PatchDescription(6, seed=0)
    component_filters(network, FRAMES, seed=1)
    return network


def test_first_filters_are_components_and_their_negatives_of_unit_variance(started: PatchDescription) -> None:
    weights = started.first.weight.detach()
    assert torch.equal(weights[:48], -weights[48:96])
    with torch.inference_mode():
        seen = started.first(normalised(FRAMES))[:, :48].transpose(0, 1).flatten(1)
    assert float(seen.mean(1).abs().max()) < 0.3
    assert float(seen[0].std()) == pytest.approx(1.0, abs=0.15), "the largest component is whitened"
    spread = seen.std(1)
    assert float(spread[-1]) < 0.3 * float(spread[0]), "noise is not"
    between = torch.corrcoef(seen[:6]) - torch.eye(6)
    assert float(between.abs().max()) < 0.25
    patches = F.unfold(normalised(FRAMES), 4).transpose(1, 2).flatten(0, 1).double()
    largest = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)[2][0]
    alike = F.cosine_similarity(weights[0].flatten().double(), largest, dim=0)
    assert abs(float(alike)) > 0.98


def test_deeper_filters_see_what_the_ones_before_give(started: PatchDescription) -> None:
    for layer, before, half in ((started.second, 128, 128), (started.third, 256, 128)):
        assert layer.in_channels == before
        assert torch.equal(layer.weight[:half], -layer.weight[half : 2 * half])
        assert bool(torch.isfinite(layer.weight).all())
    with torch.inference_mode():
        hidden = F.avg_pool2d(F.relu(started.first(normalised(FRAMES))), 2)
        seen = started.second(hidden)[:, :4].transpose(0, 1).flatten(1)
    assert seen.std(1).tolist() == pytest.approx([1.0] * 4, abs=0.25), "whitened"


def test_the_last_layer_is_the_ridge_regression(started: PatchDescription) -> None:
    rng = np.random.default_rng(0)
    said = [torch.from_numpy(rng.normal(size=(4, cells(SIDE), cells(SIDE)))).float() for _ in range(3)]
    where = torch.zeros(cells(SIDE), cells(SIDE), dtype=torch.bool)
    where[2:5, 3] = True
    examples = [
        *(Example(FRAMES[place : place + 1], each) for place, each in enumerate(said)),
        Example(FRAMES[5:6], None, where, weight=0.5),
    ]
    started = copy.deepcopy(started)
    read_out(started, iter(examples), 4)
    with torch.inference_mode():
        found = started(normalised(FRAMES[:6]))
        hidden = F.avg_pool2d(F.relu(started.first(normalised(FRAMES[:6]))), 2)
        hidden = F.relu(started.third(F.avg_pool2d(F.relu(started.second(hidden)), 2)))
        rows = F.unfold(hidden, 4).transpose(1, 2).double().numpy()
    marked = where.flatten().numpy()
    x = np.concatenate([rows[0], rows[1], rows[2], rows[5][marked]])
    y = np.concatenate([*(each.flatten(1).T.numpy() for each in said), np.zeros((marked.sum(), 4))])
    weight = np.concatenate([np.ones(len(x) - marked.sum()), np.full(marked.sum(), 0.5)])
    weight /= weight.sum()
    # The dual form, with the constant taken out by weighted centring: another way to the same minimum.
    mean, level = weight @ x, weight @ y
    ridge = RIDGE * float((weight @ x**2).mean())
    root = np.sqrt(weight)[:, None]
    inner, outer = root * (x - mean), root * (y - level)
    dual = np.linalg.solve(inner @ inner.T + ridge * np.eye(len(x)), outer)
    expected = level + (rows[0] - mean) @ (inner.T @ dual)
    np.testing.assert_allclose(found[0, :4].flatten(1).T.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:, 4:], torch.zeros_like(found[:, 4:])), "what is not said is 0"


def test_every_frame_gives_as_many_crops_as_any_other() -> None:
    places = list(crops_of(np.zeros((3, 96, 128, 3), np.uint8), 0))
    assert sorted(frame for frame, _ in places) == sorted([0, 1, 2] * 4)
    assert all(
        top % 4 == left % 4 == 0 and top + high <= 96 and left + wide <= 128 for _, (top, left, high, wide) in places
    )
    assert list(crops_of(np.zeros((0, 64, 64, 3), np.uint8), 0)) == []


def test_foreign_examples_are_generic_crops_and_marked_cells() -> None:
    marked = torch.zeros(2, cells(SIDE), cells(SIDE), dtype=torch.bool)
    marked[:, 4, 5] = True

    def examples() -> Iterator[Example]:
        return foreign_examples(FRAMES[:1], FRAMES[1:3], marked, 0)

    found = list(examples())
    assert len(found) == 4 + 2
    assert all(each.said is None and each.weight == PENALTY for each in found)
    assert [None if each.where is None else int(each.where.sum()) for each in found] == [None] * 4 + [1, 1]
    assert np.array_equal(found[0].crop, next(examples()).crop)
    place = place_around(marked[0], (SIDE, SIDE), generator(0, 0), side=40)
    assert bool(of_crop(marked[0], place).any()), "the crop has the cell"
    assert crop_place((SIDE, SIDE), generator(0, 1), 40)[2:] == (40, 40)


def test_a_student_that_begins_with_closed_forms_knows_its_teacher_on_normals_alone(
    painted_normals: Path, tmp_path: Path
) -> None:
    paths = list_images(painted_normals)
    options = TrainedOptions(preprocessing=Preprocessing(SIDE, SIDE), steps=1)
    for number in (0, 3, 6):
        (tmp_path / f"{number}.png").write_bytes(encode_png(FRAMES[number]))
    extras = EfficientAdExtras(tuple(list_images(tmp_path)), tmp_path / "x.teacher", teacher_steps=1)
    closed = learn(paths, options, extras=extras)
    random = learn(paths, options, extras=dataclasses.replace(extras, start="random"))
    assert (closed.card["start"], random.card["start"]) == ("closed", "random")
    assert closed.card["teacher"] == random.card["teacher"]
    assert closed.card["student_unlearned"] < 0.6 * random.card["student_unlearned"]
    foreign = FRAMES[1::3]
    with torch.inference_mode():
        own, other = (
            float(closed.trunk(torch.from_numpy(frames))[0].mean())
            for frames in (np.stack([cv2.resize(read_image(path), (SIDE, SIDE)) for path in paths]), foreign)
        )
    assert other > 2.0 * own
