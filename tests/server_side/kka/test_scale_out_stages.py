"""Stages of a run over a real Ray cluster on this machine: the files of one process, whatever ends in between."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgead.server_side.kka.config import read_config
from edgead.server_side.kka.jobs import OrderedMap, WriteJob
from edgead.server_side.kka.makers import opened_makers
from edgead.server_side.kka.records import Caption, Image, Judgement, Preference, Representative
from edgead.server_side.kka.rounds import Makers, run
from edgead.server_side.kka.seams import Tuned
from edgead.server_side.kka.work import WorkFolder

pytest.importorskip("ray", reason="a cluster needs edgead[server]")

PROMPT = "a part"
SAID = ("a dark scratch", "a large red stain", "a small hole", "it is fine")
"""What the author learned to say; the painter cannot draw the last one."""
SETTINGS = """
[representatives]
clusters = 3
[imagine]
author = "local"
model = "{model}"
prompt = "a part"
max_tokens = 8
batch = 10
[judge]
steps = 6
size = 32
batch = 8
visible_floor = 0.0
"""


@pytest.fixture(scope="module")
def model(models_of_tests: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models_of_tests.word_model(tmp_path_factory.mktemp("scale-out") / "tiny", [PROMPT, *SAID])
    return models_of_tests.teach(folder, PROMPT, SAID)


@pytest.fixture(scope="module")
def tuner(model: Path, models_of_tests: ModuleType) -> Callable[[], Any]:
    """Leaves an adapter of random weights, the same one whenever it is asked."""

    class Tuner:
        def tune(self, preferences: Iterable[Preference], before: Path | None, after: Path, *, seed: int) -> Tuned:
            models_of_tests.new_adapter(model, after)
            return Tuned(1, (0.7, 0.6), (0.0, 0.1))

    return Tuner


def contents(work: WorkFolder) -> dict[str, str]:
    """Digest of every file of a run but for what it cost and where it was begun."""
    return {
        path.relative_to(work.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(work.path.rglob("*"))
        if path.is_file() and path.name not in ("costs.jsonl", "lock", "kka.toml", "run.json", "report.html")
    }


@contextlib.contextmanager
def makers(work: WorkFolder, tuner: Callable[[], Any], mapped: OrderedMap[Any, Any] = map) -> Iterator[Makers]:
    with opened_makers(work.config) as found:
        yield dataclasses.replace(found, tuner=tuner, mapped=mapped)


@pytest.fixture(scope="module")
def in_process(begun: Callable[..., WorkFolder], model: Path, tuner: Callable[[], Any]) -> WorkFolder:
    """A run up to the captions of its second round, which an adapter writes."""
    work = begun(SETTINGS.format(model=model), "in-process", rounds=1, captions=20)
    with makers(work, tuner) as found:
        run(work, found, stage="imagine", last_round=1)
    return work


def test_a_run_over_workers_leaves_the_bytes_of_one_process(
    in_process: WorkFolder,
    mapped: OrderedMap[Any, Any],
    begun: Callable[..., WorkFolder],
    model: Path,
    tuner: Callable[[], Any],
) -> None:
    work = begun(SETTINGS.format(model=model), "over-workers", rounds=1, captions=20)
    functions: list[str] = []

    def counted(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        functions.append(type(function).__name__)
        yield from mapped(function, items)

    with makers(work, tuner, counted) as found:
        run(work, found, stage="imagine", last_round=1)
    assert functions == ["EmbedJob", "WriteJob", "PaintJob", "MeasureJob", "WriteJob"]
    assert contents(work) == contents(in_process)
    assert len(work.records(Representative)) == 3
    assert len(work.records(Judgement, 0)) > 5
    first, second = (work.records(Caption, number) for number in range(2))
    assert len(first) == len(second) == 20
    assert {record.text for record in first} <= set(SAID)
    assert [record.text for record in first] != [record.text for record in second]
    assert first[0].made.digest != second[0].made.digest


def test_what_arrived_before_an_end_is_kept_and_not_asked_for_again(
    in_process: WorkFolder, new_work: Callable[..., WorkFolder], model: Path
) -> None:
    work = new_work(SETTINGS.format(model=model), rounds=1, captions=20)
    asked: list[int] = []

    def ends(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        if not isinstance(function, WriteJob):
            yield from map(function, items)
            return
        yield next(map(function, items))
        raise KeyboardInterrupt

    def counted(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        batches = list(items)
        asked.append(len(batches))
        yield from map(function, batches)

    with opened_makers(work.config) as found:
        with pytest.raises(KeyboardInterrupt):
            run(work, dataclasses.replace(found, mapped=ends), stage="imagine", last_round=0)
        assert len(work.records(Caption, 0)) == 10
        run(work, dataclasses.replace(found, mapped=counted), stage="imagine", last_round=0)
    assert asked == [1]
    assert work.records(Caption, 0) == in_process.records(Caption, 0)


def test_an_author_that_does_not_travel_is_asked_here(
    new_work: Callable[..., WorkFolder], makers_of_tests: ModuleType
) -> None:
    work = new_work(rounds=0, captions=4)
    called: list[str] = []

    def watched(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        called.append(type(function).__name__)
        return map(function, items)

    run(work, dataclasses.replace(makers_of_tests.makers(), mapped=watched))
    assert called == ["EmbedJob", "PaintJob", "MeasureJob"]


def _command(config: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "edgead", "kka", "paint", str(config), "-o", str(output), "--json", *more]


def _of_session(session: int) -> list[str]:
    """Command lines of the processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(words[3]) == session and words[0] != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what is left running is seen in /proc")
def test_a_run_over_workers_that_is_interrupted_ends_soon_with_all_it_started_and_prints_nothing_but_json(
    photographs: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'normals = "{photographs}"\ncaptions = 150\n')
    over, here = tmp_path / "over", tmp_path / "here"
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            _command(config, over, "--ray", "local"), stdout=said, stderr=subprocess.PIPE, start_new_session=True
        )
    images = over / "round-0" / "images.jsonl"
    until = time.monotonic() + 60
    while not images.exists() or images.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.02)
    # As a terminal does: to all that run in it.
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    warned = process.communicate(timeout=60)[1].decode()
    took = time.monotonic() - start
    assert process.returncode == 130, warned
    assert "interrupted" in warned
    assert (tmp_path / "said").read_bytes() == b""
    assert _of_session(process.pid) == []
    # 2.5 s on a quiet machine, of which Ray takes one and a half. It must not start a cluster in order to end one.
    assert "Started a local Ray instance" not in warned
    assert took < 10
    done = subprocess.run(_command(config, over, "--ray", "local"), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["work"] == str(over)
    work = WorkFolder.create(here, read_config(config), config.read_bytes())
    with opened_makers(work.config) as found:
        run(work, found, stage="paint", last_round=0)
    assert len(work.records(Image, 0)) == 150
    assert contents(WorkFolder(over)) == contents(work)
