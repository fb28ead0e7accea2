"""The tiny detector for tests of the light room, and a world in which devices update themselves."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py beside this file; tests are no package, so it is loaded by its path."""
    pytest.importorskip("onnx")
    return loaded("edgead_tests_tiny", Path(__file__).with_name("tiny.py"))


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


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    """The module update_world.py beside this file."""
    pytest.importorskip("tuf")
    return loaded("edgead_tests_update_world", Path(__file__).with_name("update_world.py"))


@pytest.fixture(scope="session")
def bad() -> ModuleType:
    """The module of the server that misbehaves."""
    return loaded("edgead_tests_misbehaving", Path(__file__).parents[1] / "misbehaving_server.py")


@pytest.fixture(scope="session")
def template(worlds: ModuleType, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return worlds.new_world(tmp_path_factory.mktemp("world"), tiny)


@pytest.fixture
def world(template: Any, tmp_path: Path) -> Any:
    """A publisher whose release 1 is out."""
    return template.copy(tmp_path / "world")


@pytest.fixture
def server(bad: ModuleType, world: Any) -> Iterator[Any]:
    with bad.misbehaving(world.folder) as running:
        yield running


@pytest.fixture
def camera(worlds: ModuleType, world: Any, server: Any, tmp_path: Path) -> Any:
    """A device with release 1, confirmed."""
    return worlds.camera(tmp_path / "camera", server.url, world.root).installed()


@pytest.fixture(scope="session")
def tuf() -> ModuleType:
    """The module tuf_simulator.py beside this file."""
    pytest.importorskip("tuf")
    return loaded("edgead_tests_tuf_simulator", Path(__file__).with_name("tuf_simulator.py"))


@pytest.fixture
def files_server(bad: ModuleType) -> Iterator[Any]:
    """A web server of files in memory."""
    with bad.misbehaving() as running:
        yield running


@pytest.fixture
def simulator(tuf: ModuleType, files_server: Any) -> Any:
    """A TUF repository of any publisher on that server."""
    return tuf.Simulator(files_server.files)


@pytest.fixture
def client(tuf: ModuleType, files_server: Any, tmp_path: Path) -> Any:
    """The adapter that polls that server."""
    return tuf.Client(files_server, tmp_path)
