"""Small detectors of the tests' own, and one bundle with an engine of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgead.detector_file import FittedDetector, detector_spec, export_programs
from edgead.runtime.knowledge import new_pack
from edgead.runtime.spec import Calibration, KnowledgePort, Port, Preprocessing

SIZE = 16


class MeanColours(nn.Module):
    """A trunk: mean colour of each quarter of the frame, [B, 4, 3], mixed by trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.mix.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        pixels = image.permute(0, 3, 1, 2).float() / 255.0
        return (nn.functional.avg_pool2d(self.mix(pixels), SIZE // 2).flatten(2).transpose(1, 2),)


class Farthest(nn.Module):
    """A head without a map: the largest distance of a quarter to its nearest valid row."""

    def forward(self, patches: Tensor, normal: Tensor, rows: Tensor) -> tuple[Tensor]:
        far = (patches.unsqueeze(2) - normal).square().sum(-1)
        valid = torch.arange(normal.shape[0], dtype=torch.int32) < rows
        return (torch.where(valid, far, 1e30).amin(2).sqrt().amax(1),)


PORTS = (
    (Port("patches", "float32", ("B", 4, 3)),),
    (KnowledgePort("bank.normal", "float32", ("N", 3), rows="bank.normal.rows"),),
    (Port("score", "float32", ("B",)),),
)


def fitted(trunk: nn.Module | None = None, head: nn.Module | None = None, **changes: object) -> FittedDetector:
    """A detector from two modules with the ports above."""
    trunk, head = (trunk or MeanColours()).eval(), (head or Farthest()).eval()
    features, knowledge, outputs = PORTS
    spec = detector_spec(
        trunk,
        method="mean-colours",
        preprocessing=Preprocessing(SIZE, SIZE),
        features=features,
        knowledge=knowledge,
        outputs=outputs,
    )
    rng = np.random.default_rng(0)
    golden = rng.integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    normal = rng.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
    with torch.inference_mode():
        made = trunk(torch.from_numpy(normal))
    rows = (made[0] if isinstance(made, tuple) else made).reshape(-1, 3).numpy()
    pack = new_pack(
        product="colour",
        fingerprint=spec.fingerprint,
        calibration=Calibration(threshold=0.5, typical=0.1),
        arrays={"bank.normal": rows},
    )
    programs = export_programs(trunk, head, spec)
    parts = {"spec": spec, "trunk": programs[0], "head": programs[1], "pack": pack, "golden": golden, "card": {}}
    return FittedDetector(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., FittedDetector]:
    """`fitted`: modules of the test's own (or the ones above) -> a detector with a score and no map."""
    return fitted


@pytest.fixture(scope="session")
def colours() -> FittedDetector:
    """A detector with a score and no map."""
    return fitted()


@pytest.fixture(scope="session")
def bank(small_detector: Path) -> FittedDetector:
    """The memory bank that all tests share, read from its file."""
    from edgead.detector_file import read_detector

    return read_detector(small_detector)


@pytest.fixture(scope="session")
def tensorrt_bundle(small_detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with `onnx`, a TensorRT recipe in fp16, and no plan."""
    from edgead.exporter.export import export_bundle

    path = tmp_path_factory.mktemp("tensorrt") / "source.bundle"
    export_bundle(small_detector, path, ["onnx", "tensorrt:fp16"])
    return path
