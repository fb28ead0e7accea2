"""Is this a prompt set? Strict, because people edit these files: every error names the place to look at."""

from __future__ import annotations

import json
import re
from typing import NoReturn

import msgspec
from msgspec import Struct

from edgead.runtime.errors import PromptError
from edgead.server_side.prompts.prompt_set import (
    LLM,
    PERSON,
    PROMPT_SCHEMA,
    STATES,
    TEMPLATE,
    Exchange,
    Prompt,
    PromptSet,
)
from edgead.server_side.prompts.words import LIMITS, unseen_character

_AGAIN = "Mend that place in the file; `edgead prompts check FILE` tells when it is whole."


class _Schema(Struct):
    schema: int


def parse_prompt_set(data: bytes, where: str) -> PromptSet:
    """A prompt set from its JSON. `where` names the file in the errors.

    Raises:
        PromptError: not JSON (with the line), of a newer schema, or not a well-formed set (with the prompt's number).
    """
    if len(data) > LIMITS.file_bytes:
        _refuse(where, f"a file of at most {LIMITS.file_bytes >> 20} MiB", "a longer one")
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema > PROMPT_SCHEMA:
            raise PromptError(
                wanted=f"a prompt set of schema {PROMPT_SCHEMA} or older in {where}",
                got=f"schema {schema}, from a newer edgead",
                next_step="Update edgead on this machine.",
            )
        prompts = msgspec.json.decode(data, type=PromptSet)
    except msgspec.ValidationError as error:
        _refuse(where, "a prompt set", _in_words(str(error)))
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        _refuse(where, "JSON", f"{_place_in_json(data)} ({error})")
    check_prompt_set(prompts, where)
    return prompts


def check_prompt_set(prompts: PromptSet, where: str = "the prompt set") -> None:
    """Check a set against itself.

    Raises:
        PromptError: names the first thing that does not hold, with the number of the prompt, template or exchange.
    """
    if prompts.schema != PROMPT_SCHEMA:
        _refuse(where, f"schema {PROMPT_SCHEMA}", f"schema {prompts.schema}")
    for name, limit in (("class_name", LIMITS.name_chars), ("domain", LIMITS.name_chars), ("method", 40)):
        _check_text(where, name, getattr(prompts, name), limit)
    for state in STATES:
        for number, words in enumerate(getattr(prompts.states, state), 1):
            _check_slot(where, f"{state} state {number}", words)
    for number, words in enumerate(prompts.templates, 1):
        _check_slot(where, f"template {number}", words)
    for number, words in enumerate(prompts.phrases, 1):
        _check_text(where, f"phrase {number}", words, LIMITS.phrase_chars)
    _check_exchanges(where, prompts.exchanges)
    _check_prompts(where, prompts)


def _check_prompts(where: str, prompts: PromptSet) -> None:
    if len(prompts.prompts) > LIMITS.prompts:
        _refuse(where, f"at most {LIMITS.prompts} prompts", f"{len(prompts.prompts)}")
    known = {exchange.digest[:12] for exchange in prompts.exchanges}
    seen: dict[tuple[str, str | None], int] = {}
    for number, prompt in enumerate(prompts.prompts, 1):
        place = f"prompt {number}"
        _check_text(where, place, prompt.text, LIMITS.text_chars)
        if prompt.state not in STATES:
            _refuse(where, f"the state 'normal' or 'anomalous' in {place}", repr(prompt.state[:60]))
        if prompt.normality is not None:
            _check_text(where, f"the normality of {place}", prompt.normality, LIMITS.name_chars)
        _check_author(where, place, prompt, known)
        first = seen.setdefault((" ".join(prompt.text.casefold().split()), prompt.normality), number)
        if first != number:
            other = prompts.prompts[first - 1]
            _refuse(
                where,
                "every prompt once" if other.state == prompt.state else "each prompt under one state",
                f"{prompt.text[:80]!r} as prompt {first} ({other.state}) and as {place} ({prompt.state})",
            )
    for state in STATES:
        if not prompts.texts(state):
            _refuse(where, f"at least one {state} prompt that belongs to no added normality", "none")


def _check_author(where: str, place: str, prompt: Prompt, known: set[str]) -> None:
    by_llm = prompt.author.startswith(LLM)
    if by_llm:
        _check_text(where, f"the model's name in {place}", prompt.author.removeprefix(LLM), LIMITS.name_chars)
    elif prompt.author not in (TEMPLATE, PERSON):
        _refuse(where, f"the author '{TEMPLATE}', '{PERSON}' or '{LLM}NAME' in {place}", repr(prompt.author[:60]))
    if by_llm and prompt.exchange not in known:
        got = "none" if prompt.exchange is None else repr(prompt.exchange[:60])
        _refuse(where, f"one of the file's exchanges for {place}, which a language model wrote", got)
    if not by_llm and prompt.exchange is not None:
        _refuse(where, f"no exchange in {place}", f"one, though its author is {prompt.author!r}")


def _check_exchanges(where: str, exchanges: tuple[Exchange, ...]) -> None:
    if len(exchanges) > LIMITS.exchanges:
        _refuse(where, f"at most {LIMITS.exchanges} exchanges", f"{len(exchanges)}")
    digests = set()
    for number, exchange in enumerate(exchanges, 1):
        place = f"exchange {number}"
        if not re.fullmatch(r"[0-9a-f]{64}", exchange.digest):
            _refuse(where, f"a digest of 64 hexadecimal digits in {place}", repr(exchange.digest[:80]))
        if exchange.digest[:12] in digests:
            _refuse(where, "every exchange once", f"{place} again with {exchange.digest[:12]}")
        digests.add(exchange.digest[:12])
        _check_text(where, f"the model's name in {place}", exchange.model, LIMITS.name_chars)
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", exchange.time):
            _refuse(where, f"a time such as 2026-01-31T12:00:00+00:00 in {place}", repr(exchange.time[:60]))
        for name in ("prompt", "answer"):
            text = getattr(exchange, name)
            if len(text) > LIMITS.excerpt_chars:
                _refuse(where, f"at most {LIMITS.excerpt_chars} characters of {name} in {place}", f"{len(text)}")
            found = unseen_character(text.replace("\n", " "))
            if found is not None:
                _refuse(where, f"visible characters in the {name} of {place}", f"the character {found}")


def _check_text(where: str, place: str, text: str, longest: int) -> None:
    found = unseen_character(text)
    if found is not None:
        _refuse(where, f"visible characters on one line in {place}", f"the character {found}")
    if not any(char.isalnum() for char in text):
        _refuse(where, f"words in {place}", "an empty text" if not text.strip() else repr(text[:60]))
    if len(text) > longest:
        _refuse(where, f"at most {longest} characters in {place}", f"{len(text)}, beginning {text[:40]!r}")


def _check_slot(where: str, place: str, text: str) -> None:
    found = unseen_character(text)
    if found is not None:
        _refuse(where, f"visible characters on one line in {place}", f"the character {found}")
    if text.count("{}") != 1 or len(text) > LIMITS.phrase_chars:
        _refuse(where, f"one '{{}}' and at most {LIMITS.phrase_chars} characters in {place}", repr(text[:60]))


def _refuse(where: str, wanted: str, got: str) -> NoReturn:
    raise PromptError(wanted=f"{wanted} ({where})", got=got, next_step=_AGAIN)


def _in_words(message: str) -> str:
    """msgspec's message with '$.prompts[2].text' said as 'text of prompt 3'."""

    def place(match: re.Match[str]) -> str:
        kind, index, field = match["kind"].removesuffix("s"), int(match["index"]) + 1, match["field"]
        return f"{field} of {kind} {index}" if field else f"{kind} {index}"

    pattern = r"\$\.(?P<kind>\w+)\[(?P<index>\d+)\](?:\.(?P<field>\w+))?"
    return re.sub(pattern, place, message).replace("`$.", "`").replace("`$`", "the whole file")


def _place_in_json(data: bytes) -> str:
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        return f"a fault in line {error.lineno}, column {error.colno}"
    except (UnicodeError, RecursionError, ValueError):
        pass
    return "something else"
