"""The arithmetic of a verdict: intervals for paired measurements. See docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

CONFIDENCE = 0.99
EQUIVALENT = 1.02  # a ratio whose whole interval is within this of 1 is called no difference


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Difference(StrEnum):
    """What an interval of a ratio says."""

    FASTER = "faster"
    SLOWER = "slower"
    NONE = "no difference"
    INCONCLUSIVE = "inconclusive"


def difference(speedup: Interval) -> Difference:
    """Equivalence first: an interval that lies close around 1 is no difference, even if it does not hold 1."""
    if speedup.high < EQUIVALENT and speedup.low > 1 / EQUIVALENT:
        return Difference.NONE
    if speedup.low > 1:
        return Difference.FASTER
    return Difference.SLOWER if speedup.high < 1 else Difference.INCONCLUSIVE


def resolution(spread: float, count: int, confidence: float = CONFIDENCE) -> float:
    """Half the width of the t interval that `count` values of that standard deviation will have."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, count - 1)) * spread / math.sqrt(count)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of independent values. Raises ValueError for fewer than two."""
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values have no interval")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = resolution(math.sqrt(variance), count, confidence)
    return Interval(mean, mean - margin, mean + margin)


def ratio_interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The same for ratios: the interval of the mean logarithm, taken back to a ratio."""
    logs = mean_interval(log_ratios, confidence)
    return Interval(*(math.exp(min(end, 700.0)) for end in (logs.value, logs.low, logs.high)))
