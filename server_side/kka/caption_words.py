"""What a free caption says: synonyms of the grammar's words, lengths, and what a caption says is not there.

See `edgead.server_side.kka.grammar`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KIND_WORDS = {
    "missing part": r"(?:missing|broken|chipped|torn|snapped)(?: off| away| out)? (?:\w+ )?(?:parts?|pieces?|chunks?|"
    r"corners?|edges?|rims?|sections?|bits?|fragments?|portions?|teeth|tooth)|(?:part|piece|chunk|corner|"
    r"edge|rim|section|"
    r"bit|fragment|portion)s?\b(?: \w+){0,4} (?:missing|gone|broken|chipped|torn)(?: off| away| out)?|"
    r"chips?|chipped|chipping|break ?offs?|broken off|breakages?|missing|incomplete",
    "discolouration": r"discolou?r(?:ations?|ed|ing)|faded|fading|bleach(?:ed|ing)?|burn marks?|"
    r"heat marks?|heat tints?|"
    r"tarnish(?:ed|ing)?|scorch(?:ed|ing|es)?|scorch marks?|colou?r (?:changes?|shifts?|deviations?)|"
    r"yellowing|browning",
    "scratch": r"scratch(?:es|ed|ing)?|scrapes?|scraped|scuffs?|scuffed|scuff marks?|scores?|"
    r"score marks?|gouges?|gouged|"
    r"abrasions?|grooves?|tool marks?",
    "dent": r"dents?|dented|dings?|dinged|dimples?|bumps?|depressions?|indentations?|impact marks?|bruises?",
    "stain": r"stains?|stained|spots?|spotted|blotch(?:es)?|smudges?|smears?|smeared|spills?|oil|grease|"
    r"dirt|residues?|"
    r"patch(?:es)?|rust|rusty|corrosion|corroded|marks?|splash(?:es)?|blemish(?:es)?|contaminations?",
    "thread": r"threads?|fib(?:re|er)s?|hairs?|strands?|lint|fuzz|strings?|wires?|filaments?",
    "crack": r"cracks?|cracked|cracking|fractures?|fractured|fissures?|split|splits|crazing|fray(?:ed|ing|s)?",
    "hole": r"holes?|pits?|pitted|pitting|pores?|porosity|blow ?holes?|punctures?|punctured|"
    r"perforations?|cavity|cavities|"
    r"voids?|pinholes?|craters?|openings?",
}
KINDS = [(kind, re.compile(rf"\b(?:{words})\b")) for kind, words in KIND_WORDS.items()]

SIZE_WORDS = {
    "tiny": "tiny minute microscopic minuscule pinpoint",
    "small": "small little short minor slight",
    "medium-sized": "medium mid moderate average",
    "large": "large big long lengthy elongated wide broad major sizeable extended",
    "huge": "huge enormous gigantic massive giant extensive severe",
}
"""Thin, narrow and fine are no sizes: a size is how far a defect extends, and a thin scratch may be long."""
HUE_WORDS = {
    **{hue: hue for hue in ("red", "orange", "yellow", "green", "blue", "purple", "brown", "grey")},
    "black": "black",
    "white": "white",
    "gray": "grey",
    "silver": "light grey",
    "silvery": "light grey",
    "reddish": "red",
    "crimson": "dark red",
    "scarlet": "red",
    "pink": "light red",
    "rust": "brown",
    "rusty": "brown",
    "brownish": "brown",
    "tan": "light brown",
    "beige": "light brown",
    "bluish": "blue",
    "navy": "dark blue",
    "greenish": "green",
    "yellowish": "yellow",
    "golden": "yellow",
    "greyish": "grey",
    "grayish": "grey",
    "violet": "purple",
    "whitish": "white",
    "blackish": "black",
    "blackened": "black",
}
SHADES = {"dark": "dark", "deep": "dark", "light": "light", "pale": "light", "bright": ""}
SHADE_ALONE = {"dark": "dark grey", "pale": "light grey", "bright": "light grey", "light": "light grey"}
"""A shade without a hue."""
CONTRAST_WORDS = [
    ("hardly visible", r"(?:hardly|barely|scarcely|almost not|not|nearly in|almost in) ?visible|invisible|subtle|"
     r"imperceptible|(?:hardly|barely|scarcely) (?:noticeable|perceptible)|hairline"),
    ("faintly visible", r"faint(?:ly)?|slightly visible|weak(?:ly)?|"
     r"not (?:clearly|easily|readily|well|very) (?:visible|noticeable|obvious|seen)|"
     r"low contrast|indistinct|dim|blurred"),
    ("glaringly visible", r"glaring(?:ly)?|striking(?:ly)?|very (?:clearly )?(?:visible|noticeable)|unmissable|"
     r"high contrast|stark(?:ly)?|strong(?:ly)?|extremely visible"),
    ("clearly visible", r"clear(?:ly)?|plain(?:ly)?|easily|obvious(?:ly)?|distinct(?:ly)?|"
    r"prominent(?:ly)?|noticeabl[ey]|"
     r"pronounced|well visible|conspicuous(?:ly)?"),
    ("visible", r"visibl[ey]|moderate contrast|medium contrast"),
]  # fmt: skip
ROWS = {"upper": "upper", "top": "upper", "lower": "lower", "bottom": "lower"}
COLUMNS = {"left": "left", "right": "right"}
CENTRE = frozenset(("middle", "centre", "center", "central", "centrally"))
COUNTS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "single": 1,
    "two": 2,
    "2": 2,
    "both": 2,
    "pair": 2,
    "couple": 2,
    "double": 2,
    "three": 3,
    "3": 3,
    "several": 3,
    "some": 3,
    "few": 3,
    "many": 3,
    "multiple": 3,
    "numerous": 3,
}
OF_SOMETHING = frozenset(
    ("on", "of", "across", "over", "against", "from", "onto", "along", "through", "in", "at", "near")
)
ARTICLES = frozenset(("a", "an", "the", "this", "its", "that"))

REMOVED = ";"
"""Stands in what `affirmed` gives for words that were taken out."""

_QUANTITY = r"\d+(?:[.,/]\d+)?"
_UNIT = (
    r"(?:[mcnμ]m|um|px|(?:milli|centi|micro|nano|deci)?met(?:er|re)s?|microns?|inch(?:es)?|foot|feet|ft|pixels?|"
    r"percent|degrees?|thirds?|quarters?|o'clock)[²2³]?\b"
)
_LENGTH = re.compile(
    rf"(?<![\w.,])(?:(?:{_QUANTITY}(?:\s*(?:x|×|by|to|or|and|-|–)\s*{_QUANTITY})*|(?:one|two|three|half)\b)[\s-]*{_UNIT}"
    rf"|{_QUANTITY}\s*(?:[\"″”%°]|m\b|in\b(?!\s+(?:the|an?|its|total|all|upper|lower|middle|cent)))|\d+[.,]\d+)"
    r"(?:[\s-]*(?:long|wide|deep|broad|thick|tall|high)\b)?"
)
"""A number with its unit, and any other number with decimals: neither counts defects."""
_NOT = re.compile(r"\b(is|are|was|were|do|does|did|has|have|had|ca|could|wo|would)n'?t\b")
_LIST = re.compile(r"\b(?:not|without|never|free of|free from) an? [^.,;:]+(?:, an? [^.,;:]+)+,? n?or an? ")
"""'without a scratch, a dent or a crack': the articles begin nothing new."""
_WORD = re.compile(r"(?:[^\W_]|['&])+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DENIALS = _set("no without not never cannot lacks lack lacking absence absent zero neither nor none devoid")
_SOUND = _set("flawless undamaged unblemished intact")
_NEGATING = _set("no not never cannot without nor")
_WEAK = _set("not never cannot lacks lacking absent")
"""These deny what follows up to the next comma; a list goes on behind it only where it has begun before."""
_NO_DENIAL = {
    "no": "longer more less fewer doubt",
    "not": "only just very too quite so entirely fully completely perfectly exactly far merely without necessarily",
    "never": "before seen",
}
"""Denial -> what follows it where it denies no defect: 'a not very deep scratch'."""
_BREAKS = _set(
    "but yet however except besides apart aside though although while whereas only just instead than where because "
    "due when there with has have having shows show showing exhibits exhibit exhibiting displays contains contain "
    "bears carries reveals"
)
"""What follows one of these is there again."""
_BEGINNINGS = _set(
    "a an the this its one two three 2 3 several some few many multiple numerous single another it it's "
    "there's is are was were"
)
"""So is what begins with one of these behind a comma or an 'and'."""
_FARTHEST = 6
"""Words from a denial to the defect that it denies."""
_LINKS = _set("and or nor a an any the")
_DENIED_BEHIND = re.compile(
    r"(?:free(?! (?:of|from|hanging|floating|ends?)\b)|proof|resistant|none|absent)\b"
    r"|(?:(?!(?:that|which|who)\b)\S+ ){0,6}?(?:(?:is|are|was|were|do|does|did|can|could|ca) (?:not|never|nowhere)"
    r"|cannot)(?: to)?(?: be)? (?:present|there|found|seen|detected|detectable|observed|apparent|evident|exist|occur)\b"
    r"(?! (?:easily|clearly|well|at first|from|without|(?:on|in|at|among)(?: \w+){0,2} "
    r"(?:normal|other|good|usual|typical|reference))\b)"
    r"|(?:is|are|was|were|looks?|appears?|remains?) (?:\w+ )?(?:absent|defect free|flawless|undamaged|intact)\b"
)
"""What denies the defect that it follows: 'scratch-free', 'a scratch is not present'."""


def affirmed(caption: str) -> str:
    """The words of a caption, in lower case and without lengths, less those of defects that it says are not there.

    "no large scratches but a dent" -> "; but a dent", "a 2 cm scratch" -> "a scratch".

    Args:
        caption: free words.

    Returns:
        Words with one space between them; `REMOVED` where some were taken out.
    """
    text = _LENGTH.sub(" ", _NOT.sub(r"\1 not", caption.casefold().replace("’", "'")))
    text = _LIST.sub(lambda found: found[0].replace(", ", " or "), text)
    words, stops, at = [], [], 0
    for match in _WORD.finditer(text):
        words.append(match[0])
        stops.append(_stop(text[at : match.start()]))
        at = match.end()
    named = _named(" ".join(words))
    taken = [*_denied_before(words, stops, {end for _, end in named}), *_denied_behind(words, stops, named)]
    gone = {place for start, end in taken for place in range(start, end)}
    kept = [
        REMOVED if place in gone else word
        for place, word in enumerate(words)
        if place not in gone or place - 1 not in gone
    ]
    return " ".join(kept)


def _stop(gap: str) -> str:
    """What stands between two words, as ".", "," or ":"; "" where they are of one phrase."""
    if re.search(r"[.;!?\n—–]|\s-\s", gap):
        return "."
    return "," if re.search(r"[,()]", gap) else ":" if ":" in gap else ""


def _named(text: str) -> list[tuple[int, int]]:
    """The (first, last) word of everything in a text that names a defect, in order."""
    found = {
        (text.count(" ", 0, match.start()), text.count(" ", 0, match.end()))
        for _, pattern in KINDS
        for match in pattern.finditer(text)
    }
    return sorted(found)


def _denies(words: Sequence[str], at: int) -> bool:
    word, following = words[at], words[at + 1] if at + 1 < len(words) else ""
    if word == "free":
        return following in ("of", "from") or _sound(words, at)
    return _sound(words, at) or (word in _DENIALS and following not in _NO_DENIAL.get(word, "").split())


def _sound(words: Sequence[str], at: int) -> bool:
    free = words[at] == "free" and at > 0 and words[at - 1] in ("defect", "damage", "flaw", "fault")
    return words[at] in _SOUND or free


def _denied_before(words: Sequence[str], stops: Sequence[str], ends: set[int]) -> list[tuple[int, int]]:
    """The [start, end) of words from each denial to where it ends, of those that deny one of the defects at `ends`."""
    found: list[tuple[int, int]] = []
    start, last, governs = -1, 0, False
    for at in range(len(words)):
        if start >= 0 and _ends_denial(words, stops, at, last, governs):
            if governs:
                found.append((start, at))
            start, governs = -1, False
        if _denies(words, at):
            start, last = (at if start < 0 else start), at
        if start >= 0 and at in ends:
            if governs or at - last <= (2 if _sound(words, last) else _FARTHEST):
                governs = True
            else:
                start = -1
    return [*found, (start, len(words))] if governs else found


def _ends_denial(words: Sequence[str], stops: Sequence[str], at: int, last: int, governs: bool) -> bool:
    """Whether what the denial at `last` denies ends before the word at `at`."""
    word, before = words[at], words[at - 1]
    listed = stops[at] in (",", ":") or before == "and"
    return (
        stops[at] == "."
        or (word in _BREAKS and before not in _NEGATING)
        or (listed and word in _BEGINNINGS)
        or (stops[at] == "," and not governs and (words[last] in _WEAK or _sound(words, last)))
        or (_sound(words, last) and word in OF_SOMETHING)
        # "A part without scratches is chipped": it is the part that is.
        or (governs and words[last] in ("without", "free") and word in ("is", "are", "was", "were"))
    )


def _denied_behind(
    words: Sequence[str], stops: Sequence[str], named: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The [start, end) of words of defects that are denied by what follows them, and of those listed with them."""
    found: list[tuple[int, int]] = []
    linked = -1
    for first, last in reversed(named):
        end = last + 1
        while end < len(words) and stops[end] not in (".", ",") and all(end != start for start, _ in named):
            end += 1
        match = _DENIED_BEHIND.match(" ".join(words[last + 1 : end]))
        between = range(last + 1, linked)
        if match:
            end = last + 1 + len(match[0].split())
        elif linked >= 0 and all(words[at] in _LINKS for at in between) and "." not in stops[last + 1 : linked + 1]:
            end = linked
        else:
            linked = -1
            continue
        start = first
        while start and stops[start] == "" and words[start - 1] not in OF_SOMETHING | _BREAKS:
            start -= 1
            if words[start] in ("a", "an", "the") or any(start == other for _, other in named):
                break
        found.append((start, end))
        linked = first
    return found
