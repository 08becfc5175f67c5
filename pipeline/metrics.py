"""The task's own metrics on labelled data: reference and candidate on the same examples. See docs/measuring.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.statistics import Interval

CONFIDENCE = 0.95
RESAMPLES = 500

Example = Mapping[str, NDArray[Any]]  # output name -> [positions, features]


@dataclass(frozen=True)
class Metric:
    """One metric of both sides. All are shares; higher is better."""

    name: str
    reference: float
    candidate: float
    drop: Interval  # reference - candidate, 95%
    p_value: float | None  # of McNemar's exact test, that both err equally often; None for metrics that have none
    examples: int
    resolution: float  # the drop that this many examples leave possible when no answer differs

    def __str__(self) -> str:
        test = "" if self.p_value is None else f", McNemar p {self.p_value:.2g}"
        ends = f"95% [{self.drop.low:.4f}, {self.drop.high:.4f}]{test}"
        return f"{self.name} {self.candidate:.4f}, reference {self.reference:.4f}: drop {self.drop.value:.4f}, {ends}"

    def why_rejected(self, allowed: float) -> str | None:
        """By the interval's upper end where the data can resolve the gate, by the estimate where they cannot."""
        words, gate = f"{self.name} drops by {self.drop.value:.4f}", f"above the gate of {allowed:g}"
        if self.resolution <= allowed < self.drop.high:
            return f"{words} (at most {self.drop.high:.4f}), {gate}"
        if self.resolution > allowed and not self.drop.value <= allowed * (1 + 1e-9):
            return f"{words}, {gate}"
        return None

    def what_it_leaves_open(self, allowed: float) -> str | None:
        """That the labelled data are too few for the gate, and how many it would take; None when they suffice."""
        if self.resolution <= allowed:
            return None
        needed = int(np.ceil(self.examples * self.resolution / allowed))
        return (
            f"{self.name} on {self.examples} labelled examples cannot show a drop below {self.resolution:.4f}: "
            f"about {needed} would resolve the gate of {allowed:g}"
        )


def classification_metrics(
    reference: Sequence[Example], candidate: Sequence[Example], labels: Sequence[int]
) -> tuple[Metric, ...]:
    """Accuracy with McNemar's exact test, and macro F1 with a paired bootstrap.

    Accuracy's interval is exact too: Clopper and Pearson's for the answers lost and for those gained, each at half of
    the 5%, so that it has a width even where no answer differs. Raises ValueError for unlike numbers of examples.
    """
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, f1_score

    truth = np.asarray(labels)
    before, after = (np.array([int(each["logits"].argmax()) for each in side]) for side in (reference, candidate))
    if not len(truth) == len(before) == len(after):
        raise ValueError(f"{len(before)} and {len(after)} examples for {len(truth)} labels")
    lost = int(((before == truth) & (after != truth)).sum())
    gained = int(((before != truth) & (after == truth)).sum())
    share = (1 + CONFIDENCE) / 2
    gone, come = (binomtest(count, len(truth)).proportion_ci(share, method="exact") for count in (lost, gained))
    none = binomtest(0, len(truth)).proportion_ci(share, method="exact").high
    accuracy = Metric(
        "accuracy", float(accuracy_score(truth, before)), float(accuracy_score(truth, after)),
        Interval((lost - gained) / len(truth), float(gone.low - come.high), float(gone.high - come.low)),
        float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0, len(truth), float(none),
    )  # fmt: skip

    def macro(answers: NDArray[Any], rows: NDArray[Any] | slice = slice(None)) -> float:
        return float(f1_score(truth[rows], answers[rows], average="macro", zero_division=0))

    draws = np.random.default_rng(0).integers(len(truth), size=(RESAMPLES if lost + gained else 0, len(truth)))
    drops = [macro(before, rows) - macro(after, rows) for rows in draws]
    low, high = np.quantile(drops, [(1 - CONFIDENCE) / 2, share]) if drops else (0.0, 0.0)
    drop = Interval(macro(before) - macro(after), float(low), float(high))
    return accuracy, Metric("macro F1", macro(before), macro(after), drop, None, len(truth), float(none))
