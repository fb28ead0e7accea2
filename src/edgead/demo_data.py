"""The demo's photographs: two products in the MVTec layout, and a new batch that carries a new pattern."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgead.runtime.image import encode_jpeg, encode_png
from edgead.runtime.progress import Progress
from edgead.server_side.painting import paint_defect, paint_part

PRODUCTS = ("flange", "fabric")
KINDS = ("scratch", "dent", "stain", "thread")
BATCH = "flange"
"""The product whose next batch carries a new pattern."""
_JPEG_QUALITY = 93
_EXTENT = {"scratch": (0.16, 0.45), "dent": (0.08, 0.16), "stain": (0.09, 0.20), "thread": (0.18, 0.45)}
"""Smallest and largest size of a defect, as shares of the picture's side."""
_FAINTEST = {"flange": 0.28, "fabric": 0.50}
"""Contrast of the hardest defect of each kind: a coloured weave hides more than turned steel."""


@dataclass(frozen=True)
class DataOptions:
    """How much to paint.

    Attributes:
        images: normal pictures to learn from, for each product.
        pixels: side of a picture.
        seed: everything follows from it.
    """

    images: int
    pixels: int
    seed: int

    @property
    def test_images(self) -> int:
        """Good pictures of the test set."""
        return max(4, self.images // 3)

    @property
    def per_kind(self) -> int:
        """Test pictures of each kind of defect."""
        return max(3, self.images // 8)

    @property
    def batch_images(self) -> int:
        """Good pictures of the new batch to try, and as many with defects."""
        return max(4, self.images // 5)

    @property
    def taught_images(self) -> int:
        """Good pictures of the new batch to teach; a third of them only calibrates."""
        return max(6, 2 * self.images // 5)

    @property
    def calibration_images(self) -> int:
        """Good parts as ever that only calibrate."""
        return max(4, self.images // 3)


def paint_data(folder: Path, options: DataOptions) -> None:
    """Paint all pictures of the demo.

    Written are `<product>/train/good`, `<product>/test/<kind>`, `<product>/ground_truth/<kind>` for both
    products, `calibration/good` (normals that no bank ever holds) for the one that is taught later, and for its
    new batch the same layout under `<product>-new-batch`.
    """
    batch = options.batch_images
    per_product = options.images + options.test_images + len(KINDS) * options.per_kind
    taught = options.calibration_images + options.taught_images + 2 * batch
    with Progress("painting", len(PRODUCTS) * per_product + taught) as progress:
        for product in PRODUCTS:
            rng = _rng(options, product)
            _paint_good(folder / product / "train" / "good", product, options.images, rng, options, progress)
            _paint_good(folder / product / "test" / "good", product, options.test_images, rng, options, progress)
            if product == BATCH:
                place = folder / product / "calibration" / "good"
                _paint_good(place, product, options.calibration_images, rng, options, progress)
            for kind in KINDS:
                _paint_defects(folder / product, product, kind, options.per_kind, rng, options, progress)
        rng = _rng(options, f"{BATCH}-new-batch")
        place = folder / f"{BATCH}-new-batch"
        for part, count in (("train", options.taught_images), ("test", batch)):
            _paint_good(place / part / "good", BATCH, count, rng, options, progress, new_pattern=True)
        for start, kind in enumerate(KINDS):
            count = len(range(start, batch, len(KINDS)))
            _paint_defects(place, BATCH, kind, count, rng, options, progress, new_pattern=True)


def _rng(options: DataOptions, name: str) -> np.random.Generator:
    return np.random.default_rng([options.seed, zlib.crc32(name.encode())])


def _paint_good(
    folder: Path,
    product: str,
    count: int,
    rng: np.random.Generator,
    options: DataOptions,
    progress: Progress,
    new_pattern: bool = False,
) -> None:
    for number in range(count):
        part = paint_part(product, rng=rng, size=options.pixels, new_pattern=new_pattern)
        _save(folder / f"{number:03d}.jpg", encode_jpeg(part.image, _JPEG_QUALITY))
        progress.advance()


def _paint_defects(
    folder: Path,
    product: str,
    kind: str,
    count: int,
    rng: np.random.Generator,
    options: DataOptions,
    progress: Progress,
    new_pattern: bool = False,
) -> None:
    """Defects from faint to plain: the first ones of a folder are the hard ones."""
    low, high = _EXTENT[kind]
    for number in range(count):
        part = paint_part(product, rng=rng, size=options.pixels, new_pattern=new_pattern)
        plain = number / max(count - 1, 1)
        image, mask = paint_defect(
            part.image,
            kind,
            size=float(rng.uniform(low, high)),
            contrast=_FAINTEST[product] + (0.97 - _FAINTEST[product]) * plain,
            rng=rng,
            within=part.surface & ~part.pattern,
        )
        name = f"{number:03d}"
        _save(folder / "test" / kind / f"{name}.jpg", encode_jpeg(image, _JPEG_QUALITY))
        _save(folder / "ground_truth" / kind / f"{name}_mask.png", encode_png(np.stack([mask] * 3, axis=2)))
        progress.advance()


def _save(path: Path, data: bytes) -> None:
    # Whole or not at all is the concern of the folder that all of this lies in.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
