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

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgead.detector_file import FittedDetector, weights_digest
from edgead.runtime.errors import DetectorError
from edgead.runtime.image import Frame
from edgead.runtime.knowledge import head_feeds
from edgead.runtime.preprocess import prepare
from edgead.runtime.progress import Progress
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import Backbone, load_backbone
from edgead.server_side.detectors.memory_bank import smoothing_matrix
from edgead.server_side.detectors.trained import Samples, TrainedOptions
from edgead.server_side.detectors.training import Schedule, batch_of, generator, train
from edgead.server_side.distil_data import split_paths, with_defects
from edgead.server_side.learned import Learned, Modules, base_card, calibrated, golden_frames

METHOD = "distilled"
PAPER = "none: the student repeats its teacher's maps"

FLOOR = 0.05
"""Share of the teacher's threshold below which values are alike."""
CEILING = 50.0
WIDTH = 64
STEPS = 800
LEARNING_RATE = 1e-3
BATCH = 16
_TOP_WEIGHT = 4.0
_BATCH_EMBEDDED = 8


class Teacher:
    """One or several fitted detectors as one map in units of their thresholds.

    Args:
        detectors: with maps, all of one geometry (region, tiles, rotation); sizes of frames may differ. Read from a
            file, or learned and not yet written.
        names: of their files, for messages and the card.

    Raises:
        DetectorError: a detector without a map, with a threshold that is no unit, or of another geometry.
    """

    def __init__(self, detectors: Sequence[FittedDetector | Learned], names: Sequence[str]) -> None:
        self.detectors, self.names = tuple(detectors), tuple(names)
        self.units = [_unit(detector, name) for detector, name in zip(detectors, names, strict=True)]
        first = self.detectors[0].spec.preprocessing
        for detector, name in zip(detectors, names, strict=True):
            if resized(detector.spec.preprocessing, first) != first:
                raise DetectorError(
                    wanted=f"teachers that look at the same part of a frame as {names[0]}",
                    got=f"another region, rotation or tiles in {name}",
                    next_step="Fit all teachers with the same --roi, --tiles and --rotate.",
                )
        self._graphs = [(_module(each.trunk), _module(each.head)) for each in self.detectors]
        self._knowledge = [
            [torch.from_numpy(array.copy()) for array in head_feeds(each.pack, each.spec).values()]
            for each in self.detectors
        ]

    @property
    def parameters(self) -> int:
        """Numbers in all graphs."""
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def size(self) -> int:
        """Bytes of all graphs' numbers and all knowledge."""
        known = sum(array.nbytes for each in self.detectors for array in each.pack.arrays.values())
        return known + sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self._graphs for graph in pair for tensor in graph.state_dict().values()]

    @property
    def digest(self) -> str:
        """SHA-256 over feature spaces and knowledge."""
        parts = [f"{each.spec.fingerprint} {each.pack.digest}" for each in self.detectors]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def outputs(self, frame: Frame) -> tuple[float, Tensor]:
        """Score, and map float32 [T, H, W] of the first teacher's size, of a source frame; both in thresholds."""
        size = self.detectors[0].spec.preprocessing
        scores, maps = [], []
        for number, (detector, unit) in enumerate(zip(self.detectors, self.units, strict=True)):
            trunk, head = self._graphs[number]
            with torch.inference_mode():
                features = _tuple(trunk(torch.from_numpy(prepare(frame, detector.spec.preprocessing))))
                outputs = _tuple(head(*features, *self._knowledge[number]))
            found = {port.name: tensor for port, tensor in zip(detector.spec.outputs, outputs, strict=True)}
            each = found["anomaly_map"] / unit
            if each.shape[1:] != (size.height, size.width):
                each = F.interpolate(each[:, None], (size.height, size.width), mode="bilinear", antialias=True)[:, 0]
            maps.append(each)
            scores.append(float(found["score"].max()) / detector.pack.calibration.threshold)
        return float(np.mean(scores)), torch.stack(maps).mean(0)

    def targets(self, frame: Frame, grid: tuple[int, int]) -> Tensor:
        """The map at a coarser grid, each cell the mean of its pixels: float32 [T, rows, columns]."""
        return F.adaptive_avg_pool2d(self.outputs(frame)[1][:, None], grid)[:, 0].clone()


def _module(graph: ExportedProgram | nn.Module) -> nn.Module:
    return graph.module() if isinstance(graph, ExportedProgram) else graph


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _unit(detector: FittedDetector | Learned, name: str) -> float:
    if not detector.spec.has_map:
        raise DetectorError(
            wanted="a teacher with an anomaly map",
            got=f"{name}, whose method {detector.spec.method} has none",
            next_step="Name a detector that shows where, such as one of memory-bank, simplenet or recontrast.",
        )
    calibration = detector.pack.calibration
    unit = calibration.map_threshold or calibration.threshold
    if unit <= 0 or calibration.threshold <= 0:
        raise DetectorError(
            wanted=f"a threshold above 0 in {name}",
            got=f"{min(unit, calibration.threshold):g}",
            next_step="Calibrate the teacher on photographs of good parts: fit it with --normal.",
        )
    return unit


def resized(preprocessing: Preprocessing, like: Preprocessing) -> Preprocessing:
    """The same region, tiles and rotation at the frame size of `like`."""
    return msgspec.structs.replace(preprocessing, width=like.width, height=like.height)


class StudentDecoder(nn.Module):
    """Maps of a backbone -> the logarithm of the teacher's map, at the finest grid.

    Args:
        channels: of each map, finest first.
        width: of the inner layers.
        seed: of the weights.
    """

    def __init__(self, channels: Sequence[int], width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 1)
        drawn = generator(seed, -1)
        with torch.no_grad():
            for layer in (*self.inputs, *self.inner, self.last):
                assert isinstance(layer, nn.Conv2d)
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=drawn) * (2 / fan_in) ** 0.5)
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Args: maps: float32 [B, C_l, h_l, w_l], finest first. Returns: z float32 [B, h, w]."""
        finest = maps[0].shape[-2]
        joined = torch.zeros(())
        for layer, each in zip(self.inputs, maps, strict=True):
            found = layer(each)
            times = finest // each.shape[-2]
            if times > 1:
                found = F.interpolate(found, scale_factor=times, mode="nearest")
            joined = joined + found
        hidden = F.relu(self.norms[0](joined))
        for inner, norm in zip(self.inner, list(self.norms)[1:], strict=True):
            hidden = hidden + F.relu(norm(inner(hidden)))
        last: Tensor = self.last(hidden)
        return last[:, 0]


class StudentTrunk(nn.Module):
    """Frame -> z: a frozen backbone and the decoder."""

    def __init__(self, backbone: Backbone, decoder: StudentDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, image: Tensor) -> Tensor:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: logarithms float32 [B, P], row by row."""
        maps = self.backbone(image.permute(0, 3, 1, 2).float() * (1.0 / 255.0))
        found: Tensor = self.decoder(maps)
        return found.flatten(1)


class StudentHead(nn.Module):
    """Logarithms -> score and map.

    Args:
        grid: rows and columns of the trunk's cells.
        size: height and width of the engine's frame, in pixels.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.up_rows: Tensor
        self.up_columns: Tensor
        self.grid = grid
        # The teacher's map is smooth already.
        self.register_buffer("up_rows", torch.from_numpy(smoothing_matrix(grid[0], size[0], 0.0)))
        columns = torch.from_numpy(smoothing_matrix(grid[1], size[1], 0.0))
        self.register_buffer("up_columns", columns.T.contiguous())

    def forward(self, logarithms: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            logarithms: float32 [B, P].
            scale: float32 [1].

        Returns:
            score float32 [B], anomaly_map float32 [B, H, W].
        """
        values = logarithms.clamp(-10.0, 10.0).exp() * scale
        return values.amax(1), self.up_rows @ values.reshape(-1, *self.grid) @ self.up_columns


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
        loss = map_loss(self.module([each[places].float() for each in self._maps]), self._targets[places])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": float(loss.detach())}

    def validate(self) -> float:
        """The same loss over what is held out."""
        total = 0.0
        for at in range(0, len(self._stop_targets), _BATCH_EMBEDDED):
            part = slice(at, at + _BATCH_EMBEDDED)
            found = self.module([each[part].float() for each in self._stop_maps])
            total += float(map_loss(found, self._stop_targets[part])) * len(found)
        return total / len(self._stop_targets)


def student_modules(backbone: Backbone, decoder: StudentDecoder, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    size = (preprocessing.height, preprocessing.width)
    grid = (size[0] // backbone.strides[0], size[1] // backbone.strides[0])
    return Modules(
        StudentTrunk(backbone, decoder),
        StudentHead(grid, size),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("logarithms", "float32", ("B", grid[0] * grid[1])),),
        knowledge=(KnowledgePort("map.scale", "float32", (1,)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


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
        options: `preprocessing` counts by its frame size alone: the rest is the teacher's.
        anomalous: pictures of anomalies; their masks mean nothing here, as the teacher says where.
        checkpoint: where the training is kept between interruptions.

    Raises:
        InputError: fewer than 2 normals.
        ImageError: a file is no picture.
        DetectorError: a checkpoint of another distillation.
        FailureError: the loss is no number any more.
    """
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
        with Progress(label, 2 * len(normals) + len(anomalies)) as progress:
            for frame in progress.track(with_defects(normals, anomalies, options.seed)):
                tiles = prepare(frame, preprocessing)
                digest.update(tiles.tobytes())
                targets.append(teacher.targets(frame, grid))
                with torch.inference_mode():
                    found = backbone(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() * (1.0 / 255.0))
                for kept, each in zip(maps, found, strict=True):
                    # Half the memory; features are far from float16's limits.
                    kept.append(each.half().clone())
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
        identity={
            "teacher": teacher.digest,
            "backbone": weights_digest(backbone).hex(),
            "patience": options.patience,
            "data": digest.hexdigest(),
        },
    )
    schedule = Schedule(steps, validate_every=max(1, steps // 20), patience=options.patience)
    history = train(task, schedule, label="student", checkpoint=checkpoint)
    modules = student_modules(backbone, task.module.eval(), preprocessing)
    scale = _scale(task.module, stop_maps, stop_targets)
    pack, scores = calibrated(
        modules,
        options.product,
        {"map.scale": np.array([scale], np.float32)},
        parts.calibration,
        false_alarm_rate=options.false_alarm_rate,
        by_hand=1.0,
    )
    card = base_card(
        method=METHOD,
        paper=PAPER,
        calibration=pack.calibration,
        images=normal,
        seed=options.seed,
        backbone=options.backbone,
        teachers=[
            {"name": name, "method": each.spec.method, "knowledge": each.pack.digest}
            for name, each in zip(teacher.names, teacher.detectors, strict=True)
        ],
        training=history.facts(),
        data=parts.facts(),
        held_out_scores=[{"image": name, "score": value} for name, value in scores],
    )
    golden = golden_frames(normal, preprocessing, options.seed)
    learned = Learned(modules.trunk, modules.head, modules.spec, pack, golden, card)
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


__all__: Sequence[str] = (
    "METHOD",
    "Distilled",
    "StudentDecoder",
    "StudentHead",
    "StudentTask",
    "StudentTrunk",
    "Teacher",
    "distil",
    "map_loss",
    "resized",
    "student_modules",
)
