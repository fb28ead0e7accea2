"""Work over a real Ray cluster on this machine: the same bytes in the same order, whatever happens to workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.runtime.errors import FailureError, InputError, StorageError
from edgead.runtime.image import list_images
from edgead.server_side.kka.jobs import Job, OrderedMap, PaintJob
from edgead.server_side.kka.procedural import GrammarAuthor, ProceduralPainter
from edgead.server_side.kka.records import Made, Normal
from edgead.server_side.kka.scale_out import ray_map

pytest.importorskip("ray", reason="a cluster needs edgead[server]")


def test_painting_over_workers_gives_the_bytes_of_one_process(mapped: OrderedMap[Any, Any], photographs: Path) -> None:
    captions = GrammarAuthor().write([""] * 10, list(range(10)))
    captions[4] = "nothing that can be drawn"
    names = [path.name for path in list_images(photographs)]
    jobs = [
        Job(f"i{number}", caption, f"c{number}", Normal("n", names[number], "", "", Made("test")), number)
        for number, caption in enumerate(captions)
    ]
    function = PaintJob(ProceduralPainter(), photographs)
    for here, there in zip(map(function, jobs), mapped(function, jobs), strict=True):
        if here is None:
            assert there is None
            continue
        assert here.mask is not None
        assert np.array_equal(here.image, there.image)
        assert np.array_equal(here.mask, there.mask)
    missing = [Job("i", "a dent", "c", Normal("n", "no-such.png", "", "", Made("test")), 0)]
    with pytest.raises(StorageError, match=r"no-such\.png"):
        list(mapped(function, missing))


def test_results_come_in_order_few_are_under_way_and_the_function_travels_once_to_a_worker(
    mapped: OrderedMap[Any, Any], tmp_path: Path
) -> None:
    def slow_if_even(number: int) -> int:
        time.sleep(0.05 if number % 2 == 0 else 0.0)
        return number * number

    class Loaded:
        """Writes a file when it arrives in a process."""

        def __init__(self, arrivals: Path) -> None:
            self.arrivals = arrivals

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__ = state
            (self.arrivals / f"{time.time_ns()}-{os.getpid()}").touch()

        def __call__(self, number: int) -> int:
            return slow_if_even(number)

    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    most = 0
    for place, result in enumerate(mapped(Loaded(tmp_path), numbers())):
        assert result == place * place
        most = max(most, len(taken) - place)
    assert len(taken) == 40
    assert most <= 10
    assert len(list(tmp_path.iterdir())) == 2


def test_a_worker_that_dies_costs_nothing_and_an_item_that_kills_all_is_named(
    mapped: OrderedMap[Any, Any], tmp_path: Path
) -> None:
    def dies_once(number: int) -> int:
        if number == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return number

    def kills(number: int) -> int:
        if number == 1:
            os._exit(1)
        return number

    assert list(mapped(dies_once, range(8))) == list(range(8))
    assert (tmp_path / "died").exists()
    with pytest.raises(FailureError, match="workers that died of it"):
        list(mapped(kills, range(3)))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "ray://host", "host:port"])
def test_a_cluster_that_is_not_there_says_how_to_start_one(address: str) -> None:
    with pytest.raises(InputError, match="ray start --head"), ray_map(address):
        pass
