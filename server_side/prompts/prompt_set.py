"""The prompt set: every sentence that a text table is made of, who wrote it, and what it was made from.

One JSON file of schema 1 that a person reads and edits, one prompt to a line:

    {
      "schema": 1,
      "class_name": "metal nut",
      "domain": "industrial",
      "method": "winclip",
      "states": {"normal": ["flawless {}", ...], "anomalous": ["damaged {}", ...]},
      "templates": ["a photo of a {}.", ...],
      "phrases": [],
      "prompts": [
        {"text": "a photo of a flawless metal nut.", "state": "normal", "author": "template"},
        ...
      ],
      "exchanges": []
    }

`prompts` is what is used. `states`, `templates` and `phrases` tell what the prompts were composed of, and are used
again when a state with a '{}' is added. `exchanges` keeps what a language model was asked and what it said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
from msgspec import Struct

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.server_side.prompts.words import LIMITS, filled

PROMPT_SCHEMA = 1

State = Literal["normal", "anomalous"]
STATES: tuple[State, ...] = get_args(State)
"""Their position is the value of `text.state`: 0 normal, 1 anomalous."""

TEMPLATE = "template"
PERSON = "person"
LLM = "llm:"
"""Authors: `template`, `person`, or `llm:` and the name of the language model."""


class Prompt(Struct, frozen=True, forbid_unknown_fields=True):
    """One sentence for the text encoder."""

    text: str
    state: str
    """'normal' or 'anomalous': the look that the sentence describes."""
    author: str = TEMPLATE
    """'template', 'person' or 'llm:NAME'."""
    normality: str | None = None
    """The added normality that this sentence describes. Such prompts look anomalous to the detector and are part
    of no class embedding; they make that normality's row."""
    exchange: str | None = None
    """The first 12 digits of the exchange's digest, if a language model wrote this."""


class Exchange(Struct, frozen=True, forbid_unknown_fields=True):
    """What a language model was asked and what it answered."""

    digest: str
    """SHA-256 of the whole request, as in the cache: 64 hexadecimal digits."""
    model: str
    prompt: str
    answer: str
    """The answer, cleaned, at most `LIMITS.excerpt_chars` characters of it."""
    time: str
    """When it was answered, ISO 8601 in UTC."""


class StateWords(Struct, frozen=True, forbid_unknown_fields=True):
    """States of either kind, each with a '{}' where the class name goes."""

    normal: tuple[str, ...] = ()
    anomalous: tuple[str, ...] = ()


class PromptSet(Struct, frozen=True, forbid_unknown_fields=True):
    """The sentences of one class. Build one with `edgead.server_side.prompts.ensembles` or `.generators`."""

    class_name: str
    prompts: tuple[Prompt, ...]
    domain: str = "industrial"
    method: str = PERSON
    """What composed it: winclip, april-gan, alfa, descriptors, normality or person."""
    states: StateWords = StateWords()
    templates: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    schema: int = PROMPT_SCHEMA

    def texts(self, state: State) -> tuple[str, ...]:
        """The sentences of a state that make the class embedding: those of added normalities are left out."""
        return tuple(p.text for p in self.prompts if p.state == state and p.normality is None)

    def class_prompts(self) -> tuple[Prompt, ...]:
        """All prompts but those of added normalities: the rows of a text table."""
        return tuple(prompt for prompt in self.prompts if prompt.normality is None)

    def normalities(self) -> tuple[str, ...]:
        """Names of the added normalities, in order of appearance."""
        return tuple(dict.fromkeys(p.normality for p in self.prompts if p.normality is not None))

    def normality_texts(self, name: str) -> tuple[str, ...]:
        """The sentences that describe one added normality."""
        return tuple(prompt.text for prompt in self.prompts if prompt.normality == name)

    def authors(self) -> dict[str, int]:
        """Author -> number of prompts."""
        return dict(Counter(prompt.author for prompt in self.prompts))

    def add(
        self,
        texts: Iterable[str],
        state: State,
        *,
        author: str = PERSON,
        normality: str | None = None,
        exchanges: Sequence[Exchange] = (),
    ) -> PromptSet:
        """A new set with these sentences as well; those that the set already has are left out.

        A text with a '{}' is a state: it is put through the set's templates with the class name.
        A sentence that is there under the other state is kept, so that the checks refuse the contradiction.
        """
        known = {(prompt.text.casefold(), prompt.state, prompt.normality) for prompt in self.prompts}
        mark = exchanges[-1].digest[:12] if exchanges else None
        states = {name: list(getattr(self.states, name)) for name in STATES}
        new: list[Prompt] = []
        for text in texts:
            sentences = [text]
            if "{}" in text:
                said = filled(text, self.class_name)
                sentences = [filled(template, said) for template in self.templates] or [said]
                if normality is None and text not in states[state]:
                    states[state].append(text)
            for sentence in sentences:
                key = (sentence.casefold(), state, normality)
                if key not in known:
                    known.add(key)
                    new.append(Prompt(sentence, state, author, normality, mark))
        return msgspec.structs.replace(
            self,
            prompts=(*self.prompts, *new),
            states=StateWords(tuple(states["normal"]), tuple(states["anomalous"])),
            exchanges=tuple({item.digest: item for item in (*self.exchanges, *exchanges)}.values()),
        )


def format_prompt_set(prompts: PromptSet) -> bytes:
    """The set as JSON for people: one prompt, template or exchange to a line, UTF-8, a newline at the end."""
    fields = {"schema": prompts.schema, **{k: v for k, v in msgspec.structs.asdict(prompts).items() if k != "schema"}}
    parts = []
    for name in ("schema", "class_name", "domain", "method", "states", "templates", "phrases", "prompts", "exchanges"):
        value = fields[name]
        if isinstance(value, tuple) and value:
            rows = ",\n".join(f"    {_json(item)}" for item in value)
            parts.append(f"  {_json(name)}: [\n{rows}\n  ]")
        elif isinstance(value, StateWords):
            rows = ",\n".join(f"    {_json(state)}: {_json(getattr(value, state))}" for state in STATES)
            parts.append(f"  {_json(name)}: {{\n{rows}\n  }}")
        else:
            parts.append(f"  {_json(name)}: {_json(value)}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _json(value: object) -> str:
    if isinstance(value, Prompt):
        value = {name: field for name, field in msgspec.structs.asdict(value).items() if field is not None}
    # One level of spaces makes a long line readable; msgspec's own output has none.
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def write_prompt_set(path: Path, prompts: PromptSet, *, force: bool = False) -> None:
    """Check the set and write it, whole or not at all.

    Raises:
        PromptError: the set does not hold together; nothing is written.
        OutputExistsError: `path` is there and `force` is false.
        StorageError: no permission, no space, or an I/O fault.
    """
    from edgead.server_side.prompts.checks import check_prompt_set

    refuse_existing(path, force)
    check_prompt_set(prompts)
    write_file(path, format_prompt_set(prompts))


def read_prompt_set(path: Path) -> PromptSet:
    """Read and check a set, also one that a person has edited.

    Raises:
        InputError: no such file, or a folder.
        PromptError: not a prompt set, with the line or the number of the prompt that is wrong.
        StorageError: the file cannot be read.
    """
    from edgead.server_side.prompts.checks import parse_prompt_set

    if not path.is_file():
        raise InputError(
            wanted=f"a prompt set at {path}",
            got="a folder" if path.is_dir() else "no such file",
            next_step=f"Make one: edgead prompts new CLASS -o {path.name or 'prompts.json'}",
        )
    with storage_errors(path, "to read a prompt set"), path.open("rb") as stream:
        data = stream.read(LIMITS.file_bytes + 1)
    return parse_prompt_set(data, str(path))
