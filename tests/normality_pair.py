"""A base detector with a map and a normality detector beside it, small enough to reason about, in torch.

Frames are 16 x 16, patches 4 x 4 pixels. The base's score is the largest distance of a patch's mean colour (0..1) to
its nearest bank row, and its map repeats the patches' distances. A normality is a unit vector in colour space: it
explains a patch by the sigmoid of how much nearer the patch's colour lies to it than to the grey beside it. So red
defects are explained by the sentence "red stain", and by no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.detector_file import FittedDetector, detector_spec, export_programs
from edgead.runtime.bundle import Bundle
from edgead.runtime.knowledge import Pack, new_pack
from edgead.runtime.notes import encode_note
from edgead.runtime.spec import Calibration, KnowledgePort, Port, Preprocessing

SIDE, GRID = 16, 4
GREY = 100
COLOURS: Mapping[str, tuple[int, int, int]] = {"red": (230, 60, 60), "blue": (60, 60, 230), "green": (60, 230, 60)}
"""Defects that a test can paint, 0..255."""
SENTENCES = {"red": "red stain", "blue": "blue thread", "green": "green dot"}
ALIKE = 40.0
"""How sharply a normality is told from the normal feature beside it."""


class Colours(nn.Module):
    """A trunk: mean colour of each patch, [B, 16, 3] in 0..1, times a weight that makes trunks tell apart."""

    scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        pixels = image.permute(0, 3, 1, 2).float() / 255.0 * self.scale
        return (nn.functional.avg_pool2d(pixels, SIDE // GRID).flatten(2).transpose(1, 2),)


class Distance(nn.Module):
    """The base's head."""

    def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        far = (patches.unsqueeze(2) - normal).square().sum(-1)
        valid = torch.arange(normal.shape[0], dtype=torch.int32) < rows
        least, index = torch.where(valid, far, 1e30).topk(1, dim=2, largest=False)
        distance = least.squeeze(-1).clamp_min(0.0).sqrt()
        return distance.amax(1), _map(distance), index.squeeze(-1).to(torch.int32)


class Explained(nn.Module):
    """The normality head: how much each patch is what a sentence says, by the strongest sentence."""

    def forward(self, patches: Tensor, table: Tensor, rows: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = torch.arange(table.shape[0], dtype=torch.int32) < rows
        direction = torch.where(valid.unsqueeze(1), table - normal, 0.0) * ALIKE
        unit = patches / patches.square().sum(-1, keepdim=True).clamp_min(1e-9).sqrt()
        share = torch.where(valid, torch.sigmoid(unit @ direction.T), -1.0)
        strongest, place = share.topk(1, dim=-1)
        strongest = strongest.squeeze(-1).clamp(0.0, 1.0)
        nearest = torch.where(rows > 0, place.squeeze(-1), -1).to(torch.int32)
        return strongest.amax(1), _map(strongest), nearest


class NotANumber(nn.Module):
    """A normality head that gives no number on red patches."""

    def forward(self, patches: Tensor, table: Tensor, rows: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, found, nearest = Explained()(patches, table, rows, normal)
        calm = (patches[..., 0] - patches[..., 2] < 0.3).float()
        return score, found * _map(calm / calm), nearest


class Halved(nn.Module):
    """A normality head that explains half as much."""

    def forward(self, patches: Tensor, table: Tensor, rows: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, found, nearest = Explained()(patches, table, rows, normal)
        return score * 0.5, found * 0.5, nearest


def _map(values: Tensor) -> Tensor:
    grid = values.unflatten(1, (GRID, GRID))
    return grid.repeat_interleave(SIDE // GRID, 1).repeat_interleave(SIDE // GRID, 2)


def base(preprocessing: Preprocessing | None = None, scale: float = 1.0) -> FittedDetector:
    """The base detector of the product 'carpet', whose bank holds one grey row."""
    return _fitted(
        Colours(scale),
        Distance(),
        "colours",
        preprocessing or Preprocessing(SIDE, SIDE),
        (KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),),
        {"bank.normal": np.full((1, 3), GREY / 255 * scale, np.float32)},
        Calibration(threshold=0.2, map_threshold=0.2, typical=0.02),
    )


def normality(
    preprocessing: Preprocessing | None = None, *, scale: float = 2.0, head: nn.Module | None = None
) -> FittedDetector:
    """The normality detector with an empty table; with `scale` 1 its trunk is the base's."""
    return _fitted(
        Colours(scale),
        head or Explained(),
        "normality",
        preprocessing or Preprocessing(SIDE, SIDE),
        (
            KnowledgePort("normality.table", "float32", ("K", 3), rows="normality.table.rows", empty_ok=True),
            KnowledgePort("normality.normal", "float32", ("K", 3), empty_ok=True),
        ),
        {"normality.table": np.zeros((0, 3), np.float32), "normality.normal": np.zeros((0, 3), np.float32)},
        Calibration(threshold=1.0),
        {"model": {"name": "tiny", "weights": "random:0", "weights_sha256": "ab" * 32}},
    )


def _fitted(
    trunk: nn.Module,
    head: nn.Module,
    method: str,
    preprocessing: Preprocessing,
    knowledge: tuple[KnowledgePort, ...],
    arrays: Mapping[str, NDArray[np.float32]],
    calibration: Calibration,
    card: dict[str, object] | None = None,
) -> FittedDetector:
    spec = detector_spec(
        trunk,
        method=method,
        preprocessing=preprocessing,
        features=(Port("patches", "float32", ("B", GRID * GRID, 3)),),
        knowledge=knowledge,
        outputs=(
            Port("score", "float32", ("B",)),
            Port("anomaly_map", "float32", ("B", SIDE, SIDE)),
            Port("nearest_row", "int32", ("B", GRID * GRID)),
        ),
    )
    pack = new_pack(product="carpet", fingerprint=spec.fingerprint, calibration=calibration, arrays=arrays)
    golden = np.stack([frame(), frame("green")])
    programs = export_programs(trunk, head, spec)
    return FittedDetector(
        spec=spec, trunk=programs[0], head=programs[1], pack=pack, golden=golden, card=card or {"method": method}
    )


def frame(*colours: str, side: int = SIDE) -> NDArray[np.uint8]:
    """A grey frame with a square patch of each colour, the first upper left, the next ones further down right."""
    made = np.full((side, side, 3), GREY, np.uint8)
    patch = side // GRID
    for place, colour in enumerate(colours):
        corner = 2 * place * patch
        made[corner : corner + patch, corner : corner + patch] = COLOURS[colour]
    return made


def with_sentences(pack: Pack, *colours: str) -> Pack:
    """The pack with the sentences of these colours, and no other."""
    unit = [np.float32(COLOURS[colour]) / np.linalg.norm(np.float32(COLOURS[colour])) for colour in colours]
    table = np.float32(unit).reshape(-1, 3)
    normal = np.full((len(colours), 3), 1 / 3**0.5, np.float32)
    rows = [{"text": SENTENCES[colour]} for colour in colours]
    return Pack(
        pack.product,
        pack.fingerprint,
        pack.calibration,
        {
            **pack.arrays,
            "normality.table": table,
            "normality.normal": normal,
            "normality.table.text": encode_note({"rows": rows, "model": "tiny", "weights_sha256": "ab" * 32}),
        },
    )


def bundle(
    path: Path,
    targets: Sequence[str] = ("onnx", "openvino"),
    *,
    first: FittedDetector | None = None,
    second: FittedDetector | None = None,
) -> Bundle:
    """Both detectors, exported."""
    from edgead.exporter.export import export_bundle

    return export_bundle(first or base(), path, targets, normality=second or normality())
