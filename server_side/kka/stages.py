"""The first stages of a round: imagine, paint, judge. Each goes on where it stopped and repeats nothing.

Every artefact depends on the configuration, its round and its number alone (`seams.seed_of`), so that a run that was
killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.errors import InputError
from edgead.runtime.image import encode_png, read_image
from edgead.runtime.progress import Progress
from edgead.server_side.kka.config import Config
from edgead.server_side.kka.jobs import Batch, EmbedJob, Job, MeasureJob, OrderedMap, PaintJob, WriteJob
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
    seed_of,
)
from edgead.server_side.kka.work import WorkFolder

Record = TypeVar("Record")

_DIGITS = 5
_FRAMES = 16
"""Frames that are embedded or measured together: what a worker is given at a time. Results do not depend on it."""


def pick_representatives(
    work: WorkFolder, embedder: Embedder, mapped: OrderedMap[Any, Any] = map
) -> list[Representative]:
    """Cluster the described normals and choose one representative for each; see `representatives`.

    Args:
        work: the run.
        embedder: in whose features clusters are found.
        mapped: spreads the embedding; see `OrderedMap`.

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
        parts = _parts(normals)
        for part, found in zip(parts, mapped(EmbedJob(embedder, work.normals), parts), strict=True):
            features.append(found)
            progress.advance(len(part))
        chosen = choose(
            np.concatenate(features),
            settings.clusters,
            shrinkage=settings.shrinkage,
            seed=seed_of(work.config.seed, "clusters"),
        )
        for best in chosen:
            name = f"r{best.cluster:0{_DIGITS}d}"
            if name not in have:
                parent = normals[best.row].id
                work.append(Representative(name, parent, best.cluster, best.size, round(best.score, 9)))
                made.append(1)
    return work.records(Representative)


def imagine(
    work: WorkFolder, number: int, author: Author, painter: Painter, mapped: OrderedMap[Any, Any] = map
) -> list[Caption]:
    """Have captions of anomalies written, one after another representative in turn.

    An answer without usable words, or one that the painter cannot draw, is asked for again with another seed; after
    `imagine.attempts` the last one is kept with the reason.

    Args:
        work: the run.
        number: of the round.
        author: writes.
        painter: says what it cannot draw.
        mapped: spreads the work of an author that `travels`; see `OrderedMap`.

    Raises:
        InputError: no representatives, or not one usable caption in the whole round.
        LanguageModelError: the author cannot be reached, or failed.
        OutOfMemoryError: the author's memory does not suffice; what was written is kept.
    """
    if work.is_done("imagine", number):
        return work.records(Caption, number)
    config = work.config
    representatives = work.records(Representative)
    _need(representatives, "representatives", "edgead kka representatives")
    captions = {record.id: record.caption for record in work.records(Normal)}
    parents = [representatives[place % len(representatives)] for place in range(config.captions)]
    prompts = [prompt_of(config, captions[parent.parent]) for parent in parents]
    names = [numbered("c", number, place) for place in range(config.captions)]
    have = {record.id for record in work.records(Caption, number)}
    batches = []
    for start in range(0, config.captions, config.imagine.batch):
        places = range(start, min(start + config.imagine.batch, config.captions))
        if not have.issuperset(names[at] for at in places):
            batches.append(Batch(places, [prompts[at] for at in places]))
    spread = mapped if getattr(author, "travels", False) else map
    with work.stage("imagine", number) as made, Progress(f"round {number}: captions", config.captions) as progress:
        progress.advance(config.captions - sum(len(batch.places) for batch in batches))
        function = WriteJob(author, painter, config.seed, number, config.imagine.attempts)
        for batch, written in zip(batches, spread(function, batches), strict=True):
            new = [
                Caption(
                    names[at],
                    number,
                    parents[at].id,
                    answer.text,
                    Made(author.kind, author.name, author.digest, prompts[at], answer.seed),
                    answer.refused,
                )
                for at, answer in zip(batch.places, written, strict=True)
                if names[at] not in have
            ]
            work.append_all(new, number)
            made.append(len(new))
            progress.advance(len(batch.places))
        usable = sum(not record.refused for record in work.records(Caption, number))
        if not usable:
            raise InputError(
                wanted=f"captions of anomalies from {author.name or author.kind!r}",
                got=f"{config.captions} answers in round {number}, none of use: {_reasons(work, number)}",
                next_step="Change `imagine.prompt` or the model, and begin in another work folder.",
            )
    return work.records(Caption, number)


def paint(work: WorkFolder, number: int, painter: Painter, mapped: OrderedMap[Any, Any] = map) -> list[Image]:
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


def judge(work: WorkFolder, number: int, evaluator: Evaluator, mapped: OrderedMap[Any, Any] = map) -> list[Judgement]:
    """Divide the images of a round into hard and easy ones, equation (6).

    Args:
        work: the run.
        number: of the round.
        evaluator: measures distances to the centre of the normals.
        mapped: spreads the measuring; see `OrderedMap`.

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
    parts = [part for part in _parts(images) if not have.issuperset(record.id for record in part)]
    with work.stage("judge", number) as made, Progress(f"round {number}: judging", len(images)) as progress:
        progress.advance(len(images) - sum(map(len, parts)))
        function = MeasureJob(evaluator, work.path.resolve())
        for part, measured in zip(parts, mapped(function, parts), strict=True):
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


def _parts(records: Sequence[Record]) -> list[Sequence[Record]]:
    return [records[start : start + _FRAMES] for start in range(0, len(records), _FRAMES)]


def numbered(letter: str, number: int, place: int) -> str:
    """Id of the n-th artefact of a round."""
    return f"{letter}{number}-{place:0{_DIGITS}d}"


def _need(found: Sequence[object], what: str, command: str) -> None:
    if not found:
        raise InputError(wanted=what, got="none", next_step=f"Make them with: {command}")
