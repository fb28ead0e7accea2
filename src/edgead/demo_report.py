"""The demo's report: one HTML file that shows what was done, what came out, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgead import __version__
from edgead.demo_data import BATCH, KINDS, PRODUCTS
from edgead.demo_live import KINDS as LINE_KINDS
from edgead.demo_plots import svg_bars, svg_timeline, verdict_word
from edgead.demo_style import STYLE
from edgead.runtime.image import list_images, read_image
from edgead.runtime.inspection import STAGES, Inspection, Verdict
from edgead.runtime.inspector import Inspector
from edgead.runtime.overlay import overlay
from edgead.server_side.datasets import test_samples
from edgead.server_side.evaluation import Evaluation, Outcome
from edgead.server_side.evaluation_report import HEAD, rows
from edgead.server_side.html import cards, data_uri, page, svg_histogram, svg_roc, table
from edgead.server_side.metrics import roc_points

if TYPE_CHECKING:
    from edgead.demo_run import DemoResult, EngineFigures

Frame = NDArray[np.uint8]


def html_report(result: DemoResult, folder: Path) -> str:
    """The report as one page without script or request.

    Args:
        result: what the demo found.
        folder: where its pictures and bundle lie now.
    """
    body = [STYLE]
    with Inspector(result.bundle) as inspector:
        first, second = _before_and_after(result, folder, inspector)
        body += [first, _key_figures(result), _update(result), second]
        body += [_gallery(result, folder, inspector), _measured(result), _engines(result)]
        body += [_contents(result), _next(result), _footer(result)]
    lead = (
        f"Two products, four kinds of defects, one bundle. Everything on this page was painted, learned, compiled, "
        f"inspected and measured in {result.seconds['total']:.0f} seconds on this machine: {result.machine}. "
        "Nothing was downloaded."
    )
    return page("An inspector that learns while it runs", "".join(body), lead)


def _before_and_after(result: DemoResult, folder: Path, inspector: Inspector) -> tuple[str, str]:
    """A good part with the new code and a defect beside the code, each under the old and the new knowledge."""
    live = result.live
    samples = test_samples(folder / "data" / f"{BATCH}-new-batch")
    good = _passed(result) or next(sample for sample in samples if not sample.anomalous).path
    bad = _plainest([sample.path for sample in samples if sample.anomalous])
    pictures: dict[tuple[str, Path], tuple[Frame, Inspection]] = {}
    for when, pack in (("before", live.before), ("after", live.after)):
        inspector.swap(pack)
        for path in (good, bad):
            frame = read_image(path)
            inspection = inspector.inspect(frame, product=BATCH)
            pictures[when, path] = overlay(frame, inspection, inspector.spec.preprocessing), inspection
    inspector.swap(live.before)
    alarms, count = live.alarms("new good", live.before.version)
    how_many = "Every" if alarms == count else f"{alarms} of {count}"
    first = "<h2>Monday: a supplier begins to engrave a code. " + (
        f"{how_many} good part{'' if alarms == count else 's'} alarm{'s' if alarms == count else ''}.</h2>"
    )
    first += _step_row(
        pictures["before", good],
        "A good part with the new code, under Monday's knowledge",
        pictures["after", good],
        "The same picture and the same engine, one update later",
        f"{live.swap_seconds * 1e3:.0f} ms",
        f"to swap in {live.added} rows ({_bytes(live.row_bytes)}) learned from {live.taught} photographs",
    )
    kind = bad.parent.name
    second = "<h2>A real defect beside the code still stops the line</h2>" + _step_row(
        pictures["before", bad],
        f"A {kind} beside the new code, before: two alarms",
        pictures["after", bad],
        f"After: the code is known, the {kind} is not",
        "0 bytes",
        "of the engine changed",
    )
    return first, second


def _passed(result: DemoResult) -> Path | None:
    """The first good picture with the new code that the new knowledge passes."""
    live = result.live
    for seen in live.seen:
        shown = live.shown[seen.place]
        if shown.kind == "new good" and seen.inspection.knowledge == live.after.version and seen.inspection.passes:
            return shown.path
    return None


def _step_row(
    before: tuple[Frame, Inspection],
    before_text: str,
    after: tuple[Frame, Inspection],
    after_text: str,
    large: str,
    small: str,
) -> str:
    def one(item: tuple[Frame, Inspection], text: str) -> str:
        return (
            f'<figure><img src="{data_uri(item[0], side=480)}" alt="{escape(text, quote=True)}">'
            f"<figcaption>{verdict_word(item[1].verdict)} &nbsp;{escape(text)}</figcaption></figure>"
        )

    middle = f'<div class="arrow"><i>&#10142;</i><b>{escape(large)}</b>{escape(small)}</div>'
    return f'<div class="step">{one(before, before_text)}{middle}{one(after, after_text)}</div>'


def _key_figures(result: DemoResult) -> str:
    live = result.live
    fastest = min(
        (engine for engine in result.engines if engine.milliseconds), key=lambda engine: engine.milliseconds["total"]
    )
    facts = [
        (f"{evaluation.kinds[0].auroc or 0:.3f}", f"image AUROC, {product}")
        for product, evaluation in result.evaluations.items()
    ]
    facts += [
        (f"{fastest.milliseconds['total']:.1f} ms", f"per frame to verdict, map and regions ({fastest.record.name})"),
        (f"{live.swap_seconds * 1e3:.0f} ms", "knowledge swap on a running inspector, off the frame path"),
        (_bytes(live.row_bytes), "what the new pattern costs to ship"),
        (f"{live.lost} of {len(live.seen)}", "frames lost during the update"),
    ]
    return cards(facts)


def _update(result: DemoResult) -> str:
    live = result.live
    lines = []
    for kind, text in LINE_KINDS.items():
        before, after = live.alarms(kind, live.before.version), live.alarms(kind, live.after.version)
        lines.append([text, f"{before[0]} of {before[1]} NG", f"{after[0]} of {after[1]} NG"])
    during = [
        seen.ended - seen.began for seen in live.seen if seen.ended > live.swap_began and seen.began < live.swap_ended
    ]
    usual = float(np.median([seen.ended - seen.began for seen in live.seen]))
    slowest = max(during, default=usual)
    return "".join(
        [
            "<h2>The update, frame by frame</h2>",
            f'<div class="panel wide">{svg_timeline(live)}</div>',
            '<p class="note">Each dot is a frame that the running inspector answered. It '
            f"never paused: {len(live.seen)} frames, {live.lost} lost, {live.during_swap} of them while the knowledge "
            f"changed (the slowest took {slowest * 1e3:.0f} ms; {usual * 1e3:.0f} ms is usual while the same cores "
            f"also learn). Each names the version that judged it ({live.before.version} or {live.after.version}) and "
            f"was checked against that version alone: {live.mixed} mixed. {live.offered} patches of {live.taught} "
            f"photographs were unlike anything known; {live.added} rows stand for them. The threshold was set anew on "
            f"{live.calibrated} held-out good parts, old and new, which the bank never saw. From photographs to "
            f"knowledge: {live.learn_seconds:.1f} s.</p>",
            table(["what goes past the camera", "before", "after"], lines),
        ]
    )


def _gallery(result: DemoResult, folder: Path, inspector: Inspector) -> str:
    parts = [
        "<h2>What it sees</h2>",
        "<p>Photograph and verdict. It learned from good parts only and never saw a defect. Heat begins near the "
        "threshold, so a good part stays as it is.</p>",
    ]
    for product in PRODUCTS:
        parts += [f"<h3>{product.capitalize()}</h3>", '<div class="shots">']
        outcomes = result.evaluations[product].outcomes
        for kind in ("good", *KINDS):
            parts.append(_pair(_typical([o for o in outcomes if o.sample.kind == kind]), inspector, product, kind))
        found = [o for o in outcomes if o.sample.anomalous and o.inspection.verdict is Verdict.NG]
        if found:
            faintest = min(found, key=lambda outcome: outcome.score)
            label = f"the faintest that it finds: {faintest.sample.kind}"
            parts.append(_pair(faintest, inspector, product, label))
        parts.append("</div>")
    wrong = [
        (product, outcome)
        for product, evaluation in result.evaluations.items()
        for outcome in _mistakes(evaluation)[:2]
    ]
    parts.append("<h3>Where it is wrong</h3>")
    if not wrong:
        parts.append("<p>On these test sets: nowhere at the calibrated threshold.</p>")
    else:
        parts += [
            "<p>The clearest mistakes on the test sets at the calibrated threshold: faint defects, odd good parts.</p>",
            '<div class="shots">',
            *(
                _pair(
                    outcome,
                    inspector,
                    product,
                    ("missed " if outcome.sample.anomalous else "false alarm: ") + outcome.sample.kind,
                )
                for product, outcome in wrong
            ),
            "</div>",
        ]
    return "".join(parts)


def _typical(outcomes: Sequence[Outcome]) -> Outcome:
    """The middle one by score among those that were judged rightly, or among all."""
    right = [o for o in outcomes if (o.inspection.verdict is Verdict.NG) == o.sample.anomalous] or list(outcomes)
    return sorted(right, key=lambda outcome: outcome.score)[len(right) // 2]


def _mistakes(evaluation: Evaluation) -> list[Outcome]:
    wrong = [o for o in evaluation.outcomes if (o.inspection.verdict is Verdict.NG) != o.sample.anomalous]
    return sorted(wrong, key=lambda outcome: -abs(outcome.score - outcome.inspection.threshold))


def _plainest(paths: Sequence[Path]) -> Path:
    """The last picture of its kind is painted with the most contrast; a scratch shows best what is meant."""
    scratches = [path for path in paths if path.parent.name == "scratch"]
    return sorted(scratches or paths)[-1]


def _pair(outcome: Outcome, inspector: Inspector, product: str, label: str) -> str:
    frame = read_image(outcome.sample.path)
    inspection = inspector.inspect(frame, product=product)
    picture = overlay(frame, inspection, inspector.spec.preprocessing)
    # The strip under the picture would make the two sides unequal; its figures stand in the caption.
    picture = picture[: round(frame.shape[0] * picture.shape[1] / frame.shape[1])]
    share = (inspection.score or 0.0) / max(inspection.threshold, 1e-9)
    alt = escape(f"{product}: {label}", quote=True)
    return (
        f'<div class="shot"><div><img src="{data_uri(frame)}" alt="{alt}"><img src="{data_uri(picture)}" alt="{alt}, '
        f'as inspected"></div><p><span class="tags">{escape(label)}</span>{verdict_word(inspection.verdict)} '
        f"&nbsp;score {share:.2f} x the threshold</p></div>"
    )


def _measured(result: DemoResult) -> str:
    parts = ["<h2>How good it is</h2>"]
    for product, evaluation in result.evaluations.items():
        groups = {"good": [o.score for o in evaluation.outcomes if not o.sample.anomalous]}
        groups |= {kind: [o.score for o in evaluation.outcomes if o.sample.kind == kind] for kind in KINDS}
        labels = np.array([o.sample.anomalous for o in evaluation.outcomes], np.bool_)
        curves = {}
        for kind in KINDS:
            chosen = np.array([o.sample.kind in ("good", kind) for o in evaluation.outcomes], np.bool_)
            scores = np.array([o.score for o in evaluation.outcomes])
            curves[kind] = roc_points(labels[chosen], scores[chosen])
        parts += [
            f"<h3>{product.capitalize()}</h3>",
            table(HEAD, rows(evaluation)),
            '<div class="plots">',
            f'<div class="panel">{svg_histogram(groups, evaluation.threshold, "Image scores")}</div>',
            f'<div class="panel">{svg_roc(curves, "ROC by kind of defect")}</div></div>',
        ]
    parts.append(
        '<p class="note">Thresholds come from held-out good parts alone, for a wanted '
        "false-alarm rate of 1 %. &ldquo;wrong&rdquo;: defects missed, or good parts called NG, at that threshold. "
        "Defects are painted from faint to plain; masks are exact.</p>"
    )
    return "".join(parts)


def _engines(result: DemoResult) -> str:
    lines = []
    bars = {}
    for engine in result.engines:
        lines.append(_engine_row(engine))
        if engine.milliseconds:
            # The demo adds no sentences.
            stages = [stage for stage in STAGES if stage not in ("normality", "total") and stage in engine.milliseconds]
            bars[engine.record.name] = [(stage, engine.milliseconds[stage]) for stage in stages]
    head = [
        "engine",
        "ms per frame",
        "frames/s",
        "score vs torch",
        "map vs torch",
        "verdicts changed",
        "size",
        "made with",
    ]
    notes = [f"{engine.record.name}: {engine.note}." for engine in result.engines if engine.note]
    return "".join(
        [
            "<h2>Engines on this machine</h2>",
            "<p>One export, one knowledge pack, the same verdicts. An engine that differs from torch by more than its "
            "precision allows on golden pictures fails the export.</p>",
            table(head, lines),
            f'<div class="panel wide" style="margin-top:16px">{svg_bars(bars, "ms", "Milliseconds by stage")}</div>',
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
        ]
    )


def _engine_row(engine: EngineFigures) -> list[str]:
    parity, total = engine.record.parity, engine.milliseconds.get("total")
    return [
        engine.record.name,
        "-" if total is None else f"{total:.1f}",
        "-" if total is None else f"{1000 / total:.0f}",
        "-" if parity is None else f"{parity.score:.1e}",
        "-" if parity is None else f"{parity.map:.1e}",
        "-" if engine.changed is None else f"{engine.changed} of {engine.frames}",
        _bytes(engine.size),
        engine.record.made_with,
    ]


def _contents(result: DemoResult) -> str:
    manifest = result.bundle.manifest
    what = {
        "engines": "compiled graphs: the part that rarely changes",
        "knowledge": "bank, thresholds and score scale, one file per product: the part that changes every day",
        "golden": "pictures and torch's answers, to test the engine on any machine",
        "parity.json": "how far each engine is from torch",
        "card.md": "what it was made from",
    }
    groups: dict[str, list[int]] = {}
    for name, record in manifest.files.items():
        top, _, rest = name.partition("/")
        key = (
            f"engines/{rest.split('/')[0]}/" if top == "engines" else (f"{top}/" if rest and top == "golden" else name)
        )
        groups.setdefault(key, []).append(record.size)
    lines = [[key, _bytes(sum(sizes)), what.get(key.split("/")[0], "")] for key, sizes in sorted(groups.items())]
    total = sum(record.size for record in manifest.files.values())
    return "".join(
        [
            "<h2>What is in the bundle</h2>",
            f"<p><code>parts.bundle</code>, {_bytes(total)}: two products on one trunk. The second product cost one "
            "knowledge file, no export. The manifest holds the SHA-256 of every file.</p>",
            '<div class="tree">',
            table(["file", "size", "what it is"], lines),
            "</div>",
        ]
    )


def _next(result: DemoResult) -> str:
    commands = (
        "# 20 photographs of good parts already work, 200 are comfortable\n"
        "edgead export --normal photos/good --target onnx --target openvino:fp16 -o part.bundle\n\n"
        "# inspect new ones: a verdict per picture, overlays that show where\n"
        "edgead run part.bundle new-photos/ --overlays out/\n\n"
        "# measure, if you have labelled ones (MVTec layout)\n"
        "edgead evaluate part.bundle --data photos --html report.html"
    )
    return (
        "<h2>Now with your own photographs</h2>"
        f"<pre>{escape(commands)}</pre>"
        "<p>On the camera: <code>pip install edgead</code>, copy the bundle, <code>edgead run part.bundle "
        "/dev/video0 --json</code>. No torch there, no compiler, no network.</p>"
    )


def _footer(result: DemoResult) -> str:
    pictures = len(list_images(result.bundle.path.parent / "data"))
    steps = "; ".join(f"{step} {value:.1f} s" for step, value in result.seconds.items() if step != "total")
    return (
        f"<footer><p>edgead {__version__}, backbone {escape(result.options.backbone)}, "
        f"{result.options.size} x {result.options.size} pixels, seed {result.options.seed}, "
        f"{pictures} pictures and masks. {escape(steps)}.</p></footer>"
    )


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.0f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"
