"""Runs on a few painted photographs, with makers of the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png
from edgead.server_side.kka.config import read_config
from edgead.server_side.kka.jobs import OrderedMap
from edgead.server_side.kka.scale_out import ray_map
from edgead.server_side.kka.work import WorkFolder

# Ray's workers give way to everything else (nice 15): beside other tests on all processors they get next to nothing,
# and a test of 20 seconds took eight minutes.
os.environ.setdefault("RAY_worker_niceness", "0")


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mapped() -> Iterator[OrderedMap[Any, Any]]:
    """An ordered map over a real Ray cluster of this machine, ended with the module."""
    with contextlib.ExitStack() as stack:
        try:
            over_workers = stack.enter_context(ray_map("local"))
        except InputError as error:  # a sandbox may forbid what Ray needs: sockets, shared memory
            pytest.skip(f"Ray cannot start on this machine: {error.got}")
        yield over_workers


@pytest.fixture(scope="session")
def makers_of_tests() -> ModuleType:
    """The module of that name beside this file."""
    return _module("edgead_tests_kka_makers", Path(__file__).with_name("makers_of_tests.py"))


@pytest.fixture(scope="session")
def models_of_tests() -> ModuleType:
    """The module of that name beside this file: causal models."""
    return _module("edgead_tests_kka_models", Path(__file__).with_name("models_of_tests.py"))


@pytest.fixture(scope="session")
def chat() -> ModuleType:
    """The chat server of the tests of prompts."""
    return _module("edgead_tests_kka_chat_server", Path(__file__).parents[1] / "prompts" / "chat_server.py")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 plain parts of 64 x 64 pixels in three shades."""
    folder = tmp_path_factory.mktemp("kka") / "good"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        picture = rng.normal(120 + 40 * (number % 3), 4, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        (folder / f"{number:02d}.png").write_bytes(encode_png(picture))
    return folder


def _beginner(photographs: Path, folder: Path) -> Callable[..., WorkFolder]:
    def begin(text: str = "", name: str = "run", *, rounds: int = 2, captions: int = 24) -> WorkFolder:
        path = folder / f"{name}.toml"
        path.write_text(
            f'normals = "{photographs}"\nclass_name = "plate"\nrounds = {rounds}\ncaptions = {captions}\n{text}\n'
            + ('[imagine]\nauthor = "local"\nmodel = "m"\nbatch = 5\n' if "[imagine]" not in text else "")
        )
        return WorkFolder.create(folder / name, read_config(path), path.read_bytes())

    return begin


@pytest.fixture
def new_work(photographs: Path, tmp_path: Path) -> Callable[..., WorkFolder]:
    """Begins a run of the test's own, `rounds = 2` with a local author unless the words say otherwise."""
    return _beginner(photographs, tmp_path)


@pytest.fixture(scope="module")
def begun(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WorkFolder]:
    """The same for runs that tests share and only read."""
    return _beginner(photographs, tmp_path_factory.mktemp("shared"))
