"""Weights of several anomaly scores, chosen on augmented training pictures by Monte-Carlo (Abdali et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.server_side.metrics import auroc

DRAWS = 100
TURN, SKEW, WAVE = 15.0, 0.15, 0.02
"""Largest rotation in degrees, largest shear, largest displacement of a distortion as a share of the side."""

Frame = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ChosenWeights:
    """Weights and what they were chosen on.

    Attributes:
        weights: float32 [S], at least 0, of sum 1.
        auroc: of the weighted score over the augmented pictures.
        auroc_of_mean: of the plain mean of the scores there.
        pictures: how many pictures.
    """

    weights: NDArray[np.float32]
    auroc: float
    auroc_of_mean: float
    pictures: int


def choose_weights(
    scores: NDArray[np.float32], labels: NDArray[np.bool_], *, draws: int = DRAWS, seed: int = 0
) -> ChosenWeights:
    """The weights w with the best AUROC of sum_i w_i s_i, out of equal ones and uniform draws.

    Each draw is uniform in [0, 1]^S and divided by its sum. The equal weights stay unless a draw separates strictly
    better, and of draws that do equally well the one nearest to equal weights is taken: so few pictures cannot tell
    more.

    Args:
        scores: float32 [n, S], S scores of n pictures.
        labels: bool [n], true for anomalous; both must be there.
        draws: number of draws.
        seed: of the draws.
    """
    count = scores.shape[1]
    drawn = np.random.default_rng(seed).uniform(size=(draws, count))
    drawn /= drawn.sum(1, keepdims=True)
    equal = np.full((1, count), 1.0 / count)
    candidates = np.concatenate([equal, drawn])
    found = np.array([auroc(labels, scores.astype(np.float64) @ weights) for weights in candidates])
    distance = np.square(candidates - equal).sum(1)
    best = min(range(len(candidates)), key=lambda place: (-found[place], distance[place]))
    return ChosenWeights(candidates[best].astype(np.float32), float(found[best]), float(found[0]), len(labels))


def augmented(frame: Frame, rng: np.random.Generator) -> Frame:
    """A picture rotated, flipped, skewed and distorted at random, uint8 RGB of the same shape.

    Beyond the border the picture is mirrored. The distortion moves pixels along two slow waves.
    """
    height, width = frame.shape[:2]
    angle = np.deg2rad(rng.uniform(-TURN, TURN))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    skew = np.array([[1.0, rng.uniform(-SKEW, SKEW)], [rng.uniform(-SKEW, SKEW), 1.0]])
    flip = np.diag(rng.choice([-1.0, 1.0], size=2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    source = np.stack([x - centre[0], y - centre[1]], axis=-1) @ (turn @ skew @ flip).T + centre
    waves = rng.uniform(0.5, 1.5, size=2) * 2 * np.pi
    phases, sizes = rng.uniform(0, 2 * np.pi, size=2), rng.uniform(0, WAVE, size=2) * (width, height)
    source[..., 0] += sizes[0] * np.sin(waves[0] * y / height + phases[0])
    source[..., 1] += sizes[1] * np.sin(waves[1] * x / width + phases[1])
    moved = source.astype(np.float32)
    return np.asarray(
        cv2.remap(frame, moved[..., 0], moved[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.uint8
    )


__all__: Sequence[str] = ("DRAWS", "ChosenWeights", "augmented", "choose_weights")
