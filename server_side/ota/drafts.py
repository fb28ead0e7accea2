"""Drafts as files: what is to be signed, with all that is needed to judge it. Bytes in, a record or an error out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edgead.runtime.errors import InputError
from edgead.runtime.spec import canonical_json
from edgead.server_side.ota.roles import Settings

SCHEMA = 1
DRAFT_BYTES = 64 * 2**20
"""Largest draft that is read."""
_ROOTS = 10_000


class Signed(Struct, frozen=True, forbid_unknown_fields=True):
    """One signature: by which key, and its hex digits."""

    keyid: str
    sig: str


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A role that is to be signed.

    Attributes:
        role: its name.
        text: its metadata without signatures.
        before: its metadata as it is in the repository; None if it is new.
        signatures: those that it has so far.
    """

    role: str
    text: str
    before: str | None = None
    signatures: tuple[Signed, ...] = ()


class Draft(Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be signed, and what is needed to judge it.

    Attributes:
        schema: version of this record.
        title: what the publisher calls it; nothing relies on it.
        made: seconds since 1970.
        roots: every root of the repository, from the first to the one in force.
        above: metadata in force of roles that delegate to those in `parts`.
        parts: what is to be signed.
        records: by target path, the text of small targets that are new.
        settings: how the repository is laid out once this is in force.
    """

    schema: int
    title: str
    made: int
    roots: Annotated[tuple[str, ...], Meta(min_length=1, max_length=_ROOTS)]
    above: dict[str, str]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1)]
    records: dict[str, str]
    settings: Settings

    @property
    def digest(self) -> str:
        """SHA-256 of all but the signatures: the same for every custodian, to be compared by telephone."""
        bare = tuple(msgspec.structs.replace(part, signatures=()) for part in self.parts)
        return hashlib.sha256(canonical_json(msgspec.structs.replace(self, parts=bare))).hexdigest()


def encode_draft(draft: Draft) -> bytes:
    """A draft as the bytes of its file."""
    return canonical_json(draft)


def decode_draft(data: bytes) -> Draft:
    """A draft from the bytes of its file; nothing of it is believed yet, see `Case`.

    Raises:
        InputError: it is none.
    """
    try:
        if len(data) > DRAFT_BYTES:
            raise ValueError(f"over {DRAFT_BYTES} bytes")
        draft = msgspec.json.decode(data, type=Draft)
        if draft.schema != SCHEMA:
            raise ValueError(f"schema {draft.schema}")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(
            wanted="a draft as edgead ota writes it", got=str(error)[:300], next_step="Have the file sent again."
        ) from error
    return draft


def merged(drafts: Sequence[Draft]) -> Draft:
    """One draft with the signatures of several copies that were signed apart.

    Raises:
        InputError: they are not copies of one draft.
    """
    first = drafts[0]
    if len({draft.digest for draft in drafts}) != 1:
        raise InputError(
            wanted="copies of one draft", got=", ".join(draft.digest[:12] for draft in drafts), next_step="Finish each."
        )
    parts = []
    for number, part in enumerate(first.parts):
        found = dict.fromkeys(one for draft in drafts[1:] for one in draft.parts[number].signatures)
        more = [one for one in found if one not in part.signatures]
        parts.append(msgspec.structs.replace(part, signatures=(*part.signatures, *more)))
    return msgspec.structs.replace(first, parts=tuple(parts))


def refused(role: str, got: str) -> InputError:
    return InputError(
        wanted=f"signatures of the role {role} by different keys that may sign it",
        got=got,
        next_step="Do not use this copy: sign a copy of the draft as it was before.",
    )


def tampered(wanted: str) -> InputError:
    return InputError(
        wanted=f"a draft with {wanted}", got="another one", next_step="Do not sign it. Ask who made it, by telephone."
    )


def outdated(role: str, got: str) -> InputError:
    return InputError(
        wanted=f"a draft made from the role {role} as it is now", got=got, next_step="Make it anew, and sign that one."
    )


__all__ = [
    "DRAFT_BYTES",
    "SCHEMA",
    "Draft",
    "Part",
    "Signed",
    "decode_draft",
    "encode_draft",
    "merged",
    "outdated",
    "refused",
    "tampered",
]
