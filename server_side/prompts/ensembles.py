"""Prompt sets without a language model: the published ensembles, and curated phrases for added normalities.

- WinCLIP (Jeong et al., CVPR 2023, appendix): 7 normal and 4 anomalous states x 22 templates.
- APRIL-GAN (Chen et al., VAND 2023): 7 normal and 5 anomalous states x 35 templates.
- ALFA (Zhu et al., ACM MM 2024): 'A {domain} image of a {state} {class} [with {details}]', 72 prompts.
- NAND's normality addition: phrases for what is to be normal x APRIL-GAN's templates; the phrases are written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from edgead.runtime.errors import PromptError
from edgead.server_side.prompts.prompt_set import (
    STATES,
    TEMPLATE,
    Exchange,
    Prompt,
    PromptSet,
    StateWords,
)
from edgead.server_side.prompts.words import LIMITS, check_words, filled, spoken_name, with_article

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
"""The normal states of WinCLIP, taken over by APRIL-GAN."""

WINCLIP_ANOMALOUS = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
APRIL_GAN_ANOMALOUS = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")

WINCLIP_TEMPLATES = (
    "a cropped photo of the {}.",
    "a cropped photo of a {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bright photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a dark photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of the {}.",
    "a blurry photo of a {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of the {} for visual inspection.",
    "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.",
    "a photo of a {} for anomaly detection.",
)

APRIL_GAN_TEMPLATES = (
    *("a bad photo of a {}.", "a low resolution photo of the {}.", "a bad photo of the {}."),
    *("a cropped photo of the {}.", "a bright photo of a {}.", "a dark photo of the {}.", "a photo of my {}."),
    *("a photo of the cool {}.", "a close-up photo of a {}.", "a black and white photo of the {}."),
    *("a bright photo of the {}.", "a cropped photo of a {}.", "a jpeg corrupted photo of a {}."),
    *("a blurry photo of the {}.", "a photo of the {}.", "a good photo of the {}.", "a photo of one {}."),
    *("a close-up photo of the {}.", "a photo of a {}.", "a low resolution photo of a {}.", "a photo of a large {}."),
    *("a blurry photo of a {}.", "a jpeg corrupted photo of the {}.", "a good photo of a {}."),
    *("a photo of the small {}.", "a photo of the large {}.", "a black and white photo of a {}."),
    *("a dark photo of a {}.", "a photo of a cool {}.", "a photo of a small {}.", "there is a {} in the scene."),
    *("there is the {} in the scene.", "this is a {} in the scene.", "this is the {} in the scene."),
    "this is one {} in the scene.",
)

ALFA_STATES = (
    ("normal", "abnormal"),
    ("flawless", "flawed"),
    ("perfect", "imperfect"),
    ("undamaged", "damaged"),
    ("unblemished", "blemished"),
    ("intact", "broken"),
)
"""Contrastive pairs: the normal state and its opposite."""

ALFA_DETAILS = (
    ("no visible defects", "visible defects"),
    ("a uniform surface", "an irregular surface"),
    ("consistent colours", "discoloured spots"),
    ("complete edges", "cracked or chipped edges"),
    ("all parts in place", "missing or misplaced parts"),
)
"""Contrastive pairs that fill 'with {details}' when the caller names none."""

NORMALITY_STATES = (
    "{class} with {text}",
    "{class} with a {text}",
    "{text} on the {class}",
    "{text} on a {class}",
    "{class} with visible {text}",
    "{class} showing {text}",
    "{class} affected by {text}",
    "{class} with {text} on its surface",
    "{class} that has {text}",
    "{text} on {class} surface",
    "{class} with a trace of {text}",
    "{text} defect on {class}",
)
"""The offline phrases for an added normality: where a language model would vary the words for the look itself,
these vary how the look and the object are joined."""

DESCRIPTORS: tuple[tuple[str, str], ...] = (
    ("smooth {}", "scratched {}"),
    ("whole {}", "cracked {}"),
    ("clean {}", "stained {}"),
    ("complete {}", "{} with a missing piece"),
    ("{} of even colour", "discoloured {}"),
    ("straight {}", "bent {}"),
    ("{} with intact edges", "{} with a chipped edge"),
    ("{} without holes", "{} with a hole"),
    ("{} free of dirt", "{} contaminated with dirt"),
    ("{} with a regular pattern", "{} with a broken pattern"),
    ("{} of the right shape", "deformed {}"),
    ("{} in the right position", "misplaced {}"),
    ("{} without foreign matter", "{} with a foreign body on it"),
    ("{} without threads", "{} with a loose thread"),
    ("{} with clear print", "{} with smeared print"),
    ("untouched {}", "{} with a cut"),
    ("{} without wear", "worn {}"),
    ("{} without dents", "dented {}"),
    ("{} without glue", "{} with glue on it"),
    ("{} without rust", "rusty {}"),
)
"""What one sees on a good part and on a bad one, in pairs: the vocabulary of explanations."""


def compose(
    class_name: str,
    states: StateWords,
    templates: Sequence[str],
    *,
    method: str,
    domain: str = "industrial",
    author: str = TEMPLATE,
    exchanges: Sequence[Exchange] = (),
) -> PromptSet:
    """Every state of a class in every template: the compositional ensemble.

    Raises:
        PromptError: a class name or domain that is empty, too long or of odd characters.
    """
    name = spoken_name(class_name)
    empty = PromptSet(
        class_name=name,
        prompts=(),
        domain=check_words(domain, "a domain", LIMITS.name_chars),
        method=method,
        templates=tuple(templates),
    )
    for state in STATES:
        empty = empty.add(getattr(states, state), state, author=author, exchanges=exchanges)
    return empty


def winclip(class_name: str, domain: str = "industrial") -> PromptSet:
    """WinCLIP's compositional prompt ensemble: 7 x 22 normal and 4 x 22 anomalous prompts.

    Raises:
        PromptError: a class name or domain that is empty, too long or of odd characters.
    """
    return compose(
        class_name, StateWords(NORMAL_STATES, WINCLIP_ANOMALOUS), WINCLIP_TEMPLATES, method="winclip", domain=domain
    )


def april_gan(class_name: str, domain: str = "industrial") -> PromptSet:
    """APRIL-GAN's ensemble: 7 x 35 normal and 5 x 35 anomalous prompts.

    Raises:
        PromptError: a class name or domain that is empty, too long or of odd characters.
    """
    return compose(
        class_name,
        StateWords(NORMAL_STATES, APRIL_GAN_ANOMALOUS),
        APRIL_GAN_TEMPLATES,
        method="april-gan",
        domain=domain,
    )


def alfa(class_name: str, domain: str = "industrial", details: Sequence[str] | None = None) -> PromptSet:
    """ALFA's unified template, 'A {domain} image of a {state} {class} [with {details}]'.

    Six contrastive pairs of states, each without details and with five contrastive ones: 36 normal and 36 anomalous
    prompts. The paper publishes the template and the number 72; its lists of words are not public, so these pairs
    are our own.

    Args:
        class_name: the object, 'metal_nut' or 'metal nut'.
        domain: the kind of image, such as 'industrial' or 'manufacturing'.
        details: what this class's defects show, such as 'scratches'; the normal prompts then say 'no scratches'.
            None takes five that fit most objects.

    Raises:
        PromptError: a word that is empty, too long or of odd characters.
    """
    name = spoken_name(class_name)
    kind = check_words(domain, "a domain", LIMITS.name_chars)
    pairs: Iterable[tuple[str, str]] = ALFA_DETAILS
    if details is not None:
        words = [check_words(detail, "a detail", LIMITS.answer_chars) for detail in details]
        pairs = [(f"no {word}", word) for word in dict.fromkeys(words)]
    endings = [("", ""), *((f" with {good}", f" with {bad}") for good, bad in pairs)]
    prompts = []
    for position, state in enumerate(STATES):
        for word in (pair[position] for pair in ALFA_STATES):
            for ending in (pair[position] for pair in endings):
                text = f"{with_article(kind, capital=True)} image of {with_article(f'{word} {name}')}{ending}"
                prompts.append(Prompt(text, state))
    return PromptSet(
        class_name=name,
        prompts=tuple(prompts),
        domain=kind,
        method="alfa",
        states=StateWords(*(tuple(f"{pair[position]} {{}}" for pair in ALFA_STATES) for position in (0, 1))),
        phrases=tuple(dict.fromkeys(word for pair in pairs for word in pair)),
    )


def descriptors(class_name: str, domain: str = "industrial") -> PromptSet:
    """Short descriptions of what is seen on good and bad parts, for explanations by the nearest descriptor.

    Raises:
        PromptError: a class name or domain that is empty, too long or of odd characters.
    """
    states = StateWords(*(tuple(pair[position] for pair in DESCRIPTORS) for position in (0, 1)))
    return compose(class_name, states, (), method="descriptors", domain=domain)


def normality_phrases(text: str, class_name: str) -> tuple[str, ...]:
    """The curated phrases for an added normality: 'carpet with thread', 'thread on the carpet', ...

    Raises:
        PromptError: a text or class name that is empty, too long or of odd characters.
    """
    name, look = spoken_name(class_name), _look(text)
    return tuple(state.replace("{class}", name).replace("{text}", look) for state in NORMALITY_STATES)


def normality(
    text: str,
    class_name: str,
    *,
    phrases: Sequence[str] | None = None,
    author: str = TEMPLATE,
    exchanges: Sequence[Exchange] = (),
    templates: Sequence[str] = APRIL_GAN_TEMPLATES,
    domain: str = "industrial",
) -> PromptSet:
    """The prompts of a normality addition (NAND): each phrase in each template, marked with the normality's text.

    Besides these the set has APRIL-GAN's normal and anomalous prompts of the class: the normal ones make the
    feature that the suppression compares with (f_nor); the added ones make f_add.

    Args:
        text: what is normal from now on, such as 'thread'. It names the normality.
        class_name: the object.
        phrases: descriptions of that look, such as a language model's; None takes the curated ones.
        author: who wrote the phrases.
        exchanges: the language model's exchanges that produced them.
        templates: sentences with a '{}'.
        domain: the kind of image.

    Raises:
        PromptError: no phrase, or a word that is empty, too long or of odd characters.
    """
    look = _look(text)
    base = april_gan(class_name, domain)
    said = normality_phrases(look, class_name) if phrases is None else tuple(phrases)
    said = tuple(check_words(phrase, "a phrase", LIMITS.phrase_chars) for phrase in said)
    if not said:
        raise PromptError(
            wanted=f"at least one phrase for the normality {look!r}",
            got="none",
            next_step="Give phrases, or leave them out for the curated ones.",
        )
    sentences = [filled(template, phrase) for phrase in said for template in templates]
    extended = base.add(sentences, "anomalous", author=author, normality=look, exchanges=exchanges)
    return msgspec.structs.replace(extended, method="normality", phrases=said)


def _look(text: str) -> str:
    return check_words(text.replace("_", " "), "the text of a normality", LIMITS.name_chars)
