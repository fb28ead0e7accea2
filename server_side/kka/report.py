"""A run as one HTML page: what each round painted, how hard it was, what it cost. After the paper's figures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgead.runtime.errors import EdgeadError
from edgead.runtime.files import write_file
from edgead.runtime.image import read_image
from edgead.server_side.html import ACCENT, BAD, GOOD, INK, LINE, QUIET, cards, data_uri, page, table
from edgead.server_side.kka.jobs import painted_image
from edgead.server_side.kka.measuring import NO_ANOMALIES
from edgead.server_side.kka.records import Caption, Image, Judgement, Normal, Representative
from edgead.server_side.kka.rounds import facts
from edgead.server_side.kka.seams import Frame
from edgead.server_side.kka.work import WorkFolder

_SHOWN = 12
_SHOWN_FAINT = 5
_SIDE = 220
_OUTLINE = (255, 196, 0)
_BINS = 48
_IN_A_ROW = 7
_COSTLY = ("describe", "representatives", "imagine", "paint", "evaluator", "judge", "measure", "prefer")
"""Columns of the cost, in the order of the work."""
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
            '<p class="note">Squared distances to the centre of the confusion evaluator, divided by the limit that '
            "each image was judged by: left of the line is hard, equation (6). The limit is that of "
            f"{_limit_in_words(work.config.judge.hard_quantile)}. Each normal is measured by an evaluator that was not "
            "trained on it.</p>",
        ]
    measured = _auroc_table(work, numbers)
    if measured:
        body += ["<h2>What it is worth</h2>", measured]
    if rounds:
        body += [
            "<h2>What was painted</h2>",
            '<p class="note">A line goes around what was painted, where the painter says where that is; it is not in '
            "the picture itself. Visible: mean change of colour inside, 0 to 255.</p>",
        ]
    if len(rounds) > 1:
        body += ["<h2>Round by round</h2>", _side_by_side(work, numbers)]
    for each in rounds:
        body += [f"<h2>KKA({each['round']})</h2>", _gallery(work, each["round"])]
    body += ["<h2>After which normals</h2>", _representatives(work), "<h2>Cost</h2>", _costs(rounds)]
    modes = {"add": "add: each round joins those before", "rep": "rep: hard anomalies replace easy ones"}
    words = [f"{len(work.records(Normal))} normals", *([modes[work.config.mode]] if work.config.rounds else [])]
    lead = f"{work.config.class_name}: {', '.join([*words, f'seed {work.config.seed}'])}"
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
    note = "Hard share: hard ones of those that are not too faint. Visible: median change of colour inside the mask."
    return table(head, lines) + f'<p class="note">{note} {floor}</p>' if lines else ""


def _shares(rounds: Sequence[dict[str, Any]]) -> str:
    """Hard share by round, as the paper's figure 3."""
    left, top, width, height = 46, 30, 300, 210
    parts = [_frame(left, top, width, height, "hard share by round")]
    for place in range(5):
        y = top + height - place / 4 * height
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="{LINE}"/>')
        parts.append(_label(left - 6, y + 4, f"{25 * place} %", "end"))
    slot = width / len(rounds)
    bar = min(0.6 * slot, 70)
    for place, each in enumerate(rounds):
        share = each["hard_share"] or 0.0
        middle = left + slot * (place + 0.5)
        parts.append(
            f'<rect x="{middle - bar / 2:.1f}" y="{top + height * (1 - share):.1f}" width="{bar:.1f}" '
            f'height="{height * share:.1f}" fill="{ACCENT}"/>'
        )
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
    for tick in _log_ticks(low, high):
        x = left + (np.log10(tick) - low) / (high - low) * width
        parts.append(f'<line x1="{x:.1f}" y1="{top + height}" x2="{x:.1f}" y2="{top + height + 4}" stroke="{QUIET}"/>')
        parts.append(_label(x, top + height + 16, f"{tick:g}", "middle"))
    return _svg(left + width + 14, top + height + 28, parts, "distances of normals, hard and easy anomalies")


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis from 10**low to 10**high: not more than about eight."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    places = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    found = [step * 10.0**place for place in places for step in steps]
    found = [tick for tick in found if low - 1e-9 <= np.log10(tick) <= high + 1e-9]
    return found[:: max(1, -(-len(found) // 8))]


def _limit_in_words(quantile: float) -> str:
    return "the farthest held-out normal" if quantile == 1.0 else f"the {quantile:g} quantile of the held-out normals"


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
    for title, kind, chosen, most in (
        ("hard", "ng", [record for record in judged if record.hard], _SHOWN),
        ("easy", "ok", [record for record in judged if not record.hard and not record.faint], _SHOWN),
        ("too faint to count", "", [record for record in judged if record.faint], _SHOWN_FAINT),
    ):
        if not chosen:
            if kind:
                parts.append(f"<h3>No {title} ones</h3>")
            continue
        # Spread over all distances, so that a page shows the whole range and not its edge.
        places = np.unique(np.linspace(0, len(chosen) - 1, min(most, len(chosen))).astype(int))
        shown = "" if len(places) == len(chosen) else f", {len(places)} of them shown"
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
        source = data_uri(_outlined(painted_image(work.path, image), work, image), side=_SIDE)
    except EdgeadError as error:
        return f"<figure><figcaption>{html.escape(image.id)}: {html.escape(error.got)}</figcaption></figure>"
    ratio = judged.distance / judged.limit
    kind = '<span class="ng">hard</span>' if judged.hard else '<span class="ok">easy</span>'
    if judged.faint:
        kind = "too faint"
    seen = f", visible&nbsp;{image.visible:.0f}" if image.mask else ""
    return (
        f'<figure><img src="{source}" alt="{html.escape(text, quote=True)}"><figcaption>{html.escape(text)}<br>'
        f"{kind}, {ratio:.2f}&nbsp;x&nbsp;limit{seen}<br>{html.escape(image.id)}</figcaption></figure>"
    )


def _outlined(frame: Frame, work: WorkFolder, image: Image) -> Frame:
    """A picture, uint8 RGB [H, W, 3], with a line around what was painted, at a small distance from it."""
    if not image.mask:
        return frame
    inside = (read_image(work.path / image.mask)[..., 0] > 0).astype(np.uint8)
    # In pixels of the page: the picture is shrunk afterwards.
    scale = max(1.0, max(frame.shape[:2]) / _SIDE)
    away, thick = round(5 * scale), max(1, round(0.8 * scale))
    around = cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * away + 1, 2 * away + 1)))
    outlines, _ = cv2.findContours(around, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(frame.copy(), outlines, -1, _OUTLINE, thick, cv2.LINE_AA), np.uint8)


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
    order = [name for name in (NO_ANOMALIES, *(f"KKA({number})" for number in numbers)) if name in found]
    lines = [[name, f"{found[name]:.3f}", f"{found[name] - found[order[0]]:+.3f}"] for name in order]
    note = (
        f'<p class="note">Deep SAD, trained with each set, on {html.escape(Path(work.config.evaluate.data).name)}.</p>'
    )
    return table(["trained with", "image AUROC", f"against {order[0]}"], lines) + note


def _costs(rounds: Sequence[dict[str, Any]]) -> str:
    there = {stage for each in rounds for stage in each["seconds"]}
    stages = [stage for stage in _COSTLY if stage in there]
    if not stages:
        return "<p>Nothing was made yet.</p>"
    lines = []
    for each in rounds:
        seconds = [each["seconds"].get(stage, 0.0) for stage in stages]
        one = f"{sum(seconds) / each['images']:.2f}" if each["images"] else "-"
        lines.append([f"KKA({each['round']})", *(f"{value:.1f}" for value in [*seconds, sum(seconds)]), one])
    head = ["round", *(f"{stage}, s" for stage in stages), "together, s", "for an image, s"]
    note = "Time on the wall, of all starts of the run together; that of a start that was killed is not known."
    return table(head, lines) + f'<p class="note">{note}</p>'


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
