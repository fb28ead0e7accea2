"""Prompt sets with a language model: ALFA's questions, NAND's phrases, descriptors for explanations.

Every answer goes through `answers.phrases_of`, and the set records what was asked and answered. The templates of
`ensembles` are always part of the result, so that a poor answer weakens a set and never empties it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from edgead.runtime.errors import LanguageModelError
from edgead.server_side.prompts import ensembles
from edgead.server_side.prompts.answers import MOST_PHRASES, excerpt, phrases_of
from edgead.server_side.prompts.llm_cache import CachedModel, now
from edgead.server_side.prompts.prompt_set import LLM, STATES, Exchange, PromptSet, State
from edgead.server_side.prompts.requests import LanguageModel, Message, Request
from edgead.server_side.prompts.words import LIMITS, spoken_name

_ABNORMAL = {"normal": "normal", "anomalous": "abnormal"}


@dataclass(frozen=True)
class AskOptions:
    """How to ask."""

    most: int = MOST_PHRASES
    """Phrases kept of each answer."""
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    shown: Callable[[Exchange, tuple[str, ...]], None] = lambda exchange, phrases: None
    """Called with every exchange and the cleaned phrases, before they are used."""


def ask(model: LanguageModel, question: str, options: AskOptions) -> tuple[tuple[str, ...], Exchange]:
    """Ask one question; the cleaned phrases of the answer, and the record of the exchange.

    Raises:
        LanguageModelError: no answer, a refusal, or no usable phrase.
    """
    request = Request(
        model.model,
        (Message("user", question),),
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    answer = model.complete(request)
    try:
        phrases = phrases_of(answer, most=options.most)
    except LanguageModelError:
        if isinstance(model, CachedModel):
            # The next run shall ask again.
            model.forget(request)
        raise
    digest = request.digest()
    time = model.times.get(digest) if isinstance(model, CachedModel) else None
    exchange = Exchange(digest, model.model.name, excerpt(question), excerpt(answer), time or now())
    options.shown(exchange, phrases)
    return phrases, exchange


def alfa_question(class_name: str, state: State) -> str:
    """ALFA's question for one state, with the form that the answers shall have."""
    kind = _ABNORMAL[state]
    article = "an" if kind == "abnormal" else "a"
    return (
        f"How to identify {article} {kind} {class_name} in an image? "
        f"Answer with a list, one short sentence of at most 15 words on each line. "
        f"Each line begins with: {article.capitalize()} {kind} image of {class_name}"
    )


def alfa(
    model: LanguageModel,
    class_name: str,
    domain: str = "industrial",
    details: Sequence[str] | None = None,
    options: AskOptions | None = None,
) -> PromptSet:
    """ALFA's 72 prompts by template, and the language model's after 'How to identify an abnormal {class} ...?'.

    Raises:
        PromptError: a word that is empty, too long or of odd characters.
        LanguageModelError: no answer, a refusal, or no usable phrase.
    """
    options = options or AskOptions()
    prompts = ensembles.alfa(class_name, domain, details)
    name = prompts.class_name
    for asked in STATES:
        phrases, exchange = ask(model, alfa_question(name, asked), options)
        by_state: dict[State, list[str]] = {"normal": [], "anomalous": []}
        for phrase in phrases:
            state, text = alfa_form(phrase, name, asked)
            by_state[state].append(text)
        for state in STATES:
            prompts = _add_llm(prompts, by_state[state], state, exchange)
    return prompts


def alfa_form(phrase: str, class_name: str, asked: State) -> tuple[State, str]:
    """A phrase in ALFA's form, 'An abnormal image of {class} ...', and the state that it speaks of.

    A phrase that begins with the other state's form belongs there, whatever was asked.
    """
    low = phrase.casefold()
    for state in STATES:
        kind = _ABNORMAL[state]
        for article in ("a", "an", "the"):
            if low.startswith(f"{article} {kind} image of "):
                return state, phrase[0].upper() + phrase[1:]
    kind = _ABNORMAL[asked]
    form = f"{'An' if kind == 'abnormal' else 'A'} {kind} image of"
    begins = any(low.startswith(f"{article}{class_name.casefold()}") for article in ("", "a ", "an ", "the "))
    return asked, f"{form} {phrase}" if begins else f"{form} {class_name} with {phrase}"


def normality_question(text: str, class_name: str) -> str:
    """NAND's instruction, in the paper's words."""
    return f"Generate concise phrases describing defects of type '{text}' in {class_name}s."


def normality(
    model: LanguageModel,
    text: str,
    class_name: str,
    domain: str = "industrial",
    options: AskOptions | None = None,
) -> PromptSet:
    """The prompts of a normality addition, from the language model's phrases x APRIL-GAN's templates.

    Raises:
        PromptError: a word that is empty, too long or of odd characters.
        LanguageModelError: no answer, a refusal, or no usable phrase.
    """
    curated = ensembles.normality(text, class_name, domain=domain)
    name, look = curated.class_name, curated.normalities()[0]
    phrases, exchange = ask(model, normality_question(look, name), options or AskOptions())
    # 'loose thread' alone would describe the thread without the carpet
    said = [phrase if name.casefold() in phrase.casefold() else f"{name} with {phrase}" for phrase in phrases]
    return ensembles.normality(look, name, phrases=said, author=_author(model), exchanges=[exchange], domain=domain)


def descriptor_question(class_name: str, state: State) -> str:
    """The question for short descriptions of what is seen."""
    look = "a good, defect-free" if state == "normal" else "a defective"
    return (
        f"List short descriptions, of two to eight words each, of what can be seen on {look} {class_name} in an "
        f"image. One on each line, no explanations."
    )


def descriptors(
    model: LanguageModel, class_name: str, domain: str = "industrial", options: AskOptions | None = None
) -> PromptSet:
    """The curated descriptors and the language model's, for explanations.

    Raises:
        PromptError: a word that is empty, too long or of odd characters.
        LanguageModelError: no answer, a refusal, or no usable phrase.
    """
    prompts = ensembles.descriptors(spoken_name(class_name), domain)
    name = prompts.class_name
    for state in STATES:
        phrases, exchange = ask(model, descriptor_question(name, state), options or AskOptions())
        said = [phrase if name.casefold() in phrase.casefold() else f"{name} with {phrase}" for phrase in phrases]
        prompts = _add_llm(prompts, said, state, exchange)
    return prompts


def _add_llm(prompts: PromptSet, texts: Sequence[str], state: State, exchange: Exchange) -> PromptSet:
    """The set with a language model's sentences, those left out that the set has under either state."""
    known = {prompt.text.casefold() for prompt in prompts.prompts}
    fresh = [text for text in texts if text.casefold() not in known and len(text) <= LIMITS.text_chars]
    merged = prompts.add(fresh, state, author=f"{LLM}{exchange.model}", exchanges=[exchange])
    kept = [text for text in fresh if len(text) <= LIMITS.phrase_chars]
    return msgspec.structs.replace(merged, phrases=tuple(dict.fromkeys((*merged.phrases, *kept))))


def _author(model: LanguageModel) -> str:
    return f"{LLM}{model.model.name}"
