"""Captions of the normals: from a file, from a local captioner, or from the class name."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edgead.runtime.errors import InputError, missing_dependency, storage_errors
from edgead.runtime.image import list_images, read_image
from edgead.runtime.progress import Progress
from edgead.server_side.hub import digest_of, find_model
from edgead.server_side.kka.records import Made, Normal
from edgead.server_side.kka.work import WorkFolder
from edgead.server_side.prompts.answers import clean_phrase

_FILE_BYTES = 64 * 2**20
_DIGITS = 5
Describer = Callable[[Path], str]


def describe(work: WorkFolder) -> list[Normal]:
    """Describe every normal of a run; those that have their record are left as they are.

    Raises:
        InputError: no photographs, others than the run was begun with, a file of captions that misses some, or a
            captioner that cannot be had here.
        ImageError: a photograph that cannot be read.
        StorageError: the file system refused.
    """
    have = {record.file: record for record in work.records(Normal)}
    _unchanged(work, have.values())
    if work.is_done("describe"):
        return list(have.values())
    settings = work.config.describe
    paths = list_images(work.normals)
    if len(paths) < 2:
        raise InputError(
            wanted=f"photographs of normal parts in {work.normals}",
            got=f"{len(paths)}",
            next_step="Name their folder as `normals` in the configuration.",
        )
    names = [path.relative_to(work.normals).as_posix() for path in paths]
    _same_photographs(work, list(have), names)
    with work.stage("describe") as made, Progress("describing normals", len(paths)) as progress:
        caption, by = _describer(work, paths)
        for number, (path, name) in enumerate(zip(paths, names, strict=True)):
            if name not in have:
                read_image(path)
                text = clean_phrase(caption(path)) or settings.template.format(class_name=work.config.class_name)
                with storage_errors(path, "to read a photograph"):
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                have[name] = Normal(f"n{number:0{_DIGITS}d}", name, digest, text, by)
                work.append(have[name])
                made.append(1)
            progress.advance()
    return work.records(Normal)


def _unchanged(work: WorkFolder, records: Iterable[Normal]) -> None:
    """Refuse to go on with a photograph that is another one than was described: it was embedded, and painted on."""
    changed = []
    for record in records:
        path = work.normals / record.file
        with storage_errors(path, "to read a photograph"):
            if not path.is_file():
                changed.append(f"{record.file} is gone")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256:
                changed.append(f"{record.file} is another picture")
    if changed:
        raise _others(work, changed)


def _others(work: WorkFolder, changed: Sequence[str]) -> InputError:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return InputError(
        wanted=f"the photographs in {work.normals} that the run was begun with",
        got=f"others: {', '.join(changed[:3])}{more}",
        next_step="Put them back as they were, or begin in another work folder.",
    )


def _describer(work: WorkFolder, paths: Sequence[Path]) -> tuple[Describer, Made]:
    config = work.config
    if config.describe.captions:
        found = read_captions(Path(config.describe.captions))

        def written(path: Path) -> str | None:
            return found.get(path.relative_to(work.normals).as_posix(), found.get(path.name))

        missing = [path.relative_to(work.normals).as_posix() for path in paths if written(path) is None]
        if missing:
            raise InputError(
                wanted=f"a caption for each of {len(paths)} photographs in {config.describe.captions}",
                got=f"none for {len(missing)}: {', '.join(missing[:5])}",
                next_step="Add lines FILE<TAB>CAPTION, or leave `describe.captions` out.",
            )
        return lambda path: written(path) or "", Made("file", Path(config.describe.captions).name)
    if config.describe.captioner:
        return _captioner(config.describe.captioner)
    try:
        text = config.describe.template.format(class_name=config.class_name)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            wanted="a template with {class_name} as `describe.template`",
            got=f"{config.describe.template!r} ({error})",
            next_step="Correct it.",
        ) from error
    return lambda path: text, Made("class-name", prompt=config.describe.template)


def _same_photographs(work: WorkFolder, before: Sequence[str], names: Sequence[str]) -> None:
    """Refuse to go on with other photographs: ids are places in their list, and all else rests on them."""
    if list(names[: len(before)]) != list(before):
        changed = [name for name in before if name not in names] or [name for name in names if name not in before]
        raise _others(work, changed)


def read_captions(path: Path) -> dict[str, str]:
    """Captions from lines `FILE<TAB>CAPTION` by what stands for FILE; empty lines are skipped.

    Args:
        path: the file, UTF-8. FILE is the name of a photograph, or its path below the folder of normals.

    Raises:
        InputError: a line without a tab, or a file twice.
        StorageError: it cannot be read.
    """
    with storage_errors(path, "to read captions"), open(path, "rb") as stream:
        data = stream.read(_FILE_BYTES + 1)
    found: dict[str, str] = {}
    for number, line in enumerate(data[:_FILE_BYTES].decode(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        if not tab or name in found or not text.strip():
            raise InputError(
                wanted=f"FILE<TAB>CAPTION, each file once, in {path}",
                got=f"line {number}: {line[:100]!r}",
                next_step="Correct the line.",
            )
        found[name] = text.strip()
    return found


def _captioner(place: str) -> tuple[Describer, Made]:
    """A local image-to-text model of `transformers`, such as BLIP or GIT."""
    source, here = find_model(place, what="a captioner", next_step="describe.captioner = DIR")
    try:
        import torch

        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise missing_dependency(error.name or "transformers", "server", "a captioner") from error
    try:
        processor = transformers.AutoProcessor.from_pretrained(source, local_files_only=here)
        network = transformers.AutoModelForImageTextToText.from_pretrained(source, local_files_only=here).eval()
    except Exception as error:  # transformers raises whatever its layers raise
        raise InputError(
            wanted=f"an image-to-text model of transformers in {place}",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            next_step="Name a folder with config.json, weights and processor as `describe.captioner`.",
        ) from error

    def caption(path: Path) -> str:
        inputs = processor(images=read_image(path), return_tensors="pt")
        with torch.inference_mode():
            output = network.generate(**inputs, max_new_tokens=40, do_sample=False)
        return str(processor.batch_decode(output, skip_special_tokens=True)[0])

    return caption, Made("captioner", Path(place).name, digest_of(Path(source)))


__all__ = ["describe", "read_captions"]
