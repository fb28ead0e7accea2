"""The caption grammar of painted anomalies: one English sentence for each defect, and back.

    a large dark red stain near the upper left corner, clearly visible

A sentence has a number, a size, a colour, a kind, a place and a contrast; the kind alone is needed, and what is not
said is decided by the seed. What the words mean:

| part     | words -> numbers                                                                                |
|----------|-------------------------------------------------------------------------------------------------|
| number   | a -> 1, two -> 2, three -> 3 defects                                                            |
| size     | extent as a share of the picture's shorter side: tiny 0.03-0.06, small 0.06-0.12,               |
|          | medium-sized 0.12-0.25, large 0.25-0.45, huge 0.45-0.75                                         |
| colour   | black, white, and red, orange, yellow, green, blue, purple, brown, grey, each plain, dark       |
|          | (0.5 of it) or light (half way to white); unsaid: what the kind usually has                     |
| kind     | scratch, dent, stain, thread, crack, hole, missing part, discolouration                         |
| place    | centre in shares of width and height: left 0.12-0.30, middle 0.38-0.62, right 0.70-0.88; rows   |
|          | alike: "in the middle", "near the left edge", "near the upper left corner", ...                 |
| contrast | opacity: hardly visible 0.06-0.12, faintly visible 0.12-0.25, visible 0.25-0.50,                |
|          | clearly visible 0.50-0.75, glaringly visible 0.75-1.00                                          |
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgead.server_side.kka.caption_words import (
    ARTICLES,
    CENTRE,
    COLUMNS,
    CONTRAST_WORDS,
    COUNTS,
    HUE_WORDS,
    KINDS,
    OF_SOMETHING,
    REMOVED,
    ROWS,
    SHADE_ALONE,
    SHADES,
    SIZE_WORDS,
    affirmed,
)
from edgead.server_side.kka.seams import UndrawableCaptionError
from edgead.server_side.painting import DEFECTS

Range = tuple[float, float]

VERSION = 2
"""Of the words and of what they mean; goes into the digest of everything that draws by them."""

LONGEST_CAPTION = 500
"""Characters of a caption that are read; a longer one is no sentence."""

NUMBERS: Mapping[str, int] = {"a": 1, "two": 2, "three": 3}
SIZES: Mapping[str, Range] = {
    "tiny": (0.03, 0.06),
    "small": (0.06, 0.12),
    "medium-sized": (0.12, 0.25),
    "large": (0.25, 0.45),
    "huge": (0.45, 0.75),
}
CONTRASTS: Mapping[str, Range] = {
    "hardly visible": (0.06, 0.12),
    "faintly visible": (0.12, 0.25),
    "visible": (0.25, 0.50),
    "clearly visible": (0.50, 0.75),
    "glaringly visible": (0.75, 1.0),
}
_HUES = {
    "red": (190, 40, 36),
    "orange": (226, 122, 34),
    "yellow": (226, 200, 50),
    "green": (52, 132, 66),
    "blue": (44, 88, 176),
    "purple": (116, 58, 146),
    "brown": (120, 78, 44),
    "grey": (128, 128, 128),
}


def _colours() -> dict[str, tuple[int, int, int]]:
    found = {"black": (16, 16, 16), "white": (244, 244, 244)}
    for hue, rgb in _HUES.items():
        red, green, blue = rgb
        found[hue] = rgb
        found[f"dark {hue}"] = (red // 2, green // 2, blue // 2)
        found[f"light {hue}"] = ((red + 255) // 2, (green + 255) // 2, (blue + 255) // 2)
    return found


COLOURS: Mapping[str, tuple[int, int, int]] = _colours()
"""Name of a colour -> RGB, 0 to 255."""

_LOW, _MIDDLE, _HIGH = (0.12, 0.30), (0.38, 0.62), (0.70, 0.88)


def _places() -> dict[str, tuple[Range, Range]]:
    rows = {"upper": _LOW, "": _MIDDLE, "lower": _HIGH}
    columns = {"left": _LOW, "": _MIDDLE, "right": _HIGH}
    found = {}
    for (row, y), (column, x) in itertools.product(rows.items(), columns.items()):
        if row or column:
            words = f"near the {row} {column} corner" if row and column else f"near the {row}{column} edge"
        else:
            words = "in the middle"
        found[words] = (x, y)
    return found


PLACES: Mapping[str, tuple[Range, Range]] = _places()
"""Words -> ranges of the centre's x and y in shares of width and height."""


@dataclass(frozen=True)
class Defect:
    """What a caption says; an empty word where it says nothing.

    Attributes:
        kind: one of `edgead.server_side.painting.DEFECTS`.
        size: one of `SIZES`.
        colour: one of `COLOURS`.
        place: one of `PLACES`.
        contrast: one of `CONTRASTS`.
        number: of defects, 1 to 3.
    """

    kind: str
    size: str = ""
    colour: str = ""
    place: str = ""
    contrast: str = ""
    number: int = 1


@dataclass(frozen=True)
class Grammar:
    """The words that `sample` draws from; each list may be narrowed, "" among colours is the kind's usual one."""

    kinds: Sequence[str] = DEFECTS
    sizes: Sequence[str] = tuple(SIZES)
    colours: Sequence[str] = ("", *COLOURS)
    places: Sequence[str] = tuple(PLACES)
    contrasts: Sequence[str] = tuple(CONTRASTS)
    numbers: Sequence[int] = field(default=tuple(NUMBERS.values()))

    @property
    def sentences(self) -> int:
        """How many different sentences it has."""
        lists = (self.kinds, self.sizes, self.colours, self.places, self.contrasts, self.numbers)
        return int(np.prod([len(words) for words in lists]))


GRAMMAR = Grammar()
"""All of it."""


def sample(rng: np.random.Generator, grammar: Grammar = GRAMMAR) -> Defect:
    """A defect drawn uniformly from a grammar: each of its sentences is as likely as any other."""

    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    return Defect(
        kind=one(grammar.kinds),
        size=one(grammar.sizes),
        colour=one(grammar.colours),
        place=one(grammar.places),
        contrast=one(grammar.contrasts),
        number=int(grammar.numbers[int(rng.integers(len(grammar.numbers)))]),
    )


def describe(defect: Defect) -> str:
    """The sentence of a defect; `parse` reads it back to the same defect."""
    kind = defect.kind if defect.number < 2 else _plural(defect.kind)
    words = " ".join(word for word in (defect.size, defect.colour, kind) if word)
    first = {2: "two", 3: "three"}.get(defect.number, "an" if words[0] in "aeiou" else "a")
    sentence = f"{first} {words} {defect.place}".rstrip()
    return f"{sentence}, {defect.contrast}" if defect.contrast else sentence


def parse(caption: str) -> Defect:
    """The defect of a caption in free words: synonyms and any order are understood, the rest is left open.

    The first kind that is named and not denied ("no scratches but a dent") counts. A size or colour of something else
    ("a crack on a large grey plate") is not the defect's. A length ("2 cm") is neither a number of defects nor a size:
    nobody knows how large the picture is.

    Raises:
        UndrawableCaptionError: it names no defect that can be drawn, says that there is none, or is no sentence.
    """
    text = affirmed(caption[: LONGEST_CAPTION + 1])
    if len(caption) > LONGEST_CAPTION or not text:
        raise _undrawable(f"{len(caption)} characters" if text else "no words")
    named = _first_kind(text)
    if named is None:
        why = "which says that there is none" if REMOVED in text else "which names none"
        raise _undrawable(f"{' '.join(caption.split())[:200]!r}, {why}")
    kind, start, end = named
    before = text[:start].split()
    after = text[end:].split()
    plural = bool(re.search(r"(?:[^s]s|es)$", text[start:end].split()[-1])) and kind != "missing part"
    return Defect(
        kind=kind,
        size=_nearest(SIZE_WORDS, before, after),
        colour=_colour(before, after),
        place=_place([*before, *text[start:end].split(), *after]),
        contrast=_contrast(text),
        number=_number(before, plural),
    )


def chosen(words: Mapping[str, Range], word: str, rng: np.random.Generator) -> float:
    """A number from the range of a word; without one, from the range of a word drawn at random."""
    if not word:
        word = tuple(words)[int(rng.integers(len(words)))]
    return float(rng.uniform(*words[word]))


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("ch") else "s")


def _first_kind(text: str) -> tuple[str, int, int] | None:
    """(kind, start, end) of the first defect that is named; the longest of those that begin there."""
    found = []
    for order, (kind, pattern) in enumerate(KINDS):
        match = pattern.search(text)
        if match:
            found.append((match.start(), -match.end(), order, kind))
    if not found:
        return None
    start, end, _, kind = min(found)
    return kind, start, -end


def _of_something_else(words: Sequence[str], at: int) -> bool:
    """Whether the adjective at a place after the defect belongs to another noun: "on a large grey plate"."""
    start = at
    while start and at - start < 4 and words[start - 1] not in OF_SOMETHING:
        start -= 1
    return bool(start) and words[start - 1] in OF_SOMETHING and words[start] in ARTICLES


def _nearest(table: Mapping[str, str], before: Sequence[str], after: Sequence[str]) -> str:
    lookup = {word: name for name, words in table.items() for word in words.split()}
    for word in reversed(before):
        if word in OF_SOMETHING or word in ("with", "has", "shows", "having"):
            break
        if word in lookup:
            return lookup[word]
    for at, word in enumerate(after):
        if word in lookup and not _of_something_else(after, at):
            return lookup[word]
    return ""


def _colour(before: Sequence[str], after: Sequence[str]) -> str:
    words = [*before]
    for at in range(len(words) - 1, -1, -1):
        if words[at] in OF_SOMETHING or words[at] in ("with", "has", "shows", "having"):
            break
        name = _colour_at(words, at)
        if name:
            return name
    for at, word in enumerate(after):
        if (word in HUE_WORDS or word in SHADE_ALONE) and not _of_something_else(after, at):
            # The shade stands before its hue: the hue decides.
            place = at + 1 if word in SHADES and after[at + 1 : at + 2] and after[at + 1] in HUE_WORDS else at
            return _colour_at(after, place)
    return ""


def _colour_at(words: Sequence[str], at: int) -> str:
    hue = HUE_WORDS.get(words[at], "")
    if not hue:
        return SHADE_ALONE.get(words[at], "")
    shade = SHADES.get(words[at - 1], "") if at else ""
    return f"{shade} {hue}" if shade and f"{shade} {hue}" in COLOURS else hue


def _place(words: Sequence[str]) -> str:
    row = next((ROWS[word] for word in words if word in ROWS), "")
    column = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in COLUMNS and following not in ("behind", "by", "over", "after", "from"):
            column = COLUMNS[word]
            break
    if row and column:
        return f"near the {row} {column} corner"
    if row or column:
        return f"near the {row}{column} edge"
    return "in the middle" if any(word in CENTRE for word in words) else ""


def _contrast(text: str) -> str:
    return next((name for name, words in CONTRAST_WORDS if re.search(rf"\b(?:{words})\b", text)), "")


def _number(before: Sequence[str], plural: bool) -> int:
    for word in reversed(before[-5:]):
        if word in COUNTS and not (plural and word in ("a", "an")):
            return COUNTS[word]
    return 2 if plural else 1


def _undrawable(got: str) -> UndrawableCaptionError:
    return UndrawableCaptionError(
        wanted=f"a caption that names a defect: {', '.join(DEFECTS)}",
        got=got,
        next_step=f"Write one such as {describe(Defect('stain', 'large', 'dark red', 'near the left edge'))!r}.",
    )


__all__ = [
    "COLOURS",
    "CONTRASTS",
    "GRAMMAR",
    "NUMBERS",
    "PLACES",
    "SIZES",
    "VERSION",
    "Defect",
    "Grammar",
    "chosen",
    "describe",
    "parse",
    "sample",
]
