"""The anomalies of a run in the forms in which detectors take them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgead.runtime.errors import InputError, storage_errors
from edgead.server_side.kka.jobs import painted_image
from edgead.server_side.kka.records import Image, Member
from edgead.server_side.kka.work import WorkFolder


def last_set(work: WorkFolder) -> int:
    """The last round whose set is complete.

    Raises:
        InputError: none is.
    """
    done = [number for number in range(work.config.rounds + 1) if work.is_done("collect", number)]
    if not done:
        raise InputError(
            wanted=f"a run with a complete round in {work.path}", got="none", next_step="Go on with: edgead kka run"
        )
    return done[-1]


def members(work: WorkFolder, number: int | None = None, *, only: str | None = None) -> list[tuple[Image, bool]]:
    """The images of a round's set, each with whether it is hard.

    Args:
        work: the run.
        number: after which round; the last complete one if None.
        only: 'hard' or 'easy' for these alone.

    Raises:
        InputError: that round is not complete.
    """
    number = last_set(work) if number is None else number
    if not work.is_done("collect", number):
        raise InputError(
            wanted=f"the set of round {number} of {work.path}",
            got=f"complete rounds up to {last_set(work)}",
            next_step="Go on with: edgead kka run",
        )
    images = {record.id: record for earlier in range(number + 1) for record in work.records(Image, earlier)}
    found = [(images[member.parent], member.hard) for member in work.records(Member, number)]
    return [(image, hard) for image, hard in found if only is None or hard == (only == "hard")]


def samples(work: WorkFolder, number: int | None = None, *, only: str | None = None) -> list[tuple[Path, Path | None]]:
    """(picture, mask or None) of a round's set, as the detectors' `anomalous` takes them; see `members`."""
    return [
        (work.path / image.file, work.path / image.mask if image.mask else None)
        for image, _ in members(work, number, only=only)
    ]


def export_members(
    work: WorkFolder, number: int | None, folder: Path, *, only: str | None = None
) -> tuple[int, int, int]:
    """Copy a round's set into a folder: `ID.png`, and `ID_mask.png` where there is a mask.

    Returns:
        images, masks, and the round.

    Raises:
        InputError: see `members`; or an empty set.
        ImageError: a picture that is not as its record says.
        StorageError: the file system refused.
    """
    number = last_set(work) if number is None else number
    found = members(work, number, only=only)
    if not found:
        raise InputError(
            wanted=f"anomalies in the set of round {number}",
            got=f"no {only or 'visible'} ones",
            next_step="Name another round, or look at the report.",
        )
    masks = 0
    with storage_errors(folder, "to write a set"):
        for image, _ in found:
            painted_image(work.path, image)
            shutil.copyfile(work.path / image.file, folder / f"{image.id}.png")
            if image.mask:
                shutil.copyfile(work.path / image.mask, folder / f"{image.id}_mask.png")
                masks += 1
        os.sync()
    return len(found), masks, number


__all__ = ["export_members", "last_set", "members", "samples"]
