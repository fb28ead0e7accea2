"""Protocols' results as text, JSON and HTML, beside the figures that their papers published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from edgead.server_side.html import cards, page, table
from edgead.server_side.protocols import NormalityAddition, Shot, Shots, rows_of


class Published(NamedTuple):
    """A row that a paper published, in percent; None where the paper, or what is known of it, has no figure."""

    method: str
    data: str
    shots: str
    auroc: float
    pixel_auroc: float | None
    pro: float | None
    paper: str


ADDITIONS: tuple[tuple[str, float, float], ...] = (
    ("APRIL-GAN", 70.6, 75.1),
    ("WinCLIP, 0-shot", 65.9, 69.9),
    ("WinCLIP, 1-shot", 67.4, 71.0),
    ("WinCLIP, 5-shot", 70.4, 74.2),
    ("PatchCore", 72.3, 75.5),
)
"""Mean AUROC before and after, in percent, on MVTec AD with the paper's own groups (Yi et al., 2024)."""

_ALFA = "Zhu et al., ACM MM 2024"
_WINCLIP = "Jeong et al., CVPR 2023"
SHOTS: dict[Shots, tuple[Published, ...]] = {
    "zero-shot": (
        Published("ALFA", "MVTec AD", "0", 93.2, 90.6, 78.9, _ALFA),
        Published("WinCLIP", "MVTec AD", "0", 91.8, 85.1, 64.6, _WINCLIP),
        Published("ALFA", "VisA", "0", 81.2, 85.9, None, _ALFA),
        Published("WinCLIP", "VisA", "0", 78.1, 79.6, 56.8, _WINCLIP),
    ),
    "few-shot": (
        Published("ALFA", "MVTec AD", "4", 96.5, 97.6, None, _ALFA),
        Published("WinCLIP", "MVTec AD", "1", 93.1, 95.2, 87.1, _WINCLIP),
        Published("WinCLIP", "MVTec AD", "2", 94.4, None, 88.4, _WINCLIP),
        Published("WinCLIP", "MVTec AD", "4", 95.2, None, 89.0, _WINCLIP),
        Published("WinCLIP", "VisA", "1", 83.8, 96.4, 85.1, _WINCLIP),
        Published("WinCLIP", "VisA", "2", 84.6, None, 86.2, _WINCLIP),
        Published("WinCLIP", "VisA", "4", 87.3, None, 87.6, _WINCLIP),
    ),
}
"""Image AUROC, pixel AUROC, PRO in percent."""

ADDITION_HEAD = ("category", "group", "pictures", "before", "after", "change", "score before", "after", "others moved")
ADDITION_LEGEND = (
    "AUROC in percent with the group's pictures labelled normal, before and after its sentences were added. 'before' "
    "and 'after' score a picture by the maximum of its map, as the paper does; 'score' by what the inspector decides "
    "on. 'others moved' is the largest change of another defect's AUROC against good parts."
)
SHOT_HEAD = ("category", "images", "AUROC", "px AUROC", "PRO")
PUBLISHED_HEAD = ("data", "shots", "AUROC", "px AUROC", "PRO")
PUBLISHED_NOTE = "Published figures are of the named data sets as a whole: compare them with a run on the same data."


def addition_rows(result: NormalityAddition) -> list[list[str]]:
    """The cells under `ADDITION_HEAD`: one line per group, then the mean."""
    lines = []
    for one, moved in rows_of(result):
        lines.append(
            [
                *(one.category, one.group, str(one.pictures[0])),
                *_shift(one.before, one.after),
                *(_percent(one.score_before), _percent(one.score_after), f"{100 * moved:+.1f}"),
            ]
        )
    means = [result.mean(name) for name in ("before", "after", "score_before", "score_after")]
    lines.append(
        ["mean", f"{len(result.additions)} groups", "", *_shift(means[0], means[1]), *map(_percent, means[2:]), ""]
    )
    return lines


def addition_text(result: NormalityAddition) -> str:
    """The result for a terminal."""
    published = [[name, _plain(before), _plain(after), f"{after - before:+.1f}"] for name, before, after in ADDITIONS]
    return "\n".join(
        [
            *_columns([list(ADDITION_HEAD), *addition_rows(result)], left=2),
            "",
            ADDITION_LEGEND,
            "",
            *_columns([["published on MVTec AD", "before", "after", "change"], *published]),
            "",
            f"method {result.method}; groups: {result.source}",
            PUBLISHED_NOTE,
            *result.notes,
        ]
    )


def addition_dict(result: NormalityAddition) -> dict[str, Any]:
    """The result as JSON-like values; AUROC 0 to 1."""
    return {
        "protocol": "normality-addition",
        "method": result.method,
        "source": result.source,
        "mean": {name: result.mean(name) for name in ("before", "after", "score_before", "score_after")},
        "groups": [dict(vars(one)) for one in result.additions],
        "published": [
            {"method": name, "before": before / 100, "after": after / 100} for name, before, after in ADDITIONS
        ],
        "notes": list(result.notes),
    }


def addition_html(result: NormalityAddition, title: str) -> str:
    """The result as one page."""
    facts = [
        (f"{_percent(result.mean('before'))} → {_percent(result.mean('after'))}", "mean AUROC by the map's maximum"),
        (
            f"{_percent(result.mean('score_before'))} → {_percent(result.mean('score_after'))}",
            "mean AUROC by the image score",
        ),
        (str(len(result.additions)), "groups called normal in turn"),
    ]
    published = [[name, _plain(before), _plain(after), f"{after - before:+.1f}"] for name, before, after in ADDITIONS]
    body = [
        cards(facts),
        "<h2>By group</h2>",
        table(ADDITION_HEAD, addition_rows(result)),
        _notes([ADDITION_LEGEND, *result.notes]),
        "<h2>Published means on MVTec AD</h2>",
        table(("method", "before", "after", "change"), published),
        _notes([PUBLISHED_NOTE]),
    ]
    return page(title, "".join(body), f"Method {result.method}. Groups: {result.source}")


def shot_rows(result: Shot) -> list[list[str]]:
    """The cells under `SHOT_HEAD`: one line per category, then the mean."""
    names = ("auroc", "pixel_auroc", "pro")
    lines = []
    for category, evaluation in result.evaluations.items():
        everything = evaluation.kinds[0]
        figures = [_percent(getattr(everything, name)) for name in names]
        lines.append([category, str(len(evaluation.outcomes)), *figures])
    total = sum(len(evaluation.outcomes) for evaluation in result.evaluations.values())
    lines.append(["mean", str(total), *(_percent(result.mean(name)) for name in names)])
    return lines


def shot_text(result: Shot) -> str:
    """The result for a terminal."""
    return "\n".join(
        [
            *_columns([list(SHOT_HEAD), *shot_rows(result)]),
            "",
            *_columns(
                [["published", "data", "shots", "AUROC", "px AUROC", "PRO"], *_published(result.protocol)], left=2
            ),
            "",
            f"{result.protocol}, method {result.method}; all figures in percent",
            PUBLISHED_NOTE,
            *_evaluation_notes(result),
        ]
    )


def shot_dict(result: Shot) -> dict[str, Any]:
    """The result as JSON-like values; 0 to 1."""
    return {
        "protocol": result.protocol,
        "method": result.method,
        "mean": {name: result.mean(name) for name in ("auroc", "pixel_auroc", "pro")},
        "categories": {name: evaluation.to_dict() for name, evaluation in result.evaluations.items()},
        "published": [row._asdict() for row in SHOTS[result.protocol]],
    }


def shot_html(result: Shot, title: str) -> str:
    """The result as one page."""
    facts = [
        (_percent(result.mean(name)), meaning)
        for name, meaning in (("auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC"), ("pro", "PRO to 0.3 FPR"))
    ]
    body = [
        cards(facts),
        "<h2>By category</h2>",
        table(SHOT_HEAD, shot_rows(result)),
        _notes(_evaluation_notes(result)),
        "<h2>Published</h2>",
        table(("method", *PUBLISHED_HEAD), _published(result.protocol)),
        _notes([PUBLISHED_NOTE]),
    ]
    return page(title, "".join(body), f"{result.protocol}, method {result.method}; all figures in percent.")


def _published(protocol: Shots) -> list[list[str]]:
    return [
        [row.method, row.data, row.shots, _plain(row.auroc), _plain(row.pixel_auroc), _plain(row.pro)]
        for row in SHOTS[protocol]
    ]


def _evaluation_notes(result: Shot) -> list[str]:
    return [f"{name}: {note}" for name, evaluation in result.evaluations.items() for note in evaluation.notes]


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _shift(before: float, after: float) -> tuple[str, str, str]:
    return _percent(before), _percent(after), f"{100 * (after - before):+.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _columns(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns; the first `left` ones to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


__all__ = (
    "ADDITIONS",
    "SHOTS",
    "addition_dict",
    "addition_html",
    "addition_text",
    "shot_dict",
    "shot_html",
    "shot_text",
)
