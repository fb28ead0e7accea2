"""A fleet as tables for a terminal of 80 to 120 columns. Pure; see `edgead.server_side.ota.fleet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgead.runtime.rollout import Rollout
from edgead.runtime.tables import table
from edgead.server_side.ota.fleet import Fleet, Group, Product
from edgead.server_side.ota.fleet_signs import span
from edgead.server_side.ota.statuses import Seen

SHOWN = 20
"""Lines of a list, unless all are asked for."""
SHOWN_OF_A_KIND = 4
"""Devices that are named of those with one sign as their worst, unless all are asked for."""
_RELEASES = 3
_NAME = 32
_LEAST_WIDTH = 60


def fleet_text(fleet: Fleet, listed: Sequence[Seen] = (), *, everything: bool = False, width: int = 100) -> str:
    """A summary as text.

    Args:
        fleet: what is told.
        listed: devices to list each, whether something is odd about them or not.
        everything: name every device about which something is odd, and show whole messages.
        width: columns.
    """
    width = max(width, _LEAST_WIDTH)
    lines = [_head(fleet)]
    for product in fleet.products:
        lines += ["", *_product(product, width)]
    if listed:
        lines += ["", *(line if everything else _cut(line, width) for line in _listed(listed, fleet.time))]
    if fleet.failures:
        lines += ["", "releases that failed"]
        for reason in fleet.failures if everything else fleet.failures[:SHOWN]:
            told = f": {reason.text}" if reason.text else ""
            start = f"  {reason.devices:>6}  {reason.product} {reason.release} {reason.outcome}"
            lines.append(_cut(f"{start}{told}", width))
            more = ", ..." if reason.devices > len(reason.examples) else ""
            lines.append(_cut(f"{'':>10}on {', '.join(reason.examples)}{more}", width))
    if fleet.faults:
        lines += ["", "last errors"]
        for fault in fleet.faults if everything else fleet.faults[:SHOWN]:
            lines.append(_cut(f"  {fault.devices:>6}  {fault.kind}: {fault.text}", width))
    strange = [group for group in fleet.scores if group.outliers]
    if strange:
        lines += ["", "scores that stand out against the others of product and release"]
        for group in strange:
            usual = f"median score {group.ratio:.2f} of the threshold, {group.ng:.2%} NG"
            who = f"{group.product} {group.release}, of {_number(group.devices)}"
            lines.append(_cut(f"  {len(group.outliers):>6}  {who}: {usual}", width))
    if fleet.quarantined:
        named = ", ".join(f"{digest[:12]} on {_number(count)}" for digest, count in fleet.quarantined.items())
        lines += ["", _cut(f"quarantined: {named}", width)]
    if fleet.odd:
        lines += ["", f"to look at: {_number(len(fleet.odd))} of {_number(fleet.devices)} cameras"]
        lines += _odd(fleet, everything, width)
    return "\n".join(lines)


def record_text(record: Rollout) -> str:
    """A roll-out in one line."""
    how = "STOPPED" if record.stopped else "paused" if record.paused else "rolling out"
    groups = ", ".join(record.groups) or "no group"
    return f"release {record.release} {how}: {groups} and {record.percent:g} % of the others"


def _head(fleet: Fleet) -> str:
    parts = [f"{_number(fleet.devices)} cameras heard of"]
    if fleet.verified < fleet.devices:
        parts.append(f"{_number(fleet.devices - fleet.verified)} of them UNVERIFIED")
    if fleet.never:
        names = ", ".join(fleet.never[:3]) + (", ..." if len(fleet.never) > 3 else "")
        parts.append(f"{_number(len(fleet.never))} registered and never heard of ({names})")
    if fleet.refused:
        parts.append("refused: " + ", ".join(f"{count} {reason}" for reason, count in fleet.refused.items()))
    software = ", ".join(f"{version} on {_number(count)}" for version, count in fleet.software.items())
    return "; ".join(parts) + (f"\nedgead {software}" if software else "")


def _product(product: Product, width: int) -> list[str]:
    lines = [f"{product.name}: {_number(product.devices)} cameras"]
    whole = Group(
        "all",
        product.devices,
        product.releases,
        product.silent,
        product.alarms,
        product.counts,
    )
    groups = [whole, *product.groups]
    head = ["", "cameras", "silent", "alarm"]
    if product.record is not None:
        lines[0] += f"; {record_text(product.record)}"
        head += ["reached", "have it", "watching", "failed", "behind"]
    rows = [[*head, "releases"]]
    for group in groups:
        cells = [_cut(group.name, _NAME), *map(_number, (group.devices, group.silent, group.alarms))]
        if product.record is not None and group.counts is not None:
            counts = group.counts
            numbers = (
                counts.reached,
                counts.confirmed,
                counts.probation + counts.lost,
                counts.failed,
                counts.behind + counts.not_heard,
            )
            cells += map(_number, numbers)
        rows.append([*cells, _shares(group.releases, group.devices)])
    return [*lines, *(_cut(line, width) for line in _fitting(rows, width))]


def _odd(fleet: Fleet, everything: bool, width: int) -> list[str]:
    """Devices by their worst sign; with all of them, whole messages too."""
    lines = []
    for kind, count in fleet.signs.items():
        worst = [one for one in fleet.odd if one.signs[0].kind == kind]
        worse = f", {_number(len(worst))} of them without anything worse" if len(worst) < count else ""
        lines.append(f"  {kind}: {_number(count)}{worse}")
        shown = worst if everything else worst[:SHOWN_OF_A_KIND]
        wide = min(_NAME, max((len(one.device) for one in shown), default=0))
        for one in shown:
            name = one.device if everything else _cut(one.device, wide)
            line = f"    {name:<{wide}}  {'; '.join(sign.text for sign in one.signs)}"
            lines.append(line if everything else _cut(line, width))
        if len(shown) < len(worst):
            lines.append(f"    ... and {_number(len(worst) - len(shown))} others: --all")
    return lines


def _fitting(rows: list[list[str]], width: int) -> list[str]:
    """Rows as lines; where they are too wide, without the columns in which nothing is counted."""
    lines = _aligned(rows)
    if max(map(len, lines)) > width:
        told = [place for place in range(len(rows[0])) if any(row[place] != "0" for row in rows[1:])]
        lines = _aligned([[row[place] for place in told] for row in rows])
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    left = table([row[:-1] for row in rows], indent="  ").splitlines()
    wide = max(map(len, left))
    return [f"{line:<{wide}}  {row[-1]}".rstrip() for line, row in zip(left, rows, strict=True)]


def _listed(statuses: Sequence[Seen], now: float) -> list[str]:
    rows = [["camera", "product", "release", "", "heard", "groups"]]
    for seen in statuses:
        status = seen.status
        rows.append(
            [
                status.device,
                status.product,
                "none" if status.release is None else str(status.release),
                "" if status.release is None else "confirmed" if status.confirmed else "on probation",
                f"{span(max(0.0, now - seen.received))} ago",
                ", ".join(status.groups),
            ]
        )
    return table(rows, indent="  ", right=False).splitlines()


def _shares(releases: Mapping[str, int], devices: int) -> str:
    ordered = sorted(releases.items(), key=lambda item: -item[1])
    if devices <= SHOWN:
        told = [f"{release}: {count}" for release, count in ordered]
    else:
        told = [f"{release}: {_percent(count / devices)}" for release, count in ordered]
    return "  ".join(told[:_RELEASES]) + (f"  +{len(told) - _RELEASES}" if len(told) > _RELEASES else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 else "<1%"


def _number(value: int) -> str:
    return f"{value:,}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(1, width - 3)]}..."


__all__ = ["SHOWN", "fleet_text", "record_text"]
