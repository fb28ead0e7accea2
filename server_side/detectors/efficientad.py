"""EfficientAD small as a trunk and a head (Batzner et al., WACV 2024, arXiv 2303.14535).

A student imitates a frozen teacher, and an autoencoder of it, on normals only. The trunk gives the two maps of squared
differences, teacher against student (local) and autoencoder against student (global); the head brings each to a common
scale by two quantiles of validation maps, averages them and takes the maximum as the score. The quantiles are
knowledge: `map.quantiles` [2, 2], a row (q_a, q_b) for each map.

Ours, where the paper trains 70,000 steps on a GPU with ImageNet at hand:

- the teacher is distilled here, see `efficientad_teacher`, unless there is a file of one: of an earlier fit, or a
  published one;
- teacher and student begin with closed forms, see `efficientad_start`; the student with random weights if asked for;
- the student looks at crops: a PDN has no padding, so a crop's cells are the frame's own. One forward pass of a crop
  serves L_hard and L_STAE, so L_hard too sees the small changes of brightness, contrast and saturation that the paper
  makes for the autoencoder alone;
- the penalty on pictures that are no normals takes painted generic pictures, own ones, or none, in place of ImageNet;
- generated anomalies with masks (KKA) are such pictures at the cells that the mask reaches, every second step; those
  without a mask teach nothing, since most of them looks like a normal;
- far fewer steps, the autoencoder's at five times the paper's rate, with the weights of the best validation kept. A
  student that has not learned its teacher on normals finds nothing, so the card says how much it has not learned, and
  warns.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.detector_file import weights_digest
from edgead.runtime.errors import InputError
from edgead.runtime.spec import KnowledgePort, Port, Preprocessing
from edgead.server_side.backbones import load_backbone
from edgead.server_side.detectors import efficientad_teacher as teaching
from edgead.server_side.detectors.efficientad_networks import BORDER, CELL, MEAN, STD, PatchDescription, cells
from edgead.server_side.detectors.efficientad_teacher_file import read_teacher, write_teacher
from edgead.server_side.detectors.efficientad_training import LEARNING_RATE, STEPS, EfficientAdNetworks, EfficientAdTask
from edgead.server_side.detectors.memory_bank import smoothing_matrix
from edgead.server_side.detectors.trained import Samples, TrainedOptions, load_data
from edgead.server_side.detectors.training import Schedule, train
from edgead.server_side.devices import knows_bfloat16, torch_device
from edgead.server_side.learned import Learned, Modules, finished

METHOD = "efficientad"
PAPER = (
    "Batzner et al., EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies, WACV 2024, "
    "arXiv 2303.14535"
)
PRECISIONS = ("float32", "bfloat16")
STARTS = ("closed", "random")
QUANTILES = (0.9, 0.995)
SCALE = 0.1
"""What q_b is brought to; q_a is brought to 0."""
BY_HAND = 0.3
UNLEARNED = 0.5
"""Share of the teacher that a student may have left unlearned on held-out normals without a warning. One that knows
nothing has 1 or more. On magnetic tiles students with 0.6 found nothing (image AUROC 0.47), those with 0.3 did (0.77
and more)."""
_TOO_SHORT = (
    "the student has not learned {:.0%} of what its teacher says of held-out normals and may find nothing; "
    "train longer: --steps, best on a GPU"
)


@dataclasses.dataclass(frozen=True)
class EfficientAdExtras:
    """What EfficientAD has beyond `TrainedOptions`.

    Attributes:
        penalty: generic pictures for teacher and penalty; painted ones if None, no penalty if empty.
        teacher: file of a teacher, see `efficientad_teacher_file`; where there is none yet, the teacher is distilled
            and kept there for other fits.
        teacher_steps: of the teacher's distillation.
        precision: 'float32' or 'bfloat16', of the student's training: about twice as fast on processors that know it.
        start: of the student: 'closed' for the closed forms of `efficientad_start`, 'random' for the paper's random
            weights, which want the paper's number of steps.
    """

    penalty: tuple[Path, ...] | None = None
    teacher: Path | None = None
    teacher_steps: int = teaching.STEPS
    precision: str = "float32"
    start: str = "closed"


class EfficientAdTrunk(nn.Module):
    """Frame -> the two maps of differences."""

    scale: Tensor
    shift: Tensor

    def __init__(self, networks: EfficientAdNetworks) -> None:
        super().__init__()
        self.networks = networks
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Args: image: uint8 RGB [B, H, W, 3]. Returns: local and global map, each float32 [B, h, w]."""
        found: tuple[Tensor, Tensor] = self.networks(
            image.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift
        )
        return found


def upsampling(pixels: int) -> NDArray[np.float32]:
    """Bilinear upsampling of a PDN's cells to a frame's side, float32 [pixels, cells(pixels)].

    Beyond the outermost cells, which see the frame's rim, their values are repeated; the paper puts zeros there.
    """
    whole = smoothing_matrix(pixels // CELL, pixels, 0.0)
    found = whole[:, BORDER:-BORDER].copy()
    found[:, 0] += whole[:, :BORDER].sum(1)
    found[:, -1] += whole[:, -BORDER:].sum(1)
    return found


class EfficientAdHead(nn.Module):
    """Maps of differences and their quantiles -> score and map.

    Args:
        size: height and width of the engine's frame in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.up_rows: Tensor
        self.up_columns: Tensor
        self.register_buffer("up_rows", torch.from_numpy(upsampling(size[0])))
        self.register_buffer("up_columns", torch.from_numpy(upsampling(size[1]).T.copy()))

    def forward(self, local: Tensor, whole: Tensor, quantiles: Tensor) -> tuple[Tensor, Tensor]:
        """Args: local, whole: float32 [B, h, w]; quantiles: float32 [2, 2]. Returns: score [B], map [B, H, W]."""
        # Upsampling keeps constants, so both maps can be joined on the small grid.
        joined = 0.5 * (normalised_map(local, quantiles[0]) + normalised_map(whole, quantiles[1]))
        anomaly_map = self.up_rows @ joined @ self.up_columns
        return anomaly_map.flatten(1).amax(1), anomaly_map


def normalised_map(values: Tensor, quantiles: Tensor) -> Tensor:
    """A map brought to the common scale: q_a to 0, q_b to 0.1 (Algorithm 1).

    Args:
        values: of any shape.
        quantiles: (q_a, q_b), [2].
    """
    return (values - quantiles[0]) * (SCALE / (quantiles[1] - quantiles[0]))


def map_quantiles(
    maps: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], size: tuple[int, int]
) -> NDArray[np.float32]:
    """(q_a, q_b) of local and global maps of validation normals, after upsampling.

    Args:
        maps: local and global map of each frame, [h, w].
        size: height and width of the engine's frame in pixels.

    Returns:
        float32 [2, 2], q_b above q_a in each row.
    """
    rows, columns = upsampling(size[0]), upsampling(size[1])
    found = np.empty((2, 2), np.float64)
    for kind in range(2):
        values = np.stack([rows @ pair[kind] @ columns.T for pair in maps])
        found[kind] = np.quantile(values.astype(np.float64), QUANTILES)
    # Maps without any spread would divide by 0.
    found[:, 1] = np.maximum(found[:, 1], found[:, 0] * 1.001 + 1e-6)
    return found.astype(np.float32)


def efficientad_modules(networks: EfficientAdNetworks, preprocessing: Preprocessing) -> Modules:
    """Trunk and head with their ports."""
    size = (preprocessing.height, preprocessing.width)
    grid = ("B", cells(size[0]), cells(size[1]))
    return Modules(
        EfficientAdTrunk(networks.requires_grad_(False)).eval(),
        EfficientAdHead(size),
        method=METHOD,
        preprocessing=preprocessing,
        features=(Port("local", "float32", grid), Port("whole", "float32", grid)),
        knowledge=(KnowledgePort("map.quantiles", "float32", (2, 2)),),
        outputs=(Port("score", "float32", ("B",)), Port("anomaly_map", "float32", ("B", *size))),
    )


def learn(
    normal: Sequence[Path],
    options: TrainedOptions,
    anomalous: Samples = (),
    *,
    extras: EfficientAdExtras | None = None,
    checkpoint: Path | None = None,
) -> Learned:
    """An EfficientAD-small detector from photographs of good parts and, if there are some, of anomalies.

    Args:
        normal: photographs of good parts.
        options: see `TrainedOptions`; `batch` is not used, a step sees one normal as in the paper.
        anomalous: pictures of anomalies with masks, real or generated; those without a mask are not used.
        extras: see `EfficientAdExtras`.
        checkpoint: where the training is kept between interruptions; the teacher's is beside it until the end.

    Raises:
        InputError: fewer than 2 normals, a frame's size that the networks cannot take, an unknown start, precision or
            device, bfloat16 on a processor that only imitates it.
        FailureError: the teacher says the same of everything.
        ImageError: a file is no picture.
        BackboneError: an unknown backbone, or a file that is no teacher.
    """
    extras = extras or EfficientAdExtras()
    for what, named, known in (("precisions", extras.precision, PRECISIONS), ("starts", extras.start, STARTS)):
        if named not in known:
            raise InputError(wanted=f"one of the {what} {', '.join(known)}", got=f"'{named}'", next_step="Name one.")
    device = torch_device(options.device)
    if extras.precision == "bfloat16" and not knows_bfloat16(device):
        raise InputError(
            wanted=f"a device that computes in bfloat16, to train in it on {device}",
            got="one that imitates it, at many times the cost of float32",
            next_step="Leave --precision out.",
        )
    size = (options.preprocessing.height, options.preprocessing.width)
    _check_size(size)
    data = load_data(normal, options, anomalous)
    if extras.penalty is None:
        generic = teaching.generic_frames(options.preprocessing, options.seed)
    else:
        generic = teaching.picture_frames(extras.penalty, options.preprocessing)
    identity = {
        "backbone": options.backbone,
        "data": data.digest,
        "generic": int(generic.sum(dtype=np.int64)),
        "start": extras.start,
        "teacher_steps": extras.teacher_steps,
    }
    networks = EfficientAdNetworks(size, options.seed)
    kept = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.teacher")
    made: dict[str, Any] = {}

    def distilled() -> PatchDescription:
        backbone = load_backbone(options.backbone, weights=options.backbone_weights, layers=options.layers).eval()
        teacher, history = teaching.distil_teacher(
            backbone,
            data.train,
            # Without a penalty too a teacher has to know more than normals.
            generic if len(generic) else teaching.generic_frames(options.preprocessing, options.seed),
            data.stop,
            steps=extras.teacher_steps,
            seed=options.seed,
            identity=identity,
            checkpoint=kept,
            device=device,
        )
        made.update(distilled_from=options.backbone, steps=extras.teacher_steps, unexplained=round(history.best, 6))
        return teacher

    if extras.teacher is not None:
        if not extras.teacher.exists():
            teacher = distilled()
            # One that says the same of everything is told of before it is kept.
            teaching.standardise(copy.deepcopy(teacher), data.train, device)
            write_teacher(extras.teacher, teacher, made)
        # From the file in any case: a continued fit then has the teacher that it began with.
        teacher, made = read_teacher(extras.teacher)
        networks.teacher.load_state_dict(teacher.state_dict())
        networks.unexplained.fill_(float(made.get("unexplained", 0.0)))
        identity["teacher"] = weights_digest(teacher).hex()
        teaching.standardise(networks.teacher, data.train, device)
    elif checkpoint is None or not checkpoint.is_file():
        # A checkpoint of the student holds its teacher.
        networks.teacher.load_state_dict(distilled().state_dict())
        networks.unexplained.fill_(made["unexplained"])
        teaching.standardise(networks.teacher, data.train, device)
    steps = options.steps or STEPS
    task = EfficientAdTask(
        networks,
        data.train,
        generic,
        data.anomalies,
        data.stop,
        steps=steps,
        learning_rate=options.learning_rate or LEARNING_RATE,
        seed=options.seed,
        precision=extras.precision,
        identity=identity,
        device=device,
    )
    if extras.start == "closed" and (checkpoint is None or not checkpoint.is_file()):
        task.start()
    schedule = Schedule(
        steps, validate_every=max(1, steps // 5), patience=options.patience, from_start=extras.start == "closed"
    )
    history = train(task, schedule, label="EfficientAD", checkpoint=checkpoint)
    if kept is not None:
        kept.unlink(missing_ok=True)
    if extras.teacher is None:
        made = {
            "distilled_from": options.backbone,
            "steps": extras.teacher_steps,
            "unexplained": round(float(networks.unexplained), 6),
        }
    modules = efficientad_modules(networks.cpu(), options.preprocessing)
    maps = []
    for frame in data.stop:
        found = modules.embed_prepared(frame[None])
        maps.append((found["local"][0], found["whole"][0]))
    # What the teacher says has a variance of 1 over normals, so this is a share.
    unlearned = float(np.mean([local.mean() for local, _ in maps]))
    warned = {"warning": _TOO_SHORT.format(unlearned)} if unlearned > UNLEARNED else {}
    return finished(
        modules,
        options,
        {"map.quantiles": map_quantiles(maps, size)},
        paper=PAPER,
        normal=normal,
        held_out=data.calibration,
        by_hand=BY_HAND,
        backbone=options.backbone,
        teacher=made,
        penalty={
            "pictures": len(generic),
            "kind": "painted" if extras.penalty is None else ("own pictures" if extras.penalty else "left out"),
        },
        precision=extras.precision,
        start=extras.start,
        training=history.facts(),
        student_unlearned=round(unlearned, 4),
        paper_steps=70_000,
        data=data.facts(),
        score_is_map_maximum=True,
        **warned,
    )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 64 or any(side % 32 for side in size):
        raise InputError(
            wanted="a frame of at least 64 x 64 pixels for EfficientAD, its sides divisible by 32",
            got=f"{size[1]} x {size[0]}",
            next_step="Use 256 x 256, the paper's.",
        )


__all__: Sequence[str] = (
    "METHOD",
    "PAPER",
    "EfficientAdExtras",
    "EfficientAdHead",
    "EfficientAdTrunk",
    "efficientad_modules",
    "learn",
    "map_quantiles",
    "normalised_map",
    "upsampling",
)
