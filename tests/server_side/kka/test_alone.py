"""Frames on one thread each: the bytes do not depend on how many threads torch has."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from edgead.server_side.kka.alone import each_alone
from edgead.server_side.kka.embedding import BackboneEmbedder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_vectors_are_the_same_bytes_with_any_number_of_threads_and_after_a_journey() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (90, 120, 3), dtype=np.uint8) for _ in range(5)]
    embedder = BackboneEmbedder("embedded", 128)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(embedder.embed(frames).tobytes())
        assert torch.get_num_threads() == threads
    assert len(set(found)) == 1
    data = pickle.dumps(embedder)
    # The weights stay at home.
    assert len(data) < 1000
    sent: BackboneEmbedder = pickle.loads(data)
    assert sent.embed(frames).tobytes() == found[0]


def test_results_are_in_order_on_one_thread_of_torch_each_and_an_error_is_raised() -> None:
    torch.set_num_threads(3)

    def seen(number: int) -> tuple[int, int]:
        if number < 0:
            raise ValueError(number)
        return number, torch.get_num_threads()

    assert each_alone(seen, range(20)) == [(number, 1) for number in range(20)]
    assert each_alone(seen, [7]) == [(7, 1)]
    assert each_alone(seen, []) == []
    with pytest.raises(ValueError, match="-1"):
        each_alone(seen, [3, -1, 4])
    assert torch.get_num_threads() == 3
