"""The published ensembles have the published sizes and words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgead.runtime.errors import PromptError
from edgead.server_side.prompts import PromptSet, alfa, april_gan, descriptors, normality, normality_phrases, winclip
from edgead.server_side.prompts.checks import check_prompt_set, parse_prompt_set
from edgead.server_side.prompts.ensembles import APRIL_GAN_TEMPLATES, NORMALITY_STATES, WINCLIP_TEMPLATES
from edgead.server_side.prompts.prompt_set import STATES, format_prompt_set


@pytest.mark.parametrize(
    ("make", "normal", "anomalous"),
    [(winclip, 7 * 22, 4 * 22), (april_gan, 7 * 35, 5 * 35), (alfa, 36, 36), (descriptors, 20, 20)],
)
def test_ensembles_have_their_published_sizes(make: Callable[[str], PromptSet], normal: int, anomalous: int) -> None:
    prompts = make("metal_nut")
    check_prompt_set(prompts)
    assert (len(prompts.texts("normal")), len(prompts.texts("anomalous"))) == (normal, anomalous)
    assert all("metal nut" in prompt.text for prompt in prompts.prompts)
    assert not any("{}" in prompt.text or "  " in prompt.text for prompt in prompts.prompts)
    assert prompts.authors() == {"template": normal + anomalous}
    assert parse_prompt_set(format_prompt_set(prompts), "x") == prompts


def test_templates_are_distinct() -> None:
    assert len(set(WINCLIP_TEMPLATES)) == 22
    assert len(set(APRIL_GAN_TEMPLATES)) == 35


def test_winclip_composes_states_and_templates() -> None:
    prompts = winclip("carpet")
    assert "a photo of a carpet." in prompts.texts("normal")
    assert "a jpeg corrupted photo of the carpet without flaw." in prompts.texts("normal")
    assert "a photo of the damaged carpet for visual inspection." in prompts.texts("anomalous")


def test_april_gan_has_broken_things() -> None:
    assert "this is one broken carpet in the scene." in april_gan("carpet").texts("anomalous")
    assert "there is the carpet with flaw in the scene." in april_gan("carpet").texts("anomalous")


def test_alfa_fills_its_template_contrastively() -> None:
    prompts = alfa("carpet", "textural")
    assert "A textural image of a flawless carpet" in prompts.texts("normal")
    assert "A textural image of an imperfect carpet with discoloured spots" in prompts.texts("anomalous")
    own = alfa("carpet", details=["scratches", "scratches", "a loose thread"])
    assert "An industrial image of a broken carpet with a loose thread" in own.texts("anomalous")
    assert "An industrial image of an intact carpet with no scratches" in own.texts("normal")
    assert len(own.prompts) == 2 * 6 * 3


def test_a_normality_is_its_phrases_in_every_template() -> None:
    prompts = normality("metal_contamination", "metal_nut")
    assert "metal nut with metal contamination" in normality_phrases("metal_contamination", "metal_nut")
    texts = prompts.normality_texts("metal contamination")
    assert len(texts) == len(NORMALITY_STATES) * 35
    assert "a photo of a metal contamination on the metal nut." in texts
    assert {p.state for p in prompts.prompts if p.normality} == {"anomalous"}
    assert prompts.texts("normal") == april_gan("metal_nut").texts("normal")
    check_prompt_set(prompts)


def test_own_phrases_make_a_normality() -> None:
    prompts = normality("thread", "carpet", phrases=["carpet with lint"], author="person", templates=["a {}."])
    assert prompts.normality_texts("thread") == ("a carpet with lint.",)
    assert prompts.phrases == ("carpet with lint",)
    with pytest.raises(PromptError, match="at least one phrase"):
        normality("thread", "carpet", phrases=[])


def test_braces_in_a_name_are_only_characters() -> None:
    prompts = winclip("part {0} {} x")
    assert "a photo of a part {0} {} x." in prompts.texts("normal")


@pytest.mark.parametrize("make", [winclip, april_gan, alfa, descriptors, lambda name: normality("thread", name)])
@pytest.mark.parametrize("name", ["", "\n", "a" * 100, "\u2066x"])
def test_no_ensemble_of_a_class_without_a_name(make: Callable[[str], PromptSet], name: str) -> None:
    with pytest.raises(PromptError, match="a class name"):
        make(name)


def test_every_state_word_of_a_set_is_recorded() -> None:
    for state in STATES:
        assert getattr(winclip("carpet").states, state)
        assert getattr(alfa("carpet").states, state)
