"""Intervals: against scipy, against hand-computed figures, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from optimize.pipeline.statistics import CONFIDENCE, Interval, difference, mean_interval, ratio_interval, resolution


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.25, 0.4], list(range(30)), [-1e6, 1e6, 3.0]])
def test_mean_interval_is_scipys(values: list[float], confidence: float) -> None:
    found = mean_interval(values, confidence)
    expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("confidence", "margin"),
    [(0.95, 4.302653 / math.sqrt(3)), (0.99, 9.924843 / math.sqrt(3))],  # t tables, two degrees of freedom
)
def test_mean_interval_by_hand(confidence: float, margin: float) -> None:
    found = mean_interval([1.0, 2.0, 3.0], confidence)
    assert (found.low, found.value, found.high) == pytest.approx((2 - margin, 2.0, 2 + margin), rel=1e-6)


def test_the_default_confidence_is_99_percent() -> None:
    assert CONFIDENCE == 0.99
    values = [1.0, 2.0, 4.0]
    assert mean_interval(values) == mean_interval(values, 0.99)
    assert ratio_interval(values) == ratio_interval(values, 0.99)


def test_ratio_interval_by_hand() -> None:
    found = ratio_interval([math.log(1.0), math.log(2.0), math.log(4.0)], 0.95)
    margin = 4.302653 / math.sqrt(3) * math.log(2)
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-margin), 2 * math.exp(margin)), rel=1e-6)


def test_turning_the_ratios_over_turns_the_interval_over() -> None:
    logs = [0.1, 0.25, 0.4, 0.15]
    forward, back = ratio_interval(logs), ratio_interval([-log for log in logs])
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx((forward.value, forward.low, forward.high))


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval([0.5] * 6) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [3.0]])
def test_fewer_than_two_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no interval"):
        mean_interval(values)


@pytest.mark.parametrize(("count", "seed"), [(5, 1), (12, 2), (30, 3)])
def test_a_99_percent_interval_holds_the_truth_as_often_as_it_says(count: int, seed: int) -> None:
    draws = np.random.default_rng(seed).normal(0.3, 0.05, size=(3000, count))
    intervals = [mean_interval(draw.tolist()) for draw in draws]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.98 <= covered <= 0.997


def test_an_interval_reads_as_text() -> None:
    assert str(Interval(1.234, 1.2, 1.266)) == "1.23 [1.20, 1.27]"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.001, 1.5, "faster"),
        (0.5, 0.999, "slower"),
        (0.97, 1.03, "inconclusive"),
        (0.99, 1.015, "no difference"),
        (1.001, 1.019, "no difference"),  # nobody would act on it
        (0.9805, 0.999, "no difference"),
        (1.001, 1.021, "faster"),
        (0.979, 0.999, "slower"),
        (1.0, 1.5, "inconclusive"),
    ],
)
def test_what_an_interval_says(low: float, high: float, word: str) -> None:
    assert difference(Interval(math.sqrt(low * high), low, high)) == word


def test_resolution_is_half_the_interval_of_values_with_that_spread() -> None:
    values = [0.1, 0.3, 0.2, 0.6, 0.4]
    interval = mean_interval(values)
    assert resolution(float(np.std(values, ddof=1)), len(values)) == pytest.approx((interval.high - interval.low) / 2)
