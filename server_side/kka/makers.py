"""Who does the work of a run, as its configuration names them. Heavy packages are imported when they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgead.server_side.kka.config import Config
from edgead.server_side.kka.jobs import OrderedMap
from edgead.server_side.kka.rounds import Makers
from edgead.server_side.kka.seams import Author, Embedder, Evaluator, Painter, Tuner
from edgead.server_side.kka.work import WorkFolder


@contextlib.contextmanager
def opened_makers(
    config: Config, *, ray: str | None = None, say: Callable[[str], object] = lambda line: None
) -> Iterator[Makers]:
    """The makers of a configuration.

    Args:
        config: of the run.
        ray: address of a Ray cluster for writing, painting, embedding and measuring ('auto', 'local', 'HOST:PORT' or
            'ray://HOST:PORT'); None does it in this process.
        say: a line for people.

    Raises:
        InputError: a Ray cluster that cannot be reached.
    """
    from edgead.server_side.kka.describe import describe

    def embedder() -> Embedder:
        from edgead.server_side.kka.embedding import BackboneEmbedder

        return BackboneEmbedder(config.backbone)

    def author(adapter: Path | None) -> Author:
        from edgead.server_side.kka.language import open_author

        return open_author(config, adapter)

    def painter() -> Painter:
        from edgead.server_side.kka.painters import open_painter

        return open_painter(config.paint)

    def evaluator(work: WorkFolder, number: int) -> Evaluator:
        from edgead.server_side.kka.confusion import fitted_evaluator

        return fitted_evaluator(work, number)

    def tuner() -> Tuner:
        from edgead.server_side.kka.prefer import DpoTuner

        return DpoTuner(config.imagine.model, config.prefer)

    def measure(work: WorkFolder, number: int) -> object:
        if not config.evaluate.data:
            return None
        from edgead.server_side.kka.measuring import measure_round

        return measure_round(work, number)

    with contextlib.ExitStack() as stack:
        mapped: OrderedMap[Any, Any] = map
        if ray is not None:
            from edgead.server_side.kka.scale_out import ray_map

            mapped = stack.enter_context(ray_map(ray))
        yield Makers(describe, embedder, author, painter, evaluator, tuner, mapped, measure, say)


__all__ = ["opened_makers"]
