"""`edgead run`: frames of a source through an inspector, answers to the terminal, a file, pictures."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
import msgspec

from edgead.runtime.errors import ImageError, InputError, storage_errors
from edgead.runtime.files import refuse_existing, write_file
from edgead.runtime.image import encode_png
from edgead.runtime.inspection import (
    Inspection,
    ResultLine,
    Verdict,
    decode_line,
    encode_line,
    not_inspected,
    percentile,
    result_line,
)
from edgead.runtime.inspector import Inspector
from edgead.runtime.knowledge import read_pack
from edgead.runtime.overlay import overlay
from edgead.runtime.progress import Progress
from edgead.runtime.sources import SourceFrame, open_source


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--target", help="Which engine: onnx, openvino:fp16, ...; the best here if left out.")
@click.option("--product", help="Which product's knowledge; the bundle's default if left out.")
@click.option("--knowledge", "packs", multiple=True, type=click.Path(path_type=Path), help="Pack to use instead.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads per inference.")
@click.option("--deadline-ms", type=click.FloatRange(1), help="Answer each frame within so many milliseconds.")
@click.option("--unanswered", type=click.Choice(["ng", "ok"]), default="ng", show_default=True,
              help="Decision for frames that were not inspected.")
@click.option("--limit", type=click.IntRange(1), help="Stop after so many frames.")
@click.option("--overlays", type=click.Path(path_type=Path), help="Write a picture of each answer here.")
@click.option("--only-ng", is_flag=True, help="Overlays and lines of frames that are not OK only.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write JSON lines to this file.")
@click.option("--resume", is_flag=True, help="Go on with --output; pictures that are in it are skipped.")
@click.option("--force", is_flag=True, help="Replace an existing --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line per frame.")
def run(
    bundle: Path,
    source: str,
    target: str | None,
    product: str | None,
    packs: tuple[Path, ...],
    threads: int | None,
    deadline_ms: float | None,
    unanswered: str,
    limit: int | None,
    overlays: Path | None,
    only_ng: bool,
    output: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Inspect a picture, a folder, a video or a camera (0, /dev/video0, rtsp://...).

    Files that are no pictures are answered NOT_INSPECTED and the run goes on; it fails (code 1) only if no
    frame at all was inspected. Ctrl-C ends after the frame in work, with a summary and code 130.

    \b
    Example:
      edgead run part.bundle photos/ --overlays out/
      edgead run part.bundle /dev/video0 --json --deadline-ms 50
    """
    frames, count = open_source(source)
    seen = _prepare_output(output, resume, force)
    tally = _Tally()
    with contextlib.ExitStack() as stack:
        inspector = stack.enter_context(
            Inspector(bundle, target=target, threads=threads, packs=[read_pack(path) for path in packs])
        )
        stream: IO[bytes] | None = None
        if output is not None:
            stream = stack.enter_context(_opened(output))
        total = min(filter(None, (count, limit)), default=None)
        progress = stack.enter_context(Progress("inspecting", total))
        try:
            for number, item in enumerate(frames):
                if limit is not None and number >= limit:
                    break
                if item.name in seen:
                    continue
                inspection = _inspect(inspector, item, product, deadline_ms)
                tally.add(inspection)
                progress.advance()
                if only_ng and inspection.verdict is Verdict.OK:
                    continue
                line = result_line(inspection, item.name, unanswered=Verdict(unanswered.upper()))
                _tell(line, as_json)
                if stream is not None:
                    with storage_errors(str(output), "to write results"):
                        stream.write(encode_line(line))
                        stream.flush()
                if overlays is not None and item.frame is not None:
                    picture = overlay(item.frame, inspection, inspector.spec.preprocessing)
                    write_file(overlays / _picture_name(item.name), encode_png(picture))
        except KeyboardInterrupt:
            tally.interrupted = True
    if not as_json:
        click.echo(tally.summary())
    if tally.interrupted:
        return 130
    return 1 if tally.frames and not tally.answered else 0


class _Tally:
    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.milliseconds: list[float] = []
        self.interrupted = False

    @property
    def frames(self) -> int:
        return sum(self.verdicts.values())

    @property
    def answered(self) -> int:
        return self.frames - self.verdicts[Verdict.NOT_INSPECTED]

    def add(self, inspection: Inspection) -> None:
        self.verdicts[inspection.verdict] += 1
        if inspection.verdict is not Verdict.NOT_INSPECTED:
            self.milliseconds.append(inspection.timings.get("total", 0.0))

    def summary(self) -> str:
        parts = [f"{self.verdicts[verdict]} {verdict.value.replace('_', ' ')}" for verdict in Verdict]
        text = f"{self.frames} frames: {', '.join(parts)}"
        if self.milliseconds:
            middle, high = percentile(self.milliseconds, 0.5), percentile(self.milliseconds, 0.95)
            text += f"; median {middle:.1f} ms, 95 % within {high:.1f} ms"
        return text + ("; interrupted" if self.interrupted else "")


def _inspect(
    inspector: Inspector, item: SourceFrame, product: str | None, deadline_ms: float | None
) -> Inspection:
    problem = item.problem
    if item.frame is not None:
        try:
            return inspector.inspect(item.frame, product=product, deadline_ms=deadline_ms)
        except ImageError as error:
            problem = f"not usable: {error.got}"
    pack = inspector.knowledge(product)
    return not_inspected(
        problem or "no frame",
        product=pack.product,
        knowledge=pack.version,
        threshold=pack.calibration.threshold,
    )


def _tell(line: ResultLine, as_json: bool) -> None:
    if as_json:
        click.echo(encode_line(line).decode(), nl=False)
        return
    score = f"{line.score:10.4g}" if line.score is not None else " " * 10
    more = line.reason or ", ".join(f"{r.width}x{r.height} at {r.x},{r.y}" for r in line.regions[:3])
    click.echo(f"{line.verdict:<13} {score}  {line.path}  {more}".rstrip())


def _prepare_output(output: Path | None, resume: bool, force: bool) -> set[str]:
    """Check and clear `--output`; with `--resume`, the names that are in it already."""
    if output is None:
        if resume:
            raise InputError(wanted="--output with --resume", got="none", next_step="Name the file to go on with.")
        return set()
    if not resume:
        refuse_existing(output, force)
        write_file(output, b"")
        return set()
    if not output.exists():
        return set()
    with storage_errors(output, "to read results"):
        data = output.read_bytes()
    names, whole = set(), 0
    for text in data.splitlines(keepends=True):
        try:
            names.add(decode_line(text).path)
        except msgspec.DecodeError:
            break  # a line that was cut short when the last run was killed
        whole += len(text)
    write_file(output, data[:whole])
    return names


@contextlib.contextmanager
def _opened(output: Path) -> Iterator[IO[bytes]]:
    with storage_errors(output, "to write results"):
        stream = open(output, "ab")
    try:
        yield stream
    finally:
        with storage_errors(output, "to write results"):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()


def _picture_name(name: str) -> str:
    """A file name for the overlay of a frame: folders and odd characters become '-'."""
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return kept.lstrip("-.")[-200:] + ".png"
