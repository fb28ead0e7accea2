"""What `edgead run` does, apart from its options."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from edgead.runtime.errors import FailureError
from edgead.runtime.inspection import STAGES, Verdict
from edgead.runtime.progress import Progress
from edgead.runtime.sinks import Sink
from edgead.runtime.stream import Stream, Tally
from edgead.runtime.tables import table


@dataclass
class Stop:
    """Asked to end: by a limit of patience (Ctrl-C), or by the system (SIGTERM)."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: int | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the stream after the current frame; the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        old = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self.event.set()

    @property
    def exit_code(self) -> int:
        """0, or as shells have it 128 + signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


def run_stream(stream: Stream, sinks: Sequence[Sink], *, total: int | None, show_progress: bool, stop: Stop) -> Tally:
    """Inspect all of a stream; sinks are closed whatever happens.

    Args:
        stream: made with `stop.event`.
        sinks: take each result in this order.
        total: number of frames where it is known.
        show_progress: on standard error.
        stop: ends it after the current frame.

    Raises:
        StorageError: a sink could not write.
    """
    tally = Tally()
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        progress = stack.enter_context(Progress("frames", total)) if show_progress else None
        stack.enter_context(stop.on_signals())
        results = iter(stream)
        stack.callback(lambda: getattr(results, "close", lambda: None)())
        for capture, inspection in results:
            tally.add(inspection)
            for sink in sinks:
                sink.take(capture, inspection)
            if progress is not None:
                progress.advance(note=f"{tally.verdicts[Verdict.NG]} NG")
    return tally


def summary(tally: Tally, *, skipped: int = 0, dropped: int = 0, restarts: int = 0, engine: str = "") -> str:
    """The table at the end of a run."""
    rows = [
        ["frames", str(tally.frames)],
        ["OK", str(tally.verdicts[Verdict.OK])],
        ["NG", str(tally.verdicts[Verdict.NG])],
        ["not inspected", str(tally.verdicts[Verdict.NOT_INSPECTED])],
    ]
    if skipped:
        rows.append(["done before", str(skipped)])
    if dropped:
        rows.append(["dropped", str(dropped)])
    if restarts:
        rows.append(["engine restarts", str(restarts)])
    parts = [table(rows)]
    if tally.reasons:
        parts.append("\n".join(f"  {count} x {reason}" for reason, count in tally.reasons.most_common(5)))
    median, p95 = tally.milliseconds(0.5), tally.milliseconds(0.95)
    if not math.isnan(median["total"]):
        compared = max(tally.times["normality"], default=0.0) >= 0.05
        stages = [stage for stage in STAGES if compared or stage != "normality"]
        times = [
            ["ms", *stages],
            ["median", *(f"{median[stage]:.1f}" for stage in stages)],
            ["p95", *(f"{p95[stage]:.1f}" for stage in stages)],
        ]
        parts.append(table(times))
    versions = ", ".join(tally.knowledge)
    parts.append(f"knowledge {versions or '-'}{f', engine {engine}' if engine else ''}")
    return "\n".join(parts)


def refuse_if_none_inspected(tally: Tally) -> None:
    """A run in which nothing was inspected has failed, though each frame has its answer.

    Raises:
        FailureError: frames came, and none was inspected.
    """
    if tally.frames and not tally.inspected:
        reason, _ = tally.reasons.most_common(1)[0]
        raise FailureError(
            wanted="at least one frame that can be inspected",
            got=f"{tally.frames} frames and none inspected, mostly because of: {reason}",
            next_step="Check the source and the deadline.",
        )
