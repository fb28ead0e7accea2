"""The tiny CLIP that has learned painted carpets, for every test that needs a model which knows what a defect is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def painted() -> ModuleType:
    """The module painted_clip.py beside this file; tests are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("edgead_tests_painted", Path(__file__).with_name("painted_clip.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def carpet_clip(painted: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trained model (`PaintedClip`), kept in pytest's cache: two to three minutes the first time."""
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("clip") if cache is None else Path(cache.mkdir("edgead-painted-clip"))
    return painted.painted_clip(folder)
