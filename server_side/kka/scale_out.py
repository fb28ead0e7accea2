"""Work spread over a Ray cluster: the same results in the same order as in one process.

    with ray_map("auto") as mapped:
        pick_representatives(work, embedder, mapped)      # photographs are embedded on the cluster
        imagine(work, 0, author, painter, mapped)         # captions are written there, by an author that travels
        paint(work, 0, painter, mapped)
        judge(work, 0, evaluator, mapped)                 # images are embedded and measured

Whatever depends on other items stays in this process: clusters of normals, the evaluator's training, preferences.
What is applied travels once to each worker, which keeps it: weights of painters and authors are loaded there, once.
Photographs, the work folder and models are read where the work is done, so that every machine has to see them under the
same paths; records and pictures are written by this process alone, in order, as results arrive.

"The same" is to the byte for what a processor computes one item at a time: vectors, distances, procedural pictures.
A language model or a pipeline of diffusers rounds as its processor does: on a GPU as in one process on the same GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from edgead.runtime.errors import EdgeadError, FailureError, InputError, missing_dependency
from edgead.server_side.kka.jobs import OrderedMap

LOCAL = "local"
"""Address that starts a cluster of its own on this machine."""
_LOCAL_CPUS = 2
_LOCAL_STORE_BYTES = 256 * 2**20
_REACH_S = 5.0
"""Seconds to find out whether somebody listens at an address."""
_INTERRUPT_S = 0.2
"""An interrupt is heard between two waits of this length, in seconds."""
_AHEAD = 2
"""Items under way for each worker: one in work, one waiting."""
_ATTEMPTS = 3
"""Workers that one item may cost before it is the item's fault."""


@contextlib.contextmanager
def ray_map(address: str) -> Iterator[OrderedMap[Any, Any]]:
    """An ordered map over a Ray cluster.

    At most a worker for each CPU of the cluster; for each GPU, where it has any and the function asks for one
    (`uses_gpu`). No item is lost with a worker: a new one takes its place and its items. When the results are not
    wanted any longer, or on an interrupt, the workers are ended. Nothing is printed.

    Args:
        address: 'local' (a cluster of its own, 2 CPUs, no dashboard), 'auto' (the one of this machine), 'HOST:PORT' or
            'ray://HOST:PORT'.

    Yields:
        applies a function to items and gives the results in the items' order. An error that edgead raises in a worker
        is raised here as the same error.

    Raises:
        InputError: a cluster that cannot be reached or started.
        MissingDependencyError: no `ray`.
    """
    # A factory's machines tell nobody that they use Ray; read when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What is asked of Ray when it is shut down must not start a cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "ray", "server", "work on a cluster") from error
    _connect(ray, address)
    crews: list[_Crew] = []

    def mapped(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        crews.append(_Crew(ray, function))
        return _mapped(ray, crews[-1], items)

    try:
        yield mapped
    finally:
        # An error in the middle of results keeps them alive, and with them their workers.
        for crew in crews:
            crew.end()
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "edgead-kka"}
    if address == LOCAL:
        options |= {
            "address": "local",
            "num_cpus": _LOCAL_CPUS,
            "include_dashboard": False,
            "object_store_memory": _LOCAL_STORE_BYTES,
        }
    else:
        options["address"] = address
    try:
        _reach(address)
        ray.init(**options)
    except Exception as error:  # Ray raises OSError, ConnectionError, ValueError and its own
        raise InputError(
            wanted=f"a Ray cluster at {address!r}",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            next_step="Start one (ray start --head), name its address (and set RAY_AUTH_MODE=token if it asks for a "
            "token), or use --ray local; without --ray the work is done in this process.",
        ) from error


def _reach(address: str) -> None:
    """Ray itself waits for minutes for an address at which nobody listens.

    Raises:
        OSError: nobody does, or it is no address.
    """
    if address in (LOCAL, "auto"):
        return
    place = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        port = place.port
    except ValueError as error:
        raise OSError(str(error)) from error
    if not place.hostname or port is None:
        raise OSError("neither 'local', 'auto', HOST:PORT nor ray://HOST:PORT")
    with socket.create_connection((place.hostname, port), timeout=_REACH_S):
        pass


class _Worker:
    """Holds one function; a Ray actor of it runs in a process of its own."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def apply(self, item: Any) -> tuple[bool, Any]:
        """(True, result), or (False, an error of edgead as its class and contents, and the machine)."""
        try:
            return True, self._function(item)
        except EdgeadError as error:
            # Their constructors take names only, which pickling an exception does not know.
            return False, (type(error), dict(vars(error)), error.args, socket.gethostname())


class _Crew:
    """The workers of one function, and which of them has how many items under way.

    A worker is started when all others have something to do: few items do not wake a large cluster.
    """

    def __init__(self, ray: Any, function: Callable[[Any], Any]) -> None:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if getattr(function, "uses_gpu", False) else 0
        need: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
        self.most = gpus or max(1, int(resources.get("CPU", 1)))
        self._ray = ray
        self._make = ray.remote(**need, max_restarts=0, max_task_retries=0)(_Worker)
        self._function = ray.put(function)
        self.workers: list[Any] = []
        self.loads: list[int] = []

    @property
    def room(self) -> int:
        return self.most * _AHEAD - sum(self.loads)

    def submit(self, item: Any) -> tuple[Any, int, Any]:
        """(reference of the result, place of the worker, the worker) of an item, for the least busy worker."""
        if len(self.workers) < self.most and all(self.loads):
            self.workers.append(self._make.remote(self._function))
            self.loads.append(0)
        place = min(range(len(self.workers)), key=self.loads.__getitem__)
        self.loads[place] += 1
        worker = self.workers[place]
        return worker.apply.remote(item), place, worker

    def replace(self, place: int, worker: Any) -> None:
        """A new worker in the place of one that died, unless that was done already."""
        if self.workers[place] is worker:
            self.workers[place] = self._make.remote(self._function)

    def end(self) -> None:
        """End the workers; asking again, even after Ray is shut down, does nothing."""
        workers, self.workers, self._function = self.workers, [], None
        for worker in workers:
            with contextlib.suppress(Exception):  # one that is dead already
                self._ray.kill(worker)


def _mapped(ray: Any, crew: _Crew, items: Iterable[Any]) -> Iterator[Any]:
    """Results in order; at most twice as many items are under way or wait for their turn as fit the workers."""
    source = iter(items)
    waiting: deque[tuple[int, Any]] = deque()
    under_way: dict[Any, tuple[int, Any, int, Any]] = {}
    finished: dict[int, Any] = {}
    lost: dict[int, int] = {}
    read, given, more = 0, 0, True
    most = 2 * _AHEAD * crew.most
    try:
        while True:
            while crew.room > 0 and (waiting or (more and read - given < most)):
                if waiting:
                    number, item = waiting.popleft()
                else:
                    try:
                        number, item = read, next(source)
                    except StopIteration:
                        more = False
                        break
                    read += 1
                reference, place, worker = crew.submit(item)
                under_way[reference] = (number, item, place, worker)
            while given in finished:
                yield _opened(finished.pop(given))
                given += 1
            if not under_way:
                if not more and not waiting and given == read:
                    return
                continue
            ready, _ = ray.wait(list(under_way), num_returns=1, timeout=_INTERRUPT_S)
            for reference in ready:
                number, item, place, worker = under_way.pop(reference)
                crew.loads[place] -= 1
                try:
                    finished[number] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from error
                except ray.exceptions.RayError as error:
                    # The worker died with it, or its machine did.
                    lost[number] = lost.get(number, 0) + 1
                    if lost[number] >= _ATTEMPTS:
                        raise FailureError(
                            wanted=f"item {number} from a worker of the cluster",
                            got=f"{_ATTEMPTS} workers that died of it: {' '.join(str(error).split())[:200]}",
                            next_step="Look at the memory of the workers' machines; what is done is kept.",
                        ) from error
                    crew.replace(place, worker)
                    waiting.append((number, item))
    finally:
        crew.end()


def _opened(outcome: tuple[bool, Any]) -> Any:
    done, value = outcome
    if done:
        return value
    kind, contents, arguments, machine = value
    error = kind.__new__(kind)
    error.args = arguments
    vars(error).update(contents)
    if machine != socket.gethostname():
        error.got = f"{error.got} (on {machine})"
    raise error


__all__ = ["LOCAL", "ray_map"]
