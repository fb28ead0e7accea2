"""The model card of a bundle, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgead.runtime.knowledge import Pack
from edgead.runtime.spec import DetectorSpec, EngineRecord


def model_card(
    name: str, spec: DetectorSpec, pack: Pack, engines: Sequence[EngineRecord], facts: Mapping[str, Any]
) -> str:
    """What the detector is, what it knows, how exact its engines are, and what it was made from.

    Args:
        name: the bundle's name.
        spec: the detector's ports and preprocessing.
        pack: its initial knowledge.
        engines: with their parity figures.
        facts: the detector's own card: anything that JSON holds.
    """
    size, calibration = spec.preprocessing, pack.calibration
    lines = [
        f"# {name}",
        "",
        f"Anomaly detector of the method `{spec.method}` for `{pack.product}`.",
        "",
        "| | |",
        "|---|---|",
        f"| engine's frame | {size.width} x {size.height} pixels |",
        f"| feature space | `{spec.fingerprint[:12]}` |",
        f"| initial knowledge | `{pack.version}`: " + (_rows(pack) or "no memory bank") + " |",
        f"| NG above | {calibration.threshold:.6g} (typical normal part: {calibration.typical:.6g}; "
        f"{calibration.held_out} held out) |",
        "",
        "## Engines",
        "",
        "Largest differences from torch on the golden images, as shares of the reference's range.",
        "",
        "| engine | made with | score | map |",
        "|---|---|---|---|",
    ]
    for engine in engines:
        figures = engine.parity
        seen = f"{figures.score:.1e} | {figures.map:.1e}" if figures else "not executed here | "
        lines.append(f"| {engine.name} | {engine.made_with} | {seen} |")
    second = [(engine.name, engine.normality) for engine in engines if engine.normality is not None]
    if second:
        lines += [
            "",
            "## Normality by sentences",
            "",
            "Largest differences of the suppression map (0 to 1) from torch, under an empty and a filled table.",
            "",
            "| engine | map |",
            "|---|---|",
        ]
        for name, pair in second:
            lines.append(f"| {name} | {pair.parity.map:.1e} |" if pair.parity else f"| {name} | not executed here |")
    if facts:
        lines += ["", "## Made from", ""]
        lines += _list(facts, "")
    return "\n".join(lines) + "\n"


def _rows(pack: Pack) -> str:
    return ", ".join(f"{len(pack.arrays[bank])} rows in `{bank}`" for bank in pack.banks)


def _list(facts: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}- {_plain(key)}:", *_list(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {_plain(key)}: {_plain(value)}")
    return lines


def _plain(value: object) -> str:
    """One line of text, so that a fact cannot change the document around it."""
    return " ".join(str(value).split())
