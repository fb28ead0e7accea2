"""Prompt sets from a language model's answers: the published questions, honest records, templates always there."""

from __future__ import annotations

from typing import Any

import pytest

from edgead.runtime.errors import LanguageModelError, PromptError
from edgead.server_side.prompts import ensembles, generators
from edgead.server_side.prompts.checks import check_prompt_set, parse_prompt_set
from edgead.server_side.prompts.generators import AskOptions
from edgead.server_side.prompts.prompt_set import format_prompt_set


def test_alfa_asks_its_question_and_keeps_the_form(ready: Any) -> None:
    model = ready(
        "1. A normal image of carpet shows an even weave.\n2. even colour",
        "1. An abnormal image of carpet shows a hole.\n2. Carpet with lint\n3. a cut\n4. A normal image of carpet: dry",
    )
    prompts = generators.alfa(model, "carpet")
    check_prompt_set(prompts)
    questions = [request.messages[0].content for request in model.asked]
    assert questions[0].startswith("How to identify a normal carpet in an image?")
    assert questions[1].startswith("How to identify an abnormal carpet in an image?")
    assert "An abnormal image of carpet" in questions[1]
    by_llm = [(prompt.state, prompt.text) for prompt in prompts.prompts if prompt.author == "llm:ready"]
    assert by_llm == [
        ("normal", "A normal image of carpet shows an even weave"),
        ("normal", "A normal image of carpet with even colour"),
        ("normal", "A normal image of carpet: dry"),
        ("anomalous", "An abnormal image of carpet shows a hole"),
        ("anomalous", "An abnormal image of Carpet with lint"),
        ("anomalous", "An abnormal image of carpet with a cut"),
    ]
    assert prompts.authors()["template"] == 72


def test_every_sentence_of_a_model_names_the_exchange_that_made_it(ready: Any) -> None:
    shown: list[tuple[str, tuple[str, ...]]] = []
    options = AskOptions(shown=lambda exchange, phrases: shown.append((exchange.digest, phrases)))
    prompts = generators.descriptors(ready("- even weave", "- pulled loop"), "carpet", options=options)
    digests = {exchange.digest[:12]: exchange for exchange in prompts.exchanges}
    made = {prompt.text: digests[prompt.exchange or ""] for prompt in prompts.prompts if prompt.author == "llm:ready"}
    assert set(made) == {"carpet with even weave", "carpet with pulled loop"}
    assert made["carpet with pulled loop"].answer == "- pulled loop"
    assert "defective carpet" in made["carpet with pulled loop"].prompt
    assert [phrases for _, phrases in shown] == [("even weave",), ("pulled loop",)]
    assert parse_prompt_set(format_prompt_set(prompts), "x") == prompts


def test_normality_uses_the_papers_instruction(ready: Any) -> None:
    model = ready("- loose thread on the carpet\n- stray fibre")
    prompts = generators.normality(model, "thread", "metal_nut")
    assert model.asked[0].messages[0].content == (
        "Generate concise phrases describing defects of type 'thread' in metal nuts."
    )
    assert prompts.phrases == ("metal nut with loose thread on the carpet", "metal nut with stray fibre")
    assert len(prompts.normality_texts("thread")) == 2 * 35
    assert {prompt.author for prompt in prompts.prompts if prompt.normality} == {"llm:ready"}
    check_prompt_set(prompts)


def test_a_sentence_for_both_states_is_kept_for_the_first_alone(ready: Any) -> None:
    prompts = generators.descriptors(ready("- a woven carpet"), "carpet")
    check_prompt_set(prompts)
    assert [prompt.state for prompt in prompts.prompts if prompt.text == "a woven carpet"] == ["normal"]


@pytest.mark.parametrize("answer", ["", "I'm sorry, I can't.", "$$$"])
def test_no_set_is_made_of_no_answer(ready: Any, answer: str) -> None:
    for make in (generators.alfa, generators.descriptors):
        with pytest.raises(LanguageModelError):
            make(ready(answer), "carpet")
    with pytest.raises(LanguageModelError):
        generators.normality(ready(answer), "thread", "carpet")


def test_no_model_is_asked_about_a_class_without_a_name(ready: Any) -> None:
    model = ready("- a thing")
    for make in (generators.alfa, generators.descriptors):
        with pytest.raises(PromptError):
            make(model, " ")
    with pytest.raises(PromptError):
        generators.normality(model, "", "carpet")
    assert not model.asked


def test_the_longest_words_make_a_set_that_is_well_formed(ready: Any) -> None:
    name, phrase = "n" * 60, " ".join(["word"] * 24)
    model = ready(f"- {phrase}\n- {phrase[:60]}")
    for prompts in (
        generators.alfa(model, name),
        generators.descriptors(model, name),
        generators.normality(model, "t" * 60, name),
        ensembles.normality("t" * 60, name),
    ):
        check_prompt_set(prompts)
