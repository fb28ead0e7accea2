"""Plots of the demo's report as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from edgead.demo_live import LiveUpdate
from edgead.runtime.inspection import Verdict
from edgead.server_side.html import ACCENT, BAD, GOOD, INK, LINE, QUIET

COLOURS = {"good": GOOD, "new pattern": ACCENT, "defect": BAD}
_MOST_DOTS = 900


def svg_timeline(live: LiveUpdate) -> str:
    """Every frame of the line over time by its normalised score; the update as a line across.

    The scale puts the threshold in force at one half, so scores of before and after share one chart.
    """
    left, top, width, height = 58, 34, 900, 250
    end = max((seen.ended for seen in live.seen), default=1.0)

    def x(seconds: float) -> float:
        return left + width * seconds / end

    def y(normalised: float) -> float:
        return top + height * (1.0 - normalised)

    at = x(live.swap_ended)
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#fbfcfd" stroke="{LINE}"/>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height / 2}" fill="{BAD}" opacity=".05"/>',
        f'<rect x="{left}" y="{y(0.5)}" width="{width}" height="{height / 2}" fill="{GOOD}" opacity=".05"/>',
        f'<line x1="{left}" x2="{left + width}" y1="{y(0.5)}" y2="{y(0.5)}" stroke="{INK}" stroke-dasharray="4 3"/>',
        _text(left - 8, y(0.75) + 4, "NG", "end", BAD, 13, bold=True),
        _text(left - 8, y(0.25) + 4, "OK", "end", GOOD, 13, bold=True),
        _text(left - 8, y(0.5) + 4, "threshold", "end", QUIET, 10),
    ]
    step = max(1, len(live.seen) // _MOST_DOTS)
    for seen in live.seen[::step]:
        score = seen.inspection.normalised
        if score is not None:
            colour = COLOURS[live.shown[seen.place].kind]
            parts.append(f'<circle cx="{x(seen.ended):.1f}" cy="{y(score):.1f}" r="3" fill="{colour}" opacity=".75"/>')
    learning = x(live.swap_began - live.learn_seconds)
    parts += [
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 6}" y2="{top + height}" stroke="{ACCENT}" stroke-width="2"/>',
        _text(at + 5, top - 10, "new knowledge", "start", ACCENT, 12, bold=True),
        f'<line x1="{learning:.1f}" x2="{at - 4:.1f}" y1="{top - 12}" y2="{top - 12}" stroke="{ACCENT}" opacity=".5"/>',
        _text(learning - 5, top - 9, "learning", "end", QUIET, 12),
    ]
    for second in range(int(end) + 1):
        parts.append(_text(x(second), top + height + 16, f"{second} s", "middle"))
    for place, (kind, colour) in enumerate(COLOURS.items()):
        label = {"good": "good part, as ever", "new pattern": "good part with the new code"}.get(kind, "real defect")
        across = left + 8 + 230 * place
        parts.append(f'<circle cx="{across}" cy="{top + height + 36}" r="5" fill="{colour}"/>')
        parts.append(_text(across + 11, top + height + 40, label, "start", INK, 12))
    return svg(left + width + 12, top + height + 52, parts, "Scores of all frames before and after the update")


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


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = QUIET, size: int = 11, bold: bool = False
) -> str:
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
