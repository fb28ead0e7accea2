"""The procedural painter obeys its captions; the author of the grammar writes what it can draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.server_side.kka.grammar import CONTRASTS, PLACES, SIZES, Defect, Grammar, describe, parse
from edgead.server_side.kka.procedural import GrammarAuthor, ProceduralPainter
from edgead.server_side.kka.records import Caption, Image
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.seams import Frame, Painted, UndrawableCaptionError
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.painting import DEFECTS


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A grainy plate with a little colour, 160 x 120 pixels."""
    rng = np.random.default_rng(3)
    return (np.array([128, 122, 116]) + rng.normal(0, 4, (120, 160, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", DEFECTS)
def test_the_caption_and_the_seed_decide_every_pixel(kind: str, photo: np.ndarray) -> None:
    painter = ProceduralPainter()
    caption = describe(Defect(kind, "medium-sized", place="in the middle", contrast="clearly visible", number=2))
    first, again, other = (painter.paint(caption, photo.copy(), seed=seed) for seed in (5, 5, 6))
    assert first.mask is not None
    assert again.mask is not None
    assert other.mask is not None
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.mask, other.mask)
    assert set(np.unique(first.mask)) == {0, 255}
    assert not (first.image != photo)[first.mask == 0].any()
    assert (first.image != photo).any(2)[first.mask > 0].mean() > 0.6


def _measured(photo: np.ndarray, defect: Defect) -> tuple[float, float, np.ndarray]:
    """Mean area and change of a defect over seeds, and the mean centre of its mask in shares (x, y)."""
    areas, changes, centres = [], [], []
    for seed in range(6):
        painted = ProceduralPainter().paint(describe(defect), photo, seed=seed)
        assert painted.mask is not None
        inside = painted.mask > 0
        areas.append(inside.mean())
        changes.append(np.abs(painted.image.astype(int) - photo)[inside].mean())
        rows, columns = np.nonzero(inside)
        centres.append(((columns.min() + columns.max()) / 2 / 159, (rows.min() + rows.max()) / 2 / 119))
    return float(np.mean(areas)), float(np.mean(changes)), np.array(centres)


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_larger_word_is_a_larger_defect(kind: str, photo: np.ndarray) -> None:
    sizes = tuple(SIZES)
    areas = [_measured(photo, Defect(kind, size, "", "in the middle", "visible"))[0] for size in sizes]
    assert areas == sorted(areas)
    assert areas[-1] > 4 * areas[0]


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_stronger_word_is_a_stronger_change(kind: str, photo: np.ndarray) -> None:
    changes = [_measured(photo, Defect(kind, "large", "", "in the middle", word))[1] for word in CONTRASTS]
    assert changes == sorted(changes)
    assert changes[-1] > 3 * changes[0]


@pytest.mark.parametrize("words", PLACES)
def test_a_defect_is_where_the_caption_says(words: str, photo: np.ndarray) -> None:
    _, _, centres = _measured(photo, Defect("stain", "small", "", words, "clearly visible"))
    for axis, (low, high) in enumerate(PLACES[words]):
        assert (centres[:, axis] > low - 0.05).all()
        assert (centres[:, axis] < high + 0.05).all()


def test_the_colour_is_obeyed_where_the_camera_sees_colours(photo: np.ndarray) -> None:
    painter = ProceduralPainter()
    caption = "a large red stain in the middle, glaringly visible"
    painted = painter.paint(caption, photo, seed=0)
    assert painted.mask is not None
    red, green, _ = painted.image[painted.mask > 0].mean(0) - photo[painted.mask > 0].mean(0)
    assert red > green + 10
    grey = np.repeat(photo[..., :1], 3, axis=2)
    without = painter.paint(caption, grey, seed=0)
    assert (without.image == without.image[..., :1]).all()
    assert (without.image != grey).any()


def test_what_it_cannot_draw_is_refused(photo: np.ndarray) -> None:
    painter = ProceduralPainter()
    with pytest.raises(UndrawableCaptionError, match="names none"):
        painter.check("a kitten")
    with pytest.raises(UndrawableCaptionError, match="names none"):
        painter.paint("a kitten", photo, seed=0)
    with pytest.raises(InputError, match="photograph"):
        painter.paint("a dent", None, seed=0)
    painter.check("a dent")


def test_the_author_writes_what_the_painter_draws() -> None:
    author = GrammarAuthor()
    written = author.write([""] * 50, list(range(50)))
    assert written[7:9] == author.write(["", "another prompt"], [7, 8])
    assert len(set(written)) > 45
    for caption in written:
        assert describe(parse(caption)) == caption
    narrow = GrammarAuthor(Grammar(kinds=("dent",), numbers=(1,)))
    assert all(parse(caption).kind == "dent" for caption in narrow.write([""] * 5, list(range(5))))
    assert len(author.digest) == 64
    assert author.digest != narrow.digest
    assert author.digest == GrammarAuthor().digest


class Reluctant(ProceduralPainter):
    """Finds out only while it paints that it cannot."""

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        if seed % 3 == 0:
            raise UndrawableCaptionError(wanted="a picture", got="none that passes")
        return super().paint(caption, normal, seed=seed)


def test_a_caption_that_turns_out_undrawable_has_no_image_and_the_round_goes_on(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work("[imagine]\nauthor = 'grammar'", rounds=0)
    makers = makers_of_tests.makers(author=GrammarAuthor(Grammar(sizes=("large",), contrasts=("visible",))))
    run(work, dataclasses.replace(makers, painter=Reluctant))
    painted = {record.parent for record in work.records(Image, 0)}
    written = {record.id for record in work.records(Caption, 0)}
    assert 0 < len(written - painted) < len(written)
    assert painted < written
    assert all(record.visible > 0 for record in work.records(Image, 0))
    assert work.is_done("collect", 0)
