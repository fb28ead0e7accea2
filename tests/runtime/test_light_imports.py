"""The camera's install is light: tested with the heavy packages refused, and in a bare environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgead.runtime.image import encode_png

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "torchvision",
    "openvino",
    "onnx",
    "onnxscript",
    "sklearn",
    "scipy",
    "timm",
    "tensorrt",
    "tensorrt_rtx",
    "nncf",
)
FRAMEWORKS = {
    "edgead.runtime.engines.openvino",
    "edgead.runtime.engines.tensorrt",
    "edgead.runtime.engines.tensorrt_build",
}
"""Modules that import one framework, and nobody central imports them."""

REFUSE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError('refused: ' + name, name=name)
sys.meta_path.insert(0, Refuse())
"""


def python(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE + code, *map(str, words)], capture_output=True, text=True, check=False
    )


def modules() -> list[str]:
    found = []
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        parts = path.relative_to(ROOT / "runtime").with_suffix("").parts
        name = ".".join(["edgead", "runtime", *(part for part in parts if part != "__init__")])
        if name not in FRAMEWORKS:
            found.append(name)
    return found


def test_the_refusal_refuses() -> None:
    assert "refused: torch" in python("import torch").stderr


def test_every_module_of_the_light_room_imports_without_the_heavy_packages() -> None:
    names = modules()
    assert len(names) > 20
    done = python(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["run", "show", "bench"])
def test_help_loads_neither_an_engine_nor_numpy(command: str) -> None:
    code = f"""
from edgead.runtime.cli import {command}
assert {command}.main(['--help'], standalone_mode=False, prog_name='edgead {command}') in (0, None)
loaded = [name for name in ('numpy', 'cv2', 'onnxruntime', 'msgspec') if name in sys.modules]
assert not loaded, loaded
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
    assert f"edgead {command}" in done.stdout


def test_a_run_loads_no_engine_but_its_own_and_little_beside_its_libraries(
    tiny: ModuleType, tmp_path: Path, tiny_bundle: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(tiny.frame()))
    libraries = "import click, cv2, msgspec, numpy, onnxruntime\nbefore = set(sys.modules)\n"
    code = """
from edgead.runtime.cli import run
assert run.main(sys.argv[1:], standalone_mode=False) in (0, None)
more = {name.split('.')[0] for name in set(sys.modules) - before}
heavy = set('asyncio concurrent multiprocessing http ssl sqlite3 unittest email xml safetensors'.split())
assert not more & heavy, more & heavy
"""
    done = python(libraries + code, tiny_bundle, tmp_path, "--target", "onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["verdict"] == "OK"


def python310() -> str | None:
    """A python3.10 that runs; version managers put commands on the path that do not."""
    found = shutil.which("python3.10")
    if found is None or subprocess.run([found, "-V"], capture_output=True, check=False).returncode:
        return None
    return found


@pytest.mark.slow
def test_a_camera_with_python_3_10_and_no_extras_inspects(tiny: ModuleType, tiny_bundle: Path, tmp_path: Path) -> None:
    interpreter = python310()
    if interpreter is None:
        pytest.skip("no python3.10 that runs on the path")
    venv, source, photos = tmp_path / "venv", tmp_path / "source", tmp_path / "photos"
    subprocess.run([interpreter, "-m", "venv", str(venv)], check=True)
    # A copy, so that building leaves nothing in the working tree.
    skip = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "demo-output"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = subprocess.run(
        [str(venv / "bin" / "pip"), "install", "--quiet", str(source)],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert pip.returncode == 0, pip.stderr
    listed = subprocess.run(
        [str(venv / "bin" / "pip"), "list", "--format", "json"], env=clean, capture_output=True, text=True, check=True
    )
    installed = {item["name"].lower() for item in json.loads(listed.stdout)}
    assert not installed & {"torch", "openvino", "onnx", "scikit-learn", "timm"}
    photos.mkdir()
    (photos / "good.png").write_bytes(encode_png(tiny.frame()))
    (photos / "bad.png").write_bytes(encode_png(tiny.frame(200)))
    command = [str(venv / "bin" / "edgead"), "run", str(tiny_bundle), str(photos), "--json"]
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == ["NG", "OK"]
    imported = subprocess.run(
        [
            str(venv / "bin" / "python"),
            "-c",
            f"import importlib\nfor n in {modules()!r}:\n    importlib.import_module(n)",
        ],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr
