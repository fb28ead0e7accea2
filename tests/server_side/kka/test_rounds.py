"""A run from end to end with makers of the tests: what it makes, and that no end of it costs anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgead.runtime.errors import InputError, OutOfMemoryError, OutputExistsError, StorageError
from edgead.runtime.image import read_image
from edgead.server_side.kka.records import Caption, Image, Judgement, Member, Normal, Preference, Representative
from edgead.server_side.kka.rounds import facts, run
from edgead.server_side.kka.sets import export_members, samples
from edgead.server_side.kka.work import WorkFolder, trace


def contents(work: WorkFolder) -> dict[str, str]:
    """Digest of every file of a run but for what it cost."""
    return {
        path.relative_to(work.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(work.path.rglob("*"))
        if path.is_file() and path.name not in ("costs.jsonl", "lock", "kka.toml", "run.json")
    }


@pytest.fixture(scope="module")
def finished(begun: Callable[..., WorkFolder], makers_of_tests: ModuleType) -> WorkFolder:
    work = begun(name="whole")
    with work.locked():
        run(work, makers_of_tests.makers())
    return work


def test_a_run_leaves_records_of_everything_and_what_is_hard_is_preferred(finished: WorkFolder) -> None:
    assert len(finished.records(Normal)) == 12
    assert len(finished.records(Representative)) >= 3
    shares = []
    for number in range(3):
        captions, images = finished.records(Caption, number), finished.records(Image, number)
        assert len(captions) == len(images) == len(finished.records(Judgement, number)) == 24
        for image in images:
            assert (finished.path / image.file).is_file()
            assert set(read_image(finished.path / image.mask).ravel().tolist()) == {0, 255}
            assert image.visible > 20
        assert bool(finished.records(Preference, number)) == (number < 2)
        shares.append(facts(finished, number)["hard_share"])
        assert json.loads((finished.round_folder(number) / "metrics.json").read_bytes())["hard_share"] == shares[-1]
    assert shares[0] + 0.2 < min(shares[1:])


def test_preferences_choose_hard_captions_over_easy_ones(finished: WorkFolder) -> None:
    hard = {"tiny", "small"}
    pairs = finished.records(Preference, 0)
    assert pairs
    for pair in pairs:
        assert pair.chosen.split()[1] in hard
        assert pair.rejected.split()[1] not in hard
        assert "flawless plate" in pair.prompt


def test_an_image_is_traced_to_the_normal_that_its_caption_was_written_after(finished: WorkFolder) -> None:
    image = finished.records(Image, 1)[3]
    found = trace(finished, image.id)
    assert [record.kind for record in found] == ["images", "judgements", "captions", "representatives", "normals"]
    assert found[2].round == 1
    assert found[2].made.prompt.startswith("A photograph of a normal plate")
    with pytest.raises(InputError, match="an image of the run"):
        trace(finished, "i9-00000")


def test_add_grows_the_set_and_rep_replaces_the_farthest_easy_ones(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    sets: dict[str, list[list[Member]]] = {}
    for mode in ("add", "rep"):
        work = new_work(f'mode = "{mode}"', mode)
        run(work, makers_of_tests.makers())
        sets[mode] = [work.records(Member, number) for number in range(3)]
    assert [len(found) for found in sets["add"]] == [24, 48, 72]
    assert [len(found) for found in sets["rep"]] == [24, 24, 24]
    hard = [sum(member.hard for member in found) for found in sets["rep"]]
    assert hard[0] < hard[1]
    assert hard[2] >= hard[1]
    distances = {record.parent: record.distance for record in work.records(Judgement, 0)}
    kept = [distances[member.parent] for member in sets["rep"][1] if not member.hard]
    gone = {member.parent for member in sets["rep"][0]} - {member.parent for member in sets["rep"][1]}
    assert gone
    assert not kept or max(kept) <= min(distances[name] for name in gone)


@pytest.mark.parametrize("after", [0, 1, 7, 24, 30, 71])
def test_a_run_that_was_ended_while_it_painted_ends_as_one_that_was_not(
    after: int, finished: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(name="ended")
    painter = makers_of_tests.SpotPainter(fail_after=after, error=KeyboardInterrupt())
    with work.locked(), pytest.raises(KeyboardInterrupt):
        run(work, makers_of_tests.makers(painter))
    again = makers_of_tests.SpotPainter()
    with work.locked():
        run(work, makers_of_tests.makers(again))
    assert contents(work) == contents(finished)
    assert len(painter.painted) + len(again.painted) == 72


def test_half_a_line_is_cut_off_and_its_item_made_again(
    finished: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(name="torn")
    run(work, makers_of_tests.makers(), stage="paint", last_round=0)
    path = work.round_folder(0) / "images.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + lines[10][:37])
    (work.round_folder(0) / "paint.done").unlink()
    painter = makers_of_tests.SpotPainter()
    with work.locked():
        run(work, makers_of_tests.makers(painter))
    assert len(painter.painted) == 14 + 48
    assert contents(work) == contents(finished)


def test_stages_may_be_run_one_by_one(
    finished: WorkFolder, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(name="steps")
    for stage in ("describe", "representatives", "imagine", "paint", "judge", "prefer"):
        run(work, makers_of_tests.makers(), stage=stage, last_round=0)
    assert not work.round_folder(1).exists()
    run(work, makers_of_tests.makers())
    assert contents(work) == contents(finished)


def test_a_painter_without_memory_keeps_what_was_painted(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work()
    error = OutOfMemoryError(wanted="memory to paint", got="none", next_step="Paint smaller.")
    with pytest.raises(OutOfMemoryError):
        run(work, makers_of_tests.makers(makers_of_tests.SpotPainter(fail_after=5, error=error)))
    assert len(work.records(Image, 0)) == 5
    run(work, makers_of_tests.makers())
    assert len(work.records(Image, 0)) == 24


def test_an_author_of_nonsense_is_asked_again_and_then_the_round_says_so(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work()
    half = makers_of_tests.SizeAuthor(nonsense=0.5)
    run(work, makers_of_tests.makers(author=half), stage="imagine", last_round=0)
    refused = [record for record in work.records(Caption, 0) if record.refused]
    assert 0 < len(refused) < 12
    assert all(record.refused == "no words in the answer" for record in refused)
    assert sum(half.calls) > 24
    other = new_work(name="nothing")
    with pytest.raises(InputError, match="none of use"):
        run(other, makers_of_tests.makers(author=makers_of_tests.SizeAuthor(nonsense=1.0)))
    assert len(other.records(Caption, 0)) == 24


@pytest.mark.parametrize(("weights", "word"), [((0, 0, 1, 1), "hard"), ((1, 1, 0, 0), "easy")])
def test_a_round_of_one_kind_says_so_and_the_run_goes_on(
    weights: tuple[float, ...], word: str, new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(rounds=1)
    said: list[str] = []
    run(work, makers_of_tests.makers(author=makers_of_tests.SizeAuthor(weights), say=said.append))
    assert any(f"no {word} captions" in line for line in said)
    assert not (work.round_folder(0) / "adapter").exists()
    assert work.is_done("collect", 1)


def test_too_faint_an_anomaly_is_neither_hard_nor_easy_and_never_in_a_set(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work("[judge]\nvisible_floor = 255.0", rounds=0)
    run(work, makers_of_tests.makers())
    assert all(record.faint and not record.hard for record in work.records(Judgement, 0))
    assert work.records(Member, 0) == []
    with pytest.raises(InputError, match="anomalies in the set"):
        export_members(work, None, work.path)


def test_a_disk_that_is_full_loses_nothing(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType, finished: WorkFolder
) -> None:
    import resource
    import subprocess
    import sys

    work = new_work(name="full")
    # A limit on the size of files is a full disk for the file of captions, in a process of its own.
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import makers_of_tests
from pathlib import Path
from edgead.server_side.kka.records import Caption
from edgead.server_side.kka.rounds import run
from edgead.server_side.kka.work import WorkFolder
from edgead.runtime.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
work = WorkFolder(Path({str(work.path)!r}))
run(work, makers_of_tests.makers(), stage="representatives")
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    with work.locked():
        run(work, makers_of_tests.makers())
except StorageError as error:
    print("refused", len(work.records(Caption, 0)))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused ")
    assert 0 < int(done.stdout.split()[1]) < 24
    again = WorkFolder(work.path)
    with again.locked():
        run(again, makers_of_tests.makers())
    assert contents(again) == contents(finished)


def test_two_processes_do_not_work_in_one_folder(new_work: Callable[..., WorkFolder]) -> None:
    work = new_work()
    with work.locked(), pytest.raises(StorageError, match="another process"), WorkFolder(work.path).locked():
        pass


def test_another_configuration_or_folder_is_refused(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType, tmp_path: Path
) -> None:
    work = new_work()
    run(work, makers_of_tests.makers(), stage="describe")
    with pytest.raises(OutputExistsError, match="another configuration"):
        new_work("seed = 5")
    (work.path / "kka.toml").write_text("normals = 'x'\n")
    with pytest.raises(InputError, match=r"another kka\.toml"):
        WorkFolder(work.path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="other files"):
        new_work(name="mine")


def test_a_damaged_record_or_image_is_named(new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType) -> None:
    work = new_work(rounds=0)
    run(work, makers_of_tests.makers())
    image = work.records(Image, 0)[0]
    (work.path / image.file).write_bytes((work.path / work.records(Image, 0)[1].file).read_bytes())
    with pytest.raises(Exception, match=f"image {image.id}"):
        export_members(work, 0, work.path)
    path = work.round_folder(0) / "captions.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"captions.jsonl, line 1"):
        work.records(Caption, 0)


def test_a_set_is_what_detectors_take(finished: WorkFolder, tmp_path: Path) -> None:
    from edgead.server_side.fit_options import anomalous_samples

    (tmp_path / "set").mkdir()
    count, masks, number = export_members(finished, None, tmp_path / "set")
    assert (count, masks, number) == (72, 72, 2)
    found: Any = anomalous_samples(tmp_path / "set")
    assert len(found) == 72
    assert all(mask is not None for _, mask in found)
    assert len(samples(finished, 1, only="hard")) == facts(finished, 0)["hard"] + facts(finished, 1)["hard"]
