"""Pictures with masks of other products than the one in question: what APRIL-GAN's projections are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import read_image
from edgead.runtime.preprocess import prepare
from edgead.runtime.spec import Preprocessing
from edgead.server_side.datasets import Sample, read_mask, test_samples
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import MATERIALS, SMALLEST, paint_part

PAINTED = 240
"""Painted pictures, half of them with a defect, where no other set is named."""
UNNAMED = frozenset(
    ("anomalous", "anomaly", "bad", "broken", "combined", "damaged", "defect", "defective", "faulty", "ko", "ng")
)
"""Names of folders that say that there is a defect, and not which."""


class MaskedPicture(NamedTuple):
    """One picture.

    Attributes:
        frame: uint8 RGB [H, W, 3] of the engine's size.
        mask: bool [H, W], where the defect is.
        place: of its class in `Auxiliary.classes`.
        shown: place of its defect in `Auxiliary.types`; -1 for a good part, or if nobody named the defect.
    """

    frame: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    place: int
    shown: int = -1


KINDS = ("scratch", "dent", "stain", "thread", "crack", "hole")
"""Defects of a painted set. Named here, so that projections stay the same when the painter learns other kinds."""


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """A set of pictures with masks.

    Attributes:
        name: of the set and its content, for cards and checkpoints: two sets of one name are equal.
        classes: what the parts are, as words in sentences.
        count: number of pictures.
        read: the n-th picture, the same at every call.
        types: the named defects of each class: the class's place in `classes`, and a word for the defect.
    """

    name: str
    classes: tuple[str, ...]
    count: int
    read: Callable[[int], MaskedPicture]
    types: tuple[tuple[int, str], ...] = ()


def painted_auxiliary(
    size: tuple[int, int],
    count: int = PAINTED,
    *,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    materials: Sequence[str] = tuple(MATERIALS),
) -> Auxiliary:
    """Painted parts, every second one with a defect; kinds and materials take turns.

    Args:
        size: height and width of the engine's frame in pixels.
        count: number of pictures.
        seed: decides all of them.
        kinds: of defects, see `edgead.server_side.painting`.
        materials: of parts, see `edgead.server_side.painting_parts`.
    """

    def read(place: int) -> MaskedPicture:
        rng = np.random.default_rng([seed, place])
        group = place // 2 % len(materials)
        part = paint_part(materials[group], rng=rng, size=max(*size, SMALLEST))
        image, mask, shown = part.image, np.zeros(part.image.shape[:2], np.uint8), -1
        if place % 2:
            turn = place // 2 // len(materials) % len(kinds)
            kind, shown = kinds[turn], group * len(kinds) + turn
            extent, contrast = rng.uniform(0.15, 0.45), rng.uniform(0.5, 1.0)
            image, mask = paint_defect(image, kind, size=extent, contrast=contrast, rng=rng, within=part.surface)
        return _prepared(image, mask > 0, Preprocessing(width=size[1], height=size[0]), group, shown)

    types = tuple((group, kind) for group in range(len(materials)) for kind in kinds)
    name = f"painted {', '.join(materials)} with {', '.join(kinds)}: {count} of {size[0]} x {size[1]}, seed {seed}"
    return Auxiliary(name, tuple(materials), count, read, types)


def folder_auxiliary(root: Path, preprocessing: Preprocessing) -> Auxiliary:
    """The test pictures of a data set in the MVTec layout, or of a folder of such data sets, one for each class.

    A defect has the name of its folder ('bent_wire' is 'bent wire'), unless that is one of `UNNAMED` or no word.

    Args:
        root: a data set, or a folder whose folders are data sets; classes are named like their folders.
        preprocessing: of the engine's frame; tiles are left out, the whole picture is one frame.

    Raises:
        InputError: no data set, a defect without a mask, or masks without a single anomalous pixel (seen when the
            picture is read).
    """
    roots = [root] if (root / "test").is_dir() else sorted(p.parent for p in root.glob("*/test") if p.is_dir())
    if not roots:
        raise InputError(
            wanted=f"a data set with masks in the MVTec layout at {root}, or folders that are such data sets",
            got="none" if root.is_dir() else "no such folder",
            next_step="Sort the images into test/good and test/<type>, the masks into ground_truth/<type>.",
        )
    samples: list[tuple[int, Sample]] = []
    for place, folder in enumerate(roots):
        samples += [(place, sample) for sample in test_samples(folder)]
    for _, sample in samples:
        if sample.anomalous and sample.mask is None:
            raise InputError(
                wanted=f"a mask for {sample.path}",
                got="none in ground_truth",
                next_step="Add masks, or leave that type of defect out of the auxiliary set.",
            )
    digest = hashlib.sha256()
    for _, sample in samples:
        size = sample.path.stat().st_size
        digest.update(f"{sample.path.relative_to(root).as_posix()}\0{size}\0".encode())
    named = [(place, sample.kind.replace("_", " ")) for place, sample in samples if _says_which(sample)]
    types = tuple(dict.fromkeys(named))
    frame = Preprocessing(preprocessing.width, preprocessing.height, preprocessing.rotate, preprocessing.roi)

    def read(number: int) -> MaskedPicture:
        place, sample = samples[number]
        image = read_image(sample.path)
        shown = types.index((place, sample.kind.replace("_", " "))) if _says_which(sample) else -1
        return _prepared(image, read_mask(sample, image.shape), frame, place, shown)

    classes = tuple(folder.resolve().name.replace("_", " ") for folder in roots)
    name = f"{root.resolve().name}: {len(samples)} pictures, {digest.hexdigest()[:12]}"
    return Auxiliary(name, classes, len(samples), read, types)


def listed_auxiliary(
    name: str, classes: Sequence[str], pictures: Sequence[MaskedPicture], types: Sequence[tuple[int, str]] = ()
) -> Auxiliary:
    """Pictures that are in memory already."""
    return Auxiliary(name, tuple(classes), len(pictures), partial(_nth, pictures), tuple(types))


def _says_which(sample: Sample) -> bool:
    kind = sample.kind.lower()
    return sample.anomalous and kind not in UNNAMED and any(letter.isalpha() for letter in kind)


def _nth(pictures: Sequence[MaskedPicture], place: int) -> MaskedPicture:
    return pictures[place]


def _prepared(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], preprocessing: Preprocessing, place: int, shown: int
) -> MaskedPicture:
    marked = np.repeat((mask * np.uint8(255))[..., None], 3, axis=2)
    seen = prepare(marked, preprocessing)[0, ..., 0] > 127
    return MaskedPicture(prepare(image, preprocessing)[0], seen, place, shown)


__all__: Sequence[str] = ("Auxiliary", "MaskedPicture", "folder_auxiliary", "listed_auxiliary", "painted_auxiliary")
