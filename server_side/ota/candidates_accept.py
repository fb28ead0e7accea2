"""From candidates to pictures that a flow teaches, and to decisions that say which release has them.

A release names in its notes the candidates that it was made of. So a publisher that was killed between the commit of
the repository and the decision finds, the next time, that they were accepted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgead.runtime.errors import InputError, storage_errors
from edgead.runtime.image import encode_png
from edgead.server_side.ota.candidates import CandidateStore, Decision, Entry, Keys, check_signer, decided
from edgead.server_side.ota.flows import current_of
from edgead.server_side.ota.publish import releases_of
from edgead.server_side.ota.repository import Repository

MOST = 64
"""Candidates that one release is made of, at most: its notes name all of them."""
_NAMED = 16


@dataclass(frozen=True)
class Chosen:
    """Candidates to be taught together.

    Attributes:
        entries: nobody decided on them, and no release has them.
        product: of all of them.
        anomalous: what all of them show.
        before: candidates that a release has already, with its counter.
    """

    entries: tuple[Entry, ...]
    product: str
    anomalous: bool
    before: tuple[tuple[Entry, int], ...]


def choose(repository: Repository, store: CandidateStore, ids: Sequence[str], keys: Keys) -> Chosen:
    """Candidates by the beginnings of their ids, checked once more. Under the lock of the repository.

    Args:
        repository: where they are to be taught.
        store: has them.
        ids: beginnings.
        keys: of the devices that are known today: one that was removed since has no say any more.

    Raises:
        InputError: none, several or too many; one that was decided on; several products or kinds.
        CandidateError: one that its device did not sign, or that is no longer known.
    """
    entries = {entry.id: entry for entry in map(store.find, ids)}
    if not 0 < len(entries) <= MOST:
        raise InputError(
            wanted=f"1 to {MOST} candidates",
            got=str(len(entries)),
            next_step="Accept them in several releases.",
        )
    for entry in entries.values():
        if entry.decision is not None:
            raise decided(entry.decision)
        check_signer(entry.candidate, keys)
    for what, found in (
        ("product", {entry.candidate.mark.product for entry in entries.values()}),
        ("kind", {entry.candidate.mark.kind for entry in entries.values()}),
    ):
        if len(found) > 1:
            raise InputError(
                wanted=f"candidates of one {what}",
                got=", ".join(sorted(found)),
                next_step="Accept them apart: each becomes a release of its own.",
            )
    first = next(iter(entries.values())).candidate.mark
    named = {
        key: release.counter
        for release in releases_of(repository, first.product)
        for key in entries
        if key[:_NAMED] in release.notes.split()
    }
    chosen = tuple(entry for key, entry in entries.items() if key not in named)
    _check_space(repository, first.product, chosen)
    before = tuple((entries[key], counter) for key, counter in named.items())
    return Chosen(chosen, first.product, first.kind == "anomalous", before)


def write_pictures(chosen: Chosen, folder: Path) -> list[tuple[Path, Path | None]]:
    """Pictures with their masks as files, for `teach`; a box becomes a mask.

    Raises:
        CandidateError: a picture is damaged inside.
        StorageError: the file system refused.
    """
    written: list[tuple[Path, Path | None]] = []
    for entry in chosen.entries:
        candidate = entry.candidate
        picture = folder / f"{candidate.mark.device}-{entry.id[:_NAMED]}.png"
        region = candidate.region()
        mask = None if region is None else folder / f"{picture.stem}_mask.png"
        with storage_errors(folder, "to write pictures"):
            picture.write_bytes(candidate.picture)
            if mask is not None and region is not None:
                mask.write_bytes(candidate.mask or encode_png(region))
        written.append((picture, mask))
    return written


def notes_of(entries: Iterable[Entry]) -> str:
    """What a release says about the candidates that it was made of."""
    marks = [entry.candidate.mark for entry in entries]
    devices = ", ".join(sorted({mark.device for mark in marks}))
    kind = "defect" if marks and marks[0].kind == "anomalous" else "normal"
    return f"{kind}, marked at {devices}: " + " ".join(entry.id[:_NAMED] for entry in entries)


def keep_accepted(store: CandidateStore, accepted: Iterable[tuple[Entry, int]], who: str) -> None:
    """Keep that candidates were accepted, and which release has them.

    Raises:
        InputError: somebody declined one meanwhile.
        StorageError: the file system refused.
    """
    for entry, counter in accepted:
        store.decide(entry, Decision(entry.id, "accepted", who, int(time.time()), release=counter))


def _check_space(repository: Repository, product: str, entries: Iterable[Entry]) -> None:
    """What the engine of another day made smaller is not what the engine of today would see."""
    resized = [entry for entry in entries if entry.candidate.mark.resized]
    if not resized:
        return
    fingerprint = current_of(repository, product)[1].fingerprint
    for entry in resized:
        if entry.candidate.mark.fingerprint != fingerprint:
            raise InputError(
                wanted=f"a picture as the camera took it, or as the engine of {product!r} sees it",
                got=f"{entry.id[:12]}, made smaller for another engine",
                next_step="Decline it, and have the picture itself brought here: edgead ota add-anomaly",
            )


__all__ = ["MOST", "Chosen", "choose", "keep_accepted", "notes_of", "write_pictures"]
