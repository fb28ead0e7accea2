"""A fleet as one HTML page: no script, nothing that is fetched, light and dark, for a wall screen and for a phone.

Devices are counted, and named only where somebody should look, a hundred of a kind at the most: the page of ten
thousand devices has a few hundred kilobytes. Texts of devices are escaped, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from edgead.server_side.ota.adoption import STATES, Counts, State
from edgead.server_side.ota.fleet import Fleet, Group, Product
from edgead.server_side.ota.fleet_plots import strips, timeline
from edgead.server_side.ota.fleet_signs import Kind, Odd, span
from edgead.server_side.ota.fleet_style import STYLE
from edgead.server_side.ota.fleet_text import record_text
from edgead.server_side.ota.statuses import when

_NAMED = 100
_CHIPS = 6
"""Colours of releases; further ones share the last."""
_STATE_CLASSES: Mapping[State, str] = {
    "confirmed": "good",
    "probation": "busy",
    "lost": "lost",
    "rolled back": "bad",
    "rejected": "bad2",
    "behind": "wait",
    "not heard": "mute",
}
_STATE_WORDS: Mapping[State, str] = {
    "confirmed": "have it",
    "probation": "watching it",
    "lost": "watching, not heard of since",
    "rolled back": "rolled back",
    "rejected": "rejected",
    "behind": "not yet",
    "not heard": "not yet, and silent",
}
_KIND_WORDS: Mapping[Kind, str] = {
    "failed": "The release failed there",
    "alarm": "Alarms",
    "silent": "Silent",
    "unverified": "Unverified: key not registered",
    "scores": "Scores that stand out",
    "clock": "Clocks",
    "error": "Errors",
    "polls": "Polls that fail",
    "old": "Older than the release for all",
    "dropped": "Statuses were dropped",
}


def page_of(fleet: Fleet, title: str = "Fleet") -> str:
    """The page.

    Args:
        fleet: see `edgead.server_side.ota.fleet.summary`.
        title: of the page.
    """
    body = [_cards(fleet), _notes(fleet)]
    body += [_product(product) for product in fleet.products]
    body += [_failures(fleet), _odd(fleet), _listed(fleet), strips(fleet.scores), _faults(fleet), _rest(fleet)]
    lead = f"{when(fleet.time)} · silent after {span(fleet.silent_after)} without a status"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{"".join(body)}'
        '<p class="foot">What stands here is what devices say about themselves, signed with their own keys. Devices '
        "that stand out are told, and nothing is done about them.</p></main></body></html>\n"
    )


def _cards(fleet: Fleet) -> str:
    counts = [product.counts for product in fleet.products if product.counts is not None]
    facts: list[tuple[str, str, str]] = [(f"{fleet.devices:,}", "cameras heard of", "")]
    if counts:
        have, reached = sum(one.confirmed for one in counts), sum(one.reached for one in counts)
        facts.append((f"{have:,}", f"of {reached:,} reached have it", ""))
        failed = sum(one.failed for one in counts)
        facts.append((f"{failed:,}", "on which it failed", "bad" if failed else ""))
    for kind, words, tone in (("silent", "silent", "warn"), ("alarm", "with an alarm", "bad")):
        number = sum(product.silent if kind == "silent" else product.alarms for product in fleet.products)
        facts.append((f"{number:,}", words, tone if number else ""))
    facts.append((f"{len(fleet.odd):,}", "to look at", ""))
    inside = "".join(f'<div class="card {tone}"><b>{a}</b><span>{b}</span></div>' for a, b, tone in facts)
    return f'<div class="cards">{inside}</div>'


def _notes(fleet: Fleet) -> str:
    notes = []
    if fleet.verified < fleet.devices:
        notes.append(
            f"{fleet.devices - fleet.verified:,} of {fleet.devices:,} statuses are unverified: the publisher does not "
            "know their devices, and anybody can have sent them."
        )
    if fleet.refused:
        told = ", ".join(f"{count:,} {reason}" for reason, count in fleet.refused.items())
        notes.append(f"Statuses that do not count: {told}.")
    if fleet.never:
        names = ", ".join(fleet.never[:5]) + (", ..." if len(fleet.never) > 5 else "")
        notes.append(f"{len(fleet.never):,} registered and never heard of: {names}.")
    return "".join(f'<p class="notice">{escape(note)}</p>' for note in notes)


def _product(product: Product) -> str:
    record = product.record
    parts = [f"<h2>{escape(product.name)}</h2>"]
    if record is not None and product.counts is not None:
        tone = "stop" if record.stopped else "hold" if record.paused else "go"
        state = "stopped" if record.stopped else "paused" if record.paused else "rolling out"
        allowed = f"{record.error_threshold:.0%} failures allowed, {_failed(product.counts)}"
        who = record_text(record).partition(": ")[2]
        parts.append(
            f'<p class="rollout"><span class="tag {tone}">{state}</span> Release <b>{record.release}</b> to '
            f"{escape(who)}; {escape(allowed)}.</p>"
        )
        rows = [_progress("all that are reached", product.counts, "total")]
        rows += [_progress(group.name, group.counts) for group in product.groups if group.counts is not None]
        used = [state for state in STATES if product.counts.of(state)]
        legend = "".join(f'<span><i class="{_STATE_CLASSES[state]}"></i>{_STATE_WORDS[state]}</span>' for state in used)
        beyond = f'<p class="note">{product.beyond:,} have it and are not reached.</p>' if product.beyond else ""
        parts.append(f'<div class="panel"><h3>Roll-out</h3>{_legend(legend)}{"".join(rows)}{beyond}</div>')
        parts.append(timeline(product.timeline))
    parts.append(_releases(product))
    return f"<section>{''.join(parts)}</section>"


def _failed(counts: Counts) -> str:
    if not counts.reported:
        return "no report yet"
    return f"{counts.failed / counts.reported:.1%} of {counts.reported:,} reports"


def _progress(name: str, counts: Counts, tone: str = "") -> str:
    pieces = [(_STATE_CLASSES[state], counts.of(state), _STATE_WORDS[state]) for state in STATES]
    done = f"{counts.confirmed:,} of {counts.reached:,}" if counts.reached else "not reached"
    return _row(name, pieces, counts.reached, done, f"{counts.failed:,} failed" if counts.failed else "", tone)


def _releases(product: Product) -> str:
    """Releases by group, as stacked bars whose colours mean the same in all of them."""
    order = sorted(product.releases, key=lambda release: (release == "others", -product.releases[release], release))
    current = "" if product.record is None else str(product.record.release)
    if current in order:
        order.insert(0, order.pop(order.index(current)))
    colour = {release: f"r{min(place, _CHIPS - 1)}" for place, release in enumerate(order)}
    legend = "".join(
        f'<span><i class="{colour[release]}"></i>{_release(release)} <em>{product.releases[release]:,}</em></span>'
        for release in order
    )
    whole = Group("all", product.devices, product.releases, 0, 0, None)
    rows: list[str] = []
    for group in (whole, *product.groups):
        known = [(colour[release], group.releases.get(release, 0), _release(release)) for release in order]
        # A release of a small group may be none of the most frequent ones of the product.
        rest = group.devices - sum(number for _, number, _ in known)
        pieces = [*known, (f"r{_CHIPS - 1}", rest, "others")]
        signs = ", ".join(
            f"{number:,} {word}"
            for number, word in ((group.silent, "silent"), (group.alarms, "with an alarm"))
            if number
        )
        rows.append(_row(group.name, pieces, group.devices, f"{group.devices:,}", signs, "" if rows else "total"))
    return f'<div class="panel"><h3>Releases by group</h3>{_legend(legend)}{"".join(rows)}</div>'


def _release(name: str) -> str:
    return name if name in ("none", "others") else f"release {name}"


def _legend(inside: str) -> str:
    return f'<p class="legend">{inside}</p>'


def _row(name: str, pieces: Sequence[tuple[str, int, str]], whole: int, right: str, sign: str, tone: str = "") -> str:
    """A bar with its name and figures: pieces of it are (class, devices, meaning)."""
    inside = "".join(
        f'<i class="{kind}" style="flex-grow:{number}" title="{escape(words)}: {number:,}"></i>'
        for kind, number, words in pieces
        if number
    )
    told = ", ".join(f"{number} {words}" for _, number, words in pieces if number)
    sign = f"<em>{escape(sign)}</em>" if sign else ""
    return (
        f'<div class="line {tone}"><span class="name">{escape(name)}</span>'
        f'<span class="bar{"" if whole else " none"}" role="img" aria-label="{escape(told)}">{inside}</span>'
        f'<span class="right">{escape(right)}{sign}</span></div>'
    )


def _failures(fleet: Fleet) -> str:
    rows = [
        [
            f"<td class=n>{reason.devices:,}</td>",
            f"<td>{escape(reason.product)} <b>{reason.release}</b></td>",
            f'<td><span class="tag {"stop" if reason.outcome == "rejected" else "hold"}">{reason.outcome}</span></td>',
            f"<td class=text>{escape(reason.text) or '<em>not told</em>'}</td>",
            f"<td class=text><code>{_examples(reason.examples, reason.devices)}</code></td>",
        ]
        for reason in fleet.failures
    ]
    return _table("Releases that failed", ("cameras", "release", "", "reason", "for example"), rows)


def _faults(fleet: Fleet) -> str:
    rows = [
        [
            f"<td class=n>{fault.devices:,}</td>",
            f"<td class=n>{fault.count:,}</td>",
            f"<td class=text><b>{escape(fault.kind)}</b> {escape(fault.text)}</td>",
            f"<td>{escape(when(fault.newest))}</td>",
            f"<td class=text><code>{_examples(fault.examples, fault.devices)}</code></td>",
        ]
        for fault in fleet.faults
    ]
    return _table("Last errors", ("cameras", "errors", "last error", "newest", "for example"), rows)


def _examples(names: Sequence[str], devices: int) -> str:
    return escape(", ".join(names)) + (", ..." if devices > len(names) else "")


def _odd(fleet: Fleet) -> str:
    """Devices by their worst sign; long lists are folded."""
    if not fleet.odd:
        return "<h2>To look at</h2><p>Nothing is odd about any camera.</p>"
    parts = []
    for kind, count in fleet.signs.items():
        worst = [one for one in fleet.odd if one.signs[0].kind == kind]
        if not worst:
            continue
        rows = [_odd_row(one, fleet.time) for one in worst[:_NAMED]]
        more = ""
        if len(worst) > _NAMED:
            more = f'<p class="note">... and {len(worst) - _NAMED:,} others: edgead ota status --all names them.</p>'
        extra = f", {count - len(worst):,} more with something worse" if count > len(worst) else ""
        opened = " open" if len(worst) <= 8 and kind in ("failed", "alarm", "silent", "unverified", "scores") else ""
        head = "<tr><th>camera</th><th>groups</th><th>release</th><th>what</th><th>heard</th></tr>"
        parts.append(
            f"<details{opened}><summary><b>{_KIND_WORDS[kind]}</b> <em>{len(worst):,}{extra}</em></summary>"
            f'<div class="wide"><table>{head}{"".join(rows)}</table></div>{more}</details>'
        )
    return f'<h2>To look at</h2><div class="panel folds">{"".join(parts)}</div>'


def _odd_row(one: Odd, now: float) -> str:
    signs = "<br>".join(escape(sign.text) for sign in one.signs)
    mark = "" if one.verified else ' <span class="tag hold">unverified</span>'
    return (
        f"<tr><td><code>{escape(one.device)}</code>{mark}</td>"
        f"<td class=text>{escape(one.product)}: {escape(', '.join(one.groups) or 'no group')}</td>"
        f"<td class=n>{_held(one)}</td><td class=text>{signs}</td>"
        f"<td>{span(max(0.0, now - one.received))} ago</td></tr>"
    )


def _listed(fleet: Fleet) -> str:
    rows = [
        [
            f"<td><code>{escape(one.device)}</code></td>",
            f"<td class=text>{escape(one.product)}: {escape(', '.join(one.groups) or 'no group')}</td>",
            f"<td class=n>{_held(one)}</td>",
            f"<td>{span(max(0.0, fleet.time - one.received))} ago</td>",
            f"<td>{escape(', '.join(sign.kind for sign in one.signs)) or '<em>nothing odd</em>'}</td>",
        ]
        for one in fleet.listed
    ]
    return _table("All cameras", ("camera", "groups", "release", "heard", ""), rows)


def _held(one: Odd) -> str:
    if one.release is None:
        return "none"
    return f"{one.release}" if one.confirmed else f"{one.release}, watching it"


def _rest(fleet: Fleet) -> str:
    rows = [[f"<td>{escape(name)}</td>", f"<td class=n>{count:,}</td>"] for name, count in fleet.software.items()]
    parts = [_table("Versions of edgead", ("version", "cameras"), rows)]
    rows = [
        [f"<td class=text><code>{escape(digest)}</code></td>", f"<td class=n>{count:,}</td>"]
        for digest, count in fleet.quarantined.items()
    ]
    parts.append(_table("Quarantined releases", ("digest of the release", "cameras"), rows))
    return "".join(parts)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML; empty without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="panel wide"><table><tr>{top}</tr>{body}</table></div>'


__all__ = ["page_of"]
