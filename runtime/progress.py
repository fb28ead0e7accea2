"""Progress on standard error: a live line on a terminal, a few plain lines in a log.

Machine-readable output goes to standard output, so progress never mixes with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TextIO, TypeVar

Item = TypeVar("Item")

_LIVE_INTERVAL = 0.1
"""Seconds between updates of a live line."""
_LOG_INTERVAL = 15.0
"""Seconds between lines where nobody watches; work that ends sooner prints nothing there."""


class Progress:
    """How far a long piece of work has come, with the time that is left.

    Args:
        label: what is being done, as a noun ("coreset", "reading images").
        total: number of steps, or None if it is not known.
        stream: where to write; standard error by default.
    """

    def __init__(self, label: str, total: int | None = None, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.note = ""
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._start = time.monotonic()
        self._shown = self._start
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and self._width:
            if kind is None:
                self._show()
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more; `note` is shown behind the figures."""
        self.done += steps
        self.note = note
        now = time.monotonic()
        if now - self._shown >= (_LIVE_INTERVAL if self._live else _LOG_INTERVAL):
            self._shown = now
            self._show()

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items` and count each when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._start
        if self.total:
            left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
            text = f"{self.label}: {self.done}/{self.total} ({100 * self.done // self.total} %)"
            text += f", {_duration(elapsed)}"
            if 0 < self.done < self.total:
                text += f", {_duration(left)} left"
        else:
            text = f"{self.label}: {self.done}, {_duration(elapsed)}"
        if self.note:
            text += f", {self.note}"
        if self._live:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
