"""The first stages of a round: imagine, paint, judge. Each goes on where it stopped and repeats nothing.

Every artefact depends on the configuration, its round and its number alone (`seams.seed_of`), so that a run that was
killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import ImageError, InputError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.progress import Progress
from edgead.server_side.kka.config import Config
from edgead.server_side.kka.records import (
    Caption,
    Image,
    Judgement,
    Made,
    Normal,
    Representative,
)
from edgead.server_side.kka.representatives import choose
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
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.prompts.answers import clean_phrase

_DIGITS = 5
_EMBED_BATCH = 32
_NOTHING = "no words in the answer"

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]
"""Applies a function to items and yields results in the items' order; `map`, or one over many machines."""


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


def pick_representatives(work: WorkFolder, embedder: Embedder) -> list[Representative]:
    """Cluster the described normals and choose one representative for each; see `representatives`.

    Raises:
        InputError: nothing was described.
        ImageError: a photograph that cannot be read.
    """
    if work.is_done("representatives"):
        return work.records(Representative)
    normals = work.records(Normal)
    _need(normals, "described normals", "edgead kka describe")
    settings = work.config.representatives
    have = {record.id for record in work.records(Representative)}
    with work.stage("representatives") as made, Progress("embedding normals", len(normals)) as progress:
        features = []
        for start in range(0, len(normals), _EMBED_BATCH):
            part = normals[start : start + _EMBED_BATCH]
            features.append(embedder.embed([read_image(work.normals / record.file) for record in part]))
            progress.advance(len(part))
        chosen = choose(
            np.concatenate(features),
            settings.clusters,
            shrinkage=settings.shrinkage,
            seed=seed_of(work.config.seed, "clusters"),
        )
        for found in chosen:
            name = f"r{found.cluster:0{_DIGITS}d}"
            if name not in have:
                parent = normals[found.row].id
                work.append(Representative(name, parent, found.cluster, found.size, round(found.score, 9)))
                made.append(1)
    return work.records(Representative)


def imagine(work: WorkFolder, number: int, author: Author, painter: Painter) -> list[Caption]:
    """Have captions of anomalies written, one after another representative in turn.

    An answer without usable words, or one that the painter cannot draw, is asked for again with another seed; after
    `imagine.attempts` the last one is kept with the reason.

    Raises:
        InputError: no representatives, or not one usable caption in the whole round.
        LanguageModelError: the author cannot be reached, or failed.
    """
    if work.is_done("imagine", number):
        return work.records(Caption, number)
    config = work.config
    representatives = work.records(Representative)
    _need(representatives, "representatives", "edgead kka representatives")
    captions = {record.id: record.caption for record in work.records(Normal)}
    have = {record.id for record in work.records(Caption, number)}
    with work.stage("imagine", number) as made, Progress(f"round {number}: captions", config.captions) as progress:
        for start in range(0, config.captions, config.imagine.batch):
            places = range(start, min(start + config.imagine.batch, config.captions))
            names = [numbered("c", number, place) for place in places]
            if not have.issuperset(names):
                parents = [representatives[place % len(representatives)] for place in places]
                prompts = [prompt_of(config, captions[parent.parent]) for parent in parents]
                written = _written(config, number, author, painter, places, prompts)
                new = [
                    Caption(
                        name,
                        number,
                        parent.id,
                        text,
                        Made(author.kind, author.name, author.digest, prompt, seed),
                        refused,
                    )
                    for name, parent, prompt, (text, refused, seed) in zip(
                        names, parents, prompts, written, strict=True
                    )
                    if name not in have
                ]
                work.append_all(new, number)
                made.append(len(new))
            progress.advance(len(names))
        usable = sum(not record.refused for record in work.records(Caption, number))
        if not usable:
            raise InputError(
                wanted=f"captions of anomalies from {author.name or author.kind!r}",
                got=f"{config.captions} answers in round {number}, none of use: {_reasons(work, number)}",
                next_step="Change `imagine.prompt` or the model, and begin in another work folder.",
            )
    return work.records(Caption, number)


def paint(
    work: WorkFolder, number: int, painter: Painter, mapped: OrderedMap[Job, Painted | None] = map
) -> list[Image]:
    """Paint every usable caption of a round; one that turns out undrawable only now has no image.

    Args:
        work: the run.
        number: of the round.
        painter: paints.
        mapped: spreads the work; see `OrderedMap`.

    Raises:
        InputError: no captions.
        OutOfMemoryError: the painter's memory does not suffice; what was painted is kept.
        StorageError: the file system refused.
    """
    if work.is_done("paint", number):
        return work.records(Image, number)
    jobs = painting_jobs(work, number, painter)
    have = {record.id for record in work.records(Image, number)}
    waiting = [job for job in jobs if job.name not in have]
    folder = f"round-{number}"
    with work.stage("paint", number) as made, Progress(f"round {number}: painting", len(jobs)) as progress:
        progress.advance(len(jobs) - len(waiting))
        results = mapped(PaintJob(painter, work.normals), waiting)
        for job, painted in zip(waiting, results, strict=True):
            if painted is None:
                progress.advance()
                continue
            data = encode_png(painted.image)
            file = f"{folder}/images/{job.name}.png"
            mask = f"{folder}/masks/{job.name}.png" if painted.mask is not None else ""
            if painted.mask is not None:
                work.write(mask, encode_png(np.repeat(painted.mask[..., None], 3, axis=2)))
            work.write(file, data)
            work.append(
                Image(
                    job.name,
                    number,
                    job.parent,
                    job.normal.id if job.normal else "",
                    file,
                    hashlib.sha256(data).hexdigest(),
                    Made(painter.kind, painter.name, painter.digest, job.caption, job.seed),
                    mask,
                    _visibility(painted, None if job.normal is None else read_image(work.normals / job.normal.file)),
                ),
                number,
            )
            made.append(1)
            progress.advance()
    return work.records(Image, number)


@dataclass(frozen=True)
class PaintJob:
    """Paints one job: what is sent to other machines."""

    painter: Painter
    normals: object
    """Folder of the photographs."""

    def __call__(self, job: Job) -> Painted | None:
        """The painted anomaly; None where the painter finds out only while it paints that it cannot."""
        normal = None if job.normal is None else read_image(f"{self.normals}/{job.normal.file}")
        try:
            return self.painter.paint(job.caption, normal, seed=job.seed)
        except UndrawableCaptionError:
            return None


def painting_jobs(work: WorkFolder, number: int, painter: Painter) -> list[Job]:
    """What is to be painted in a round, in order.

    Raises:
        InputError: no usable captions.
    """
    captions = [record for record in work.records(Caption, number) if not record.refused]
    _need(captions, f"captions of round {number}", "edgead kka imagine")
    normals = work.records(Normal)
    jobs = []
    for caption in captions:
        for copy in range(work.config.paint.images):
            name = caption.id.replace("c", "i", 1) + (f"-{copy}" if work.config.paint.images > 1 else "")
            seed = seed_of(work.config.seed, "image", number, caption.id, copy)
            normal = normals[seed_of(seed, "normal") % len(normals)] if painter.needs_normal else None
            jobs.append(Job(name, caption.text, caption.id, normal, seed))
    return jobs


def judge(work: WorkFolder, number: int, evaluator: Evaluator) -> list[Judgement]:
    """Divide the images of a round into hard and easy ones, equation (6).

    Args:
        work: the run.
        number: of the round.
        evaluator: measures distances to the centre of the normals.

    Raises:
        InputError: no images.
        ImageError: an image of the work folder that cannot be read.
    """
    if work.is_done("judge", number):
        return work.records(Judgement, number)
    images = work.records(Image, number)
    _need(images, f"images of round {number}", "edgead kka paint")
    have = {record.parent for record in work.records(Judgement, number)}
    floor = work.config.judge.visible_floor
    with work.stage("judge", number) as made, Progress(f"round {number}: judging", len(images)) as progress:
        for start in range(0, len(images), _EMBED_BATCH):
            part = images[start : start + _EMBED_BATCH]
            if not have.issuperset(record.id for record in part):
                names = [record.id for record in part]
                measured = evaluator.measure(names, [painted_image(work, record) for record in part])
                new = []
                for record, (distance, limit) in zip(part, measured, strict=True):
                    # Without a mask nobody knows how visible it is.
                    faint = bool(record.mask) and record.visible < floor
                    hard = is_hard(distance, limit) and not faint
                    name = record.id.replace("i", "j", 1)
                    if record.id not in have:
                        new.append(Judgement(name, number, record.id, distance, limit, hard, faint))
                work.append_all(new, number)
                made.append(len(new))
            progress.advance(len(part))
    return work.records(Judgement, number)


def hard_limit(normal_distances: NDArray[np.floating], quantile: float) -> float:
    """The distance up to which a generated anomaly is hard, equation (6): a quantile of the normals' distances.

    Args:
        normal_distances: [N] of normals that the evaluator did not train on.
        quantile: 1 for the farthest normal, "nearer to the centre than some normal samples".

    Raises:
        InputError: no distances, or one that is not finite.
    """
    distances = np.asarray(normal_distances, np.float64)
    if not distances.size or not np.isfinite(distances).all():
        raise InputError(
            wanted="finite distances of held-out normals",
            got=f"{distances.size}",
            next_step="Train the evaluator with a smaller learning rate, or give more photographs.",
        )
    return float(np.quantile(distances, quantile))


def is_hard(distance: float, limit: float) -> bool:
    """Equation (6): nearer to the centre than the limit."""
    return distance < limit


def painted_image(work: WorkFolder, record: Image) -> Frame:
    """The pixels of a painted anomaly, checked against its record.

    Raises:
        ImageError: the file is missing, or is not the one that was painted.
    """
    path = work.path / record.file
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


def _written(
    config: Config, number: int, author: Author, painter: Painter, places: range, prompts: Sequence[str]
) -> list[tuple[str, str, int]]:
    """(text, why it is of no use, seed) for each place; a whole batch at a time, as an answer may depend on it."""
    found: list[tuple[str, str, int]] = [("", _NOTHING, 0)] * len(places)
    open_places = list(range(len(places)))
    for attempt in range(config.imagine.attempts):
        seeds = [seed_of(config.seed, "caption", number, places[at], attempt) for at in open_places]
        answers = author.write([prompts[at] for at in open_places], seeds)
        for at, seed, answer in zip(list(open_places), seeds, answers, strict=True):
            text = clean_phrase(answer)
            refused = _NOTHING if text is None else _undrawable(painter, text)
            found[at] = (text or answer[:200].strip(), refused, seed)
            if not refused:
                open_places.remove(at)
        if not open_places:
            break
    return found


def _undrawable(painter: Painter, text: str) -> str:
    try:
        painter.check(text)
    except UndrawableCaptionError as error:
        return error.got[:500]
    return ""


def prompt_of(config: Config, caption: str) -> str:
    """What the author is asked after a normal's caption.

    Raises:
        InputError: the configuration's prompt has other places than `{class_name}` and `{caption}`.
    """
    try:
        return config.imagine.prompt.format(class_name=config.class_name, caption=caption)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            wanted="a prompt with {class_name} and {caption} as `imagine.prompt`",
            got=f"{config.imagine.prompt[:100]!r} ({error})",
            next_step="Correct it.",
        ) from error


def _visibility(painted: Painted, normal: Frame | None) -> float:
    """Mean absolute change of colour inside the mask, 0 to 255; 0 where nobody can know."""
    if painted.mask is None or normal is None or normal.shape != painted.image.shape or not painted.mask.any():
        return 0.0
    inside = painted.mask > 0
    change = np.abs(painted.image[inside].astype(np.int16) - normal[inside].astype(np.int16))
    return round(float(change.mean()), 6)


def _reasons(work: WorkFolder, number: int) -> str:
    counted: dict[str, int] = {}
    for record in work.records(Caption, number):
        counted[record.refused] = counted.get(record.refused, 0) + 1
    most = sorted(counted.items(), key=lambda item: -item[1])[:3]
    return "; ".join(f"{count} x {reason}" for reason, count in most)


def numbered(letter: str, number: int, place: int) -> str:
    """Id of the n-th artefact of a round."""
    return f"{letter}{number}-{place:0{_DIGITS}d}"


def _need(found: Sequence[object], what: str, command: str) -> None:
    if not found:
        raise InputError(wanted=what, got="none", next_step=f"Make them with: {command}")
