"""The work folder: begun once, whatever kills it, and never with another run's words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from edgead.runtime.errors import InputError, OutputExistsError, StorageError
from edgead.server_side.kka.config import read_config
from edgead.server_side.kka.describe import describe
from edgead.server_side.kka.records import Caption, Cost, Image, Made, Normal
from edgead.server_side.kka.rounds import Makers, run
from edgead.server_side.kka.work import WorkFolder


def begin(photographs: Path, folder: Path, words: str) -> WorkFolder:
    path = folder / "run.toml"
    path.write_text(f'normals = "{photographs}"\n{words}\n')
    return WorkFolder.create(folder / "work", read_config(path), path.read_bytes())


@pytest.mark.parametrize("left", [("kka.toml",), ("kka.toml", ".run.json.x1_.part"), (".kka.toml.ab.part",), ("lock",)])
def test_what_a_kill_leaves_at_the_very_beginning_is_begun_anew(
    left: tuple[str, ...], photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    for name in left:
        (tmp_path / "work" / name).write_text("half")
    assert begin(photographs, tmp_path, "seed = 3").config.seed == 3
    assert WorkFolder(tmp_path / "work").config.seed == 3


def test_a_configuration_may_be_corrected_until_something_is_made(photographs: Path, tmp_path: Path) -> None:
    begin(tmp_path / "missing", tmp_path, "")
    work = begin(photographs, tmp_path, 'class_name = "plate"')
    assert work.normals == photographs
    run(work, _no_makers(), stage="describe")
    assert begin(photographs, tmp_path, 'class_name = "plate"').records(Normal)
    with pytest.raises(OutputExistsError, match=r"class_name was 'plate', is 'tile'; judge\.folds was 2, is 3"):
        begin(photographs, tmp_path, 'class_name = "tile"\n[judge]\nfolds = 3')


def test_comments_and_spaces_of_a_configuration_may_change(photographs: Path, tmp_path: Path) -> None:
    work = begin(photographs, tmp_path, "seed = 3")
    run(work, _no_makers(), stage="describe")
    again = begin(photographs, tmp_path, "# what a night!\nseed   =   3")
    assert len(again.records(Normal)) == 12


def test_a_finished_run_that_is_given_more_rounds_ends_as_one_that_had_them_from_the_start(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    long = new_work(name="long", rounds=2, captions=6)
    run(long, makers_of_tests.makers())
    work = new_work(name="short", rounds=1, captions=6)
    run(work, makers_of_tests.makers())
    with pytest.raises(OutputExistsError, match="`rounds` may be raised"):
        new_work(name="short", rounds=2, captions=7)
    work = new_work(name="short", rounds=2, captions=6)
    painter = makers_of_tests.SpotPainter()
    run(work, makers_of_tests.makers(painter))
    assert len(painter.painted) == 6
    for path in sorted(long.path.rglob("*")):
        if path.is_file() and path.name not in ("costs.jsonl", "kka.toml", "run.json"):
            assert (work.path / path.relative_to(long.path)).read_bytes() == path.read_bytes()
    with pytest.raises(OutputExistsError, match="rounds was 2, is 1"):
        new_work(name="short", rounds=1, captions=6)


@pytest.mark.parametrize("killed_before", ["kka.toml", "run.json"])
def test_a_kill_while_rounds_are_added_leaves_the_old_run_or_the_new_one(
    killed_before: str, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(name="short", rounds=1, captions=6)
    run(work, makers_of_tests.makers(), stage="describe")
    old = (work.path / "kka.toml").read_bytes()
    changed = old.replace(b"rounds = 1", b"rounds = 2")
    content = json.loads((work.path / "run.json").read_bytes())
    content |= {"before": content["config"], "config": hashlib.sha256(changed).hexdigest()}
    (work.path / "run.json").write_text(json.dumps(content))
    if killed_before == "run.json":
        (work.path / "kka.toml").write_bytes(changed)
    assert WorkFolder(work.path).config.rounds == (1 if killed_before == "kka.toml" else 2)
    assert new_work(name="short", rounds=2, captions=6).config.rounds == 2
    assert WorkFolder(work.path).config.rounds == 2


def test_a_run_that_another_took_the_place_of_is_not_worked_on(photographs: Path, tmp_path: Path) -> None:
    first = begin(photographs, tmp_path, "seed = 3")
    second = begin(photographs, tmp_path, "seed = 4")
    with pytest.raises(InputError, match="taken its place"), first.locked():
        pass
    with second.locked(), pytest.raises(StorageError, match="another process"):
        begin(photographs, tmp_path, "seed = 5")


def test_half_a_file_of_a_kill_is_removed_at_the_next_start(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(rounds=0, captions=4)
    run(work, makers_of_tests.makers(), stage="paint")
    left = [
        work.round_folder(0) / ".evaluator-0.json.q8_.part",
        work.round_folder(0) / "images" / ".i0-00002.png.a.part",
    ]
    for path in left:
        path.write_bytes(b"half")
    with work.locked():
        assert not any(path.exists() for path in left)
    assert len(work.records(Image, 0)) == 4
    assert len(list((work.round_folder(0) / "images").iterdir())) == 4


def test_a_record_that_could_not_be_read_again_is_not_written(new_work: Callable[..., WorkFolder]) -> None:
    work = new_work()
    with pytest.raises(InputError, match="Shorten the texts"):
        work.append(Caption("c0-00000", 0, "r00000", "long " * 1000, Made("endpoint")))
    assert work.records(Caption, 0) == []


def test_what_is_no_stage_is_timed_however_it_ends(new_work: Callable[..., WorkFolder]) -> None:
    work = new_work()
    with pytest.raises(KeyboardInterrupt), work.timed("evaluator", 1, 2):
        raise KeyboardInterrupt
    (cost,) = work.records(Cost)
    assert (cost.stage, cost.round, cost.items) == ("evaluator", 1, 2)


@pytest.mark.parametrize("made", [False, True])
def test_no_work_folder_is_said_in_words(made: bool, tmp_path: Path) -> None:
    if made:
        (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match=r"a folder without run\.json" if made else "nothing there"):
        WorkFolder(tmp_path / "x")


def _no_makers() -> Makers:

    def none(*given: object) -> NoReturn:
        raise AssertionError("nothing but describing is asked for")

    return Makers(describe, none, none, none, none, none)
