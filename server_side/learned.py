"""From a trunk, a head and knowledge to a fitted detector: golden frames, held-out calibration, card.

What is common to every method but the memory bank: it brings its two modules, its ports and its arrays, and gets
them back with thresholds that rest on photographs which the arrays never saw.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgead import __version__
from edgead.detector_file import FittedDetector, detector_spec, read_detector, write_detector
from edgead.runtime.errors import InputError
from edgead.runtime.image import read_image
from edgead.runtime.knowledge import Pack, head_feeds, new_pack
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import Calibration, DetectorSpec, KnowledgePort, Port, Preprocessing
from edgead.server_side.calibration import calibrate, statement
from edgead.server_side.devices import device_of
from edgead.server_side.painting import paint_defect
from edgead.server_side.painting_parts import paint_part

GOLDEN = 4
"""Golden frames of normal parts; as many again get a painted defect, so both verdicts are tested."""
KINDS = ("scratch", "stain", "crack", "hole")
Frame = NDArray[np.uint8]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Learned:
    """A detector that was fitted and not yet written."""

    trunk: nn.Module
    head: nn.Module
    spec: DetectorSpec
    pack: Pack
    golden: NDArray[np.uint8]
    card: dict[str, Any]

    def write(self, output: Path, *, force: bool = False) -> FittedDetector:
        """Write the fitted-detector file and read it back.

        Raises:
            DetectorError: the modules break the graph contract.
            OutputExistsError: the output exists and `force` is false.
            StorageError: the file system refused.
        """
        write_detector(
            output,
            trunk=self.trunk,
            head=self.head,
            spec=self.spec,
            pack=self.pack,
            golden=self.golden,
            card=self.card,
            force=force,
        )
        return read_detector(output)


class Modules:
    """A trunk and a head in torch, as the inspector will run them: frames in, score and merged tiles out.

    Args:
        trunk: uint8 RGB [T, H, W, 3] -> features, in the order of `features`.
        head: features and knowledge -> outputs, in the order of `outputs`.
        method: the detector's method name.
        preprocessing: what happens to a frame before the trunk.
        features, knowledge, outputs: the ports, in graph order.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        method: str,
        preprocessing: Preprocessing,
        features: tuple[Port, ...],
        knowledge: tuple[KnowledgePort, ...],
        outputs: tuple[Port, ...],
    ) -> None:
        self.trunk, self.head = trunk.eval(), head.eval()
        self.spec: DetectorSpec = detector_spec(
            trunk,
            method=method,
            preprocessing=preprocessing,
            features=features,
            knowledge=knowledge,
            outputs=outputs,
        )

    def embed(self, frame: Frame) -> dict[str, NDArray[np.float32]]:
        """The trunk's features of a source frame by name, each [T, ...] with T tiles."""
        return self.embed_prepared(prepare(frame, self.spec.preprocessing))

    def embed_prepared(self, frames: Frame) -> dict[str, NDArray[np.float32]]:
        """The trunk's features of engine-sized frames uint8 [T, H, W, 3], computed wherever the trunk is."""
        with torch.inference_mode():
            found = self.trunk(torch.from_numpy(np.ascontiguousarray(frames)).to(device_of(self.trunk)))
        tensors = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        return {port.name: tensor.cpu().numpy() for port, tensor in zip(self.spec.features, tensors, strict=True)}

    def outputs(self, features: Arrays, pack: Pack) -> dict[str, NDArray[Any]]:
        """The head's outputs by name, each [T, ...], for features [T, ...] under a pack."""
        feeds = [torch.from_numpy(array.copy()) for array in head_feeds(pack, self.spec).values()]
        inputs = [torch.from_numpy(np.asarray(features[port.name])) for port in self.spec.features]
        with torch.inference_mode():
            found = self.head(*inputs, *feeds)
        tensors = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        return {port.name: tensor.numpy() for port, tensor in zip(self.spec.outputs, tensors, strict=True)}

    def pack(self, product: str, arrays: Arrays, calibration: Calibration | None = None) -> Pack:
        """A pack of this detector's feature space; without a calibration its threshold means nothing yet."""
        return new_pack(
            product=product,
            fingerprint=self.spec.fingerprint,
            calibration=calibration or Calibration(0.0),
            arrays=arrays,
        )


def calibrated(
    modules: Modules,
    product: str,
    arrays: Arrays,
    held_out: Sequence[Path],
    *,
    false_alarm_rate: float,
    without: Callable[[int], Arrays] | None = None,
    by_hand: float,
) -> tuple[Pack, list[tuple[str, float]]]:
    """A pack with thresholds from photographs that its arrays do not know.

    Args:
        modules: the detector.
        product: name of the product in the pack.
        arrays: the knowledge.
        held_out: normal photographs to set the threshold on. Fewer than 2 cannot: the threshold is then
            `by_hand`, and the calibration says that nothing is known of its false alarms.
        false_alarm_rate: wanted share of normal frames called NG.
        without: the knowledge to score the n-th of `held_out` with, where `arrays` were made from it.
        by_hand: the method's own threshold for want of photographs.

    Returns:
        the pack, and (file name, image score) of each held-out photograph.
    """
    if len(held_out) < 2:
        return modules.pack(product, arrays, Calibration(by_hand)), []
    pack = modules.pack(product, arrays)
    scores, maxima = [], []
    with Progress("calibrating on held-out images", len(held_out)) as progress:
        for place, path in enumerate(progress.track(held_out)):
            own = pack if without is None else modules.pack(product, without(place))
            found = modules.outputs(modules.embed(read_image(path)), own)
            scores.append(float(found["score"].max()))
            if "anomaly_map" in found:
                maxima.append(float(found["anomaly_map"].max()))
    calibration = calibrate(
        np.array(scores, np.float32),
        np.array(maxima, np.float32) if maxima else None,
        false_alarm_rate=false_alarm_rate,
    )
    named = [(path.name, score) for path, score in zip(held_out, scores, strict=True)]
    return modules.pack(product, arrays, calibration), named


def golden_frames(paths: Sequence[Path], preprocessing: Preprocessing, seed: int = 0) -> Frame:
    """Engine-sized frames of normals and the same with painted defects, uint8 [G, H, W, 3].

    Without photographs (a zero-shot detector may be made of sentences alone) the parts are painted too.
    """
    rng = np.random.default_rng(seed)
    frames: list[Frame] = []
    for place in range(GOLDEN):
        if paths:
            source = read_image(paths[place % len(paths)])
        else:
            source = paint_part(("flange", "fabric")[place % 2], rng=rng).image
        frame = prepare(source, preprocessing if paths else Preprocessing(preprocessing.width, preprocessing.height))[0]
        painted, _ = paint_defect(frame, KINDS[place], contrast=0.9, rng=rng)
        frames += [frame, painted]
        if paths and place + 1 >= len(paths):
            break
    return np.stack(frames)


def split_normals(paths: Sequence[Path], taken: int, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """(`taken` normals to learn from, the others to calibrate on), chosen by the seed, each in its old order.

    Raises:
        InputError: fewer photographs than are to be taken.
    """
    if taken > len(paths):
        raise InputError(
            wanted=f"at least {taken} photographs of good parts",
            got=f"{len(paths)}",
            next_step="Take more photographs, or ask for fewer shots.",
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    chosen = set(order[:taken].tolist())
    return (
        [path for place, path in enumerate(paths) if place in chosen],
        [path for place, path in enumerate(paths) if place not in chosen],
    )


def base_card(
    *, method: str, paper: str, calibration: Calibration, images: Sequence[Path], seed: int, **more: Any
) -> dict[str, Any]:
    """Facts for the model card that every method has: JSON-like, without paths of this machine."""
    names = hashlib.sha256("\n".join(path.name for path in images).encode()).hexdigest()
    return {
        "method": method,
        "paper": paper,
        "images": {"all": len(images), "names_sha256": names},
        "calibration": statement(calibration),
        "seed": seed,
        "made_with": {
            "edgead": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        **more,
    }


class Finish(Protocol):
    """What the end of a fit has to know of a method's options."""

    @property
    def product(self) -> str:
        """Name of the product in the pack."""
        ...

    @property
    def false_alarm_rate(self) -> float:
        """Wanted share of normal frames called NG."""
        ...

    @property
    def seed(self) -> int:
        """Of the fit, for the golden frames and the card."""
        ...


def finished(
    modules: Modules,
    options: Finish,
    arrays: Arrays,
    *,
    paper: str,
    normal: Sequence[Path],
    held_out: Sequence[Path],
    by_hand: float,
    **facts: Any,
) -> Learned:
    """The end of a fit: thresholds on held-out photographs, the card, and golden frames.

    Args:
        modules: the detector.
        options: of the fit.
        arrays: the knowledge; nothing of it is made of `held_out`.
        paper: where the method is from, for the card.
        normal: all photographs of good parts.
        held_out: those of them that set the threshold.
        by_hand: see `calibrated`.
        facts: more for the card.
    """
    pack, scores = calibrated(
        modules, options.product, arrays, held_out, false_alarm_rate=options.false_alarm_rate, by_hand=by_hand
    )
    card = base_card(
        method=modules.spec.method,
        paper=paper,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        **facts,
        held_out_scores=[{"image": name, "score": value} for name, value in scores],
    )
    golden = golden_frames(normal, modules.spec.preprocessing, options.seed)
    return Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)


__all__: Sequence[str] = (
    "Arrays",
    "Frame",
    "Learned",
    "Modules",
    "base_card",
    "calibrated",
    "finished",
    "golden_frames",
    "split_normals",
)
