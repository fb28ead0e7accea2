"""Synonyms: which words of a free caption mean which word of the grammar; see `edgead.server_side.kka.grammar`."""

from __future__ import annotations

import re

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
    "small": "small little short minor slight fine thin narrow",
    "medium-sized": "medium mid moderate average",
    "large": "large big long wide broad major sizeable extended",
    "huge": "huge enormous gigantic massive giant extensive severe",
}
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
    ("faintly visible", r"faint(?:ly)?|slightly visible|weak(?:ly)?|low contrast|indistinct|dim|blurred"),
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
DENIALS = frozenset(("no", "without", "not", "never", "free", "lacks", "lacking", "absent", "zero"))
