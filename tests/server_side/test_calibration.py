"""Thresholds from few images, and what they can promise."""

from __future__ import annotations

import numpy as np
import pytest

from edgead.runtime.errors import InputError
from edgead.server_side.calibration import calibrate, false_alarm_bound, statement, upper_quantile


def test_none_of_20_allows_a_rate_below_13_9_percent_and_no_less() -> None:
    assert false_alarm_bound(0, 20) == pytest.approx(1 - 0.05 ** (1 / 20))
    assert round(100 * false_alarm_bound(0, 20), 1) == 13.9
    assert false_alarm_bound(20, 20) == 1.0


def test_with_many_images_the_threshold_is_the_order_statistic() -> None:
    for count, exceeding in ((99, 0), (198, 0), (199, 1), (999, 9), (1000, 9)):
        scores = np.arange(count, dtype=np.float32)
        assert (scores > upper_quantile(scores, 0.01)).sum() == exceeding


def test_the_expected_false_alarm_rate_of_an_order_statistic_is_never_above_the_wanted_one() -> None:
    rng = np.random.default_rng(2)
    for count in (99, 150, 260):
        samples = np.sort(rng.random((2000, count)), axis=1)
        # Of uniform scores the share above a threshold is 1 - threshold.
        rates = [1.0 - upper_quantile(sample, 0.01) for sample in samples]
        assert np.mean(rates) < 0.01 * 1.05


def test_with_few_images_the_threshold_lies_above_all_of_them() -> None:
    scores = np.random.default_rng(0).normal(10, 1, 20).astype(np.float32)
    assert upper_quantile(scores, 0.01) > scores.max()


def test_the_wanted_rate_is_met_on_average_over_many_small_samples() -> None:
    rng = np.random.default_rng(1)
    rates = []
    for _ in range(300):
        threshold = upper_quantile(rng.normal(size=20).astype(np.float32), 0.01)
        rates.append((rng.normal(size=2000) > threshold).mean())
    assert 0.003 < float(np.mean(rates)) < 0.015


def test_scores_that_lean_to_the_right_get_the_wanted_rate_too() -> None:
    rng = np.random.default_rng(3)
    future = rng.lognormal(2.0, 0.12, 20_000)
    rates = [(future > upper_quantile(rng.lognormal(2.0, 0.12, 15), 0.01)).mean() for _ in range(300)]
    assert 0.004 < float(np.mean(rates)) < 0.013


def test_two_images_cannot_push_the_threshold_out_of_reach() -> None:
    scores = np.array([3.0, 5.0], np.float32)
    assert 5.0 <= upper_quantile(scores, 0.01) <= 10.0


def test_equal_scores_are_their_own_threshold() -> None:
    assert upper_quantile(np.full(10, 2.5, np.float32), 0.01) == pytest.approx(2.5)
    assert upper_quantile(np.zeros(10, np.float32), 0.01) == 0.0


def test_a_typical_part_is_0_1_and_the_threshold_0_5_on_the_normalised_scale() -> None:
    calibration = calibrate(np.linspace(1, 3, 200, dtype=np.float32))
    assert calibration.normalise(calibration.threshold) == pytest.approx(0.5)
    assert calibration.normalise(calibration.typical) == pytest.approx(0.1)
    assert calibration.normalise(1e9) == 1.0


def test_the_statement_says_when_the_threshold_is_extrapolated() -> None:
    few = calibrate(np.array([1.0, 1.1, 1.2], np.float32))
    many = calibrate(np.linspace(1, 2, 500, dtype=np.float32))
    assert "extrapolated" in statement(few)
    assert "extrapolated" not in statement(many)
    assert "500" in statement(many)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, np.nan]])
def test_too_few_or_broken_scores_are_refused(scores: list[float]) -> None:
    with pytest.raises(InputError):
        calibrate(np.array(scores, np.float32))
