"""`edgead device` as a person or a service runs it, in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tuf")

from edgead.runtime.device_folder import init_device, read_device
from edgead.runtime.errors import InputError, OutputExistsError
from edgead.runtime.image import encode_png
from edgead.runtime.slots import Store
from edgead.runtime.update_outcome import Device

Run = Callable[..., subprocess.CompletedProcess[str]]


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    worlds = loaded("edgead_tests_update_world", Path(__file__).with_name("update_world.py"))
    made = worlds.new_world(tmp_path_factory.mktemp("world"), tiny)
    (made.home / "root.json").write_bytes(made.root)
    return made


@pytest.fixture(scope="module")
def server(world: Any) -> Iterator[Any]:
    bad = loaded("edgead_tests_misbehaving", Path(__file__).parents[1] / "misbehaving_server.py")
    with bad.misbehaving(world.folder) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgead", "device", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, **options)

    return call


def init_words(folder: Path, world: Any, url: str) -> list[object]:
    root = world.home / "root.json"
    return ["init", folder, "--root", root, "--id", "cam-1", "--repository", url, "--product", "part"]


def test_the_life_of_a_device(run: Run, world: Any, server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    done = run(*init_words(folder, world, server.url), "--group", "pilot")
    assert done.returncode == 0, done.stderr
    assert run(*init_words(folder, world, server.url)).returncode == 2
    done = run("status", folder)
    assert done.returncode == 0, done.stderr
    assert "release     none" in done.stdout

    done = run("update", folder, "--once", "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["status"], first["release"], first["way"]) == ("activated", 1, "initial")
    assert run("rollback", folder).returncode == 1  # there is nothing to go back to
    done = run("confirm", folder)
    assert (done.returncode, done.stdout) == (0, "part-1 is confirmed\n")

    world.update()
    done = run("update", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("activated: release 2; knowledge: 1 delta; ")
    done = run("rollback", folder, "--reason", "a trial")
    assert done.returncode == 0, done.stderr
    done = run("status", folder, "--json")
    found = json.loads(done.stdout)
    assert (found["active"]["release"], found["confirmed"], len(found["quarantined"])) == (1, True, 1)
    assert "a trial" in found["alarm"]
    assert found["attempts"][-1] == {"release": 2, "outcome": "rolled back", "reason": "a trial"}
    assert found["groups"] == ["pilot"]
    done = run("update", folder, "--json")
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "current")

    world.update()
    done = run("update", folder, "--confirm")
    assert done.returncode == 0, done.stderr
    assert Store(folder).state().confirmed
    done = run("status", folder)
    assert "release     part-3 (confirmed)" in done.stdout
    assert "failed here release 2 rolled back: a trial" in done.stdout
    assert "last poll" in done.stdout


def test_an_update_that_fails_exits_with_1_and_says_why(run: Run, world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    assert run(*init_words(folder, world, "http://user:secret@127.0.0.1:1/updates")).returncode == 0
    done = run("update", folder, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "FetchError"
    assert "wanted" in done.stderr
    shown = run("status", folder, "--json")
    assert json.loads(shown.stdout)["last"]["failures"] == 1
    assert "secret" not in done.stdout + done.stderr + shown.stdout


def test_the_loop_polls_until_it_is_ended(world: Any, server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    init_device(folder, Device("cam-2", server.url, "part", world.root))
    command = [sys.executable, "-m", "edgead", "device", "update", str(folder), "--every", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10.0) == 130
    assert [line["status"] for line in lines] == ["activated", "current"]


def test_what_was_marked_goes_where_the_statuses_go(run: Run, world: Any, server: Any, tmp_path: Path) -> None:
    folder, share = tmp_path / "camera", tmp_path / "share"
    share.mkdir()
    assert run(*init_words(folder, world, server.url), "--statuses", share).returncode == 0
    assert run("update", folder).returncode == 0
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    (tmp_path / "frame.png").write_bytes(encode_png(frame))
    done = run("mark", folder, tmp_path / "frame.png", "--normal", "--json")
    assert done.returncode == 0, done.stderr
    digest = json.loads(done.stdout)["id"]
    arrived = share / "candidates" / f"{digest}.candidate"
    command = [sys.executable, "-m", "edgead", "device", "update", str(folder), "--every", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60.0
        # It arrives a moment before the device forgets it.
        while json.loads(run("marks", folder, "--json").stdout)["marks"] and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(10.0) == 130
    assert arrived.exists()
    assert json.loads(run("marks", folder, "--json").stdout)["marks"] == []


@pytest.mark.parametrize(
    "words",
    [
        ["--repository", "ftp://x"],
        ["--repository", "no-such-folder"],
        ["--product", "../up"],
        ["--id", "a/b"],
        ["--group", "a b"],
    ],
    ids=str,
)
def test_a_name_or_address_that_is_none_exits_with_2(run: Run, world: Any, tmp_path: Path, words: list[str]) -> None:
    done = run(*init_words(tmp_path / "camera", world, "http://localhost"), *words)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "camera").exists()


def test_what_is_no_root_or_no_device_exits_with_2(run: Run, world: Any, tmp_path: Path) -> None:
    (tmp_path / "fake.json").write_text("{}")
    words = init_words(tmp_path / "camera", world, "http://localhost")
    assert run(*words, "--root", tmp_path / "fake.json").returncode == 2
    for command in ("update", "status", "confirm", "rollback"):
        assert run(command, tmp_path / "camera").returncode == 2
    assert not (tmp_path / "camera").exists()


def test_row_27_one_copy_of_who_it_is_and_of_its_root_is_enough(world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    device = Device("cam-3", "http://localhost", "part", world.root, ("b", "a"))
    init_device(folder, device)
    wanted = Device("cam-3", "http://localhost", "part", world.root, ("a", "b"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        *("device.copy.json", "device.copy.key", "device.json", "device.key"),
        *("root.copy.json", "root.json"),
    ]
    for name in names:
        good = (folder / name).read_bytes()
        for damaged in (b"", b"\0" * len(good), good[:-10]):
            (folder / name).write_bytes(damaged)
            assert read_device(folder) == wanted
        (folder / name).unlink()
        assert read_device(folder) == wanted
        (folder / name).write_bytes(good)
    for name in ("root.json", "root.copy.json"):
        (folder / name).write_bytes(b"\0" * 10)
    with pytest.raises(InputError, match="device init"):
        read_device(folder)
    with pytest.raises(OutputExistsError):
        init_device(folder, device)
    init_device(folder, device, force=True)
    assert read_device(folder) == wanted


def test_a_device_without_the_extra_is_told_what_to_install(world: Any, server: Any, tmp_path: Path) -> None:
    init_device(tmp_path / "camera", Device("cam-4", server.url, "part", world.root))
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tuf', 'securesystemslib', 'cryptography', 'torch'):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Refuse())
from edgead.cli import main
main(sys.argv[1:])
"""
    words = ["device", "update", str(tmp_path / "camera")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'edgead[ota]'" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code, "device", "status", words[2]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_imports_neither_tuf_nor_an_engine_before_it_polls() -> None:
    code = "import sys, edgead.runtime.device_cli; print({'tuf', 'onnxruntime', 'cryptography'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
