"""Fitting few-shot detection with an anomalous bank: which windows are anomalous, and the weights of the scores.

Trunk and head are in `anomalous_few_shot_head`, the paper with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import prepare
from edgead.runtime.knowledge import Pack
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Preprocessing
from edgead.server_side.detectors.anomalous_few_shot_head import (
    METHOD,
    WEIGHTS,
    anomalous_few_shot_modules,
    window_scales,
)
from edgead.server_side.detectors.score_weights import augmented, choose_weights
from edgead.server_side.detectors.text_fitting import (
    Features,
    Shots,
    most_unusual,
    open_tower,
    prompts_for,
    stacked,
    take_shots,
    text_facts,
    text_knowledge,
)
from edgead.server_side.detectors.text_heads import cover
from edgead.server_side.detectors.winclip import EVEN_ODDS, UNLIKE
from edgead.server_side.learned import Arrays, Learned, Modules, base_card, calibrated, golden_frames
from edgead.server_side.photographs import read_photograph
from edgead.server_side.prompts.ensembles import winclip
from edgead.server_side.vision_language import VisionTower
from edgead.server_side.vision_language.options import VisionLanguageOptions

PAPER = "Abdali et al., Anomalous Samples for Few-Shot Anomaly Detection, INNS DLIA at IJCNN 2025"
PICTURES = 10
"""Augmented pictures of each kind, good and anomalous, that the weights are chosen on."""
SCORE = (
    "The weighted mean of the prompts' score and the largest values of two association maps, not the maximum of the "
    "map; a normality that is added lowers it in proportion to the map's maximum."
)

Samples = Sequence[tuple[Path, Path | None]]


def marked_windows(mask: NDArray[np.float32], grid: tuple[int, int], scale: int) -> NDArray[np.bool_]:
    """The windows that show the defect of a masked picture: bool [T, W].

    Those that the mask covers at least half as much as the window that it covers most: at every scale at least one,
    and none that merely touches the defect.

    Args:
        mask: float32 [T, H, W], 0 to 1, of the engine-sized frames (tiles) of one picture, not all 0.
        grid: rows and columns of patches.
        scale: patches along a window's side.
    """
    with torch.inference_mode():
        share = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask)[:, None], grid)[:, 0].numpy()
    covered = cover(grid[0], scale).T @ share @ cover(grid[1], scale)
    flat = covered.reshape(len(mask), -1)
    return np.asarray(flat >= 0.5 * flat.max())


def read_sample(picture: Path, mask: Path | None, preprocessing: Preprocessing) -> tuple[NDArray[Any], NDArray[Any]]:
    """An anomalous sample: its frame uint8 RGB [H, W, 3] and the mask of its engine-sized frames float32 [T, H', W'].

    Raises:
        InputError: no mask, one of another size, without an anomalous pixel, or with none in the region of interest.
        ImageError: a file is no picture.
    """
    frame = read_photograph(picture)
    if mask is None:
        raise InputError(
            wanted=f"a mask of where the defect in {picture} is",
            got="none",
            next_step=f"Draw one and put it beside the picture as {picture.stem}_mask.png.",
        )
    drawn = read_photograph(mask)
    if drawn.shape != frame.shape:
        raise InputError(
            wanted=f"a mask of {frame.shape[1]} x {frame.shape[0]} pixels for {picture}",
            got=f"{drawn.shape[1]} x {drawn.shape[0]} in {mask}",
            next_step="Draw the mask on the picture itself.",
        )
    marked = np.where(drawn > drawn.max() / 2, np.uint8(255), np.uint8(0))
    seen = prepare(marked, preprocessing)[..., 0].astype(np.float32) / 255.0
    if not seen.any():
        place = "in the region of interest of" if marked.any() else "in"
        raise InputError(
            wanted=f"anomalous pixels {place} {mask}", got="none", next_step="Mark the defect, or leave the sample out."
        )
    return frame, seen


class _Fit:
    """The banks of one fit, with and without a picture of theirs."""

    def __init__(self, modules: Modules, tower: VisionTower, shots: Shots, samples: Samples) -> None:
        self.modules, self.tower, self.shots = modules, tower, shots
        self.scales = window_scales(tower.grid)
        self.frames: list[NDArray[Any]] = []
        self.marked: list[Features] = []
        for picture, mask in samples:
            frame, seen = read_sample(picture, mask, modules.spec.preprocessing)
            features = modules.embed(frame)
            self.frames.append(frame)
            chosen = {k: marked_windows(seen, tower.grid, k) for k in self.scales}
            self.marked.append({f"windows.{k}": features[f"windows.{k}"][chosen[k]] for k in self.scales})

    def banks(self, normal: Sequence[Features], anomalous: Sequence[Features]) -> Arrays:
        return {
            f"bank.{kind}.{k}": stacked(features, f"windows.{k}", self.tower.embed_dim)
            for kind, features in (("normal", normal), ("anomalous", anomalous))
            for k in self.scales
        }

    def part_scores(self, text: Arrays, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Zero-shot, normal-bank and anomalous-bank scores [n, 3] of augmented pictures, and which are anomalous.

        A picture is compared with the banks of the others of its kind, where there are others: with its own rows
        the banks would look better than they are.
        """
        rng = np.random.default_rng(seed)
        good = [read_photograph(path) for path in self.shots.paths]
        rows, labels = [], []
        with Progress("choosing weights on augmented pictures", 2 * PICTURES) as progress:
            for frames, label in ((good, False), (self.frames, True)):
                order = rng.permutation(len(frames)).tolist()
                for place, source in enumerate(order[:PICTURES]):
                    alone = self._alone(source, label, text)
                    for _ in range(len(range(place, PICTURES, len(order)))):
                        features = self.modules.embed(augmented(frames[source], rng))
                        found = [self.modules.outputs(features, pack)["score"].max() for pack in alone]
                        rows.append(found)
                        labels.append(label)
                        progress.advance()
        return np.array(rows, np.float32), np.array(labels, np.bool_)

    def _alone(self, source: int, anomalous: bool, text: Arrays) -> list[Pack]:
        """Packs without the rows of one picture, in which one of the three scores counts alone."""
        normal, marked = list(self.shots.features), list(self.marked)
        own = marked if anomalous else normal
        if len(own) > 1:
            own.pop(source)
        banks = self.banks(normal, marked)
        return [self.modules.pack("part", {**banks, **text, WEIGHTS: each}) for each in np.eye(3, dtype=np.float32)]


def learn(normal: Sequence[Path], options: VisionLanguageOptions, anomalous: Samples = ()) -> Learned:
    """A detector from prompts, reference pictures of good parts and masked pictures of defects.

    With both kinds of pictures the weights of the three scores are chosen by `choose_weights` on augmented pictures
    of them, `PICTURES` of each kind; otherwise they are equal.

    Args:
        normal: photographs of good parts, possibly none: shots and what calibrates the threshold (see `take_shots`).
        options: see `VisionLanguageOptions`.
        anomalous: pictures of defects, each with its mask.

    Raises:
        InputError: a mask that is missing, of another size or without an anomalous pixel; fewer normals than shots;
            no such file of prompts.
        ImageError: a file is no picture.
        PromptError: a class name that makes no prompts, or a file that is no prompt set of both states.
        BackboneError: unknown model or weights, or too few patches for four kinds of windows.
    """
    model, tower, preprocessing = open_tower(options)
    modules = anomalous_few_shot_modules(tower, preprocessing)
    for picture, mask in anomalous:  # a mistake there is better told before minutes of work
        read_sample(picture, mask, preprocessing)
    prompts = prompts_for(options, winclip)
    shots = take_shots(modules, normal, options)
    fit = _Fit(modules, tower, shots, anomalous)
    text: dict[str, NDArray[Any]] = text_knowledge(model, prompts)
    weights = np.full(3, 1 / 3, np.float32)
    chosen: dict[str, Any] = {"weights_chosen": "equal: choosing needs shots and anomalous samples"}
    if shots.paths and anomalous:
        found = choose_weights(*fit.part_scores(text, options.seed), seed=options.seed)
        weights = found.weights
        chosen = {
            "weights_chosen": "on augmented training pictures",
            "weights_auroc": found.auroc,
            "weights_auroc_of_mean": found.auroc_of_mean,
            "weights_pictures": found.pictures,
        }
    text[WEIGHTS] = weights
    arrays: Arrays = {**fit.banks(shots.features, fit.marked), **text}
    pack, scores = calibrated(
        modules,
        options.product,
        arrays,
        shots.held_out,
        false_alarm_rate=options.false_alarm_rate,
        without=lambda place: {**fit.banks(shots.others(place), fit.marked), **text},
        by_hand=_by_hand(weights, bool(shots.paths), bool(anomalous)),
    )
    card = base_card(
        method=METHOD,
        paper=PAPER,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        **text_facts(model, prompts),
        shots=[path.name for path in shots.paths],
        anomalous_samples=[path.name for path, _ in anomalous],
        windows=list(fit.scales),
        bank={name: len(pack.arrays[name]) for name in pack.banks},
        weights=[float(weight) for weight in weights],
        **chosen,
        score=SCORE,
        score_is_map_maximum=False,
        most_unusual=most_unusual(scores),
    )
    golden = golden_frames(normal, preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


def _by_hand(weights: NDArray[np.float32], normal: bool, anomalous: bool) -> float:
    """The score at even odds and a cosine of 0.8 with both banks: a threshold where no photograph sets one."""
    shares = weights * np.array([1.0, normal, anomalous])
    return float(shares @ np.array([EVEN_ODDS, UNLIKE, 1.0 - UNLIKE]) / max(float(shares.sum()), 1e-12))


__all__: Sequence[str] = ("METHOD", "learn", "marked_windows", "read_sample")
