"""Intervals: against scipy, against hand-computed figures, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from optimize.pipeline.statistics import (
    CONFIDENCE,
    Interval,
    difference,
    mean_interval,
    ratio_interval,
    resolution,
    signed_rank_interval,
)


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


def test_signed_rank_interval_by_hand() -> None:
    found = signed_rank_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 30.0])
    assert (found.low, found.high) == (1.0, 30.0)  # eight values: 2 / 256 is what 99% leaves, so the very ends
    assert found.value == 4.5  # the middle of the 36 means of pairs
    assert signed_rank_interval([1.0, 2.0]).high == math.inf
    nine = signed_rank_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 30.0])
    assert (nine.low, nine.high) == (1.5, 19.0)  # one mean is cut off at either end


@pytest.mark.parametrize("count", [8, 12, 25, 60])
@pytest.mark.parametrize("seed", range(3))
def test_the_signed_rank_interval_is_what_scipys_test_does_not_reject(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(2, size=count) + 0.7
    interval = signed_rank_interval(values.tolist())
    for end, inwards in ((interval.low, 1e-9), (interval.high, -1e-9)):
        assert stats.wilcoxon(values - end - inwards, method="exact").pvalue > 0.01
        assert stats.wilcoxon(values - end + inwards, method="exact").pvalue <= 0.01


@pytest.mark.parametrize("distribution", ["normal", "bimodal", "heavy"])
def test_equal_sides_are_called_different_at_most_as_often_as_it_says(distribution: str) -> None:
    chance = np.random.default_rng(7)
    draws = {
        "normal": lambda: chance.normal(0, 0.05, 8),
        "bimodal": lambda: chance.choice([-1.5, 1.5, -0.01, 0.01], 8),  # a load that hits one side or the other
        "heavy": lambda: chance.standard_cauchy(8) / 10,
    }[distribution]
    claims = [difference(ratio_interval(draws().tolist())) in ("faster", "slower") for _ in range(4000)]
    assert np.mean(claims) <= 0.0125  # 2 / 256, and three standard errors


def test_ratio_interval_is_the_signed_rank_interval_of_logarithms() -> None:
    logs = [0.1, 0.25, 0.4, 0.15, 0.2, 0.3, 0.22, 0.31, 0.05]
    expected = signed_rank_interval(logs)
    found = ratio_interval(logs)
    assert (found.value, found.low, found.high) == pytest.approx(
        tuple(map(math.exp, (expected.value, expected.low, expected.high)))
    )
    assert ratio_interval([0.1, 0.2]).high == math.inf
    assert str(ratio_interval([0.0, 0.0])) == "1.00 [too few]"


def test_turning_the_ratios_over_turns_the_interval_over() -> None:
    logs = [0.1, 0.25, 0.4, 0.15, 0.2, 0.3, 0.22, 0.31, 0.05]
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
        (1.021, 1.5, "faster"),
        (1.019, 1.5, "inconclusive"),  # two processes of one program may differ by as much
        (0.5, 0.98, "slower"),
        (0.5, 0.981, "inconclusive"),
        (0.97, 1.03, "inconclusive"),
        (0.99, 1.015, "no difference"),
        (1.001, 1.019, "no difference"),  # nobody would act on it
        (0.9805, 0.999, "no difference"),
        (1.001, 1.021, "inconclusive"),
        (0.979, 0.999, "inconclusive"),
        (1.0, 1.5, "inconclusive"),
    ],
)
def test_what_an_interval_says(low: float, high: float, word: str) -> None:
    assert difference(Interval(math.sqrt(low * high), low, high)) == word


def test_resolution_is_half_the_interval_of_values_with_that_spread() -> None:
    values = [0.1, 0.3, 0.2, 0.6, 0.4]
    interval = mean_interval(values)
    assert resolution(float(np.std(values, ddof=1)), len(values)) == pytest.approx((interval.high - interval.low) / 2)
