"""Where normal ends: a threshold for a wanted false-alarm rate, and how much so few images can promise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from edgead.runtime.errors import InputError
from edgead.runtime.spec import Calibration

CONFIDENCE = 0.95


def calibrate(
    scores: NDArray[np.float32],
    map_maxima: NDArray[np.float32] | None = None,
    *,
    false_alarm_rate: float = 0.01,
) -> Calibration:
    """Thresholds from the scores of held-out normal images.

    Args:
        scores: image scores [n], n >= 2, of normals that the bank does not hold.
        map_maxima: largest value of each image's anomaly map [n], for the threshold of the outlines.
        false_alarm_rate: wanted share of normal frames called NG, between 0 and 1 (exclusive).

    Raises:
        InputError: fewer than 2 scores, a score that is no number, or a rate outside (0, 1).
    """
    if not 0.0 < false_alarm_rate < 1.0:
        raise InputError(wanted="a false-alarm rate between 0 and 1", got=f"{false_alarm_rate}", next_step="Try 0.01.")
    if len(scores) < 2 or not np.isfinite(scores).all():
        raise InputError(
            wanted="finite scores of at least 2 held-out normal images",
            got=f"{len(scores)} scores",
            next_step="Add photographs of good parts.",
        )
    threshold = upper_quantile(scores, false_alarm_rate)
    exceeding = int((scores > threshold).sum())
    return Calibration(
        threshold=threshold,
        map_threshold=None if map_maxima is None else upper_quantile(map_maxima, false_alarm_rate),
        typical=float(np.median(scores)),
        held_out=len(scores),
        false_alarm_rate=false_alarm_rate,
        false_alarm_bound=false_alarm_bound(exceeding, len(scores)),
    )


def upper_quantile(values: NDArray[np.float32], rate: float) -> float:
    """The value that at most a share `rate` of all future values is expected to exceed.

    Of n values, a further one exceeds the (k + 1)-th largest with probability (k + 1) / (n + 1), whatever their
    distribution; so with enough of them this is the order statistic with the largest k that keeps the promise.
    With fewer the sample cannot show so rare a value, and the tail is extrapolated: the upper prediction limit
    for one more value whose logarithm is normally distributed (Student's t with n - 1 degrees of freedom), at
    least the largest value seen and at most twice it. Distances are positive and lean to the right: of real
    scores, limits on the plain values let through nearly twice the wanted share, those on logarithms the wanted
    one. Values that are not all positive are taken as they are.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count = len(ordered)
    exceeding = _allowed(count, rate)
    if exceeding >= 0:
        return float(ordered[count - 1 - exceeding])
    positive = ordered[0] > 0
    plain = np.log(ordered) if positive else ordered
    spread = float(plain.std(ddof=1)) * math.sqrt(1.0 + 1.0 / count)
    limit = float(plain.mean()) + float(stats.t.ppf(1.0 - rate, count - 1)) * spread
    largest = float(ordered[-1])
    if not positive:
        return max(limit, largest)
    return min(max(math.exp(min(limit, 700.0)), largest), 2.0 * largest)


def _allowed(count: int, rate: float) -> int:
    """How many of `count` held-out values may lie above the threshold; -1 if even none is not enough."""
    return math.floor(rate * (count + 1) + 1e-9) - 1


def false_alarm_bound(exceeding: int, count: int) -> float:
    """Upper 95 % confidence bound of the true share, if `exceeding` of `count` images exceed the threshold.

    Clopper and Pearson 1934, one-sided: for none of 20 it is 1 - 0.05 ** (1 / 20) = 13.9 %.
    """
    if exceeding >= count:
        return 1.0
    return float(stats.beta.ppf(CONFIDENCE, exceeding + 1, count - exceeding))


def statement(calibration: Calibration) -> str:
    """What the calibration promises, as a sentence for people."""
    if calibration.false_alarm_rate is None or calibration.false_alarm_bound is None:
        return "The threshold was set by hand; nothing is known of its false-alarm rate."
    text = (
        f"Threshold for {100 * calibration.false_alarm_rate:g} % false alarms from {calibration.held_out} "
        f"held-out normal images; with {100 * CONFIDENCE:g} % confidence the true rate is below "
        f"{100 * calibration.false_alarm_bound:.1f} %."
    )
    if _allowed(calibration.held_out, calibration.false_alarm_rate) < 0:
        text += (
            f" So few images cannot show a rate of {100 * calibration.false_alarm_rate:g} %: the threshold "
            "is extrapolated from their spread."
        )
    return text
