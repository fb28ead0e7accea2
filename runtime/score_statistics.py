"""How the scores of a release lie, in constant memory: counts of verdicts, and a histogram of score/threshold.

The histogram has fixed bins of equal width in the logarithm, from `LOWEST` to `HIGHEST`, so that nothing has to be
known before the first frame, and counts of two hours can be added. A bin's edges differ by 2 %, and a quantile is told
as the geometric middle of its bin: it is off by less than 1 % of itself. The largest ratio is kept as it is. Ratios
below `LOWEST` count as 0, those above `HIGHEST` as `HIGHEST`.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable

from edgead.runtime.device_status import MOST_NAMES, QUANTILES, ScoreStatistics
from edgead.runtime.inspection import Inspection, Verdict

LOWEST, HIGHEST = 1e-4, 1e4
"""Ratios of score to threshold that are told apart."""
_STEP = math.log(1.02)
_FIRST = math.log(LOWEST)
_BINS = math.ceil((math.log(HIGHEST) - _FIRST) / _STEP)


class _Product:
    """Counts of one product: 8 bytes for each of the bins, and a few numbers."""

    __slots__ = ("bins", "largest", "ng", "not_inspected", "ok", "scored", "smallest")

    def __init__(self) -> None:
        self.bins = array("Q", bytes(8 * _BINS))
        self.ok = self.ng = self.not_inspected = self.scored = 0
        self.smallest, self.largest = math.inf, 0.0

    def add(self, result: Inspection) -> None:
        if result.verdict is Verdict.NOT_INSPECTED:
            self.not_inspected += 1
            return
        if result.verdict is Verdict.OK:
            self.ok += 1
        else:
            self.ng += 1
        score, threshold = result.score, result.threshold
        # Against a threshold of zero, and of what is no number, there is no share.
        if score is None or not threshold > 0.0 or not math.isfinite(ratio := float(score) / float(threshold)):
            return
        ratio = 0.0 if ratio < LOWEST else min(ratio, HIGHEST)
        self.scored += 1
        self.smallest, self.largest = min(self.smallest, ratio), max(self.largest, ratio)
        if ratio:
            self.bins[min(_BINS - 1, int((math.log(ratio) - _FIRST) / _STEP))] += 1

    def ratios(self) -> tuple[float, ...]:
        if not self.scored:
            return ()
        below = self.scored - sum(self.bins)  # those that count as 0
        found: list[float] = []
        wanted = [math.ceil(share * self.scored) for share in QUANTILES[:-1]]
        place, count = 0, below
        for rank in wanted:
            while count < rank:
                count += self.bins[place]
                place += 1
            middle = 0.0 if rank <= below else math.exp(_FIRST + (place - 0.5) * _STEP)
            found.append(min(max(middle, self.smallest), self.largest))
        return (*found, self.largest)


class ScoreCounter:
    """Counts inspections by product. All methods may be called from any thread.

    Args:
        clock: seconds since 1970 in UTC.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._products: dict[str, _Product] = {}
        self._since = int(clock())

    def add(self, result: Inspection) -> None:
        """Count a frame."""
        with self._lock:
            counts = self._products.get(result.product)
            if counts is None:
                # A status names so many products and no more; the others are inspected all the same.
                if len(self._products) >= MOST_NAMES:
                    return
                counts = self._products[result.product] = _Product()
            counts.add(result)

    def reset(self) -> None:
        """Begin anew: another release is active."""
        with self._lock:
            self._products = {}
            self._since = int(self._clock())

    def statistics(self) -> tuple[ScoreStatistics, ...]:
        """What was counted, by product in the order of their names."""
        with self._lock:
            since = max(0, self._since)
            return tuple(
                ScoreStatistics(
                    product,
                    counts.ok + counts.ng + counts.not_inspected,
                    counts.ok,
                    counts.ng,
                    counts.not_inspected,
                    since,
                    counts.ratios(),
                )
                for product, counts in sorted(self._products.items())
            )


__all__ = ["HIGHEST", "LOWEST", "ScoreCounter"]
