"""Real detectors and bundles for all tests: painted parts, an untrained backbone, real engines."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background of a shell starts with SIGINT ignored, and so would whatever the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "test_painted_language.py",
    "test_scale_out_stages.py",
    "test_protocols.py",
    "test_anomalous_few_shot.py",
    "test_prefer_seen.py",
    "test_loop.py",
    "test_winclip.py",
    "test_alfa.py",
    "test_efficientad.py",
    "test_recontrast.py",
)
"""Files of a minute or more: where several processes share the tests, one that begins last would end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; everything else in its order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def one_table_of_operators() -> Iterator[None]:
    """Let torch read its table of ONNX operators once in a process: it parses 500 functions for every graph, which is
    two thirds of the time that a small one takes, and tests export hundreds. It only reads the table afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # else no collected module needs it
            # Not part of torch's interface: where another version has it elsewhere, tests take longer.
            with contextlib.suppress(ImportError, AttributeError):
                from torch.onnx._internal.exporter._registration import ONNXRegistry

                patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def normality_pair() -> ModuleType:
    """The module normality_pair.py beside this file: a base detector and a normality detector."""
    spec = importlib.util.spec_from_file_location("edgead_tests_pair", Path(__file__).with_name("normality_pair.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def painted_normals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 painted flanges, 96 x 96 pixels."""
    from edgead.runtime.image import encode_png
    from edgead.server_side.painting_parts import paint_part

    folder = tmp_path_factory.mktemp("painted") / "good"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        (folder / f"{index:03d}.png").write_bytes(encode_png(paint_part("flange", rng=rng, size=96).image))
    return folder


@pytest.fixture(scope="session")
def small_detector(painted_normals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted-detector file of a 64 x 64 memory bank over the untrained backbone."""
    from edgead.runtime.spec import Preprocessing
    from edgead.server_side.fitting import FitOptions, fit_memory_bank

    path = tmp_path_factory.mktemp("detector") / "small.detector"
    options = FitOptions(backbone="random", preprocessing=Preprocessing(64, 64), rows=100)
    fit_memory_bank(painted_normals, path, options)
    return path


@pytest.fixture(scope="session")
def small_bundle(small_detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that detector with the engines onnx and openvino, each fp32 and fp16."""
    from edgead.exporter.export import export_bundle

    path = tmp_path_factory.mktemp("bundle") / "small.bundle"
    export_bundle(small_detector, path, ["onnx", "onnx:fp16", "openvino", "openvino:fp16"])
    return path
