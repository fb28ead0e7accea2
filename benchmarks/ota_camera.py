"""A camera for `benchmarks.ota`, as a process of its own: it inspects, updates itself, and says when what happened.

    python -m benchmarks.ota_camera follow FOLDER FRAMES.npy
    python -m benchmarks.ota_camera pause FOLDER FRAMES.npy

Lines of JSON go to standard output; it ends when standard input does. `follow` inspects some frames a second and tells
of each update. `pause` finds the highest frame rate that it sustains, streams at it, first without an updater, then
with one, and tells at its end how long the stream had to wait.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgead.runtime.device_folder import read_device
from edgead.runtime.frames import FrameRing
from edgead.runtime.inspection import Verdict
from edgead.runtime.live import LiveInspector
from edgead.runtime.slots import Active, Store
from edgead.runtime.update_outcome import Outcome
from edgead.runtime.updater import DeviceUpdater

POLL_S = 1.0
JITTER = 0.2
TARGET = "onnx"
THREADS = 1
"""Of inspection, and of the updater's tests: one of two cores each."""
FOLLOW_PAUSE_S = 0.02
RATE_S, QUIET_S = 8.0, 20.0
MARGIN = 1.02

Windows = list[tuple[float, float]]


class TimedLine(LiveInspector):
    """Notes when it takes releases."""

    def __init__(self, active: Active, **options: Any) -> None:
        super().__init__(active, **options)
        self.taken: Windows = []

    def take(self, active: Active) -> None:
        begin = time.time()
        super().take(active)
        self.taken.append((begin, time.time()))


class TimedUpdater(DeviceUpdater):
    """Notes when it polls and tests."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.polled = 0.0
        self.tested = (0.0, 0.0)

    def poll(self) -> Outcome:
        self.polled = time.time()
        return super().poll()

    def self_test(self, candidate: Active) -> None:
        begin = time.time()
        super().self_test(candidate)
        self.tested = (begin, time.time())


def say(event: str, **more: Any) -> None:
    print(json.dumps({"event": event, "peak_kb": peak_kb(), **more}), flush=True)


def peak_kb() -> int:
    """The kernel's high-water mark of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1])


def main(mode: str, folder: Path, frames_file: Path) -> None:
    frames = np.load(frames_file)
    store, device = Store(folder), read_device(folder)
    first = DeviceUpdater(store, device, target=TARGET, threads=THREADS).poll()
    if first.error is not None:
        raise first.error
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    ring = FrameRing(store.frames, every_s=1.0)
    with TimedLine(store.start(), frames=ring, target=TARGET, threads=THREADS) as line:
        updater = TimedUpdater(store, device, line, target=TARGET, threads=THREADS)
        (follow if mode == "follow" else pause)(line, updater, frames, stop)


def follow(line: TimedLine, updater: TimedUpdater, frames: NDArray[np.uint8], stop: threading.Event) -> None:
    """Inspect now and then; tell of each poll, and of the first frame under other knowledge."""

    def report(outcome: Outcome) -> None:
        error = "" if outcome.error is None else str(outcome.error)
        fields = {name: getattr(outcome, name) for name in ("status", "way", "received", "requests", "seconds")}
        taken = line.taken[-1] if line.taken else (0.0, 0.0)
        say("outcome", polled=updater.polled, tested=updater.tested, taken=taken, error=error, **fields)

    known = line.inspect(frames[0]).knowledge
    say("ready", knowledge=known)
    updater.start(POLL_S, JITTER, stop, report)
    number = 0
    while not stop.is_set():
        result = line.inspect(frames[number % len(frames)])
        if result.knowledge != known:
            known = result.knowledge
            say("knowledge", knowledge=known, at=time.time(), verdict=result.verdict.value)
        number += 1
        time.sleep(FOLLOW_PAUSE_S)


def pause(line: TimedLine, updater: TimedUpdater, frames: NDArray[np.uint8], stop: threading.Event) -> None:
    """A stream at the highest rate that is sustained, without and with updates."""
    lasted, end = [], time.perf_counter() + RATE_S
    for number, frame in enumerate(forever(frames)):
        begin = time.perf_counter()
        if begin >= end:
            break
        line.inspect(frame)
        if number >= 10:
            lasted.append(time.perf_counter() - begin)
    interval = MARGIN * sustained(lasted)
    quiet = stream(line, frames, interval, stop, QUIET_S)
    updates: list[dict[str, Any]] = []

    def report(outcome: Outcome) -> None:
        if outcome.status == "activated":
            updates.append({"window": (updater.polled, time.time()), "tested": updater.tested, "way": outcome.way})
            say("update", **updates[-1])
        elif outcome.status not in ("current", "confirmed"):
            say("trouble", status=outcome.status, reason=outcome.reason)

    say("ready", interval=interval, lasted_ms=spread(np.array(lasted)))
    updater.start(POLL_S, JITTER, stop, report)
    busy = stream(line, frames, interval, stop, 600.0)
    polls = [update["window"] for update in updates]
    figures = {
        "interval_ms": interval * 1e3,
        "frames_per_s": 1.0 / interval,
        "updates": len(updates),
        "swap_ms": [1e3 * (end - begin) for begin, end in line.taken],
        "quiet": told(quiet, interval, None),
        "all": told(busy, interval, None),
        "in_updates": told(busy, interval, polls),
        "in_swaps": told(busy, interval, line.taken),
    }
    say("pause", **figures)


def forever(frames: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    while True:
        yield from frames


def sustained(lasted: list[float]) -> float:
    """The shortest interval between frames at which none is dropped, if one may wait for the one before.

    Args:
        lasted: seconds of each of a row of frames.
    """
    low, high = float(np.median(lasted)), max(lasted)
    for _ in range(40):
        middle, behind, worst = (low + high) / 2, 0.0, 0.0
        for seconds in lasted:
            behind = max(0.0, behind + seconds - middle)
            worst = max(worst, behind)
        low, high = (low, middle) if worst < middle else (middle, high)
    return high


def stream(
    line: TimedLine, frames: NDArray[np.uint8], interval: float, stop: threading.Event, seconds: float
) -> list[tuple[float, float, int, bool]]:
    """Frames at a fixed rate; the newest one waits for the inspector, an older one that still waits is dropped.

    Returns:
        of each frame that was inspected: when it began and ended, how many were dropped before it, whether it has a
        verdict.
    """
    found = []
    due = start = time.time()
    for frame in forever(frames):
        now = time.time()
        if stop.is_set() or now >= start + seconds:
            return found
        if now < due:
            time.sleep(due - now)
        dropped = int(max(0.0, now - due) // interval)
        due += dropped * interval
        begin = time.time()
        result = line.inspect(frame)
        found.append((begin, time.time(), dropped, result.verdict is not Verdict.NOT_INSPECTED))
        due += interval
    return found


def told(found: list[tuple[float, float, int, bool]], interval: float, windows: Windows | None) -> dict[str, Any]:
    """Gaps between answers, all of them or those that overlap a window."""
    ends = np.array([end for _, end, _, _ in found])
    gaps = np.diff(ends)
    kept = np.ones(len(gaps), np.bool_)
    if windows is not None:
        kept[:] = False
        for begin, end in windows:
            kept |= (ends[1:] >= begin) & (ends[:-1] <= end)
    rows = [row for row, keep in zip(found[1:], kept, strict=True) if keep]
    return {
        "frames": len(rows),
        "dropped": sum(row[2] for row in rows),
        "not_inspected": sum(not row[3] for row in rows),
        "gaps_ms": spread(gaps[kept]) if kept.any() else None,
        "longest_pause_ms": max(0.0, 1e3 * (float(gaps[kept].max()) - interval)) if kept.any() else None,
    }


def spread(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Milliseconds at some shares of a distribution."""
    shares = {"median": 50.0, "p99": 99.0, "p99.9": 99.9, "longest": 100.0}
    return {name: float(np.percentile(seconds, share)) * 1e3 for name, share in shares.items()}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
