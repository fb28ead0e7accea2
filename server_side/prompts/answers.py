"""What a language model answered, made into phrases. Nothing in an answer is believed: it is parsed, cleaned, bounded.

Whatever comes in, the output is at most `most` distinct lines of `LIMITS.shortest_answer_chars` to
`LIMITS.answer_chars` visible characters, or a `LanguageModelError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from edgead.runtime.errors import LanguageModelError
from edgead.server_side.prompts.words import LIMITS, one_line

MOST_PHRASES = 40
"""Phrases that one answer may give, unless the caller says otherwise."""

_LONGEST_ANSWER = 200_000
"""Characters of an answer that are looked at."""

_LONGEST_WORD = 40
"""A longer run without a space is an encoding, a key or a web address, not a word."""

_REFUSAL = re.compile(
    r"""(?ix) ^\W* (?: (?:i['’]?m|i\s+am)\s+(?:(?:really|very|so|truly)\s+)?sorry | sorry\b | (?:my\s+)?apolog
      | (?:unfortunately|regrettably)\b.{0,20}\b(?:i|we)\b | as\s+an?\s+(?:ai|artificial|large\s+language|language)\b
      | i\s+(?:cannot|can\s*not|can['’]?t|won['’]?t|will\s+not|do\s+not|don['’]?t|must\s+decline|must\s+refuse|refuse)\b
      | i(?:\s+am|['’]?m)\s+(?:not\s+able|unable|not\s+allowed|not\s+comfortable|just\s+an?)\b
      | (?:this|your|that)\s+request\s+(?:is|was|has|violates|cannot)\b )"""
)
_THOUGHT = re.compile(r"(?is)<(think|thinking|reasoning)>.*?(?:</\1>|\Z)")
_FENCE = re.compile(r"```[a-zA-Z0-9_-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]\n]{0,300})\]\([^)\s]{0,2000}(?:\s[^)\n]{0,300})?\)")
_URL = re.compile(r"(?i)\S*://\S*|\b(?:www\.|mailto:)\S*")
_TAG = re.compile(r"<[^<>\n]{1,200}>")
_ITEM = re.compile(r"^\s*(?:[-*•‣·–—+▪◦●]+|\(?\d{1,3}\s*[.):\]]|\(?[A-Za-z][.)])\s+(?=\S)")
_PREAMBLE = re.compile(
    r"(?i)^(?:sure|certainly|of course|okay|ok|here\b|below\b|the following|these are|absolutely|great|"
    r"i hope|hope this|let me know|note\b|please\b|feel free|in summary|in conclusion|overall)\b"
)
_QUOTES = "\"'`“”‘’«»„‚*_~#>|"
_ENDS = " \t.,;:!?"


def phrases_of(answer: str, *, most: int = MOST_PHRASES) -> tuple[str, ...]:
    """The phrases in an answer: of a JSON array, a numbered or bulleted list, lines, or a list with commas.

    Args:
        answer: what the language model said.
        most: phrases to keep, the first ones.

    Raises:
        LanguageModelError: a refusal, or no usable phrase.
    """
    text = _THOUGHT.sub(" ", answer[:_LONGEST_ANSWER])
    opening = [line for line in text.splitlines() if line.strip()][:2]
    if any(_REFUSAL.match(line) for line in opening):
        raise LanguageModelError(
            wanted="a list of phrases from the language model",
            got=f"a refusal: {excerpt(text, 120)!r}",
            next_step="Say the class or the normality in other words, take another model, or use the templates.",
        )
    found: dict[str, str] = {}
    for raw in _raw_phrases(text):
        phrase = clean_phrase(raw)
        if phrase is not None and not _REFUSAL.match(phrase):
            found.setdefault(phrase.casefold(), phrase)
        if len(found) >= most:
            break
    if not found:
        raise LanguageModelError(
            wanted="a list of phrases from the language model",
            got=f"nothing usable: {excerpt(text, 120)!r}" if text.strip() else "an empty answer",
            next_step="Take another model, or use the templates.",
        )
    return tuple(found.values())


def clean_phrase(raw: str) -> str | None:
    """One phrase as plain words, or None if there is none in it.

    Markdown, quotes, web addresses, tags, braces, control and direction characters go; what is left must be within
    the limits and mostly letters.
    """
    text = one_line(raw[: LIMITS.answer_chars * 20])
    text = _TAG.sub(" ", _URL.sub(" ", _LINK.sub(r"\1", text)))
    text = re.sub(r"\*\*|__|[{}\\`]", "", text)
    text = one_line(_ITEM.sub("", text)).strip(_QUOTES + _ENDS)
    text = text.strip("()[]") if text.count("(") != text.count(")") or text.count("[") != text.count("]") else text
    if len(text) > LIMITS.answer_chars and ":" in text:
        # 'Loose thread: a long explanation' is a phrase and its explanation.
        text = text.split(":", 1)[0]
    text = text.strip(_QUOTES + _ENDS)
    if not LIMITS.shortest_answer_chars <= len(text) <= LIMITS.answer_chars:
        return None
    letters = sum(char.isalpha() for char in text)
    if letters < 2 or letters * 2 < len(text) or max(map(len, text.split())) > _LONGEST_WORD:
        return None
    return text


def excerpt(text: str, longest: int = LIMITS.excerpt_chars) -> str:
    """The beginning of an answer for people: cleaned line by line, empty lines folded, at most `longest` characters."""
    lines = (one_line(line) for line in text[: longest * 4].splitlines())
    return "\n".join(line for line in lines if line)[:longest].strip()


def _raw_phrases(text: str) -> Iterator[str]:
    fenced = [match.group(1) for match in _FENCE.finditer(text)]
    for block in (*fenced, text, _bracketed(text)):
        value = _json_value(block)
        if value is not None:
            yield from _strings(value)
            return
    yield from _lines("\n".join(fenced) if fenced and any(map(str.strip, fenced)) else text)


def _bracketed(text: str) -> str:
    """From the first '[' to the last ']': an array with words around it."""
    start, end = text.find("["), text.rfind("]")
    return text[start : end + 1] if 0 <= start < end else ""


def _json_value(block: str) -> Any:
    if block.strip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        return None
    return value if value else None


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """All strings of a JSON value; of an object its values, not its keys."""
    if isinstance(value, str):
        yield from value.splitlines()
    elif depth < 5 and isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, depth + 1)


def _lines(text: str) -> Iterable[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    items = [line for line in lines if _ITEM.match(line)]
    if items:
        return items
    lines = [line for line in lines if not line.startswith("#")]
    if len(lines) == 1:
        said = lines[0].split(":", 1)[-1] if _PREAMBLE.match(lines[0]) else lines[0]
        pieces = [piece.strip() for piece in re.split(r"[;,]", said) if piece.strip()]
        if len(pieces) >= 3 and max(map(len, pieces)) <= LIMITS.answer_chars // 2:
            return [re.sub(r"(?i)^and\s+", "", piece) for piece in pieces]
    return [line for line in lines if not line.endswith(":") and not _PREAMBLE.match(line)]
