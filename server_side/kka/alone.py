"""Frames worked on one by one, each on one thread of torch.

Sums that torch divides among threads are rounded otherwise for another number of threads. On one thread a frame gives
the same bytes in this process, in a worker of a cluster, and on a machine with more cores; the cores are kept busy with
frames beside each other instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_alone(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Results of a function for each item, in order, as many at a time as torch has threads here.

    Args:
        function: works on one item; may be called from several threads at a time.
        items: all in memory already.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(items) < 2:
            return [function(item) for item in items]
        # A thread of its own number of threads: torch keeps it for each.
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


__all__ = ["each_alone"]
