"""Accuracy: what counts as a difference between outputs, and each reason for which a candidate is rejected."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.pipeline.accuracy import (
    Accuracy,
    as_compared,
    compare_outputs,
    why_rejected,
    why_unsteady,
)
from optimize.pipeline.contract import Cell, Gates, Meaning
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval

Outputs = list[dict[str, NDArray[Any]]]
GATES = Gates(max_drop=0.001)


@pytest.fixture
def reference() -> Outputs:
    """Twelve examples of three to five positions with eight features."""
    random = np.random.default_rng(11)
    return [{"logits": random.normal(size=(3 + index % 3, 8)).astype(np.float32)} for index in range(12)]


def mapped(outputs: Outputs, function: Any) -> Outputs:
    return [{name: function(index, array) for name, array in each.items()} for index, each in enumerate(outputs)]


def outputs(*rows: list[float]) -> Outputs:
    return [{"logits": np.array([row], dtype=np.float32)} for row in rows]


def test_identical_outputs(reference: Outputs) -> None:
    found = compare_outputs(
        reference, mapped(reference, lambda index, array: array.copy()), meaning=Meaning.CHOICE, cells={}
    )
    assert (found.drop.value, found.worst_drop) == pytest.approx((0, 0), abs=1e-12)
    assert (found.relative_error, found.max_error, found.top1, found.examples) == (0.0, 0.0, 1.0, 12)
    assert why_rejected(found, GATES) is None


def test_a_known_angle() -> None:
    found = compare_outputs(outputs([1, 0], [1, 0]), outputs([1, 0], [1, 1]), meaning=Meaning.VECTOR, cells={})
    drop = 1 - math.sqrt(0.5)
    assert found.drop.value == pytest.approx(drop / 2)
    assert found.worst_drop == pytest.approx(drop)
    assert (found.relative_error, found.max_error) == (1.0, 1.0)
    assert found.top1 is None


def test_opposite_outputs() -> None:
    found = compare_outputs(outputs([1, 2], [3, 1]), outputs([-1, -2], [-3, -1]), meaning=Meaning.VECTOR, cells={})
    assert found.drop.value == pytest.approx(2.0)


def test_positions_are_averaged_before_examples() -> None:
    one = [{"logits": np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.float32)}] * 2
    other = [{"logits": np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)}, one[0]]
    found = compare_outputs(one, other, meaning=Meaning.VECTOR, cells={})
    assert found.worst_drop == pytest.approx(0.25)
    assert found.drop.value == pytest.approx(0.125)


def test_the_worst_of_several_outputs_tells_the_error() -> None:
    one = [{"start": np.array([[1.0, 0.0]], np.float32), "end": np.array([[2.0, 0.0]], np.float32)}] * 2
    other = [{"start": one[0]["start"], "end": np.array([[1.0, 0.0]], np.float32)}, one[0]]
    found = compare_outputs(one, other, meaning=Meaning.VECTOR, cells={})
    assert (found.relative_error, found.max_error) == (0.5, 1.0)


@pytest.mark.parametrize("scale", [0.5, 1.5, 100.0])
def test_a_wrong_scale_is_rejected_though_the_cosine_is_one(reference: Outputs, scale: float) -> None:
    scaled = mapped(reference, lambda index, array: array * np.float32(scale))
    found = compare_outputs(reference, scaled, meaning=Meaning.VECTOR, cells={})
    assert found.drop.value == pytest.approx(0, abs=1e-7)
    assert found.relative_error == pytest.approx(abs(scale - 1), rel=1e-5)
    assert "relative error" in str(why_rejected(found, GATES))


@pytest.mark.parametrize("count", [1, 4])
def test_rows_of_zeros_are_alike_and_give_no_nan(count: int) -> None:
    zeros = [{"logits": np.zeros((count, 3), np.float32)}] * 2
    same = compare_outputs(zeros, zeros, meaning=Meaning.VECTOR, cells={})
    assert (same.drop, same.worst_drop, same.relative_error) == (Interval(0.0, 0.0, 0.0), 0.0, 0.0)
    ones = mapped(zeros, lambda index, array: array + 1)
    for found in (
        compare_outputs(zeros, ones, meaning=Meaning.VECTOR, cells={}),
        compare_outputs(ones, zeros, meaning=Meaning.VECTOR, cells={}),
    ):
        assert found.drop.value == 1.0
        assert all(map(math.isfinite, (found.drop.low, found.drop.high, found.relative_error, found.max_error)))
        assert why_rejected(found, GATES) is not None


@pytest.mark.parametrize("magnitude", [1e-30, 1e15])
def test_tiny_and_huge_outputs_are_compared_like_others(reference: Outputs, magnitude: float) -> None:
    scaled = mapped(reference, lambda index, array: array * np.float32(magnitude))
    found = compare_outputs(scaled, scaled, meaning=Meaning.CHOICE, cells={})
    assert found.drop.value == pytest.approx(0, abs=1e-12)
    assert why_rejected(found, GATES) is None


@pytest.mark.parametrize("where", [0, 5, 11])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_never_accepted(reference: Outputs, where: int, value: float) -> None:
    def spoil(index: int, array: NDArray[Any]) -> NDArray[Any]:
        spoilt = array.copy()
        spoilt[0, 0] = value if index == where else spoilt[0, 0]
        return spoilt

    with np.errstate(invalid="ignore"):
        found = compare_outputs(
            reference, mapped(reference, spoil), meaning=Meaning.VECTOR, cells={Cell(1, 32): [10, 11]}
        )
    assert why_rejected(found, GATES) is not None


@pytest.mark.parametrize("shape", [(3, 7), (4, 8), (3, 8, 1), (24,), (1, 8), (3, 1)])
def test_a_shape_that_differs_cannot_be_compared(reference: Outputs, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits has shape \[.*\], the reference \[3, 8\]"):
        compare_outputs(reference[:1], [{"logits": np.zeros(shape, np.float32)}], meaning=Meaning.VECTOR, cells={})


@pytest.mark.parametrize("count", [0, 11, 13])
def test_a_wrong_number_of_examples_cannot_be_compared(reference: Outputs, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} examples came back, not 12"):
        compare_outputs(reference, (reference * 2)[:count], meaning=Meaning.VECTOR, cells={})


def test_cells_are_judged_apart_from_text(reference: Outputs) -> None:
    cells = {Cell(1, 32): [8], Cell(3, 64): [9, 10, 11]}
    candidate = mapped(reference, lambda index, array: -array if index == 10 else array)
    found = compare_outputs(reference, candidate, meaning=Meaning.VECTOR, cells=cells)
    assert found.cells == pytest.approx({"1x32": 0.0, "3x64": 2 / 3}, abs=1e-7)
    assert (found.examples, found.top1) == (8, None)
    assert found.drop.value == pytest.approx(0, abs=1e-12)
    assert found.worst_drop == pytest.approx(2.0)


def test_top1_counts_answers(reference: Outputs) -> None:
    found = compare_outputs(
        outputs([1, 2, 3], [3, 2, 1], [1, 3, 2], [1, 3, 2]),
        outputs([1, 2, 3], [3, 2, 1], [1, 3, 2], [3, 1, 2]),
        meaning=Meaning.CHOICE, cells={},
    )  # fmt: skip
    assert found.top1 == 0.75


def test_two_classes_that_nearly_cancel_are_compared_as_probabilities() -> None:
    reference, candidate = outputs([0.01, -0.01], [-4.0, 4.0]), outputs([-0.01, 0.01], [-4.02, 4.02])
    as_vectors = compare_outputs(reference, candidate, meaning=Meaning.VECTOR, cells={})
    assert as_vectors.worst_drop == pytest.approx(2.0)  # although nothing has happened
    found = compare_outputs(reference, candidate, meaning=Meaning.CHOICE, cells={})
    assert found.worst_drop == pytest.approx(2e-4, rel=0.05)  # of half and half: the angle between 0.505 and 0.495
    assert found.relative_error == pytest.approx(0.02, rel=0.05)
    assert found.top1 == 0.5


@pytest.mark.parametrize("rows", [([2.0, 0.0], [1.0, 0.0]), ([2.0, -1.0, 0.5], [0.0, 1.0, 2.0])])
def test_probabilities_that_change_are_seen(rows: tuple[list[float], ...]) -> None:
    scaled = [[0.1 * value for value in row] for row in rows]
    assert compare_outputs(outputs(*rows), outputs(*scaled), meaning=Meaning.CHOICE, cells={}).worst_drop > 0.01
    same = compare_outputs(outputs(*rows), outputs(*rows), meaning=Meaning.CHOICE, cells={})
    assert same.worst_drop == pytest.approx(0, abs=1e-12)


def test_a_score_is_held_against_the_spread_of_scores() -> None:
    reference, candidate = outputs(*[[value] for value in (3.0, 4.0, 5.0)]), outputs([3.0], [4.0], [5.8])
    found = compare_outputs(reference, candidate, meaning=Meaning.NUMBERS, cells={})
    error = 0.8 / math.sqrt(2 / 3)
    assert found.relative_error == pytest.approx(error, rel=1e-5)
    assert found.worst_drop == pytest.approx(error**2 / 2, rel=1e-5)
    assert found.top1 is None
    assert why_rejected(found, GATES) is not None
    shifted = outputs([3.001], [4.001], [5.001])
    assert why_rejected(compare_outputs(reference, shifted, meaning=Meaning.NUMBERS, cells={}), GATES) is None


def test_of_scores_that_are_all_the_same_only_the_same_will_do() -> None:
    reference = outputs([2.0], [2.0])
    same = compare_outputs(reference, reference, meaning=Meaning.NUMBERS, cells={})
    other = compare_outputs(reference, outputs([2.0], [2.01]), meaning=Meaning.NUMBERS, cells={})
    assert same.worst_drop == 0.0
    assert other.worst_drop > 1.0


def test_flags_are_judged_each_by_itself() -> None:
    reference, raised = outputs([4.0, -4.0, -2.0]), outputs([9.0, 1.0, 3.0])  # the same softmax
    found = compare_outputs(reference * 2, raised * 2, meaning=Meaning.FLAGS, cells={})
    assert found.top1 == 0.0
    assert found.worst_drop > 0.1
    assert compare_outputs(reference * 2, raised * 2, meaning=Meaning.CHOICE, cells={}).worst_drop == pytest.approx(0)


def test_outputs_are_compared_as_what_they_mean() -> None:
    assert as_compared(np.array([[0.0, math.log(3.0)]]), Meaning.CHOICE) == pytest.approx(np.array([[0.25, 0.75]]))
    assert as_compared(np.array([[math.log(3.0)]]), Meaning.FLAGS) == pytest.approx(np.array([[0.75, 0.25]]))
    assert as_compared(np.array([[1000.0, -1000.0]]), Meaning.CHOICE) == pytest.approx(np.array([[1.0, 0.0]]))


def accuracy(**changed: Any) -> Accuracy:
    """One that just passes the gates."""
    at_the_gates = Accuracy(
        drop=Interval(0.0005, 0.0, 0.001), worst_drop=0.01, relative_error=math.sqrt(0.02), max_error=9.0, top1=0.991,
        cells={"1x32": 0.01}, examples=1000, metrics=(metric(0.5, 0.5),),
    )  # fmt: skip
    return dataclasses.replace(at_the_gates, **changed)


def metric(reference: float, candidate: float) -> Metric:
    return Metric("accuracy", reference, candidate, Interval(reference - candidate, -1.0, 1.0), None, 100, 0.04)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"top1": None, "metrics": (), "cells": {}},
        {"drop": Interval(-0.1, -0.2, -0.0)},
        {"top1": 1 - 1 / 75, "examples": 75},  # one answer may differ, of however few
        {"top1": 1 - 1 / 8, "examples": 8},
        {"metrics": (metric(0.5, 0.9),)},
        {"metrics": (metric(0.5, 0.4995),)},
    ],
)
def test_what_passes(changed: dict[str, Any]) -> None:
    assert why_rejected(accuracy(**changed), GATES) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"drop": Interval(0.0005, 0.0, 0.00101)}, "drop 0.0005 (at most 0.001) is above the gate of 0.001"),
        ({"drop": Interval(math.nan, math.nan, math.nan)}, "drop nan"),
        ({"drop": Interval(0.0, -math.inf, math.inf)}, "drop 0 (at most inf)"),
        ({"worst_drop": 0.0101}, "one example drops by 0.01, more than 10 times the gate of 0.001"),
        ({"worst_drop": math.nan}, "one example drops by nan"),
        ({"relative_error": 0.1415}, "one example's relative error is 0.14, above 0.14"),
        ({"relative_error": math.inf}, "one example's relative error is inf"),
        ({"cells": {"1x32": 0.0, "8x128": 0.02}}, "cell 8x128 drops by 0.02, more than 10 times the gate of 0.001"),
        ({"cells": {"1x32": math.nan}}, "cell 1x32 drops by nan"),
        ({"top1": 0.98}, "2.0% of the answers differ, more than 10 times the gate of 0.001"),
        ({"top1": 1 - 2 / 8, "examples": 8}, "25.0% of the answers differ"),
        ({"metrics": (metric(0.9, 0.89),)}, "accuracy drops by 0.0100, above the gate of 0.001"),
    ],
)
def test_what_is_rejected_and_why(changed: dict[str, Any], reason: str) -> None:
    assert str(why_rejected(accuracy(**changed), GATES)).startswith(reason)


@pytest.mark.parametrize("changed", [{"top1": 0.99}, {"metrics": (metric(0.9, 0.899),)}])
def test_what_lies_on_a_gate_passes(changed: dict[str, Any]) -> None:
    assert why_rejected(accuracy(**changed), GATES) is None


def test_a_looser_gate_lets_it_pass() -> None:
    lossy = accuracy(drop=Interval(0.01, 0.005, 0.015), worst_drop=0.1)
    assert why_rejected(lossy, GATES) is not None
    assert why_rejected(lossy, Gates(max_drop=0.02)) is None


@pytest.mark.parametrize(
    ("repeat_error", "steady"), [(0.0, True), (0.004, True), (0.0041, False), (math.nan, False), (math.inf, False)]
)
def test_outputs_may_differ_a_little_between_two_runs(repeat_error: float, steady: bool) -> None:
    reason = why_unsteady(repeat_error, outputs([1, -4], [2, 3]))
    assert (reason is None) is steady
    assert steady or "(outputs reach 4)" in str(reason)


def test_outputs_of_zeros_may_not_differ_at_all() -> None:
    zeros = outputs([0, 0])
    assert why_unsteady(0.0, zeros) is None
    assert why_unsteady(1e-30, zeros) is not None
