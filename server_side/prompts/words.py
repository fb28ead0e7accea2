"""Words that people and language models write: cleaned to one plain line, or refused. Bytes in, text out; no I/O."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from edgead.runtime.errors import PromptError


@dataclass(frozen=True)
class PromptLimits:
    """How much a prompt set may hold. A text encoder reads 77 tokens, so longer prompts would be cut unseen."""

    text_chars: int = 300
    """Characters of one prompt."""
    phrase_chars: int = 200
    """Characters of one phrase, state or template."""
    answer_chars: int = 120
    """Characters of one phrase that a language model wrote."""
    shortest_answer_chars: int = 3
    name_chars: int = 60
    """Characters of a class name, a domain, a normality or the name of a language model."""
    prompts: int = 20_000
    """Prompts of one set."""
    exchanges: int = 1_000
    """Exchanges with language models that one set records."""
    excerpt_chars: int = 4_000
    """Characters of a question or an answer that an exchange keeps."""
    file_bytes: int = 16 << 20


LIMITS = PromptLimits()

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that draw nothing or turn the writing direction: control, format, surrogate, private, none."""


def unseen_character(text: str) -> str | None:
    """The first character of `text` that draws nothing or turns the writing direction, as 'U+202E'; or None."""
    return next((f"U+{ord(char):04X}" for char in text if unicodedata.category(char) in _UNSEEN), None)


def one_line(text: str) -> str:
    """`text` in Unicode NFC, without unseen characters, its white space folded to single spaces."""
    spaced = re.sub(r"\s", " ", text)
    seen = "".join(char for char in spaced if unicodedata.category(char) not in _UNSEEN)
    return " ".join(unicodedata.normalize("NFC", seen).split())


def check_words(text: str, what: str, longest: int) -> str:
    """Words that a person typed, as one plain line; `what` names them in the errors.

    Raises:
        PromptError: empty, longer than `longest` characters, or with control or direction characters.
    """
    found = unseen_character(text)
    if found is not None:
        raise PromptError(
            wanted=f"{what} of visible characters on one line",
            got=f"the character {found} in it",
            next_step="Type the words again by hand.",
        )
    line = one_line(text)
    if not any(char.isalnum() for char in line):
        raise PromptError(
            wanted=f"{what} in words",
            got="an empty text" if not line else repr(line[:60]),
            next_step="Write at least one letter or digit.",
        )
    if len(line) > longest:
        raise PromptError(
            wanted=f"{what} of at most {longest} characters",
            got=f"{len(line)}, beginning {line[:40]!r}",
            next_step="Shorten it.",
        )
    return line


def spoken_name(name: str, what: str = "a class name") -> str:
    """A class name as one says it: 'metal_nut' becomes 'metal nut'.

    Raises:
        PromptError: empty, too long, or with control or direction characters.
    """
    return check_words(name.replace("_", " "), what, LIMITS.name_chars)


def with_article(words: str, *, capital: bool = False) -> str:
    """`words` after 'a' or 'an', by the first letter: 'an industrial image', 'A uniform surface'."""
    vowel = words[:1].lower() in "aeiou" and not re.match(r"(?i)(uni(?!n|m)|use|usu|eu|one\b)", words)
    article = "an" if vowel else "a"
    return f"{article.capitalize() if capital else article} {words}"


def filled(template: str, words: str) -> str:
    """`template` with `words` in place of '{}'. Braces in `words` are only characters."""
    return template.replace("{}", words)
