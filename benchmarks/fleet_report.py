"""What a simulated fleet came to, for people: tables, the paper sums for a million devices, and a picture."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from html import escape
from typing import Any

from benchmarks.fleet_run import DAY, END, HOUR, Flow, Results, Settings, peak_by_rules
from edgead.runtime.tables import table

DEFAULT_INTERVAL = 60.0
"""Seconds between polls, unless a device is told otherwise."""
_MILLION, _MONTH_S, _UPDATES, _FURTHER = 10**6, 30 * DAY, 4, 4
"""Updates a month, and publications about each (steps of a roll-out) beside the one that brings it."""
_INK, _QUIET, _LINE, _GOOD, _BAD, _ACCENT = "#1a2733", "#667785", "#dde4ea", "#1a7f5a", "#c4342d", "#1f5fbf"
_BIN_S = 900.0


def figures(found: Results, settings: Settings) -> dict[str, Any]:
    """All that is printed, as numbers."""
    flows = found.flows
    devices = settings.devices
    quiet, update = flows.get("quiet day", Flow()), flows.get("day of the update", Flow())
    took = sorted(found.adopted)
    widened = next((when for when, what in found.steps if what == "to 100 %"), END)
    wanted = -(-99 * devices // 100)
    nine = took[wanted - 1] if len(took) >= wanted else None
    begun = next((when for when, what in found.steps if what.startswith("a good release")), 0.0)
    dark = next((when for when, what in found.steps if what.startswith("power cut")), END)
    wake = Counter({second: count for second, count in found.seconds.items() if second >= dark})
    plain, others, taken = (_mean(flows, kind) for kind in ("no news", "others' news", "activated"))
    rules = {
        f"{name}, {jitter:g}": peak_by_rules(devices, interval, jitter, settings.seed)
        for name, interval in (("here", settings.interval), ("60 s", DEFAULT_INTERVAL))
        for jitter in (settings.jitter, 0.0)
    }
    return {
        "devices": devices,
        "pilots": found.pilots,
        "polls": flows["all"].polls,
        "requests": flows["all"].requests,
        "polls_per_device_quiet_day": quiet.polls / devices,
        "bytes_per_device_quiet_day": (quiet.sent + quiet.received) / devices,
        "bytes_per_device_day_of_update": (update.sent + update.received) / devices,
        "poll_without_news": plain,
        "poll_with_news_for_others": others,
        "poll_that_updates": taken,
        "hours_to_99_percent_from_first_pilot": None if nine is None else (nine - begun) / HOUR,
        "hours_to_99_percent_from_100_percent": None if nine is None else (nine - widened) / HOUR,
        "hours_to_all_from_100_percent": (took[-1] - widened) / HOUR if len(took) == devices else None,
        "share_at_power_cut": bisect_left(took, dark) / devices,
        "peak_requests_per_second": max(found.seconds.values()),
        "peak_requests_per_second_after_power_cut": max(wake.values(), default=0),
        "peak_polls_per_second_by_rules": rules,
        "outcomes": dict(found.outcomes.most_common()),
        "answers": found.answers,
        "faults_drawn": dict(found.faults),
        "polls_failed_by_fault": dict(found.felled),
        "power_cuts_in_a_poll": found.crashes,
        "checks": found.checks,
        "devices_ever_wrong": len({number for number, _, _ in found.wrong}),
        "wrong": found.wrong[:20],
        "bad_release": {
            "tested_by": found.tried_bad,
            "stopped_after_minutes": None if found.stopped is None else (found.stopped - DAY) / 60,
        },
        "ended": dict(found.ended),
        "tests": found.tests,
        "paper": paper(plain, others, taken),
    }


def paper(quiet: dict[str, float], others: dict[str, float], update: dict[str, float]) -> dict[str, float]:
    """Sums for a million devices behind a content network, from the measured bytes of the three kinds of polls."""
    found = {}
    for name, interval in (("60 s", DEFAULT_INTERVAL), ("1 h", HOUR)):
        found[f"requests/s, poll every {name}"] = _MILLION * quiet["requests"] / interval
        polls = _MILLION * _MONTH_S / interval
        month = update["sent"] + _FURTHER * others["sent"]
        found[f"TB/month, poll every {name}"] = (polls * quiet["sent"] + _MILLION * _UPDATES * month) / 1e12
    return found


def text(numbers: dict[str, Any], settings: Settings, seconds: float) -> str:
    """Tables for people."""
    quiet, update, rules = numbers["poll_without_news"], numbers["poll_that_updates"], {}
    for name, polls in numbers["peak_polls_per_second_by_rules"].items():
        rules[name] = f"{polls} polls, {polls * quiet['requests']:.0f} requests"
    here, even = f"{settings.jitter:g}", "0"
    rows = [
        ("devices, of them pilots", f"{numbers['devices']}, {numbers['pilots']}"),
        ("polls, requests", f"{numbers['polls']}, {numbers['requests']}"),
        ("a poll without news", _flow_text(quiet)),
        ("a poll with news for others", _flow_text(numbers["poll_with_news_for_others"])),
        ("a poll that updates", _flow_text(update)),
        (
            "bytes per device, quiet day",
            f"{numbers['bytes_per_device_quiet_day']:.0f} with {numbers['polls_per_device_quiet_day']:.2f} polls",
        ),
        ("bytes per device, day of the update", f"{numbers['bytes_per_device_day_of_update']:.0f}"),
        ("99 % of devices after the step to 100 %", _hours(numbers["hours_to_99_percent_from_100_percent"])),
        ("  share of them when the plant's power went", f"{numbers['share_at_power_cut']:.1%}"),
        ("99 % of devices after the first pilot step", _hours(numbers["hours_to_99_percent_from_first_pilot"])),
        ("the last device after the step to 100 %", _hours(numbers["hours_to_all_from_100_percent"])),
        ("peak requests in a second, whole story", str(numbers["peak_requests_per_second"])),
        ("  after the power cut of the plant", str(numbers["peak_requests_per_second_after_power_cut"])),
        ("  that, by the rules, with jitter", rules[f"here, {here}"]),
        ("  that, by the rules, without jitter", rules[f"here, {even}"]),
        ("  polling every 60 s, by the rules, with", rules[f"60 s, {here}"]),
        ("  polling every 60 s, by the rules, without", rules[f"60 s, {even}"]),
        ("power cuts in the middle of a poll", str(numbers["power_cuts_in_a_poll"])),
        ("looks at what a device runs", str(numbers["checks"])),
        ("devices that ever ran something mixed or broken", str(numbers["devices_ever_wrong"])),
        ("devices that tested and refused the bad release", str(numbers["bad_release"]["tested_by"])),
        ("minutes until the bad release was stopped", _number(numbers["bad_release"]["stopped_after_minutes"])),
        ("tests on the engine, and remembered ones", f"{numbers['tests']['real']}, {numbers['tests']['remembered']}"),
        ("real seconds", f"{seconds:.0f}"),
    ]
    parts = [table(rows, right=False)]
    for title, key in (
        ("polls by what came of them", "outcomes"),
        ("answers of the server", "answers"),
        ("faults drawn", "faults_drawn"),
        ("polls that failed, by fault", "polls_failed_by_fault"),
        ("devices at the end", "ended"),
    ):
        parts.append(f"{title}\n" + table([(name, str(count)) for name, count in numbers[key].items()], indent="  "))
    for item in numbers["wrong"]:
        parts.append("WRONG: device {}, second {:.0f}: {}".format(*item))
    parts.append(_paper_text(quiet, numbers["poll_with_news_for_others"], update, numbers["paper"]))
    return "\n\n".join(parts)


def picture(found: Results, settings: Settings) -> str:
    """Adoption and requests over time as SVG."""
    left, width, top, height, gap = 70.0, 900.0, 64.0, 210.0, 64.0
    second = top + height + gap
    took = sorted(found.adopted)
    bins: Counter[int] = Counter()
    for moment, count in found.seconds.items():
        if moment < END:
            bins[int(moment // _BIN_S)] += count
    per_minute = {place: count * 60.0 / _BIN_S for place, count in bins.items()}
    most = max(per_minute.values(), default=1.0)

    def x(when: float) -> float:
        return left + width * when / END

    parts = [
        _text(left, 26, f"{settings.devices} devices through a roll-out, with faults", "start", _INK, 17, bold=True),
        _text(left, top - 10, "devices with the new release", "start", _GOOD, 13, bold=True),
        _text(left, second - 10, "requests per minute", "start", _ACCENT, 13, bold=True),
    ]
    for edge in (top, second):
        parts.append(f'<rect x="{left}" y="{edge}" width="{width}" height="{height}" fill="#fbfcfd" stroke="{_LINE}"/>')
    for share in (0, 25, 50, 75, 100):
        y = top + height * (1 - share / 100)
        parts.append(_text(left - 8, y + 4, f"{share} %", "end", _QUIET, 11))
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LINE}"/>')
    for part in (0.0, 0.5, 1.0):
        parts.append(_text(left - 8, second + height * (1 - part) + 4, f"{most * part:.3g}", "end", _QUIET, 11))
    marks = {}
    for when, what in found.steps:
        if when <= END and "timestamp" not in what:
            marks[when] = what
    for number, (when, what) in enumerate(marks.items(), 1):
        colour = _BAD if "bad" in what or "power" in what else _GOOD
        parts.append(
            f'<line x1="{x(when):.1f}" x2="{x(when):.1f}" y1="{top}" y2="{second + height}" stroke="{colour}" '
            'stroke-dasharray="3 4" opacity=".7"/>'
        )
        row = second + height + 44 + 18 * ((number - 1) % 4)
        column = left + 450 * ((number - 1) // 4)
        parts.append(
            _text(x(when), top + height + 14 + 12 * (number % 2), str(number), "middle", colour, 11, bold=True)
        )
        parts.append(_text(column, row, f"{number}  hour {when / HOUR:.1f}: {what}", "start", colour, 12))
    steps = [END * place / 450 for place in range(451)]
    shares = [bisect_left(took, when) / settings.devices for when in steps]
    line = " ".join(
        f"{x(when):.1f},{top + height * (1 - share):.1f}" for when, share in zip(steps, shares, strict=True)
    )
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_GOOD}" stroke-width="2.5"/>')
    wide = width * _BIN_S / END
    for place, rate in sorted(per_minute.items()):
        tall = height * rate / most
        parts.append(
            f'<rect x="{x(place * _BIN_S):.1f}" y="{second + height - tall:.1f}" width="{wide:.2f}" '
            f'height="{tall:.1f}" fill="{_ACCENT}"/>'
        )
    for hour in range(0, int(END / HOUR) + 1, 6):
        parts.append(_text(x(hour * HOUR), second + height + 18, f"{hour} h", "middle", _QUIET, 11))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24:.0f} {second + height + 116:.0f}" '
        f'width="{left + width + 24:.0f}" font-family="system-ui,sans-serif">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _mean(flows: dict[str, Flow], kind: str) -> dict[str, float]:
    flow = flows.get(kind, Flow())
    polls = max(1, flow.polls)
    return {
        "requests": flow.requests / polls,
        "sent": flow.sent / polls,
        "received": flow.received / polls,
        "bodies": flow.bodies / polls,
    }


def _flow_text(mean: dict[str, float]) -> str:
    return (
        f"{mean['requests']:.2f} requests, {mean['bodies']:.0f} bytes of bodies; with heads {mean['sent']:.0f} down, "
        f"{mean['received']:.0f} up"
    )


def _paper_text(
    quiet: dict[str, float], others: dict[str, float], update: dict[str, float], sums: dict[str, float]
) -> str:
    lines = ["On paper: 10^6 devices behind a content network, from the bytes above (HTTP, without TLS and TCP)"]
    for name, interval in (("60 s", DEFAULT_INTERVAL), ("1 h", HOUR)):
        month = f"10^6 x {_UPDATES} updates x ({update['sent']:.0f} B + {_FURTHER} x {others['sent']:.0f} B)"
        lines += [
            f"  poll every {name}: 10^6 x {quiet['requests']:.2f} requests / {interval:.0f} s = "
            f"{sums[f'requests/s, poll every {name}']:,.0f} requests/s",
            f"    10^6 x {_MONTH_S:.0f} s / {interval:.0f} s x {quiet['sent']:.0f} B + {month} = "
            f"{sums[f'TB/month, poll every {name}']:.2f} TB/month down",
        ]
    return "\n".join(lines)


def _hours(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f} h"


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _text(x: float, y: float, words: str, anchor: str, colour: str, size: int, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"{weight}>'
        f"{escape(words)}</text>"
    )


__all__ = ["figures", "paper", "picture", "text"]
