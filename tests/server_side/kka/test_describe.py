"""Captions of normals: whose they are, and that a run keeps to the photographs it was begun with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgead.runtime.errors import InputError
from edgead.server_side.kka.config import read_config
from edgead.server_side.kka.describe import describe, read_captions
from edgead.server_side.kka.records import Normal
from edgead.server_side.kka.work import WorkFolder


@pytest.fixture
def begin(photographs: Path, tmp_path: Path) -> Callable[..., WorkFolder]:
    """Begins a run on two of the photographs in each of two sub-folders."""
    for folder in ("left", "right"):
        (tmp_path / "good" / folder).mkdir(parents=True)
        for name in ("00.png", "01.png"):
            shutil.copy(photographs / name, tmp_path / "good" / folder / name)

    def begun(captions: str = "") -> WorkFolder:
        text = 'normals = "good"\nclass_name = "plate"\n'
        if captions:
            (tmp_path / "captions.tsv").write_text(captions)
            text += '[describe]\ncaptions = "captions.tsv"\n'
        (tmp_path / "run.toml").write_text(text)
        config = read_config(tmp_path / "run.toml")
        return WorkFolder.create(tmp_path / "work", config, (tmp_path / "run.toml").read_bytes())

    return begun


def test_photographs_of_one_name_in_two_folders_have_captions_of_their_own(begin: Callable[..., WorkFolder]) -> None:
    work = begin("left/00.png\ta plate on the left\n00.png\ta plate\n01.png\tanother plate\n")
    found = {record.file: record.caption for record in describe(work)}
    assert found == {
        "left/00.png": "a plate on the left",
        "left/01.png": "another plate",
        "right/00.png": "a plate",
        "right/01.png": "another plate",
    }


def test_a_photograph_without_its_line_is_named_with_its_folder(begin: Callable[..., WorkFolder]) -> None:
    with pytest.raises(InputError, match=r"none for 1: right/01\.png"):
        describe(begin("00.png\ta plate\nleft/01.png\tanother\n"))


@pytest.mark.parametrize("harm", ["added", "removed"])
def test_other_photographs_than_a_run_was_begun_with_are_refused(
    harm: str, begin: Callable[..., WorkFolder], tmp_path: Path
) -> None:
    work = begin()
    describe(work)
    records = work.path / "normals.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:2]))
    (work.round_folder(0) / "describe.done").unlink()
    if harm == "added":
        shutil.copy(tmp_path / "good" / "left" / "00.png", tmp_path / "good" / "a.png")
    else:
        (tmp_path / "good" / "left" / "00.png").unlink()
    with pytest.raises(InputError, match="that the run was begun with") as refused:
        describe(work)
    assert ("a.png" if harm == "added" else "left/00.png") in refused.value.got
    assert len(work.records(Normal)) == 2


@pytest.mark.parametrize("harm", ["replaced", "removed"])
def test_a_photograph_that_changed_after_its_description_is_refused(
    harm: str, begin: Callable[..., WorkFolder], tmp_path: Path
) -> None:
    work = begin()
    before = describe(work)
    assert describe(work) == before
    path = tmp_path / "good" / "left" / "00.png"
    kept = path.read_bytes()
    if harm == "replaced":
        shutil.copy(tmp_path / "good" / "left" / "01.png", path)
    else:
        path.unlink()
    with pytest.raises(InputError, match="that the run was begun with") as refused:
        describe(work)
    said = {"replaced": "left/00.png is another picture", "removed": "left/00.png is gone"}[harm]
    assert said in refused.value.got
    path.write_bytes(kept)
    assert describe(work) == before, "it goes on when they are back"


@pytest.mark.parametrize("line", ["00.png a plate", "00.png\t ", "00.png\ta\n00.png\tb"])
def test_a_line_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "captions.tsv").write_text(line)
    with pytest.raises(InputError, match=r"line \d: '00\.png"):
        read_captions(tmp_path / "captions.tsv")
