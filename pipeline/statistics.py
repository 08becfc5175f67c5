"""The arithmetic of a verdict: intervals for paired measurements. See docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean of independent values. Raises ValueError for fewer than two."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values have no interval")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = float(t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - margin, mean + margin)


def ratio_interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The same for ratios: the interval of the mean logarithm, taken back to a ratio."""
    logs = mean_interval(log_ratios, confidence)
    return Interval(*(math.exp(min(end, 700.0)) for end in (logs.value, logs.low, logs.high)))
