"""Labelled data sets in the MVTec layout.

train/good/*.png                        normal images to fit on
test/good/*.png, test/<type>/*.png      images to evaluate on; the type is the kind of defect
ground_truth/<type>/<name>_mask.png     where the defect is, if known (see `read_mask`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import is_image_path, list_images, read_image

GOOD = "good"


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        path: the image.
        kind: 'good', or the type of its defect.
        mask: its pixel mask; None for good parts and for types without masks.
    """

    path: Path
    kind: str
    mask: Path | None

    @property
    def anomalous(self) -> bool:
        """Whether the image shows a defect."""
        return self.kind != GOOD


def test_samples(root: Path) -> list[Sample]:
    """The labelled test images of a data set, sorted by type and name.

    Raises:
        InputError: no `test` folder, no images, a mask without its image, or a type in which some images
            have masks and others do not.
    """
    test = root / "test"
    if not test.is_dir():
        raise InputError(
            wanted=f"a data set in the MVTec layout with a folder 'test' in {root}",
            got="no such folder" if root.is_dir() else "no such data set",
            next_step="Sort the images into test/good and test/<defect type>.",
        )
    samples: list[Sample] = []
    for folder in sorted(path for path in test.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = [path for path in sorted(folder.rglob("*")) if is_image_path(path)]
        masks = {} if folder.name == GOOD else _masks(root / "ground_truth" / folder.name)
        stems = {path.stem for path in images}
        for stem in sorted(set(masks) - stems):
            raise InputError(
                wanted=f"the image that {masks[stem]} is the mask of in {folder}",
                got="no image of that name",
                next_step="Add the image, or remove the mask.",
            )
        if masks and stems - set(masks):
            raise InputError(
                wanted=f"a mask for every image in {folder}, or for none",
                got=f"no mask for {sorted(stems - set(masks))[0]}",
                next_step=f"Add {sorted(stems - set(masks))[0]}_mask.png to ground_truth/{folder.name}.",
            )
        samples += [Sample(path, folder.name, masks.get(path.stem)) for path in images]
    if not samples:
        raise InputError(wanted=f"images in the folders of {test}", got="none", next_step="Add images.")
    return samples


def _masks(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.stem.removesuffix("_mask"): path for path in sorted(folder.rglob("*")) if is_image_path(path)}


def normal_images(root: Path) -> list[Path]:
    """The images of `train/good`.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    return list_images(root / "train" / GOOD)


def read_mask(sample: Sample, shape: Sequence[int]) -> NDArray[np.bool_]:
    """A sample's mask, bool [H, W] of its image's size; all false for good parts.

    The defect is what is brighter than half of the mask's brightest pixel, so masks of 0 and 1, of 0 and 255,
    and with soft edges mean the same. Published sets hold black masks too: nothing is marked then.

    Raises:
        InputError: the mask has another size than the image.
        ImageError: it is no picture.
    """
    if sample.mask is None:
        return np.zeros((shape[0], shape[1]), np.bool_)
    values = read_image(sample.mask).max(2)
    mask: NDArray[np.bool_] = values > values.max() / 2
    if mask.shape != (shape[0], shape[1]):
        raise InputError(
            wanted=f"a mask of {shape[1]} x {shape[0]} pixels for {sample.path}",
            got=f"{mask.shape[1]} x {mask.shape[0]} in {sample.mask}",
            next_step="Draw the mask on the image itself.",
        )
    return mask
