"""Small makers with the real interfaces: an author of four sizes, a painter of one spot, distances by rule."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.server_side.kka.describe import describe
from edgead.server_side.kka.records import Preference
from edgead.server_side.kka.rounds import Makers
from edgead.server_side.kka.seams import Frame, Painted, Tuned, UndrawableCaptionError

SIZES = ("tiny", "small", "large", "huge")
_RADIUS = dict(zip(SIZES, (1, 3, 6, 12), strict=True))


@dataclass
class SizeAuthor:
    """Writes "a SIZE spot", each size with its own odds."""

    weights: tuple[float, ...] = (1, 1, 1, 1)
    nonsense: float = 0.0
    calls: list[int] = field(default_factory=list)
    kind: str = "of-the-tests"
    name: str = "sizes"
    digest: str = hashlib.sha256(b"sizes").hexdigest()

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        self.calls.append(len(prompts))
        answers = []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            odds = np.array(self.weights) / sum(self.weights)
            size = SIZES[rng.choice(len(SIZES), p=odds)]
            answers.append("{}" if rng.random() < self.nonsense else f"a {size} spot")
        return answers


@dataclass
class SpotPainter:
    """Paints a black spot of the caption's size at a random place."""

    painted: list[int] = field(default_factory=list)
    fail_after: int | None = None
    error: BaseException | None = None
    kind: str = "of-the-tests"
    name: str = "spots"
    digest: str = hashlib.sha256(b"spots").hexdigest()
    needs_normal: bool = True

    def check(self, caption: str) -> None:
        if not _RADIUS.keys() & set(caption.split()[1:2]):
            raise UndrawableCaptionError(wanted="a size", got=caption, next_step="Name one.")

    def paint(self, caption: str, normal: Frame | None, *, seed: int) -> Painted:
        assert normal is not None
        if self.fail_after is not None and len(self.painted) >= self.fail_after:
            assert self.error is not None
            raise self.error
        self.painted.append(seed)
        rng = np.random.default_rng(seed)
        mask = np.zeros(normal.shape[:2], np.uint8)
        place = tuple(int(rng.integers(16, side - 16)) for side in mask.shape[::-1])
        cv2.circle(mask, place, _RADIUS[caption.split()[1]], 255, -1)
        image = normal.copy()
        image[mask > 0] //= 3
        return Painted(image, mask)


class DarkEvaluator:
    """The distance is the share of dark pixels."""

    normal_distances: NDArray[np.float32] = np.array([0.0, 0.01], np.float32)

    def measure(self, names: Sequence[str], frames: Sequence[Frame]) -> list[tuple[float, float]]:
        assert len(names) == len(frames)
        return [(float((frame.mean(2) < 80).mean()), 0.01) for frame in frames]


class MeanEmbedder:
    """Mean colours of the four quarters."""

    name = "quarters"

    def embed(self, frames: Sequence[Frame]) -> NDArray[np.float32]:
        return np.stack(
            [cv2.resize(frame, (2, 2), interpolation=cv2.INTER_AREA).reshape(-1) for frame in frames]
        ).astype(np.float32)


class CountingTuner:
    """Keeps which sizes were chosen and which rejected; the author of the next round reads it."""

    def tune(self, preferences: Sequence[Preference], before: Path | None, after: Path, *, seed: int) -> Tuned:
        weights = read_weights(before)
        for pair in preferences:
            weights[SIZES.index(pair.chosen.split()[1])] += 0.1
        after.mkdir()
        (after / "weights.txt").write_text(" ".join(f"{weight:.6f}" for weight in weights))
        return Tuned(1, (0.7, 0.6), (0.0, 0.1))


def read_weights(adapter: Path | None) -> list[float]:
    """Odds that a tuned author has."""
    if adapter is None:
        return [1.0] * len(SIZES)
    return [float(word) for word in (adapter / "weights.txt").read_text().split()]


def makers(painter: SpotPainter | None = None, author: SizeAuthor | None = None, **more: object) -> Makers:
    """Makers of the tests; the author follows its adapter unless one is given."""
    chosen = painter or SpotPainter()
    return Makers(
        describe=describe,
        embedder=MeanEmbedder,
        author=lambda adapter: author or SizeAuthor(tuple(read_weights(adapter))),
        painter=lambda: chosen,
        evaluator=lambda work, number: DarkEvaluator(),
        tuner=CountingTuner,
        **more,  # type: ignore[arg-type]
    )
