"""Photographs to fit on: read with an error that names the way out, and the unreadable ones left out if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgead.runtime.errors import EdgeadError, ImageError, InputError, StorageError
from edgead.runtime.image import Frame, read_image
from edgead.runtime.progress import Progress

FEWEST = 2
"""Photographs of good parts that a fit needs: one cannot show how normal parts differ."""
_LISTED = 50
"""Left-out pictures that a card names; the count is always whole."""

Samples = Sequence[tuple[Path, Path | None]]


@dataclass(frozen=True)
class LeftOut:
    """A picture that nothing was learned from.

    Attributes:
        path: the picture.
        reason: why it could not be read, as a phrase.
    """

    path: Path
    reason: str


def read_photograph(path: Path) -> Frame:
    """A picture to fit on, uint8 RGB [H, W, 3].

    Raises:
        ImageError: it is no picture that edgead reads.
        StorageError: the file cannot be read.
    """
    try:
        return read_image(path)
    except (ImageError, StorageError) as error:
        raise type(error)(
            wanted=error.wanted,
            got=error.got,
            next_step="Replace it, or leave unreadable pictures out, each named with its reason: --skip-unreadable.",
        ) from error


def defect_mask(mask: Frame, path: Path, image: Path, frame: Frame) -> Frame:
    """Where the defect of a picture is, as uint8 RGB [H, W, 3] of 0 and 255: what is brighter than half of the
    mask's brightest pixel.

    Args:
        mask: as read from `path`.
        frame: the picture, as read from `image`.

    Raises:
        InputError: the mask marks nothing, or has another size than the picture.
    """
    if mask.shape != frame.shape or not mask.any():
        size = f"{mask.shape[1]} x {mask.shape[0]}" if mask.any() else "a black picture"
        raise InputError(
            wanted=f"a mask of {frame.shape[1]} x {frame.shape[0]} pixels for {image}",
            got=f"{size} in {path}",
            next_step="Draw the mask on the picture itself.",
        )
    return np.where(mask > mask.max() / 2, np.uint8(255), np.uint8(0))


def enough(paths: Sequence[Path], left_out: Sequence[LeftOut] = ()) -> None:
    """Check that photographs of good parts are left to fit on.

    Raises:
        InputError: fewer than `FEWEST`.
    """
    if len(paths) >= FEWEST:
        return
    got = f"{len(paths)}"
    if left_out:
        got += f", and {len(left_out)} unreadable, such as {left_out[0].path} ({left_out[0].reason})"
    raise InputError(
        wanted=f"at least {FEWEST} {'readable ' if left_out else ''}photographs of good parts "
        "(20 work, 200 are comfortable)",
        got=got,
        next_step="Take more photographs: one image cannot show how normal parts differ.",
    )


def leave_out_unreadable(paths: Sequence[Path], samples: Samples = ()) -> tuple[list[Path], Samples, list[LeftOut]]:
    """Decode everything once and keep what can be read.

    Args:
        paths: photographs of good parts.
        samples: pictures of known defects with their masks. A picture goes with an unreadable mask: without one it
            would be learned from in another way.

    Returns:
        the readable photographs, the readable samples, and what was left out, in order.
    """
    left_out: list[LeftOut] = []

    def reads(path: Path, instead: Path | None = None) -> bool:
        try:
            read_image(path)
        except (ImageError, StorageError) as error:
            mask = f"its mask {path}: " if instead is not None else ""
            left_out.append(LeftOut(instead or path, mask + _reason(error)))
            return False
        return True

    with Progress("checking pictures", len(paths) + len(samples)) as progress:
        good = [path for path in progress.track(paths) if reads(path)]
        defects = [
            (picture, mask)
            for picture, mask in progress.track(samples)
            if reads(picture) and (mask is None or reads(mask, picture))
        ]
    return good, defects, left_out


def left_out_facts(left_out: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """For a card: names, without the folders of this machine, and reasons."""
    return [{"image": item.path.name, "reason": item.reason} for item in left_out[:_LISTED]]


def _reason(error: EdgeadError) -> str:
    return " ".join(error.got.split())
