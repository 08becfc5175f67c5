"""The arithmetic of a verdict: intervals for paired measurements. See docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from optimize.pipeline.contract import Word

CONFIDENCE = 0.99
LARGEST_LOG = 700.0  # whose exponential is still a float
EQUIVALENT = 1.02  # so far may two processes of one program differ: see docs/measuring.md, "Words"


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.high):
            return f"{self.value:.2f} [too few]"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Difference(Word):
    """What an interval of a ratio says."""

    FASTER = "faster"
    SLOWER = "slower"
    NONE = "no difference"
    INCONCLUSIVE = "inconclusive"


def difference(speedup: Interval) -> Difference:
    """Whether all of the interval lies within EQUIVALENT of 1, beyond it on one side, or neither.

    Source: Mytkowicz and others, Producing Wrong Data Without Doing Anything Obviously Wrong! (ASPLOS 2009)
    """
    if speedup.high < EQUIVALENT and speedup.low > 1 / EQUIVALENT:
        return Difference.NONE
    if speedup.low >= EQUIVALENT:
        return Difference.FASTER
    return Difference.SLOWER if speedup.high <= 1 / EQUIVALENT else Difference.INCONCLUSIVE


def resolution(spread: float, count: int, confidence: float = CONFIDENCE) -> float:
    """Half the width of the t interval that `count` values of that standard deviation will have."""
    from scipy.special import stdtrit  # scipy.stats, which has it too, takes half a second to import

    return float(stdtrit(count - 1, (1 + confidence) / 2)) * spread / math.sqrt(count)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of independent values. Raises ValueError for fewer than two."""
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values have no interval")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = resolution(math.sqrt(variance), count, confidence)
    return Interval(mean, mean - margin, mean + margin)


def ratio_of_sums_interval(sums: Sequence[float], counts: Sequence[int], confidence: float) -> Interval:
    """What there is of something per unit, from groups that are independent while their units are not.

    The linearized variance of a ratio estimate, with Student's t. Raises ValueError for fewer than two groups.
    Source: Cochran, Sampling Techniques, 6.4
    """
    groups, total = len(sums), sum(counts)
    if groups < 2:
        raise ValueError(f"{groups} groups have no interval")
    ratio = math.fsum(sums) / total
    residuals = [each - ratio * count for each, count in zip(sums, counts, strict=True)]
    spread = math.sqrt(math.fsum(residual**2 for residual in residuals) / (groups - 1))
    margin = resolution(spread, groups, confidence) * groups / total
    return Interval(ratio, ratio - margin, ratio + margin)


def signed_rank_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Hodges and Lehmann's estimate, the median of all pairs' means, with the exact interval of Wilcoxon's test.

    It assumes symmetry and nothing else of the values' distribution. With too few values for the confidence (less than
    8 for 99%) its ends are infinite. Raises ValueError for none.
    Source: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3.3
    """
    array, count = np.asarray(values, dtype=float), len(values)
    if not count:
        raise ValueError("no values have no interval")
    means = np.sort((array[:, None] + array[None, :])[np.triu_indices(count)] / 2)
    outside = _signed_rank_cut(count, confidence)
    estimate = float(np.median(means))
    if outside == 0:
        return Interval(estimate, -math.inf, math.inf)
    return Interval(estimate, float(means[outside - 1]), float(means[-outside]))


@cache
def _signed_rank_cut(count: int, confidence: float) -> int:
    """How many of the sorted means end up at or below the interval's lower end: 0 when there are too few values."""
    chances = np.zeros(count * (count + 1) // 2 + 1)  # of every rank sum, when each rank counts or not by a coin's toss
    chances[0] = 1.0
    for rank in range(1, count + 1):
        chances[rank:] = chances[rank:] + chances[:-rank]
        chances /= 2
    return int(np.searchsorted(np.cumsum(chances), (1 - confidence) / 2, side="right"))


def ratio_interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The signed-rank interval of logarithms, taken back to a ratio."""
    logs = signed_rank_interval(log_ratios, confidence)
    return Interval(*(math.inf if end > LARGEST_LOG else math.exp(end) for end in (logs.value, logs.low, logs.high)))
