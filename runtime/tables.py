"""Plain text tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, indent: str = "", right: bool = True) -> str:
    """Rows as aligned columns, two spaces apart.

    Args:
        rows: cells; shorter rows are filled with empty ones.
        indent: put before every line.
        right: align all columns but the first to the right, as figures want it.
    """
    columns = max((len(row) for row in rows), default=0)
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in filled) for column in range(columns)]
    lines = []
    for row in filled:
        cells = [
            cell.rjust(width) if right and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def bytes_text(size: int) -> str:
    """A size for people, in units of 1000: '154 kB'."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
