"""Metrics on labelled data: known answers, exact intervals, and the gate where the data can resolve it or not."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from optimize.pipeline.metrics import Metric, classification_metrics
from optimize.pipeline.statistics import Interval

TRUTH = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def answers(classes: list[int]) -> list[dict[str, NDArray[Any]]]:
    return [{"logits": np.eye(3, dtype=np.float32)[[index]]} for index in classes]


def test_accuracy_and_macro_f1_by_hand() -> None:
    before, after = TRUTH, [0, 0, 0, 1, 1, 1, 1, 2, 2, 1]  # two answers lost
    accuracy, macro = classification_metrics(answers(before), answers(after), TRUTH)
    assert (accuracy.name, accuracy.reference, accuracy.candidate) == ("accuracy", 1.0, 0.8)
    assert accuracy.drop.value == pytest.approx(0.2)
    assert (macro.name, macro.reference) == ("macro F1", 1.0)
    assert macro.candidate == pytest.approx((6 / 7 + 6 / 8 + 4 / 5) / 3)
    assert macro.drop.low <= macro.drop.value <= macro.drop.high


def test_accuracy_has_mcnemars_exact_test_and_an_exact_interval() -> None:
    before, after = TRUTH, [0, 0, 0, 1, 1, 1, 1, 2, 2, 1]
    accuracy, _ = classification_metrics(answers(before), answers(after), TRUTH)
    assert accuracy.p_value == pytest.approx(0.5)  # both of two differing answers on one side: 2 * (1/2)^2
    lost, gained = (stats.binomtest(count, 10).proportion_ci(0.975, method="exact") for count in (2, 0))
    assert (accuracy.drop.low, accuracy.drop.high) == pytest.approx((lost.low - gained.high, lost.high - gained.low))


def test_equal_answers_still_leave_a_drop_possible() -> None:
    accuracy, macro = classification_metrics(answers(TRUTH), answers(TRUTH), TRUTH)
    assert accuracy.p_value == 1.0
    assert accuracy.drop.value == macro.drop.value == 0.0
    assert accuracy.drop.high == accuracy.resolution == pytest.approx(1 - 0.0125**0.1)


def test_gained_answers_offset_lost_ones() -> None:
    before, after = [1, *TRUTH[1:]], [*TRUTH[:-1], 0]
    accuracy, _ = classification_metrics(answers(before), answers(after), TRUTH)
    assert (accuracy.drop.value, accuracy.p_value) == (0.0, 1.0)


def test_there_is_a_label_for_each_example() -> None:
    with pytest.raises(ValueError, match="10 and 10 examples for 9 labels"):
        classification_metrics(answers(TRUTH), answers(TRUTH), TRUTH[:-1])


@pytest.mark.parametrize(
    ("lost", "high", "resolution", "rejected"),
    [
        (0.0, 0.0009, 0.0009, False),
        (0.0002, 0.0021, 0.0009, True),  # the data can resolve the gate, and the bad end is beyond it
        (0.0002, 0.0021, 0.0015, False),  # they cannot: the estimate decides
        (0.0020, 0.0021, 0.0015, True),
        (-0.01, 0.0005, 0.0002, False),
        (float("nan"), float("nan"), 0.0015, True),
    ],
)
def test_the_gate_is_on_the_bad_end_where_the_data_can_resolve_it(
    lost: float, high: float, resolution: float, rejected: bool
) -> None:
    metric = Metric("accuracy", 0.9, 0.9 - lost, Interval(lost, -1.0, high), None, 4000, resolution)
    assert (metric.why_rejected(0.001) is not None) is rejected
    assert (metric.what_it_leaves_open(0.001) is None) is (resolution <= 0.001)


def test_it_says_how_many_examples_would_do() -> None:
    metric = classification_metrics(answers(TRUTH * 10), answers(TRUTH * 10), TRUTH * 10)[0]
    words = metric.what_it_leaves_open(0.001)
    assert words is not None
    needed = int(words.split("about ")[1].split()[0])
    assert stats.binomtest(0, needed).proportion_ci(0.975, method="exact").high == pytest.approx(0.001, rel=0.05)
