"""A tiny CLIP with random weights for detectors that rest on sentences, and engines to hold them against."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgead.runtime.spec import DetectorSpec
from edgead.server_side.learned import Learned, Modules
from edgead.server_side.vision_language import VisionLanguageModel, load_model
from edgead.server_side.vision_language.options import VisionLanguageOptions

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_options(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageOptions:
    """A CLIP of 6 x 6 patches, 4 layers and 32 joint dimensions with random weights."""
    path = tmp_path_factory.mktemp("clip") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return VisionLanguageOptions(model=str(path), weights="random:3", class_name="flange")


@pytest.fixture(scope="session")
def tiny_clip(tiny_options: VisionLanguageOptions) -> VisionLanguageModel:
    """The model of `tiny_options`."""
    return load_model(tiny_options.model, tiny_options.weights)


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Learned, str], Path]:
    """Writes a detector and exports it to every target; the parity gate compares the engines with torch."""
    pytest.importorskip("openvino")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX builds plans without a GPU")
    from edgead.exporter.export import export_bundle

    def export(learned: Learned, name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        learned.write(folder / "learned.detector")
        export_bundle(
            folder / "learned.detector",
            folder / "learned.bundle",
            ["onnx", "openvino", "tensorrt"],
            compute_capabilities=["8.6"],
            capacity=1024,
        )
        return folder / "learned.bundle"

    return export


@pytest.fixture(scope="session")
def as_modules() -> Callable[[Learned], Modules]:
    """A learned detector's modules, to run it in torch."""

    def made(learned: Learned) -> Modules:
        spec: DetectorSpec = learned.spec
        return Modules(
            learned.trunk,
            learned.head,
            method=spec.method,
            preprocessing=spec.preprocessing,
            features=spec.features,
            knowledge=spec.knowledge,
            outputs=spec.outputs,
        )

    return made


@pytest.fixture
def frame() -> np.ndarray:
    """Noise of the tiny CLIP's size."""
    return np.random.default_rng(5).integers(0, 256, (48, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def other_device() -> ModuleType:
    """The module other_device.py of the folder above: a device that is not the CPU, without a GPU."""
    path = Path(__file__).parents[1] / "other_device.py"
    spec = importlib.util.spec_from_file_location("edgead_tests_other_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
