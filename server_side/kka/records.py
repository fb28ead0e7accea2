"""What a run keeps of everything that it makes: one line of JSON each, plain to read, with what made it.

A record never holds a time or a duration, so that a run that was killed and resumed leaves the same bytes as one that
was not. What a stage cost stands in `costs.jsonl`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.errors import InputError
from edgead.runtime.spec import canonical_json

RECORD_BYTES = 64 * 1024
"""Longest line that is read."""

_MADE = "what was made"

Digest = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
Round = Annotated[int, Meta(ge=0, le=999)]
Id = Annotated[str, Meta(pattern="^[a-z][0-9a-z-]{1,40}$")]
Text = Annotated[str, Meta(max_length=2000)]


class Made(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What made an artefact.

    Attributes:
        by: kind of maker, such as `file`, `class-name`, `transformers`, `procedural`, `inpainting`.
        model: its name or folder name; never a key or a password.
        digest: SHA-256 of its weights or rules, 64 hex digits, or empty where nobody can know them.
        prompt: what it was asked.
        seed: of this one artefact.
    """

    by: str
    model: str = ""
    digest: Digest = ""
    prompt: Annotated[str, Meta(max_length=8000)] = ""
    seed: int = 0


class Normal(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A photograph of a normal part with what it shows, in words."""

    kind: ClassVar[str] = "normals"
    id: Id
    file: str
    """Path relative to the folder of normals, with forward slashes."""
    sha256: Digest
    caption: Text
    made: Made


class Representative(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The most typical normal of a cluster: lowest Mahalanobis score, equation (1)."""

    kind: ClassVar[str] = "representatives"
    id: Id
    parent: Id
    """The normal."""
    cluster: int
    size: int
    """Normals in its cluster."""
    score: float


class Caption(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An anomaly in words."""

    kind: ClassVar[str] = "captions"
    id: Id
    round: Round
    parent: Id
    """The representative that it was written after."""
    text: Text
    made: Made
    refused: Text = ""
    """Why it is of no use (empty, too long, nothing that the painter can draw); empty for a usable one."""


class Image(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A painted anomaly."""

    kind: ClassVar[str] = "images"
    id: Id
    round: Round
    parent: Id
    """The caption."""
    normal: str
    """Id of the photograph that it was painted on, or empty."""
    file: str
    """PNG, relative to the work folder."""
    sha256: Digest
    """Of the PNG's bytes."""
    made: Made
    mask: str = ""
    """PNG of 0 and 255, relative to the work folder; empty where the painter gives none."""
    visible: float = 0.0
    """Mean absolute change of colour inside the mask, 0 to 255; 0 where there is no mask or no normal."""


class Judgement(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How far a painted anomaly lies from the normals: equation (6)."""

    kind: ClassVar[str] = "judgements"
    id: Id
    round: Round
    parent: Id
    """The image."""
    distance: float
    """Squared distance to the centre of the evaluator's sphere."""
    limit: float
    """The quantile of the normals' distances up to which an anomaly is hard."""
    hard: bool
    faint: bool = False
    """Below the floor of visibility: neither hard nor easy, and of no use for training."""


class Preference(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A hard caption that was chosen over an easy one."""

    kind: ClassVar[str] = "preferences"
    id: Id
    round: Round
    prompt: Annotated[str, Meta(max_length=8000)]
    chosen: Text
    rejected: Text
    chosen_id: Id
    rejected_id: Id


class Member(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An image that detectors train on after a round."""

    kind: ClassVar[str] = "set"
    id: Id
    round: Round
    parent: Id
    """The image, of this round or an earlier one."""
    hard: bool


class Cost(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a stage took, one line for each time that it ran."""

    kind: ClassVar[str] = "costs"
    stage: str
    round: Round
    items: int
    seconds: float


Record = Normal | Representative | Caption | Image | Judgement | Preference | Member | Cost
AnyRecord = TypeVar("AnyRecord", Normal, Representative, Caption, Image, Judgement, Preference, Member, Cost)


def encode_record(record: Record) -> bytes:
    """A record as one line: canonical JSON and a newline.

    Raises:
        InputError: one that could not be read again, as a text in it is too long.
        ValueError: a number that is not finite.
    """
    line = canonical_json(record)
    _decoded(line, type(record), _MADE)
    return line + b"\n"


def decode_record(line: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """A checked record from its line, without the newline.

    Args:
        line: the bytes.
        kind: class of the record.
        where: file and line number, for the message.

    Raises:
        InputError: it is not of that kind.
    """
    found: AnyRecord = _decoded(line, kind, where)
    return found


def _decoded(line: bytes, kind: type[Record], where: str) -> Any:
    if len(line) > RECORD_BYTES:
        raise _refusal(where, kind, f"{len(line)} bytes")
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _refusal(where, kind, str(error)[:300]) from error


def _refusal(where: str, kind: type[Record], got: str) -> InputError:
    return InputError(
        wanted=f"a record of {kind.kind} in {where}",
        got=got,
        next_step="Restore the file, or begin in another work folder."
        if where != _MADE
        else "Shorten the texts of the configuration, and begin in another work folder.",
    )
