"""Plots of a fleet's page as inline SVG that stretches with the page; whatever is read stands in HTML around it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgead.server_side.ota.fleet_scores import LEAST_DEVICES, LEAST_FRAMES, Scores, Z
from edgead.server_side.ota.fleet_signs import span
from edgead.server_side.ota.guard import Decision
from edgead.server_side.ota.statuses import when

_WIDE, _HIGH, _TALL = 1000, 40, 140
_STRIPS = 8
_MARKS = 200


def strips(groups: Sequence[Scores]) -> str:
    """Medians of score/threshold of all devices by product and release: one strip each, those that stand out marked."""
    shown = [group for group in groups if group.compared][:_STRIPS]
    if not shown:
        return ""
    # One axis for all of them, so that they can be compared by eye.
    high = max(group.high for group in shown)
    high = max(high, 1.05)
    inside = "".join(_strip(group, high) for group in shown)
    left = len(groups) - len(shown)
    more = f" Not drawn: {left} more releases, with fewer cameras." if left else ""
    return (
        f'<h2>Scores</h2><div class="panel"><p class="legend"><span><i class="r0"></i>cameras by their median '
        'score/threshold</span><span><i class="bad"></i>stands out</span></p>'
        f'{inside}<p class="note">Stands out: more than {Z} robust standard deviations from the others of the same '
        f"product and release, in its median score or in its share of NG, with {LEAST_FRAMES} frames or more and among "
        f"{LEAST_DEVICES} cameras or more.{more}</p></div>"
    )


def _strip(group: Scores, high: float) -> str:
    peak = max(group.bins) or 1
    step = (group.high - group.low) / len(group.bins)
    parts = []
    for place, number in enumerate(group.bins):
        if number:
            # The square root shows a bin of one device beside one of a thousand.
            tall = max(2.0, (_HIGH - 6) * (number / peak) ** 0.5)
            x = (group.low + place * step) / high * _WIDE
            parts.append(
                f'<rect x="{x:.1f}" y="{_HIGH - tall:.1f}" width="{step / high * _WIDE:.2f}" height="{tall:.1f}" '
                f'fill="var(--r0)"><title>{number:,} cameras</title></rect>'
            )
    for outlier in group.outliers[:_MARKS]:
        x = min(outlier.ratio, high) / high * _WIDE
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HIGH}" stroke="var(--bad)" stroke-width="2" '
            f'vector-effect="non-scaling-stroke"><title>{escape(outlier.device)}: {escape(outlier.told)}</title></line>'
        )
    one = _WIDE / high
    parts.append(
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{_HIGH}" stroke="var(--ink)" stroke-dasharray="4 3" '
        'vector-effect="non-scaling-stroke"/>'
    )
    out = f"; <b>{len(group.outliers):,} stand out</b>" if group.outliers else ""
    ticks = "".join(
        f'<span style="left:{100 * value / high:.2f}%">{value:g}</span>'
        for value in _ticks(high)
        if abs(value - 1) > 0.12 * high
    )
    return (
        f'<div class="strip"><p><b>{escape(group.product)} {group.release}</b>: {group.devices:,} cameras, median '
        f"{group.ratio:.2f} of the threshold, {group.ng:.2%} NG{out}</p>"
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" height="{_HIGH}" preserveAspectRatio="none" role="img" '
        f'aria-label="scores of {escape(group.product)} {group.release}">'
        f'<rect width="{_WIDE}" height="{_HIGH}" fill="var(--track)"/>{"".join(parts)}</svg>'
        f'<div class="axis">{ticks}<span style="left:{100 / high:.2f}%">threshold</span></div></div>'
    )


def _ticks(high: float) -> list[float]:
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1e9) if high / step <= 8)
    return [round(place * step, 6) for place in range(int(high / step) + 1)]


def timeline(decisions: Sequence[Decision]) -> str:
    """How a release came to the devices, as a guard saw it; empty with less than two looks."""
    if len(decisions) < 2 or decisions[-1].time <= decisions[0].time:
        return ""
    first, last = decisions[0].time, decisions[-1].time
    most = max(max(one.reached, one.reported) for one in decisions) or 1

    def line(values: Sequence[int]) -> list[str]:
        places = []
        for one, value in zip(decisions, values, strict=True):
            x, y = (one.time - first) / (last - first) * _WIDE, (1 - value / most) * (_TALL - 4) + 2
            places.append(f"{x:.1f},{y:.1f}")
        return places

    confirmed = line([one.confirmed for one in decisions])
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_TALL}" stroke="var(--{colour})" stroke-dasharray="3 3" '
        f'vector-effect="non-scaling-stroke"><title>{escape(one.reason)}</title></line>'
        for one in decisions
        if one.action in ("widen", "stop")
        for x, colour in [((one.time - first) / (last - first) * _WIDE, "bad" if one.action == "stop" else "quiet")]
    )
    lines = "".join(
        f'<polyline points="{" ".join(points)}" fill="none" stroke="var(--{colour})" stroke-width="2" '
        'vector-effect="non-scaling-stroke"/>'
        for points, colour in (
            (line([one.reached for one in decisions]), "wait"),
            (confirmed, "good"),
            (line([one.failed for one in decisions]), "bad"),
        )
    )
    legend = "".join(
        f'<span><i class="{kind}"></i>{words}</span>'
        for kind, words in (("wait", "reached"), ("good", "have it"), ("bad", "failed"))
    )
    return (
        f'<div class="panel"><h3>Adoption</h3><p class="legend">{legend}<span><em>the top is {most:,}; dashed: '
        f'widened or stopped</em></span></p><svg viewBox="0 0 {_WIDE} {_TALL}" height="{_TALL}" '
        f'preserveAspectRatio="none" role="img" aria-label="adoption over time">'
        f'<rect width="{_WIDE}" height="{_TALL}" fill="var(--track)"/>'
        f'<polygon points="0,{_TALL} {" ".join(confirmed)} {_WIDE},{_TALL}" fill="var(--good)" opacity=".25"/>'
        f'{marks}{lines}</svg><div class="ends"><span>{escape(when(first))}</span>'
        f"<span>{escape(when(last))}, {span(last - first)} later</span></div></div>"
    )


__all__ = ["strips", "timeline"]
