"""A run as one HTML page: what each round painted, how hard it was, what it cost. After the paper's figures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgead.runtime.errors import EdgeadError
from edgead.runtime.files import write_file
from edgead.runtime.image import read_image
from edgead.server_side.html import ACCENT, BAD, GOOD, INK, LINE, QUIET, cards, data_uri, page, table, ticks
from edgead.server_side.kka.jobs import painted_image
from edgead.server_side.kka.measuring import NO_ANOMALIES
from edgead.server_side.kka.records import Caption, Image, Judgement, Normal, Representative
from edgead.server_side.kka.rounds import facts
from edgead.server_side.kka.work import WorkFolder

_SHOWN = 12
_SIDE = 220
_BINS = 48
_IN_A_ROW = 7
_ROW = f"grid-template-columns:repeat({_IN_A_ROW},minmax(0,1fr))"


def write_report(work: WorkFolder, output: Path | None = None) -> Path:
    """Write the report of what a run has made so far.

    Args:
        work: the run.
        output: the HTML file; `report.html` in the work folder if None.

    Raises:
        StorageError: the file system refused.
    """
    output = output or work.path / "report.html"
    write_file(output, report_html(work).encode())
    return output


def report_html(work: WorkFolder) -> str:
    """The page; see `write_report`."""
    numbers = [number for number in range(work.config.rounds + 1) if work.is_done("judge", number)]
    rounds = [facts(work, number) for number in numbers]
    body = [_cards(rounds), _rounds_table(work, rounds)]
    if rounds:
        body += [
            "<h2>How hard</h2>",
            '<div class="row">',
            f'<div class="panel">{_shares(rounds)}</div>',
            f'<div class="panel">{_distances(work, rounds)}</div>',
            "</div>",
            '<p class="note">Distances to the centre of the confusion evaluator, divided by the limit that each image '
            "was judged by: left of the line is hard, equation (6). Normals are those that no evaluator was trained on."
            "</p>",
        ]
    measured = _auroc_table(work, numbers)
    if measured:
        body += ["<h2>What it is worth</h2>", measured]
    if len(rounds) > 1:
        body += ["<h2>Round by round</h2>", _side_by_side(work, numbers)]
    for each in rounds:
        body += [f"<h2>KKA({each['round']})</h2>", _gallery(work, each["round"])]
    body += ["<h2>After which normals</h2>", _representatives(work), "<h2>Cost</h2>", _costs(rounds)]
    mode = {"add": "each round joins those before", "rep": "hard anomalies replace easy ones"}[work.config.mode]
    lead = f"{work.config.class_name}: {len(work.records(Normal))} normals, {mode}, seed {work.config.seed}"
    return page("Key knowledge augmentation", "".join(body), lead)


def _cards(rounds: Sequence[dict[str, Any]]) -> str:
    if not rounds:
        return "<p>No round is judged yet.</p>"
    first, last = rounds[0], rounds[-1]
    found = [(str(sum(each["images"] for each in rounds)), "painted anomalies")]
    if first["hard_share"] is not None:
        found.append((_percent(first["hard_share"]), "hard in KKA(0)"))
    if len(rounds) > 1 and last["hard_share"] is not None:
        found.append((_percent(last["hard_share"]), f"hard in KKA({last['round']})"))
    found.append((f"{last['set']}", f"in the last set, {last['set_hard']} of them hard"))
    return cards(found)


def _rounds_table(work: WorkFolder, rounds: Sequence[dict[str, Any]]) -> str:
    head = ["round", "captions", "of no use", "images", "hard", "easy", "too faint", "hard share", "visible", "set"]
    lines = [
        [
            f"KKA({each['round']})",
            *(str(each[name]) for name in ("captions", "refused", "images", "hard", "easy", "faint")),
            _percent(each["hard_share"]),
            "-" if each["visible"] is None else f"{each['visible']:.1f}",
            f"{each['set']}, {each['set_hard']} hard",
        ]
        for each in rounds
    ]
    floor = (
        f"A defect whose colours change by less than {work.config.judge.visible_floor:g} of 255 is too faint to count."
    )
    return table(head, lines) + f'<p class="note">visible: median change of colour inside the mask. {floor}</p>'


def _shares(rounds: Sequence[dict[str, Any]]) -> str:
    """Hard share by round, as the paper's figure 3."""
    left, top, width, height = 46, 30, 300, 210
    parts = [_frame(left, top, width, height, "hard share by round")]
    for place in range(5):
        y = top + height - place / 4 * height
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="{LINE}"/>')
        parts.append(_label(left - 6, y + 4, f"{25 * place} %", "end"))
    slot = width / len(rounds)
    for place, each in enumerate(rounds):
        share = each["hard_share"] or 0.0
        x = left + slot * place + slot * 0.2
        parts.append(
            f'<rect x="{x:.1f}" y="{top + height * (1 - share):.1f}" width="{slot * 0.6:.1f}" '
            f'height="{height * share:.1f}" fill="{ACCENT}"/>'
        )
        middle = x + slot * 0.3
        parts.append(_label(middle, top + height * (1 - share) - 5, _percent(each["hard_share"]), "middle", INK))
        parts.append(_label(middle, top + height + 16, f"KKA({each['round']})", "middle"))
    return _svg(left + width + 14, top + height + 28, parts, "hard share by round")


def _distances(work: WorkFolder, rounds: Sequence[dict[str, Any]]) -> str:
    """Histograms of normals, hard and easy anomalies on one logarithmic axis, as the paper's figure 6."""
    groups: list[tuple[str, list[float], str]] = []
    normals = _normal_distances(work, rounds[-1]["round"])
    if normals:
        groups.append(("normals", normals, GOOD))
    for each in rounds:
        groups.append((f"KKA({each['round']}) hard", each["distances_over_limit"]["hard"], BAD))
        groups.append((f"KKA({each['round']}) easy", each["distances_over_limit"]["easy"], QUIET))
    values = np.log10(np.maximum([value for _, found, _ in groups for value in found] or [1.0], 1e-6))
    low, high = min(float(values.min()), -0.1), max(float(values.max()), 0.1)
    left, top, width, row = 104, 30, 300, 34
    height = row * len(groups)
    parts = [_frame(left, top, width, height, "distance to the centre, in multiples of the limit")]
    for row_place, (name, found, colour) in enumerate(groups):
        base = top + row * (row_place + 1)
        counts, _ = np.histogram(np.log10(np.maximum(found, 1e-6)) if found else [], np.linspace(low, high, _BINS + 1))
        for at, count in enumerate(counts):
            if count:
                tall = (row - 8) * count / counts.max()
                x = left + at * width / _BINS
                parts.append(
                    f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{width / _BINS - 0.5:.1f}" '
                    f'height="{tall:.1f}" fill="{colour}"/>'
                )
        parts.append(_label(left - 6, base - 13, name, "end", INK))
        parts.append(_label(left - 6, base - 1, str(len(found)), "end"))
    edge = left + (0 - low) / (high - low) * width
    parts.append(
        f'<line x1="{edge:.1f}" y1="{top}" x2="{edge:.1f}" y2="{top + height}" stroke="{INK}" stroke-dasharray="4 3"/>'
    )
    for tick in ticks(low, high):
        x = left + (tick - low) / (high - low) * width
        parts.append(_label(x, top + height + 16, f"{10**tick:.2g}", "middle"))
    return _svg(left + width + 14, top + height + 28, parts, "distances of normals, hard and easy anomalies")


def _normal_distances(work: WorkFolder, number: int) -> list[float]:
    from safetensors.numpy import load_file

    if work.config.judge.evaluator == "first":
        number = 0
    found: list[float] = []
    for path in sorted(work.round_folder(number).glob("evaluator-*.safetensors")):
        try:
            limit = float(json.loads(path.with_suffix(".json").read_bytes())["limit"])
            found += (load_file(path)["normal_distances"] / limit).tolist()
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            continue
    return found


def _gallery(work: WorkFolder, number: int) -> str:
    """Some images of a round with their captions, the nearest first: hard ones, then easy ones."""
    captions = {record.id: record.text for record in work.records(Caption, number)}
    images = {record.id: record for record in work.records(Image, number)}
    judged = sorted(work.records(Judgement, number), key=lambda record: record.distance / record.limit)
    parts = []
    for title, kind, chosen in (
        ("hard", "ng", [record for record in judged if record.hard]),
        ("easy", "ok", [record for record in judged if not record.hard and not record.faint]),
    ):
        if not chosen:
            parts.append(f"<h3>No {title} ones</h3>")
            continue
        # Spread over all distances, so that a page shows the whole range and not its edge.
        places = np.unique(np.linspace(0, len(chosen) - 1, min(_SHOWN, len(chosen))).astype(int))
        shown = "" if len(places) == len(chosen) else f", {len(places)} of them"
        parts.append(f'<h3>{len(chosen)} <span class="{kind}">{title}</span>{shown}</h3>')
        parts.append('<div class="grid">')
        parts += [_figure(work, images[chosen[at].parent], captions, chosen[at]) for at in places.tolist()]
        parts.append("</div>")
    return "".join(parts)


def _side_by_side(work: WorkFolder, numbers: Sequence[int]) -> str:
    """One row of pictures for each round, evenly over its distances, as the paper's figure 4: what became of them."""
    parts = []
    for number in numbers:
        captions = {record.id: record.text for record in work.records(Caption, number)}
        images = {record.id: record for record in work.records(Image, number)}
        judged = [record for record in work.records(Judgement, number) if not record.faint]
        judged.sort(key=lambda record: record.distance / record.limit)
        places = np.unique(np.linspace(0, len(judged) - 1, min(_IN_A_ROW, len(judged))).astype(int))
        cells = "".join(_figure(work, images[judged[at].parent], captions, judged[at]) for at in places.tolist())
        parts.append(f'<h3>KKA({number})</h3><div class="grid" style="{_ROW}">{cells}</div>')
    note = '<p class="note">From the hardest on the left to the easiest on the right, evenly over those that count.</p>'
    return "".join(parts) + note


def _figure(work: WorkFolder, image: Image, captions: dict[str, str], judged: Judgement) -> str:
    text = captions.get(image.parent, "")
    try:
        source = data_uri(painted_image(work.path, image), side=_SIDE)
    except EdgeadError as error:
        return f"<figure><figcaption>{html.escape(image.id)}: {html.escape(error.got)}</figcaption></figure>"
    ratio = judged.distance / judged.limit
    kind = '<span class="ng">hard</span>' if judged.hard else '<span class="ok">easy</span>'
    seen = f", visible {image.visible:.0f}" if image.mask else ""
    return (
        f'<figure><img src="{source}" alt="{html.escape(text, quote=True)}"><figcaption>{html.escape(text)}<br>'
        f"{kind}, {ratio:.2f} x limit{seen}<br>{html.escape(image.id)}</figcaption></figure>"
    )


def _representatives(work: WorkFolder) -> str:
    normals = {record.id: record for record in work.records(Normal)}
    parts = ['<div class="grid">']
    for record in work.records(Representative):
        normal = normals[record.parent]
        try:
            source = data_uri(read_image(work.normals / normal.file), side=_SIDE)
        except EdgeadError as error:
            parts.append(
                f"<figure><figcaption>{html.escape(normal.file)}: {html.escape(error.got)}</figcaption></figure>"
            )
            continue
        parts.append(
            f'<figure><img src="{source}" alt=""><figcaption>{html.escape(normal.caption)}<br>'
            f"{html.escape(normal.file)}, cluster of {record.size}</figcaption></figure>"
        )
    return "".join([*parts, "</div>"])


def _auroc_table(work: WorkFolder, numbers: Sequence[int]) -> str:
    found: dict[str, float] = {}
    for number in numbers:
        path = work.round_folder(number) / "auroc.json"
        if path.exists():
            found |= json.loads(path.read_bytes())
    if not found:
        return ""
    order = sorted(found, key=lambda name: (name != NO_ANOMALIES, name))
    lines = [[name, f"{found[name]:.3f}", f"{found[name] - found[order[0]]:+.3f}"] for name in order]
    note = (
        f'<p class="note">Deep SAD, trained with each set, on {html.escape(Path(work.config.evaluate.data).name)}.</p>'
    )
    return table(["trained with", "image AUROC", f"against {order[0]}"], lines) + note


def _costs(rounds: Sequence[dict[str, Any]]) -> str:
    stages = sorted({stage for each in rounds for stage in each["seconds"]})
    if not stages:
        return "<p>Nothing was made yet.</p>"
    lines = [
        [f"KKA({each['round']})", str(each["images"]), *(f"{each['seconds'].get(stage, 0.0):.1f}" for stage in stages)]
        for each in rounds
    ]
    return table(["round", "images", *(f"{stage}, s" for stage in stages)], lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _frame(left: float, top: float, width: float, height: float, title: str) -> str:
    return f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="{LINE}"/>' + _label(
        left + width / 2, top - 12, title, "middle", INK
    )


def _label(x: float, y: float, text: str, anchor: str, colour: str = QUIET) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{colour}" '
        f'font-family="system-ui,sans-serif">{html.escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
    )


__all__ = ["report_html", "write_report"]
