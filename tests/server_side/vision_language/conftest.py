"""Small two-tower models with random weights, and a way to run a tower in real engines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgead.server_side.vision_language import TowerOutput, VisionLanguageModel, VisionTower, load_model

TINY: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}

Config = Callable[..., Path]
Flat = Callable[[TowerOutput], dict[str, Tensor]]
Engines = Callable[[VisionTower, Sequence[int], Sequence[int], bool], None]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Writes a tiny open_clip config with other settings of its towers; gives its path."""
    folder = tmp_path_factory.mktemp("configs")

    def write(name: str = "tiny", vision: dict[str, Any] | None = None, **top: Any) -> Path:
        config = copy.deepcopy(TINY) | top
        config["vision_cfg"] |= vision or {}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Config) -> VisionLanguageModel:
    """A CLIP of 4 x 4 patches, 3 layers and 48 joint dimensions."""
    return load_model(str(tiny_config()), "random:1")


@pytest.fixture(scope="session")
def flat() -> Flat:
    """A tower's output as named tensors."""
    return named


@pytest.fixture(scope="session")
def agree_in_engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Exports a tower with a free batch and compares ONNX Runtime and OpenVINO with torch, batches of 1 and 3."""
    pytest.importorskip("openvino")

    def check(tower: VisionTower, windows: Sequence[int], taps: Sequence[int], values: bool) -> None:
        run_engines(tmp_path_factory.mktemp("export"), tower, windows, taps, values)

    return check


def named(output: TowerOutput) -> dict[str, Tensor]:
    found = {"pooled": output.pooled, "patches": output.patches}
    found |= {f"window.{index}": tensor for index, tensor in enumerate(output.windows)}
    found |= {f"layer.{index}": tensor for index, tensor in enumerate(output.layers)}
    return found if output.values is None else found | {"values": output.values}


class Flattened(nn.Module):
    def __init__(self, tower: VisionTower, windows: Sequence[int], taps: Sequence[int], values: bool) -> None:
        super().__init__()
        self.tower, self.windows, self.taps, self.values = tower, windows, taps, values

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        output = self.tower(image, windows=self.windows, taps=self.taps, values=self.values)
        return tuple(named(output).values())


def frames(tower: VisionTower, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, *tower.size, 3), dtype=np.uint8)


def run_engines(folder: Path, tower: VisionTower, windows: Sequence[int], taps: Sequence[int], values: bool) -> None:
    import onnxruntime as ort
    import openvino as ov

    from edgead.exporter.onnx_from_torch import onnx_from_torch, save_onnx
    from edgead.runtime.spec import Port

    module = Flattened(tower, windows, taps, values).eval()
    sample = torch.from_numpy(frames(tower, 2))
    with torch.inference_mode():
        example = named(tower(sample, windows=windows, taps=taps, values=values))
    outputs = tuple(Port(name, "float32", ("B", *tensor.shape[1:])) for name, tensor in example.items())
    batch = torch.export.Dim("B", min=1)
    program = torch.export.export(module, (sample,), dynamic_shapes=({0: batch},), strict=False)
    model = onnx_from_torch(program, (Port("image", "uint8", ("B", *tower.size, 3)),), outputs, part="trunk")
    names = [port.name for port in outputs]
    save_onnx(model, folder, "trunk.onnx")
    session = ort.InferenceSession(str(folder / "trunk.onnx"), providers=["CPUExecutionProvider"])
    compiled = ov.Core().compile_model(str(folder / "trunk.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        image = frames(tower, count)
        with torch.inference_mode():
            wanted = [tensor.numpy() for tensor in module(torch.from_numpy(image))]
        inferred = compiled([image])
        for index, (name, other) in enumerate(zip(names, session.run(names, {"image": image}), strict=True)):
            for engine, got in (("onnxruntime", other), ("openvino", inferred[index])):
                size = np.abs(wanted[index]).max()
                np.testing.assert_allclose(got, wanted[index], atol=1e-4 * size, err_msg=f"{engine}: {name}")
