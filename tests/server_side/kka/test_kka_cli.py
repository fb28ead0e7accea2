"""`edgead kka` as a person meets it: what it says, what it refuses at once, and with which code it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import tomllib

from edgead.cli import main
from edgead.runtime.errors import InputError, MissingDependencyError
from edgead.server_side.kka import preflight
from edgead.server_side.kka.config import Config, Imagine, Paint, parse_config
from edgead.server_side.kka.template import template

Edgead = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Edgead:
    """Runs a command in the test's folder: (exit code, what it printed, what it said)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["kka", *words])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def toml(edgead: Edgead, photographs: Path, tmp_path: Path) -> Path:
    """A configuration of a small run with the procedural painter."""
    path = tmp_path / "plate.toml"
    assert edgead("new", "--normals", str(photographs), "-o", str(path))[0] == 0
    small = {"captions = 200": "captions = 8", "steps = 600": "steps = 4", "clusters = 8": "clusters = 2"}
    text = path.read_text().replace("size = 128 ", "size = 32 ")
    for old, changed in small.items():
        assert text.count(old) == 1
        text = text.replace(old, changed)
    path.write_text(text)
    return path


def test_the_written_configuration_has_every_field_with_its_default() -> None:
    text = template('photos/"good"')
    assert parse_config(text.encode()) == Config(normals='photos/"good"')
    written = tomllib.loads(text)
    for name, value in msgspec.to_builtins(Config(normals="")).items():
        assert name in written
        if isinstance(value, dict):
            assert written[name].keys() == value.keys()


def test_photographs_are_named_from_where_the_configuration_is(
    edgead: Edgead, photographs: Path, tmp_path: Path
) -> None:
    shutil.copytree(photographs, tmp_path / "good")
    code, printed, _ = edgead("new", "--normals", "good", "-o", "runs/a.toml")
    assert code == 0
    assert "12 photographs" in printed
    assert 'normals = "../good"' in (tmp_path / "runs" / "a.toml").read_text()
    assert edgead("describe", "runs/a.toml")[0] == 0
    code, _, said = edgead("new", "--normals", "nothing", "-o", "b.toml")
    assert (code, (tmp_path / "b.toml").exists()) == (2, False)
    assert "a folder of images at nothing" in said


def test_a_whole_run_says_what_it_made_and_what_comes_next(edgead: Edgead, toml: Path, tmp_path: Path) -> None:
    code, printed, _ = edgead("paint", str(toml))
    assert code == 0
    assert "12 normals, 2 representatives, 8 captions, 8 images" in printed
    assert f"next: edgead kka judge {toml}" in printed
    assert f"next: edgead kka run {toml}" in edgead("judge", str(toml))[1]
    code, printed, said = edgead("run", str(toml))
    assert code == 0
    assert "KKA(0): 8 images" in said
    assert "export-set" in printed
    code, printed, _ = edgead("run", str(toml), "--json")
    found = json.loads(printed)
    assert (found["images"], found["rounds"][0]["images"]) == (8, 8)
    code, printed, _ = edgead("export-set", "plate.kka", "-o", "set", "--json")
    made = json.loads(printed)
    assert made == {
        "set": "set",
        "images": len(list(Path("set").glob("*-*[0-9].png"))),
        "masks": made["images"],
        "round": 0,
    }
    code, printed, _ = edgead("trace", "plate.kka", "i0-00003")
    assert code == 0
    assert any(f"({number:02d}.png)" in printed for number in range(12))
    assert edgead("report", "plate.kka", "-o", "page.html")[0] == 0
    assert Path("page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "nothing.toml"), "edgead kka new --normals DIR"),
        (("run", "folder"), "a folder"),
        (("trace", "nothing", "i0-00000"), "nothing there"),
        (("report", "folder"), "a folder without run.json"),
        (("export-set", "nothing", "-o", "x"), "edgead kka run CONFIG"),
        (("run", "bad.toml"), "captoins"),
        (("run", "bad.toml", "--round", "-1"), "--round"),
    ],
)
def test_a_mistake_is_said_with_code_2_and_nothing_is_made(
    words: tuple[str, ...], said: str, edgead: Edgead, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.toml").write_text('normals = "x"\ncaptoins = 3\n')
    code, _, printed = edgead(*words)
    assert code == 2
    assert said in printed
    assert "Traceback" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "folder"]


def test_a_work_folder_in_place_of_a_configuration_names_it(edgead: Edgead, toml: Path) -> None:
    assert edgead("describe", str(toml))[0] == 0
    code, _, said = edgead("run", "plate.kka")
    assert code == 2
    assert "plate.toml" in said


def test_a_model_that_is_not_here_is_told_before_anything_is_made(edgead: Edgead, toml: Path, tmp_path: Path) -> None:
    toml.write_text(
        toml.read_text()
        .replace('author = "grammar"', 'author = "local"')
        .replace('model = "" ', 'model = "no/such/x" ', 1)
    )
    code, _, said = edgead("run", str(toml))
    assert code == 2
    assert "imagine.model = DIR" in said
    assert not (tmp_path / "plate.kka").exists()
    # What needs no model can be done without it.
    assert edgead("representatives", str(toml))[0] == 0


def test_what_is_done_is_not_asked_for_again(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEAD_TEST_KEY", raising=False)
    endpoint = Imagine("endpoint", "m", "http://127.0.0.1:9", "EDGEAD_TEST_KEY")
    config = Config(str(photographs), imagine=endpoint, paint=Paint("inpainting", "no/such/pipeline"))
    with pytest.raises(InputError, match="EDGEAD_TEST_KEY"):
        preflight.check(config, None, lambda stage, number: False)
    with pytest.raises(InputError, match=r"paint\.model = DIR"):
        preflight.check(config, None, lambda stage, number: stage == "imagine")
    preflight.check(config, None, lambda stage, number: True)
    preflight.check(config, "representatives", lambda stage, number: False)
    with pytest.raises(InputError, match="file of captions"):
        preflight.check(
            msgspec.structs.replace(config, describe=msgspec.structs.replace(config.describe, captions="no.tsv")),
            "describe",
            lambda stage, number: False,
        )


def test_a_package_that_only_the_last_stage_needs_is_told_at_the_start(photographs: Path) -> None:
    config = Config(str(photographs), rounds=1, imagine=Imagine("local", str(photographs)))
    preflight.check(config, None, lambda stage, number: False)
    with pytest.raises(MissingDependencyError, match="edgead_no_such_package"):
        preflight.check(config, None, lambda stage, number: False, tuning=("edgead_no_such_package",))
