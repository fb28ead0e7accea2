"""Defects lie on the part of a photograph: both painters, every kind, every place, unless the frame is asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.server_side.kka.config import Paint, parse_config
from edgead.server_side.kka.grammar import PLACES, Defect, describe
from edgead.server_side.kka.inpainting_masks import drawn_mask
from edgead.server_side.kka.painters import open_painter
from edgead.server_side.kka.places import Part, part_of
from edgead.server_side.kka.procedural import ProceduralPainter
from edgead.server_side.painting import DEFECTS, paint_part
from edgead.server_side.part_finder import find_part


@pytest.fixture(scope="module")
def flange() -> np.ndarray:
    return paint_part("flange", rng=np.random.default_rng(4), size=200).image


@pytest.fixture(scope="module")
def disc() -> Part:
    """A small disc, in the lower right of its photograph."""
    rows, columns = np.mgrid[0:200, 0:300]
    return Part(np.hypot(columns - 210, rows - 130) < 50)


@pytest.mark.parametrize("kind", DEFECTS)
def test_the_procedural_painter_changes_nothing_beside_the_part(kind: str, flange: np.ndarray) -> None:
    part = find_part(flange)
    assert not part.all()
    for seed, (size, place) in enumerate(itertools.product(("tiny", "large", "huge"), ("", *PLACES))):
        caption = describe(Defect(kind, size, "", place, "clearly visible", 1 + seed % 3))
        painted = ProceduralPainter().paint(caption, flange, seed=seed)
        assert painted.mask is not None
        changed = (painted.image != flange).any(2)
        assert changed.any()
        assert not changed[painted.mask == 0].any()
        assert not (painted.mask > 0)[~part].any()


@pytest.mark.parametrize("kind", DEFECTS)
def test_an_inpainting_mask_lies_on_the_part(kind: str, disc: Part) -> None:
    for seed, place in enumerate(("", *PLACES)):
        for size in ("tiny", "huge"):
            caption = describe(Defect(kind, size, "", place))
            mask = drawn_mask((200, 300), caption, np.random.default_rng(seed), least=6, part=disc)
            assert (mask > 0).any()
            assert not (mask > 0)[~disc.mask].any()


@pytest.mark.parametrize("words", PLACES)
def test_a_place_of_a_caption_is_a_place_on_the_part(words: str, disc: Part) -> None:
    (left, right), (top, bottom) = PLACES[words]
    for x, y in itertools.product((left, right), (top, bottom)):
        across, down = disc.place((x, y))
        column, row = round(across * 299), round(down * 199)
        assert disc.mask[row, column]
        # Where the box has no part, in its corners, the nearest point of the part is taken.
        assert abs(column - (161 + x * 98)) < 16
        assert abs(row - (81 + y * 98)) < 16


def test_a_place_at_random_lies_on_the_part_and_the_deepest_in_its_middle(disc: Part) -> None:
    rng = np.random.default_rng(0)
    places = [disc.somewhere(rng) for _ in range(100)]
    assert all(disc.mask[round(y * 199), round(x * 299)] for x, y in places)
    assert len(set(places)) > 90
    x, y = disc.deepest
    assert (round(x * 299), round(y * 199)) == (210, 130)


def test_a_stain_in_the_middle_lies_in_the_middle_of_a_part_that_lies_aside(flange: np.ndarray) -> None:
    wide = np.concatenate([np.repeat(flange[:, :1], 140, axis=1), flange], axis=1)
    part = part_of(wide, "part")
    assert part is not None
    painted = ProceduralPainter().paint("a small stain in the middle, clearly visible", wide, seed=3)
    assert painted.mask is not None
    assert abs(np.nonzero(painted.mask)[1].mean() - 240) < 30
    anywhere = ProceduralPainter(within="frame").paint("a small stain in the middle, clearly visible", wide, seed=3)
    assert anywhere.mask is not None
    assert abs(np.nonzero(anywhere.mask)[1].mean() - 170) < 30


def test_where_the_part_fills_the_frame_both_words_paint_the_same() -> None:
    fabric = paint_part("fabric", rng=np.random.default_rng(2), size=160).image
    assert part_of(fabric, "part") is None
    one, other = (ProceduralPainter(within=within).paint("two cracks", fabric, seed=1) for within in ("part", "frame"))
    assert np.array_equal(one.image, other.image)


def test_the_frame_may_be_asked_for(flange: np.ndarray) -> None:
    config = parse_config(b'normals = "n"\n[paint]\nwithin = "frame"')
    painter = open_painter(config.paint)
    part = find_part(flange)
    caption = "a large stain near the upper left corner, clearly visible"
    outside = painter.paint(caption, flange, seed=0).mask
    assert outside is not None
    assert (outside > 0)[~part].any()
    usual = open_painter(Paint())
    assert painter.digest != usual.digest
    inside = usual.paint(caption, flange, seed=0)
    assert inside.mask is not None
    assert not (inside.mask > 0)[~part].any()
    assert np.array_equal(inside.image, usual.paint(caption, flange.copy(), seed=0).image)


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="within"):
        parse_config(b'normals = "n"\n[paint]\nwithin = "edge"')
    assert parse_config(b'normals = "n"').paint.within == "part"
