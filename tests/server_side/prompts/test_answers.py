"""Answers of language models: whatever they say, a bounded list of clean phrases or one kind of error."""

from __future__ import annotations

import contextlib
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.runtime.errors import LanguageModelError
from edgead.server_side.prompts.answers import clean_phrase, excerpt, phrases_of
from edgead.server_side.prompts.words import LIMITS


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ("1. Loose thread\n2) frayed yarn\n(3) cut fibre", ("Loose thread", "frayed yarn", "cut fibre")),
        ("Sure! Here are phrases:\n\n- loose thread\n* frayed yarn\n• cut fibre\n\nI hope this helps!",
         ("loose thread", "frayed yarn", "cut fibre")),
        ('["loose thread", "frayed yarn"]', ("loose thread", "frayed yarn")),
        ('Here you go:\n```json\n["loose thread", "frayed yarn"]\n```\nEnjoy.', ("loose thread", "frayed yarn")),
        ('The list is ["loose thread", "frayed yarn"], as asked.', ("loose thread", "frayed yarn")),
        ('{"phrases": [{"text": "loose thread"}, {"text": "frayed yarn"}]}', ("loose thread", "frayed yarn")),
        ("loose thread, frayed yarn; and cut fibre.", ("loose thread", "frayed yarn", "cut fibre")),
        ("Loose thread\nfrayed yarn\n", ("Loose thread", "frayed yarn")),
        ("1. **Loose thread**\n2. \"frayed yarn\"\n3. `cut fibre`.", ("Loose thread", "frayed yarn", "cut fibre")),
        ("- loose thread\n- Loose Thread\n- LOOSE THREAD.", ("loose thread",)),
        ("<think>I cannot do this\n- wrong</think>\n- loose thread", ("loose thread",)),
        ("- loose [thread](http://evil.example/x) here\n- www.evil.example\n- see https://a.b/c?d now",
         ("loose thread here", "see now")),
        ("- loose\u202e thr\u200bead\x07", ("loose thread",)),
        ("- <b>loose</b> thread {class}", ("loose thread class",)),
        ("- Cafe\u0301 stain", ("Caf\u00e9 stain",)),
        ("- ab\n- loose thread\n- " + "x " * 100, ("loose thread",)),
        ("- Loose thread: " + "a long explanation " * 20, ("Loose thread",)),
        ("- 12345 67\n- %%%%\n- loose thread\n- " + "QUJD" * 20, ("loose thread",)),
        ("# Defects\nloose thread\nfrayed yarn", ("loose thread", "frayed yarn")),
        ('["loose \\ud800thread"]', ("loose thread",)),
        ('["loose thread", ', ("loose thread",)),
    ],
)  # fmt: skip
def test_lists_of_many_forms_are_read(answer: str, phrases: tuple[str, ...]) -> None:
    assert phrases_of(answer) == phrases


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I can’t assist.",
        "Sorry, I cannot do this. Instead you could:\n- ask a friend\n- read a book",
        "As an AI language model, I do not have images.\n1. thing one\n2. thing two",
        "I cannot provide that.",
        "Unfortunately, I am not able to help.",
        "I apologize, but no.".replace("I apologize", "Apologies"),
        "<think>fine</think>I am unable to answer.",
        "This request violates our policy.",
    ],
)
def test_a_refusal_is_told_as_one(answer: str) -> None:
    with pytest.raises(LanguageModelError, match="a refusal"):
        phrases_of(answer)


@pytest.mark.parametrize(
    "answer", ["", "   \n\t", "%$#@!\n&&&&", "1 2 3 4", "[]", "{}", "[" * 50_000, "\x00" * 99, "42"]
)
def test_garbage_is_told_as_one(answer: str) -> None:
    with pytest.raises(LanguageModelError, match=r"nothing usable|an empty answer"):
        phrases_of(answer)


def test_ten_megabytes_give_no_more_than_was_asked_for() -> None:
    answer = "\n".join(f"- phrase number {'abcdefghij'[n % 10]}{n}" for n in range(400_000))
    assert len(phrases_of(answer, most=7)) == 7
    assert len(phrases_of(answer)) == 40


@pytest.mark.parametrize("unit", ["<", "[", "[](", "```", "<think>", "**", "http://", "{", '["', "- ", "( ", "a,"])
def test_repetition_takes_no_long_time(unit: str) -> None:
    # A pattern that runs away would need hours for this.
    with contextlib.suppress(LanguageModelError):
        phrases_of(unit * (200_000 // len(unit)))


PIECES = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["- ", "1. ", "\n", "```json\n", "```", "[", "]", '"', "{", "}", "http://x.y ", "<think>", "\u202e",
                     "I'm sorry", "loose thread", "**", ": ", ",", "\ud800", "\x00", "x" * 150]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join), st.integers(1, 50))
def test_any_answer_gives_bounded_clean_phrases_or_the_one_error(answer: str, most: int) -> None:
    try:
        phrases = phrases_of(answer, most=most)
    except LanguageModelError:
        return
    assert 1 <= len(phrases) <= most
    assert len({phrase.casefold() for phrase in phrases}) == len(phrases)
    for phrase in phrases:
        assert LIMITS.shortest_answer_chars <= len(phrase) <= LIMITS.answer_chars
        assert phrase == unicodedata.normalize("NFC", phrase) == phrase.strip()
        assert not any(unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn"} for char in phrase)
        assert "://" not in phrase
        assert "{" not in phrase
        phrase.encode()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400))
def test_cleaning_again_changes_nothing_that_matters(text: str) -> None:
    once = clean_phrase(text)
    if once is not None:
        twice = clean_phrase(once)
        assert twice is None or len(twice) <= len(once)
    assert len(excerpt(text, 50)) <= 50
