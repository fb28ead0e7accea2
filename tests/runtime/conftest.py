"""The tiny detector for tests of the light room."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py beside this file; tests are no package, so it is loaded by its path."""
    pytest.importorskip("onnx")
    spec = importlib.util.spec_from_file_location("edgead_tests_tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny detector for ONNX Runtime, with the product 'part'."""
    path: Path = tiny.bundle(tmp_path_factory.mktemp("tiny") / "tiny.bundle").path
    return path


@pytest.fixture(scope="session")
def slow_bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a trunk that takes some tenths of a second."""
    path: Path = tiny.bundle(tmp_path_factory.mktemp("slow") / "slow.bundle", slow=3).path
    return path
