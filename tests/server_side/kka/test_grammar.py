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
