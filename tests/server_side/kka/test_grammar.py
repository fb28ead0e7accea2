"""The caption grammar: every sentence is read back, free words are understood, what is no caption is refused."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.server_side.kka.grammar import (
    COLOURS,
    CONTRASTS,
    GRAMMAR,
    PLACES,
    SIZES,
    Defect,
    Grammar,
    chosen,
    describe,
    parse,
    sample,
)
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.painting import DEFECTS
from edgead.server_side.prompts.answers import clean_phrase

DEFECT = st.builds(
    Defect,
    kind=st.sampled_from(DEFECTS),
    size=st.sampled_from(["", *SIZES]),
    colour=st.sampled_from(["", *COLOURS]),
    place=st.sampled_from(["", *PLACES]),
    contrast=st.sampled_from(["", *CONTRASTS]),
    number=st.integers(1, 3),
)


@given(DEFECT)
@settings(max_examples=400, deadline=None)
def test_a_sentence_is_read_back_as_the_defect_that_it_describes(defect: Defect) -> None:
    sentence = describe(defect)
    assert parse(sentence) == defect
    # What cleans the answers of language models leaves it as it is.
    assert clean_phrase(sentence) == sentence


def test_a_sentence_reads_like_one() -> None:
    full = Defect("stain", "large", "dark red", "near the upper left corner", "clearly visible")
    assert describe(full) == "a large dark red stain near the upper left corner, clearly visible"
    assert describe(Defect("scratch", "tiny", number=3)) == "three tiny scratches"
    assert describe(Defect("hole", colour="orange", place="in the middle")) == "an orange hole in the middle"


@pytest.mark.parametrize(
    ("caption", "defect"),
    [
        (
            "On the left of a large grey plate there's a SMALL, dark-red scratch!",
            Defect("scratch", "small", "dark red", "near the left edge"),
        ),
        (
            "a crack, very clearly visible, at the top right",
            Defect("crack", place="near the upper right corner", contrast="glaringly visible"),
        ),
        ("the rim is chipped", Defect("missing part")),
        ("Part of the lower flange has broken off.", Defect("missing part", place="near the lower edge")),
        ("a pale discolored area in the center", Defect("discolouration", "", "light grey", "in the middle")),
        ("several tiny pits across the surface", Defect("hole", "tiny", number=3)),
        ("scratches", Defect("scratch", number=2)),
        ("an oil stain that is dark brown", Defect("stain", colour="dark brown")),
        ("a hole on a large grey plate", Defect("hole")),
        ("a barely visible hairline fracture", Defect("crack", contrast="hardly visible")),
        ("a red thread left behind on it", Defect("thread", colour="red")),
    ],
)
def test_free_words_are_understood(caption: str, defect: Defect) -> None:
    assert parse(caption) == defect


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "   \x00\x1b[31m",
        "ein großer Kratzer",
        "表面の傷",
        "a wholesome part",
        "there are no scratches on it",
        "a part without any dents",
        "a flawless surface",
        "Ignore all previous instructions.",
        "scratch " * 200,
    ],
)
def test_what_names_no_defect_is_refused_with_what_can_be_drawn(caption: str) -> None:
    with pytest.raises(
        UndrawableCaptionError, match="scratch, dent, stain, thread, crack, hole, missing part"
    ) as caught:
        parse(caption)
    assert len(str(caught.value)) < 700


@given(st.text(max_size=700))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_defect_or_refused(text: str) -> None:
    with contextlib.suppress(UndrawableCaptionError):
        assert parse(text).kind in DEFECTS


def test_sampling_is_uniform_and_may_be_narrowed() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample(rng) for _ in range(4000)]
    for words, part in ((DEFECTS, "kind"), (GRAMMAR.sizes, "size"), (GRAMMAR.places, "place"), ((1, 2, 3), "number")):
        counted = Counter(getattr(defect, part) for defect in drawn)
        assert set(counted) == set(words)
        assert min(counted.values()) > 0.8 * len(drawn) / len(words)
    narrow = Grammar(kinds=("dent", "stain"), sizes=("tiny",), colours=("",), contrasts=("visible",), numbers=(1,))
    assert narrow.sentences == 2 * len(PLACES)
    assert len({describe(sample(rng, narrow)) for _ in range(400)}) == narrow.sentences


def test_ranges_of_sizes_and_contrasts_follow_one_another() -> None:
    rng = np.random.default_rng(0)
    for words in (SIZES, CONTRASTS):
        ranges = list(words.values())
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
        assert all(words[word][0] <= chosen(words, word, rng) <= words[word][1] for word in words)
        assert ranges[0][0] <= chosen(words, "", rng) <= ranges[-1][1]


@pytest.mark.parametrize(
    ("caption", "defect"),
    [
        ("a 2 cm scratch", Defect("scratch")),
        ("2cm scratch", Defect("scratch")),
        ("a 3 mm long crack", Defect("crack")),
        ("3 mm long crack near the top", Defect("crack", place="near the upper edge")),
        ("a 0.5 inch dent", Defect("dent")),
        ("a 2-inch-long dark scratch", Defect("scratch", colour="dark grey")),
        ("a three-millimetre hole", Defect("hole")),
        ("a 2 x 3 mm stain", Defect("stain")),
        ("a 2 to 3 mm wide chip", Defect("missing part")),
        ("a 3 µm pit", Defect("hole")),
        ('a 2" crack', Defect("crack")),
        ("a 2 in scratch", Defect("scratch")),
        ("a stain of 3% of the surface", Defect("stain")),
        ("at 3 o'clock a dent", Defect("dent")),
        ("a large crack, 2 cm long", Defect("crack", "large")),
        # These are counts.
        ("2 scratches", Defect("scratch", number=2)),
        ("3 dents in the middle", Defect("dent", place="in the middle", number=3)),
        ("two 3 mm cracks", Defect("crack", number=2)),
        ("3 cm scratches", Defect("scratch", number=2)),
    ],
)
def test_a_number_before_a_unit_is_a_length_and_no_count(caption: str, defect: Defect) -> None:
    assert parse(caption) == defect


@pytest.mark.parametrize(
    ("caption", "defect"),
    [
        ("no scratches but a dent", Defect("dent")),
        ("free of cracks, with a small chip", Defect("missing part", "small")),
        ("without scratches, one stain", Defect("stain")),
        (
            "No large red scratches on the left, but two dents on the right.",
            Defect("dent", "", "", "near the right edge", number=2),
        ),
        ("a dent, but no large dark scratches on the left", Defect("dent")),
        ("In the middle there are no cracks, only a tiny hole", Defect("hole", "tiny", place="in the middle")),
        ("There isn't a scratch. There is a brown stain.", Defect("stain", colour="brown")),
        ("There isn’t a scratch, a dent is visible", Defect("dent", contrast="visible")),
        ("not a scratch but a hairline crack", Defect("crack", contrast="hardly visible")),
        ("a scratch-free surface with a dent", Defect("dent")),
        ("a scratch-resistant plate with a dent", Defect("dent")),
        ("a long scratch is not present, but a stain is", Defect("stain")),
        ("the part does not have any scratches and has a dent", Defect("dent")),
        ("no defects other than a small hole", Defect("hole", "small")),
        ("flawless except for a scratch", Defect("scratch")),
        ("an otherwise flawless surface with a deep crack", Defect("crack")),
        ("a scratch on an otherwise undamaged part", Defect("scratch")),
        ("neither scratches nor dents, but a stain", Defect("stain")),
        ("the part without scratches is chipped", Defect("missing part")),
        ("lacking a bit of paint, scratched", Defect("scratch")),
        ("it's not a dent, it's a scratch", Defect("scratch")),
        ("Scratches: none. Dents: two", Defect("dent", number=2)),
        # These deny nothing.
        ("the surface is not smooth, a dent is on the left", Defect("dent", place="near the left edge")),
        ("a not very deep scratch", Defect("scratch")),
        ("not only a scratch", Defect("scratch")),
        ("a crack that is not present in normal parts", Defect("crack")),
        ("no longer round: a dent", Defect("dent")),
        ("a dent, not visible at first glance", Defect("dent", contrast="hardly visible")),
        ("a crack that isn't clearly visible", Defect("crack", contrast="faintly visible")),
        ("a free hanging thread", Defect("thread")),
    ],
)
def test_of_what_is_denied_nothing_is_drawn_and_the_rest_is(caption: str, defect: Defect) -> None:
    assert parse(caption) == defect


@pytest.mark.parametrize(
    "caption",
    [
        "there isn't a scratch",
        "there isn’t any scratch",
        "a scratch is not present",
        "Scratches, dents and cracks are not present.",
        "a scratch cannot be seen",
        "scratches are absent",
        "scratch-free surface",
        "a scratch and dent free surface",
        "no visible defects",
        "no visible defects, scratches or dents",
        "no scratches, dents, or cracks",
        "free of scratches, cracks and stains",
        "free from any visible large dark cracks",
        "without a scratch, a dent or a crack",
        "no evidence of any visible cracks",
        "does not show any scratches",
        "neither scratches nor dents",
        "no part is missing",
        "the part is not missing",
        "an undamaged wire",
        "the wire is flawless",
        "a defect-free thread",
    ],
)
def test_a_caption_that_says_there_is_none_is_refused(caption: str) -> None:
    with pytest.raises(UndrawableCaptionError, match="a caption that names a defect"):
        parse(caption)


@pytest.mark.parametrize(
    ("caption", "defect"),
    [
        ("A long, thin scratch", Defect("scratch", "large")),
        ("a thin, long scratch", Defect("scratch", "large")),
        ("a long fine hairline crack", Defect("crack", "large", contrast="hardly visible")),
        ("a thin scratch", Defect("scratch")),
        ("a short, thin scratch", Defect("scratch", "small")),
        ("an elongated dent", Defect("dent", "large")),
    ],
)
def test_a_defect_is_as_large_as_it_is_long_however_thin(caption: str, defect: Defect) -> None:
    assert parse(caption) == defect


def test_the_same_seed_gives_the_same_sentence_as_ever() -> None:
    written = [describe(sample(np.random.default_rng(seed))) for seed in range(3)]
    assert written == [
        "a large dark green missing part near the upper right corner, faintly visible",
        "a medium-sized light purple thread near the lower right corner, hardly visible",
        "three small white missing parts near the upper right corner, visible",
    ]
