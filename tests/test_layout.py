"""The rooms, the arrows between them, and the packaging that they rest on."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the runtime's tests also run on 3.10, which has no TOML reader
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("exporter", "runtime", "server_side")
ALLOWED = {
    "runtime": {"edgead.runtime"},
    "exporter": {"edgead.exporter", "edgead.runtime", "edgead.detector_file"},
    "server_side": {"edgead.server_side", "edgead.runtime", "edgead.detector_file"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            names.update(f"edgead.{alias.name}" for alias in node.names) if module == "edgead" else names.add(module)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_linked_for_type_checkers(room: str) -> None:
    assert (ROOT / "src" / "edgead" / room).resolve() == ROOT / room


def test_the_package_list_names_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"edgead"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add("edgead." + ".".join(init.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == found


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_of_import_point_to_the_runtime_only(room: str) -> None:
    for path in modules(room):
        for name in imported(path):
            if name == "edgead" or not name.startswith("edgead."):
                continue
            ok = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[room])
            assert ok or name == "edgead.__version__", f"{path.relative_to(ROOT)} imports {name}"


def test_the_runtime_names_no_heavy_package() -> None:
    heavy = {"torch", "torchvision", "onnx", "onnxscript", "sklearn", "timm", "PIL", "scipy", "matplotlib"}
    for path in modules("runtime"):
        found = {name.split(".")[0] for name in imported(path)} & heavy
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_passes_400_lines(room: str) -> None:
    long = {str(path.relative_to(ROOT)): n for path in modules(room) if (n := len(path.open().readlines())) > 400}
    assert not long


def test_examples_stay_under_80_lines() -> None:
    for path in (ROOT / "edge_examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


def test_the_project_speaks_of_itself_alone() -> None:
    # Absolute paths of a build machine have no business in a published tree.
    private = re.compile(r"/(?:work|root|home)/[a-z]")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith((".venv", ".git", ".mypy", ".ruff", ".pytest", ".hypothesis")) or "build" in parts:
            continue
        if path.is_file() and not path.is_symlink() and path.suffix in {".py", ".md", ".toml", ".json", ".yml", ""}:
            text = path.read_text(errors="ignore")
            assert not private.search(text), path.relative_to(ROOT)
