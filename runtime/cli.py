"""Commands of the light room: `edgead run`, `show` and `bench`. Imports wait until a command runs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgead.runtime.errors import InputError

if TYPE_CHECKING:
    from edgead.runtime.bundle import Bundle
    from edgead.runtime.inspector import Inspector
    from edgead.runtime.isolation import IsolatedInspector

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH)
@click.argument("source")
@click.option("--target", help="Engine: onnx, openvino:fp16, ...; the best one of this machine if left out.")
@click.option("--product", help="Whose knowledge to compare with; the bundle's default if left out.")
@click.option(
    "--knowledge",
    type=_PATH,
    multiple=True,
    help="A knowledge pack to use instead of the bundle's own, or a delta upon it; may be repeated, in their order.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON for each frame.")
@click.option("--overlays", type=_PATH, help="Write a picture of each result into this folder.")
@click.option("--only-ng", is_flag=True, help="Print and draw only frames that do not pass; --output has all.")
@click.option("-o", "--output", type=_PATH, help="Write one line of JSON for each frame into this file.")
@click.option("--resume", is_flag=True, help="Go on with the output: skip the frames that it already answers.")
@click.option("--force", is_flag=True, help="Replace an existing output; write among existing overlays.")
@click.option(
    "--deadline-ms", type=click.FloatRange(0, min_open=True), help="Answer within so many ms, or say NOT_INSPECTED."
)
@click.option(
    "--isolate",
    is_flag=True,
    help="Run the engine in a process of its own, which is replaced when it hangs or crashes.",
)
@click.option(
    "--hung-after",
    type=click.FloatRange(0, min_open=True),
    help="With --isolate: seconds after which a frame's call is hung; 10 deadlines (1 s at least) if left out, "
    "30 without a deadline.",
)
@click.option("--limit", type=click.IntRange(1), help="End after so many frames.")
@click.option(
    "--threads", type=click.IntRange(1), help="Processor threads; if left out all there are, or OMP_NUM_THREADS."
)
@click.option(
    "--unanswered",
    type=click.Choice(["ok", "ng"]),
    default="ng",
    show_default=True,
    help="What the line does with a frame that was not inspected.",
)
@click.option(
    "--frozen-after",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds of identical pictures after which a camera counts as frozen; 0 for never.",
)
@click.pass_context
def run(
    context: click.Context,
    bundle: Path,
    source: str,
    target: str | None,
    product: str | None,
    knowledge: tuple[Path, ...],
    as_json: bool,
    overlays: Path | None,
    only_ng: bool,
    output: Path | None,
    resume: bool,
    force: bool,
    deadline_ms: float | None,
    isolate: bool,
    hung_after: float | None,
    limit: int | None,
    threads: int | None,
    unanswered: str,
    frozen_after: float,
) -> None:
    """Inspect SOURCE with BUNDLE: a folder, a picture, a video file, a camera (0, /dev/video0) or a stream
    (rtsp://...).

    Folders and videos are inspected whole. A camera that is faster than the engine loses its oldest frames, which
    are counted. A frame that cannot be decoded, misses its deadline or upsets the engine is NOT_INSPECTED and
    does not pass by default; the run goes on.

    Ctrl-C ends the run after the current frame, with whole lines and the summary. Exit codes: 0 done, whatever
    the verdicts; 1 not one frame could be inspected; 2 the caller's mistake; 130 interrupted; 143 terminated.

    \b
    Example:
      edgead run part.bundle new-photos/ --overlays out/
      edgead run part.bundle new-photos/ -o results.jsonl --resume
      edgead run part.bundle 0 --json --deadline-ms 100
      edgead run part.bundle rtsp://camera/1 --json --deadline-ms 100 --isolate
    """
    if hung_after is not None and not isolate:
        raise InputError(
            wanted="--isolate with --hung-after", got="--hung-after alone", next_step="Only a process can be ended."
        )
    if resume and output is None:
        raise InputError(
            wanted="an output to go on with", got="--resume without --output", next_step="Add: -o FILE.jsonl"
        )
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.chain import read_chain
    from edgead.runtime.inspection import Verdict
    from edgead.runtime.run import Stop, refuse_if_none_inspected, run_stream, summary
    from edgead.runtime.sinks import JsonFile, JsonLines, Overlays, Sink, TextLines
    from edgead.runtime.sources import open_source
    from edgead.runtime.stream import Stream

    opened = open_bundle(bundle, verify=False)
    for path in knowledge:
        if not path.is_file():
            raise InputError(
                wanted=f"a knowledge pack (.safetensors) or delta at {path}",
                got="a folder" if path.is_dir() else "nothing there",
                next_step="Check the path.",
            )
    packs = list(read_chain(opened, knowledge).values())
    if len(packs) > 1 or (packs and product not in (None, packs[0].product)):
        raise InputError(
            wanted=f"knowledge of {product or packs[0].product!r}",
            got=f"knowledge of {', '.join(repr(pack.product) for pack in packs)}",
            next_step="Leave one out.",
        )
    product = packs[0].product if packs else product or opened.manifest.default
    frames = open_source(source, frozen_after=frozen_after or None)
    if resume and frames.live:
        raise InputError(
            wanted="a folder or video file with --resume", got=f"the live source {source}", next_step="Leave it out."
        )
    decision = Verdict.OK if unanswered == "ok" else Verdict.NG
    stop = Stop()
    options: dict[str, Any] = {"target": target, "threads": threads, "packs": packs, "products": [product]}
    with (
        _inspector(opened, isolate, hung_after, options) as inspector,
        contextlib.closing(frames),
    ):
        sinks: list[Sink] = []
        file = None if output is None else JsonFile(output, resume=resume, force=force, unanswered=decision)
        if file is not None:
            sinks.append(file)
            _note_other_knowledge(file.knowledge, inspector.knowledge(product).version)
        if overlays is not None:
            spec = inspector.spec.preprocessing
            again = force or resume
            sinks.append(Overlays(overlays, spec, force=again, unanswered=decision, only_ng=only_ng))
        if as_json:
            sinks.append(JsonLines(sys.stdout.buffer, unanswered=decision, only_ng=only_ng))
        else:
            sinks.append(TextLines(_print_line, unanswered=decision, only_ng=only_ng))
        done = file.done if file is not None else set()
        stream = Stream(
            inspector,
            frames,
            product=product,
            deadline_ms=deadline_ms,
            skip=done,
            limit=limit,
            stop=stop.event,
        )
        total = None if frames.total is None else max(0, min(frames.total - len(done), limit or frames.total))
        # On a terminal the lines themselves are the progress.
        watch = not sys.stdout.isatty()
        tally = run_stream(stream, sinks, total=total, show_progress=watch, stop=stop)
        restarts = getattr(inspector, "restarts", 0)
        text = summary(tally, skipped=len(done), dropped=stream.dropped, restarts=restarts, engine=inspector.engine)
    click.echo(("" if as_json else "\n") + text, err=as_json)
    if stop.signal is None:
        refuse_if_none_inspected(tally)
    else:
        context.exit(stop.exit_code)


@click.command()
@click.argument("path", metavar="BUNDLE_OR_PACK_OR_DETECTOR", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
def show(path: Path, as_json: bool) -> None:
    """What is in a bundle, a knowledge pack (.safetensors) or a fitted detector.

    Every file of a bundle is checked against its digest.

    \b
    Example:
      edgead show part.bundle
      edgead show part.bundle/knowledge/part.safetensors --json
    """
    from edgead.runtime.show import as_text, describe
    from edgead.runtime.spec import canonical_json

    record = describe(path)
    click.echo(canonical_json(record).decode() if as_json else as_text(record))


@click.command()
@click.argument("bundle", type=_PATH)
@click.option("--target", "targets", multiple=True, help="Engine to time: onnx, openvino:fp16, ...; may be repeated.")
@click.option("--all", "every", is_flag=True, help="Time every engine of the bundle.")
@click.option(
    "--images", type=_PATH, help="A picture or folder to time with; golden frames at 1280 x 1024 if left out."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="Time for each engine."
)
@click.option(
    "--threads", type=click.IntRange(1), help="Processor threads; if left out all there are, or OMP_NUM_THREADS."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def bench(
    bundle: Path,
    targets: tuple[str, ...],
    every: bool,
    images: Path | None,
    seconds: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time the engines of BUNDLE on this machine, each in a process of its own.

    Measured are whole frames, from the decoded picture to verdict and regions. Overhead is the whole frame against
    trunk and head alone; the cold start runs from the start of the process to its first verdict.

    \b
    Example:
      edgead bench part.bundle --all
      edgead bench part.bundle --target onnx --images photos/ --seconds 10 --json
    """
    from edgead.runtime.bench import Failure, Task, as_text, machine, measure
    from edgead.runtime.bundle import open_bundle
    from edgead.runtime.engines import default_record
    from edgead.runtime.errors import FailureError
    from edgead.runtime.image import list_images
    from edgead.runtime.progress import Progress
    from edgead.runtime.spec import canonical_json

    if every and targets:
        raise InputError(wanted="either --all or --target", got="both", next_step="Leave one out.")
    if images is not None and not images.exists():
        raise InputError(wanted=f"pictures at {images}", got="nothing there", next_step="Check the path.")
    if images is not None and images.is_dir():
        list_images(images)  # a mistake of the caller, told before any process is started
    opened = open_bundle(bundle, verify=False)
    if every:
        records = list(opened.manifest.engines)
    else:
        records = [opened.engine(target) for target in targets] or [default_record(opened)]
    results = []
    with Progress("engines", len(records)) as progress:
        for record in records:
            folder = None if images is None else str(images.resolve())
            task = Task(str(bundle.resolve()), record.name, threads, folder, seconds)
            results.append(measure(task))
            progress.advance(note=record.name)
    host = machine()
    if as_json:
        click.echo(canonical_json({"machine": host, "engines": results}).decode())
    else:
        click.echo(as_text(host, results))
    failed = [result for result in results if isinstance(result, Failure)]
    if len(failed) == len(results):
        raise FailureError(
            wanted="at least one engine that runs here", got=failed[0].reason, next_step=failed[0].next_step
        )


def _inspector(
    bundle: Bundle, isolate: bool, hung_after: float | None, options: dict[str, Any]
) -> Inspector | IsolatedInspector:
    if isolate:
        from edgead.runtime.isolation import IsolatedInspector

        return IsolatedInspector(bundle, hung_after=hung_after, **options)
    from edgead.runtime.inspector import Inspector

    return Inspector(bundle, **options)


def _print_line(text: str, verdict: object) -> None:
    colour = {"OK": "green", "NG": "red"}.get(str(getattr(verdict, "value", "")), "yellow")
    click.echo(click.style(text[:2], fg=colour) + text[2:])


def _note_other_knowledge(earlier: set[str], now: str) -> None:
    if earlier - {now}:
        others = ", ".join(sorted(earlier - {now}))
        click.echo(f"note: the output has answers of knowledge {others}; new ones are of {now}", err=True)
