"""Any detector's maps into a small student: a frozen compact backbone and a few convolutions that repeat the map.

The teacher is one fitted detector or several; of several the mean of their maps, each in units of its own threshold,
so that 1 is where each of them begins to call a pixel anomalous. The student sees photographs of good parts, the same
with painted defects, and pictures of anomalies if there are some, and learns the logarithm of the teacher's value at
each cell of its finest map, under

    mean over cells of (1 + min(t, 4)) * huber(z - log max(t, FLOOR)),        t the teacher's value, z the student's

in which what is near or above the threshold weighs more than the even ground. Its map is exp(z) times `map.scale`,
upsampled; its score is the highest cell. The scale, one number by which the held-out scores of both are alike, and the
thresholds are knowledge; they are calibrated on photographs that nothing was trained on, as for any other detector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.detector_file import weights_digest
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors.trained import Samples, TrainedOptions
from edgead.server_side.detectors.training import Schedule, batch_of, train
from edgead.server_side.devices import CPU, placed, torch_device
from edgead.server_side.distil_data import PAINTED, split_paths, with_defects
from edgead.server_side.distil_student import METHOD, StudentDecoder, student_modules
from edgead.server_side.distil_teacher import Teacher, resized
from edgead.server_side.learned import Learned, finished

PAPER = "none: the student repeats its teacher's maps"

FLOOR = 0.05
"""Share of the teacher's threshold below which values are alike."""
CEILING = 50.0
STEPS = 800
LEARNING_RATE = 1e-3
BATCH = 16
_TOP_WEIGHT = 4.0
_BATCH_EMBEDDED = 8


def map_loss(logarithms: Tensor, targets: Tensor) -> Tensor:
    """The loss of the module's docstring.

    Args:
        logarithms: z, of any shape.
        targets: t of the same shape, in the teacher's thresholds.

    Returns:
        a scalar.
    """
    wanted = targets.clamp(FLOOR, CEILING).log()
    weight = 1.0 + targets.clamp(0.0, _TOP_WEIGHT)
    return (weight * F.huber_loss(logarithms, wanted, reduction="none")).mean()


class StudentTask:
    """Trains the decoder; see `training.Task`.

    Args:
        maps: of the backbone, one tensor [N, C_l, h_l, w_l] for each layer.
        targets: float32 [N, h, w].
        stop_maps, stop_targets: the same of what is held out.
        batch, learning_rate, steps, seed: as everywhere.
        device: where the decoder is trained; maps and targets stay where they are.
        identity: what a checkpoint must agree in.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        targets: Tensor,
        stop_maps: Sequence[Tensor],
        stop_targets: Tensor,
        *,
        batch: int = BATCH,
        learning_rate: float = LEARNING_RATE,
        steps: int = STEPS,
        seed: int = 0,
        device: torch.device = CPU,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._maps, self._targets = list(maps), targets
        self._stop_maps, self._stop_targets = list(stop_maps), stop_targets
        self._batch, self._rate, self._steps, self._seed = batch, learning_rate, steps, seed
        self.module = StudentDecoder([each.shape[1] for each in maps], seed=seed)
        with torch.no_grad():
            assert self.module.last.bias is not None
            # From the mean on, the first steps are not spent on it.
            self.module.last.bias.fill_(float(targets.clamp(FLOOR, CEILING).log().mean()))
        self.module.to(device)
        self._device = device
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=learning_rate, weight_decay=1e-4)
        self.optimizers = [self._optimizer]
        self.identity = {
            "method": METHOD,
            "seed": seed,
            "batch": batch,
            "learning_rate": learning_rate,
            "steps": steps,
            **(identity or {}),
        }

    def step(self, number: int) -> dict[str, float]:
        """One step of AdamW; a cosine takes the rate to a hundredth."""
        share = number / max(1, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * share))))
        places = batch_of(len(self._targets), max(2, min(self._batch, len(self._targets))), self._seed, number)
        found = self.module([each[places].to(self._device).float() for each in self._maps])
        loss = map_loss(found, self._targets[places].to(self._device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": float(loss.detach())}

    def validate(self) -> float:
        """The same loss over what is held out."""
        total = 0.0
        for at in range(0, len(self._stop_targets), _BATCH_EMBEDDED):
            part = slice(at, at + _BATCH_EMBEDDED)
            found = self.module([each[part].to(self._device).float() for each in self._stop_maps])
            total += float(map_loss(found, self._stop_targets[part].to(self._device))) * len(found)
        return total / len(self._stop_targets)


@dataclass(frozen=True, eq=False)
class Distilled:
    """A student that was trained, and photographs that it was not trained on.

    Attributes:
        learned: the student's detector, not yet written.
        held_out: photographs of good parts that set its threshold.
    """

    learned: Learned
    held_out: tuple[Path, ...]


def distil(
    teacher: Teacher,
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    checkpoint: Path | None = None,
) -> Distilled:
    """Train a student on a teacher's maps.

    Args:
        teacher: one detector or several.
        normal: photographs of good parts; those that set the teacher's threshold may be among them.
        options: `preprocessing` counts by its frame size alone: the rest is the teacher's. `device` is the student's;
            the teacher runs on the CPU.
        anomalous: pictures of anomalies; their masks mean nothing here, as the teacher says where.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals, or no such device.
        ImageError: a file is no picture.
        DetectorError: a checkpoint of another distillation.
        FailureError: the loss is no number any more.
    """
    device = torch_device(options.device)
    preprocessing = resized(teacher.detectors[0].spec.preprocessing, options.preprocessing)
    options = replace(options, preprocessing=preprocessing)
    backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
    parts = split_paths(normal, [path for path, _ in anomalous], options.held_out, options.seed)
    grid = (preprocessing.height // backbone.strides[0], preprocessing.width // backbone.strides[0])
    steps, rate = options.steps or STEPS, options.learning_rate or LEARNING_RATE
    digest = hashlib.sha256()

    def seen(normals: Sequence[Path], anomalies: Sequence[Path], label: str) -> tuple[list[Tensor], Tensor]:
        maps: list[list[Tensor]] = [[] for _ in backbone.strides]
        targets: list[Tensor] = []
        total = (1 + PAINTED) * len(normals) + len(anomalies)
        with placed(backbone, device), Progress(label, total) as progress:
            for frame in progress.track(with_defects(normals, anomalies, options.seed)):
                tiles = prepare(frame, preprocessing)
                digest.update(tiles.tobytes())
                targets.append(teacher.targets(frame, grid))
                with torch.inference_mode():
                    image = torch.from_numpy(tiles).to(device)
                    found = backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
                for kept, each in zip(maps, found, strict=True):
                    # Half the memory; features are far from float16's limits.
                    kept.append(each.half().cpu().clone())
        return [torch.cat(each) for each in maps], torch.cat(targets)

    maps, targets = seen(parts.train, parts.anomalies, "the teacher's maps")
    stop_maps, stop_targets = seen(parts.stop, parts.stop_anomalies, "the teacher's maps of held-out pictures")
    task = StudentTask(
        maps,
        targets,
        stop_maps,
        stop_targets,
        batch=options.batch,
        learning_rate=rate,
        steps=steps,
        seed=options.seed,
        device=device,
        identity={
            "teacher": teacher.digest,
            "backbone": weights_digest(backbone).hex(),
            "patience": options.patience,
            "data": digest.hexdigest(),
        },
    )
    schedule = Schedule(steps, validate_every=max(1, steps // 20), patience=options.patience)
    history = train(task, schedule, label="student", checkpoint=checkpoint)
    modules = student_modules(backbone, task.module.to(CPU).eval(), preprocessing)
    scale = _scale(task.module, stop_maps, stop_targets)
    learned = finished(
        modules,
        options,
        {"map.scale": np.array([scale], np.float32)},
        paper=PAPER,
        normal=normal,
        held_out=parts.calibration,
        by_hand=1.0,
        backbone=options.backbone,
        teachers=[
            {"name": name, "method": each.spec.method, "knowledge": each.pack.digest}
            for name, each in zip(teacher.names, teacher.detectors, strict=True)
        ],
        training=history.facts(),
        data=parts.facts(),
    )
    return Distilled(learned, parts.calibration)


def _scale(decoder: StudentDecoder, maps: Sequence[Tensor], targets: Tensor) -> float:
    """Median ratio of the highest cells: a student that hedges says too little of the highest values."""
    with torch.inference_mode():
        highest = torch.cat(
            [
                decoder([each[at : at + _BATCH_EMBEDDED].float() for each in maps]).amax((1, 2))
                for at in range(0, len(targets), _BATCH_EMBEDDED)
            ]
        )
    wanted = targets.amax((1, 2)).clamp(FLOOR, CEILING).log()
    return float((wanted - highest).median().exp())


__all__: Sequence[str] = ("Distilled", "StudentTask", "distil", "map_loss")
