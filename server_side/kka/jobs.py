"""The work of a run as functions of one item each, which other machines can do as well as this process.

    captions     WriteJob     Batch -> answers          loads the author
    pictures     PaintJob     Job -> painted            loads the painter
    embedding    EmbedJob     photographs -> vectors    loads the backbone
    judging      MeasureJob   images -> distances       loads the backbone; the trained networks travel

A result depends on the function and the item alone. Stages record results in the items' order, wherever they come from.
What is heavy (a model's weights) does not travel: each process loads its own when it first needs it. Photographs, the
work folder and folders of models are read under the same paths everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError
from edgead.runtime.image import read_image
from edgead.server_side.kka.records import Image, Normal
from edgead.server_side.kka.seams import (
    Author,
    Embedder,
    Evaluator,
    Frame,
    Painted,
    Painter,
    UndrawableCaptionError,
    seed_of,
)
from edgead.server_side.prompts.answers import clean_phrase

_NOTHING = "no words in the answer"

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]
"""Applies a function to items and yields results in the items' order; `map`, or one over many machines.

A function with `uses_gpu` is given a GPU for each worker, where there are any.
"""


@dataclass(frozen=True)
class Batch:
    """Captions that are written together.

    Attributes:
        places: numbers of the captions in their round.
        prompts: one for each.
    """

    places: Sequence[int]
    prompts: Sequence[str]


@dataclass(frozen=True)
class Written:
    """What came of one caption.

    Attributes:
        text: the caption, or the beginning of an answer that is none.
        refused: why it is of no use, or nothing.
        seed: with which it was asked for.
    """

    text: str
    refused: str
    seed: int


@dataclass(frozen=True)
class WriteJob:
    """Has a batch of captions written, and again what cannot be used.

    Attributes:
        author: writes.
        painter: says what it cannot draw.
        seed: of the run.
        round: number of the round.
        attempts: how often a caption is asked for.
    """

    author: Author
    painter: Painter
    seed: int
    round: int
    attempts: int

    @property
    def uses_gpu(self) -> bool:
        """Whether the author wants a GPU of its own."""
        return bool(getattr(self.author, "uses_gpu", False))

    def __call__(self, batch: Batch) -> list[Written]:
        """One for each place; a whole batch at a time, as an answer may depend on its company by a rounding error.

        Raises:
            LanguageModelError: the author cannot be reached, or failed.
            OutOfMemoryError: its memory does not suffice.
        """
        found = [Written("", _NOTHING, 0)] * len(batch.places)
        waiting = list(range(len(batch.places)))
        for attempt in range(self.attempts):
            seeds = [seed_of(self.seed, "caption", self.round, batch.places[at], attempt) for at in waiting]
            answers = self.author.write([batch.prompts[at] for at in waiting], seeds)
            for at, seed, answer in zip(list(waiting), seeds, answers, strict=True):
                text = clean_phrase(answer)
                refused = _NOTHING if text is None else self._undrawable(text)
                found[at] = Written(text or answer[:200].strip(), refused, seed)
                if not refused:
                    waiting.remove(at)
            if not waiting:
                break
        return found

    def _undrawable(self, text: str) -> str:
        try:
            self.painter.check(text)
        except UndrawableCaptionError as error:
            return error.got[:500]
        return ""


@dataclass(frozen=True)
class Job:
    """One image to paint.

    Attributes:
        name: of the image.
        caption: in words.
        parent: id of the caption.
        normal: the photograph to paint on, or None.
        seed: of the image.
    """

    name: str
    caption: str
    parent: str
    normal: Normal | None
    seed: int


@dataclass(frozen=True)
class PaintJob:
    """Paints one job.

    Attributes:
        painter: paints.
        normals: folder of the photographs.
    """

    painter: Painter
    normals: Path

    @property
    def uses_gpu(self) -> bool:
        """Whether the painter wants a GPU of its own."""
        return bool(getattr(self.painter, "uses_gpu", False))

    def __call__(self, job: Job) -> Painted | None:
        """The painted anomaly; None where the painter finds out only while it paints that it cannot."""
        normal = None if job.normal is None else read_image(self.normals / job.normal.file)
        try:
            return self.painter.paint(job.caption, normal, seed=job.seed)
        except UndrawableCaptionError:
            return None


@dataclass(frozen=True)
class EmbedJob:
    """Embeds photographs.

    Attributes:
        embedder: makes the vectors.
        normals: folder of the photographs.
    """

    embedder: Embedder
    normals: Path

    def __call__(self, part: Sequence[Normal]) -> NDArray[np.float32]:
        """float32 [N, D] of N photographs.

        Raises:
            ImageError: one that cannot be read.
        """
        return self.embedder.embed([read_image(self.normals / record.file) for record in part])


@dataclass(frozen=True)
class MeasureJob:
    """Measures painted images.

    Attributes:
        evaluator: trained already.
        folder: of the run, an absolute path.
    """

    evaluator: Evaluator
    folder: Path

    def __call__(self, part: Sequence[Image]) -> list[tuple[float, float]]:
        """(distance, limit) of each image; see `Evaluator.measure`.

        Raises:
            ImageError: see `painted_image`.
        """
        names = [record.id for record in part]
        return self.evaluator.measure(names, [painted_image(self.folder, record) for record in part])


def painted_image(folder: Path, record: Image) -> Frame:
    """The pixels of a painted anomaly, checked against its record.

    Args:
        folder: of the run.
        record: of the image.

    Raises:
        ImageError: the file is missing, or is not the one that was painted.
    """
    path = folder / record.file
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        found = str(error.strerror)
    if found != record.sha256:
        raise ImageError(
            wanted=f"the image {record.id} at {path}",
            got="another file" if len(found) == 64 else found,
            next_step="Restore it; its record says what made it.",
        )
    return read_image(path)


__all__ = [
    "Batch",
    "EmbedJob",
    "Job",
    "MeasureJob",
    "OrderedMap",
    "PaintJob",
    "WriteJob",
    "Written",
    "painted_image",
]
