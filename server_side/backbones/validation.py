"""Choosing between backbones without a test set: painted defects on normal images held out of training.

A *product* is a set of normal images. Some fill a memory bank; the others are scored twice, as they are and
with a defect painted on them. The score is PatchCore's (Roth et al., Towards Total Recall in Industrial
Anomaly Detection, 2022) in a short form: 3x3 averaging of each map, all maps on the grid of the finest, a
greedy coreset, the largest nearest-neighbour distance of an image. Defects are of low to middle visibility,
so that the figures tell backbones apart rather than saturate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from edgead.runtime.errors import InputError

Picture = NDArray[np.uint8]
"""[H, W, 3] uint8 RGB."""

Features = Callable[[torch.Tensor], list[torch.Tensor]]
"""Image [B, 3, H, W] float in 0..1 -> maps [B, C, h, w], finest first."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_BANK_SHARE = 0.01
_BANK_CANDIDATES = 10_000
_BATCH = 8


@dataclass(frozen=True)
class Product:
    """Normal images of one product: those of the bank and those that are scored, all of one size."""

    name: str
    bank: tuple[Picture, ...]
    probes: tuple[Picture, ...]


@dataclass(frozen=True)
class ProductScore:
    """Image AUROC and patch AUROC (cells of the finest map against the painted mask), both in 0..1."""

    product: str
    image_auroc: float
    patch_auroc: float


def find_images(folder: Path) -> list[Path]:
    """All image files under `folder`, sorted by path.

    Raises:
        InputError: no folder, or no image in it.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise InputError(
            wanted=f"a folder of images at {folder}",
            got="no such folder" if not folder.is_dir() else "a folder without images",
            next_step=f"Name a folder with files of {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return found


def read_picture(path: Path) -> Picture:
    """Decode `path` as [H, W, 3] uint8 RGB.

    Raises:
        InputError: the file is no image.
    """
    raw = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
    if raw is None:
        raise InputError(wanted=f"an image at {path}", got="a file that does not decode", next_step="Remove it.")
    return np.ascontiguousarray(raw[:, :, ::-1]).astype(np.uint8, copy=False)


def product_from_folder(folder: Path, *, bank: int, probes: int, size: int = 256, seed: int = 0) -> Product:
    """A random part of the images under `folder`, each resized to `size` x `size` pixels.

    Raises:
        InputError: fewer than 4 images, or one that does not decode.
    """
    paths = find_images(folder)
    if len(paths) < 4:
        raise InputError(wanted=f"4 images or more in {folder}", got=f"{len(paths)}", next_step="Add images.")
    order = np.random.default_rng(seed).permutation(len(paths))
    probes = min(probes, len(paths) // 2)
    pictures = [_resized(read_picture(paths[i]), size) for i in order[: bank + probes]]
    return Product(folder.parent.parent.name or folder.name, tuple(pictures[probes:]), tuple(pictures[:probes]))


def product_from_texture(path: Path, *, bank: int, probes: int, size: int = 256, seed: int = 0) -> Product:
    """Random square crops of one texture image as a product of a continuous material.

    Raises:
        InputError: `path` is no image.
    """
    picture = read_picture(path)
    rng = np.random.default_rng(seed)
    short = min(picture.shape[:2])
    crops = []
    for _ in range(bank + probes):
        side = int(short * rng.uniform(0.55, 0.65))
        top = int(rng.integers(0, picture.shape[0] - side + 1))
        left = int(rng.integers(0, picture.shape[1] - side + 1))
        crops.append(_resized(picture[top : top + side, left : left + side], size))
    return Product(path.stem, tuple(crops[:bank]), tuple(crops[bank:]))


def _resized(picture: Picture, size: int) -> Picture:
    shrinks = min(picture.shape[:2]) > size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, (size, size), interpolation=method), dtype=np.uint8)


# --- painted defects ---------------------------------------------------------------------------------------


def _scratch(rng: np.random.Generator, size: int) -> tuple[NDArray[np.float32], float]:
    mask = np.zeros((size, size), np.float32)
    x, y = rng.uniform(0.15, 0.85, 2) * size
    angle, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.08)
    points = []
    for _ in range(int(rng.integers(7, 26))):
        points.append((x, y))
        x, y, angle = x + 4 * np.cos(angle), y + 4 * np.sin(angle), angle + bend
    line = np.round(np.array(points) * 8).astype(np.int32)
    cv2.polylines(mask, [line], False, 1.0, int(rng.integers(1, 3)), cv2.LINE_AA, 3)
    return mask, float(rng.choice([-1, 1]))


def _crack(rng: np.random.Generator, size: int) -> tuple[NDArray[np.float32], float]:
    mask = np.zeros((size, size), np.float32)
    start = rng.uniform(0.2, 0.8, 2) * size
    for _ in range(int(rng.integers(1, 4))):
        steps = rng.normal(0, 2.2, (int(rng.integers(8, 25)), 2)) + rng.normal(0, 1.6, 2)
        line = np.round((start + np.cumsum(steps, axis=0)) * 8).astype(np.int32)
        cv2.polylines(mask, [line], False, 1.0, 1, cv2.LINE_AA, 3)
    return mask, -1.0


def _blob(rng: np.random.Generator, size: int, low: float, high: float, soft: float) -> NDArray[np.float32]:
    """An irregular spot of radius `low`..`high` pixels whose rim is `soft` of the radius wide."""
    mask = np.zeros((size, size), np.float32)
    radius = rng.uniform(low, high)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    wobble = 1 + 0.25 * np.sin(angles * 2 + rng.uniform(0, 6)) + 0.12 * np.sin(angles * 5 + rng.uniform(0, 6))
    radii = radius * wobble * rng.uniform(0.8, 1.2)
    centre = rng.uniform(0.15, 0.85, 2) * size
    outline = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1.0, cv2.LINE_AA)
    blurred = cv2.GaussianBlur(mask, (0, 0), max(0.4, soft * radius))
    return np.asarray(blurred, dtype=np.float32)


def _add(picture: NDArray[np.float32], mask: NDArray[np.float32], amount: float) -> NDArray[np.float32]:
    return picture + mask[..., None] * amount


def paint_defect(picture: Picture, rng: np.random.Generator, strength: float = 1.0) -> tuple[Picture, Picture]:
    """Paint one defect of a random kind on a square picture.

    Kinds: scratch, crack, dent (shading), stain, hole, thread, local blur, patch cut from elsewhere.

    Args:
        picture: [S, S, 3] uint8 RGB.
        rng: decides kind, place, size and visibility.
        strength: contrast factor; 1 is low to middle visibility.

    Returns:
        the painted picture and its mask [S, S] uint8 of 0 and 255, both new arrays.
    """
    size = picture.shape[0]
    base = picture.astype(np.float32)
    out: NDArray[np.floating[Any]]
    level = strength * rng.uniform(36, 110)
    kind = int(rng.integers(8))
    if kind == 0:
        mask, sign = _scratch(rng, size)
        out = _add(base, mask, sign * 1.6 * level)
    elif kind == 1:
        mask, sign = _crack(rng, size)
        out = _add(base, mask, sign * 1.8 * level)
    elif kind == 2:
        mask = _blob(rng, size, 9, 26, 0.35)
        across, along = (1, 0) if rng.random() < 0.5 else (0, 1)
        slope = np.asarray(cv2.Sobel(mask, cv2.CV_32F, across, along), dtype=np.float32)
        out = _add(base, slope / (np.abs(slope).max() + 1e-6), 0.8 * level)
    elif kind == 3:
        mask = _blob(rng, size, 6, 20, 0.2)
        tint = rng.uniform(-1, 0.4, 3).astype(np.float32)
        out = base + mask[..., None] * tint * 0.8 * level
    elif kind == 4:
        mask = _blob(rng, size, 2.5, 8, 0.15)
        out = _add(base, mask, -1.6 * level)
    elif kind == 5:
        mask, _ = _scratch(rng, size)
        colour = rng.uniform(30, 225, 3).astype(np.float32)
        out = base + mask[..., None] * (colour - base) * min(1.0, level / 110)
    elif kind == 6:
        mask = _blob(rng, size, 10, 24, 0.15)
        smooth = cv2.GaussianBlur(base, (0, 0), float(rng.uniform(1.5, 4.0)))
        out = base + mask[..., None] * (smooth - base)
    else:
        mask = _blob(rng, size, 7, 18, 0.08)
        shift = rng.integers(size // 6, size // 2, 2)
        moved = np.roll(np.rot90(base, int(rng.integers(4))), shift, (0, 1))
        out = base + mask[..., None] * (moved - base) * min(1.0, 0.35 + level / 120)
    painted = np.clip(np.round(out), 0, 255).astype(np.uint8)
    return painted, np.where(mask > 0.3, 255, 0).astype(np.uint8)


# --- the score ---------------------------------------------------------------------------------------------


def patch_embeddings(features: Features, pictures: Sequence[Picture], device: str = "cpu") -> torch.Tensor:
    """PatchCore's locally averaged, multi-layer patch embeddings.

    Returns:
        [len(pictures), h * w, D] float32 on the grid of the finest map; D is the sum of the maps' channels.
    """
    rows = []
    for start in range(0, len(pictures), _BATCH):
        batch = torch.from_numpy(np.stack(pictures[start : start + _BATCH]))
        image = batch.to(device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            maps = [functional.avg_pool2d(m, 3, 1, 1, count_include_pad=False) for m in features(image)]
            grid = maps[0].shape[-2:]
            wide = [maps[0]] + [functional.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps[1:]]
            rows.append(torch.cat(wide, 1).flatten(2).transpose(1, 2).float())
    return torch.cat(rows)


def greedy_coreset(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Farthest-point sampling from row 0: [N, D] -> [min(size, N), D] (Roth et al. 2022, algorithm 1)."""
    chosen = [0]
    squares = (rows * rows).sum(1)
    distance = torch.full_like(squares, torch.inf)
    for _ in range(min(size, len(rows)) - 1):
        last = chosen[-1]
        distance = torch.minimum(distance, squares + squares[last] - 2 * (rows @ rows[last]))
        chosen.append(int(distance.argmax()))
    return rows[chosen]


def auroc(negatives: NDArray[np.float64], positives: NDArray[np.float64]) -> float:
    """The probability that a positive outscores a negative, ties counting one half; 0..1."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, "left")
    not_above = np.searchsorted(ordered, positives, "right")
    return float((below + not_above).mean() / 2 / len(ordered))


def score_product(features: Features, product: Product, *, seed: int = 0, device: str = "cpu") -> ProductScore:
    """Bank, paint and score one product.

    The same seed paints the same defects whatever the backbone is, so that scores are paired.
    """
    rng = np.random.default_rng([seed, zlib.crc32(product.name.encode())])
    painted = [paint_defect(picture, rng) for picture in product.probes]
    bank = patch_embeddings(features, product.bank, device).flatten(0, 1)
    size = max(64, round(len(bank) * _BANK_SHARE))
    picked = rng.permutation(len(bank))[:_BANK_CANDIDATES]
    bank = greedy_coreset(bank[torch.from_numpy(picked).to(bank.device)], size)
    scored = [*product.probes, *(picture for picture, _ in painted)]
    distances = [
        torch.cdist(patch_embeddings(features, [picture], device)[0], bank).amin(1).cpu().numpy() for picture in scored
    ]
    count = len(product.probes)
    images = np.array([d.max() for d in distances], dtype=np.float64)
    side = round(len(distances[0]) ** 0.5)
    defective = np.concatenate(
        [cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA).ravel() > 25 for _, mask in painted]
    )
    cells = np.concatenate(distances[count:]).astype(np.float64)
    return ProductScore(
        product.name,
        auroc(images[:count], images[count:]),
        auroc(cells[~defective], cells[defective]),
    )


def score_backbone(
    features: Features, products: Iterable[Product], *, seed: int = 0, device: str = "cpu"
) -> list[ProductScore]:
    """`score_product` for each product."""
    return [score_product(features, product, seed=seed, device=device) for product in products]
