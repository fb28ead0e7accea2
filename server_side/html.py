"""Self-contained HTML: a page, tables, SVG plots and embedded pictures. No script, no request to anywhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from edgead.runtime.image import encode_jpeg

INK, QUIET, LINE, GOOD, BAD, ACCENT = "#1a2733", "#667785", "#dde4ea", "#1a7f5a", "#c4342d", "#1f5fbf"
PALETTE = ("#c4342d", "#c77700", "#7b4fb5", "#1f5fbf", "#0f8b8d", "#a03e78", "#6b7a00", "#5a5a5a")

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:#1a2733;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 8px}
h2{font-size:1.25rem;margin:44px 0 12px}
h3{font-size:1rem;margin:20px 0 8px}
p{margin:0 0 12px;max-width:72ch}
.lead{color:#667785;font-size:1.05rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0}
.card{background:#fff;border:1px solid #dde4ea;border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:1.55rem;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{color:#667785;font-size:.88rem}
.panel{background:#fff;border:1px solid #dde4ea;border-radius:10px;padding:16px;overflow-x:auto}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:16px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid #eef2f5;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{color:#667785;font-weight:600}
tr:last-child td{border-bottom:0}
figure{margin:0}
figure img{width:100%;display:block;border-radius:8px;background:#e9eef2}
figcaption{font-size:.85rem;color:#667785;padding:6px 2px 0;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px}
.case{display:grid;grid-template-columns:1fr 1fr;gap:8px;align-content:start}
.case img{height:190px;object-fit:contain;background:#16212b}
.note{color:#667785;font-size:.88rem;margin:10px 2px 0;max-width:none}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:18px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px}
.ok{color:#1a7f5a;font-weight:600}.ng{color:#c4342d;font-weight:600}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9rem}
pre{background:#16212b;color:#e6edf3;border-radius:10px;padding:14px 16px;overflow-x:auto}
svg{max-width:100%;height:auto;display:block}
.row svg{margin:0 auto}
"""


def page(title: str, body: str, lead: str = "") -> str:
    """A whole document. `title` and `lead` are text; `body` is HTML."""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{intro}{body}</main></body></html>\n"
    )


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Large figures with what they mean: (figure, meaning)."""
    inside = "".join(f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in facts)
    return f'<div class="cards">{inside}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts in a panel that scrolls by itself on narrow screens."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="panel"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def figure(frame: NDArray[np.uint8], caption: str, *, side: int = 320) -> str:
    """A picture, uint8 RGB [H, W, 3], embedded with its longer side at most `side` pixels."""
    return (
        f'<figure><img src="{data_uri(frame, side=side)}" alt="{escape(caption, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(frame: NDArray[np.uint8], *, side: int = 320) -> str:
    """A picture, uint8 RGB [H, W, 3], as a JPEG data URI, shrunk to at most `side` pixels."""
    scale = side / max(frame.shape[:2])
    if scale < 1:
        size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
        frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(frame, 85)).decode()


def svg_roc(curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """ROC curves, name -> points (false-positive rate, true-positive rate) from (0, 0) to (1, 1)."""
    left, top, width, height = 46, 30, 280, 240
    parts = [_axes(left, top, width, height, title, "false-alarm rate", "share of defects found")]
    for place in range(5):
        share = place / 4
        parts.append(_text(left + share * width, top + height + 16, f"{share:g}", "middle"))
        parts.append(_text(left - 6, top + height - share * height + 4, f"{share:g}", "end"))
    parts.append(f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top}" stroke="{LINE}"/>')
    for place, (name, points) in enumerate(curves.items()):
        colour = ACCENT if len(curves) == 1 else PALETTE[place % len(PALETTE)]
        path = " ".join(f"{left + x * width:.1f},{top + (1 - y) * height:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(curves) > 1:
            y = top + height - 12 - 16 * (len(curves) - 1 - place)
            parts.append(_text(left + width - 8, y, name, "end", colour))
    return _svg(left + width + 14, top + height + 44, parts, title)


def svg_histogram(groups: Mapping[str, Sequence[float]], threshold: float, title: str, *, bins: int = 40) -> str:
    """Histograms of scores by group, one row each on a shared axis, with the threshold as a line.

    The group named 'good' is green; others take colours in turn. Each row is scaled to its own peak.
    """
    values = np.concatenate([np.asarray(list(group), np.float64) for group in groups.values() if len(group)])
    low, high = float(min(values.min(), threshold)), float(max(values.max(), threshold))
    high = high if high > low else low + 1.0
    edges = np.linspace(low, high, bins + 1)
    left, top, width, row = 110, 30, 330, 44
    height = row * len(groups)
    parts = [_axes(left, top, width, height, title, "image score", "")]
    colours = iter(PALETTE * (1 + len(groups) // len(PALETTE)))
    for place, (name, group) in enumerate(groups.items()):
        colour = GOOD if name == "good" else next(colours)
        counts, _ = np.histogram(np.asarray(list(group), np.float64), edges)
        base = top + row * (place + 1)
        for bin_, count in enumerate(counts):
            if count:
                tall = (row - 8) * count / counts.max()
                parts.append(
                    f'<rect x="{left + bin_ * width / bins:.1f}" y="{base - tall:.1f}" '
                    f'width="{width / bins - 0.6:.1f}" height="{tall:.1f}" fill="{colour}"/>'
                )
        parts.append(_text(left - 8, base - 16, name[:14], "end", INK))
        parts.append(_text(left - 8, base - 3, f"{len(group)} images", "end"))
    at = left + (threshold - low) / (high - low) * width
    parts.append(
        f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{top + height}" stroke="{INK}" stroke-dasharray="4 3"/>'
    )
    parts.append(_text(min(max(at, left + 30), left + width - 30), top - 4, "threshold", "middle", INK))
    for tick in ticks(low, high):
        x = left + (tick - low) / (high - low) * width
        parts.append(f'<line x1="{x:.1f}" y1="{top + height}" x2="{x:.1f}" y2="{top + height + 4}" stroke="{QUIET}"/>')
        parts.append(_text(x, top + height + 16, f"{tick:g}", "middle"))
    return _svg(left + width + 20, top + height + 44, parts, title)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def _axes(left: float, top: float, width: float, height: float, title: str, below: str, beside: str) -> str:
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#fbfcfd" stroke="{LINE}"/>',
        _text(0, 13, title, "start", INK, 13),
        _text(left + width / 2, top + height + 34, below, "middle"),
    ]
    if beside:
        y = top + height / 2
        parts.append(
            f'<text x="11" y="{y}" transform="rotate(-90 11 {y})" text-anchor="middle" fill="{QUIET}" '
            f'font-size="11">{escape(beside)}</text>'
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, colour: str = QUIET, size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )
