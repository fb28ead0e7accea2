"""Plots of the demo's report as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from edgead.demo_live import KINDS, LiveUpdate
from edgead.runtime.inspection import Verdict
from edgead.server_side.html import ACCENT, BAD, GOOD, INK, LINE, QUIET

COLOURS = {"good": GOOD, "defect": "#8a2be2", "new good": ACCENT, "new defect": BAD}
_MOST_DOTS = 900
_LOWEST, _HIGHEST = 0.5, 5.0
"""Scores in multiples of the threshold between which the time line is drawn; logarithmic."""


def svg_timeline(live: LiveUpdate) -> str:
    """Every frame of the line over time by its score in multiples of the threshold that was in force."""
    left, top, width, height = 66, 40, 900, 300
    end = max((seen.ended for seen in live.seen), default=1.0)

    def x(seconds: float) -> float:
        return left + width * seconds / end

    def y(multiple: float) -> float:
        inside = min(max(multiple, _LOWEST), _HIGHEST)
        return top + height * (1.0 - math.log(inside / _LOWEST) / math.log(_HIGHEST / _LOWEST))

    at, limit = x(live.swap_ended), y(1.0)
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#fbfcfd" stroke="{LINE}"/>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{limit - top:.1f}" fill="{BAD}" opacity=".05"/>',
        f'<rect x="{left}" y="{limit:.1f}" width="{width}" height="{top + height - limit:.1f}" fill="{GOOD}" '
        'opacity=".05"/>',
        f'<line x1="{left}" x2="{left + width}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="{INK}" '
        'stroke-dasharray="4 3"/>',
        _text(left - 8, (top + limit) / 2, "NG", "end", BAD, 15, bold=True),
        _text(left - 8, (limit + top + height) / 2 + 8, "OK", "end", GOOD, 15, bold=True),
        _text(left - 8, limit + 4, "threshold", "end", QUIET, 11),
    ]
    for multiple in (2.0, 4.0):
        parts.append(_text(left - 8, y(multiple) + 4, f"{multiple:g} x", "end", QUIET, 11))
    step = max(1, len(live.seen) // _MOST_DOTS)
    for seen in live.seen[::step]:
        score = seen.inspection.score
        if score is not None and seen.inspection.threshold > 0:
            colour = COLOURS[live.shown[seen.place].kind]
            place = y(score / seen.inspection.threshold)
            parts.append(f'<circle cx="{x(seen.ended):.1f}" cy="{place:.1f}" r="3.4" fill="{colour}" opacity=".7"/>')
    learning = x(live.swap_began - live.learn_seconds)
    parts += [
        f'<rect x="{learning:.1f}" y="{top}" width="{max(at - learning, 1):.1f}" height="{height}" fill="{ACCENT}" '
        'opacity=".07"/>',
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{top + height}" stroke="{ACCENT}" stroke-width="2"/>',
        _text(at + 6, top - 10, "new knowledge", "start", ACCENT, 14, bold=True),
        _text(at - 6, top - 10, "the server learns", "end", QUIET, 13),
    ]
    for second in range(int(end) + 1):
        parts.append(_text(x(second), top + height + 18, f"{second} s", "middle", QUIET, 12))
    for place_, (kind, colour) in enumerate(COLOURS.items()):
        across = left + 8 + 226 * place_
        parts.append(f'<circle cx="{across}" cy="{top + height + 42}" r="5.5" fill="{colour}"/>')
        parts.append(_text(across + 12, top + height + 47, KINDS[kind], "start", INK, 13))
    return svg(left + width + 14, top + height + 60, parts, "Scores of all frames before and after the update")


def svg_bars(values: Mapping[str, Sequence[tuple[str, float]]], unit: str, title: str) -> str:
    """Stacked horizontal bars: name -> (part, value), such as stages of a frame by engine."""
    shades = {"prepare": "#9db4cf", "trunk": ACCENT, "head": "#0f8b8d", "regions": "#c77700"}
    left, top, width, row = 128, 26, 520, 34
    longest = max((sum(value for _, value in parts) for parts in values.values()), default=1.0) or 1.0
    drawn = []
    for place, (name, stages) in enumerate(values.items()):
        y, x = top + row * place, float(left)
        drawn.append(_text(left - 10, y + 18, name, "end", INK, 12))
        for stage, value in stages:
            long = width * value / longest
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{max(long, 0.5):.1f}" height="20" '
                f'fill="{shades.get(stage, QUIET)}"><title>{escape(stage)} {value:.2f} {unit}</title></rect>'
            )
            x += long
        total = sum(value for _, value in stages)
        drawn.append(_text(x + 7, y + 19, f"{total:.1f} {unit}", "start", INK, 12, bold=True))
    x = float(left)
    for stage, colour in shades.items():
        drawn.append(f'<rect x="{x}" y="4" width="11" height="11" fill="{colour}"/>')
        drawn.append(_text(x + 16, 14, stage, "start", QUIET, 12))
        x += 90
    return svg(left + width + 90, top + row * len(values) + 6, drawn, title)


def verdict_word(verdict: Verdict) -> str:
    """A verdict as coloured HTML."""
    return f'<span class="{"ok" if verdict is Verdict.OK else "ng"}">{verdict.value.replace("_", " ")}</span>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = QUIET, size: int = 11, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"{weight}>'
        f"{escape(text)}</text>"
    )


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """An inline picture of so many pixels that shrinks with the page."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )
