"""A candidate's outputs against the float32 reference's, on the same real text. See docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import Example
from optimize.pipeline.contract import Cell, Gates, Meaning
from optimize.pipeline.errors import OutputError
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval, mean_interval

TAIL = 10  # no single example may drop by more than this many times the gate; answers may differ as often
ANSWERS = (Meaning.CHOICE, Meaning.FLAGS)
REPEAT_TOLERANCE = 1e-3  # of the output's largest magnitude, between two runs of one batch


@dataclass(frozen=True)
class Accuracy:
    """What was found. `drop` is 1 - cosine, averaged over an example's positions and then over examples.

    Where logits are answers, outputs are compared as probabilities, and so are the errors. Of numbers, errors are
    relative to their spread over the examples, and the drop is half an error's square.
    """

    drop: Interval
    worst_drop: float
    relative_error: float  # of the worst example: |candidate - reference| / |reference|
    max_error: float  # largest absolute difference of one element
    top1: float | None  # share of answers that are the reference's; None where outputs are none
    cells: Mapping[str, float]  # drop on each cell of the workload
    examples: int
    metrics: tuple[Metric, ...] = ()  # the task's own, on labelled data

    def __str__(self) -> str:
        top1 = "" if self.top1 is None else f", same answers {self.top1:.1%}"
        return f"cosine {1 - self.drop.value:.5f} (worst {1 - self.worst_drop:.4f}){top1}"


def compare_outputs(
    reference: Sequence[Example],
    candidate: Sequence[Example],
    *,
    meaning: Meaning,
    cells: Mapping[Cell, Sequence[int]],
) -> Accuracy:
    """Compare examples pairwise, by what their outputs mean.

    `cells` says which of the examples (by index) are a cell's; the others are text.
    Raises OutputError when shapes differ: then nothing can be compared.
    """
    if len(reference) != len(candidate):
        raise OutputError(f"{len(candidate)} examples came back, not {len(reference)}")
    scales = _scales(reference) if meaning is Meaning.NUMBERS else {}
    drops, errors, largest, agreements = [], [], 0.0, []
    for ours, theirs in zip(candidate, reference, strict=True):
        lost, relative, same = [], [], []
        for name, expected in theirs.items():
            found = ours[name]
            if found.shape != expected.shape:
                raise OutputError(f"{name} has shape {list(found.shape)}, the reference {list(expected.shape)}")
            if meaning in ANSWERS:
                same.append(_same_answers(found, expected, meaning))
            found, expected = as_compared(found, meaning), as_compared(expected, meaning)
            difference = np.abs(found - expected)
            largest = max(largest, float(difference.max(initial=0)))
            if meaning is Meaning.NUMBERS:
                error = math.sqrt(float(np.mean(np.square(difference / scales[name]))))
                lost.append(error**2 / 2)  # as 1 - cosine is of a small error
            else:
                error = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-12))
                lost.append(1 - cosine(found, expected))
            relative.append(error)
        drops.append(float(np.mean(lost)))
        errors.append(max(relative))
        agreements.append(float(np.mean(same)) if same else math.nan)
    in_cells = {index for indices in cells.values() for index in indices}
    text = [index for index in range(len(drops)) if index not in in_cells]
    return Accuracy(
        drop=mean_interval([drops[index] for index in text], 0.95),
        worst_drop=max(drops),
        relative_error=max(errors),
        max_error=largest,
        top1=float(np.mean([agreements[index] for index in text])) if meaning in ANSWERS else None,
        cells={str(cell): float(np.mean([drops[index] for index in indices])) for cell, indices in cells.items()},
        examples=len(text),
    )


def as_compared(output: NDArray[Any], meaning: Meaning) -> NDArray[np.float64]:
    """An output as what is compared: for a choice softmax, for flags each one's sigmoid and its rest.

    Not logits: two that nearly cancel, as a two-class head's do where it is unsure, point anywhere.
    """
    wide = output.astype(np.float64)
    if meaning is Meaning.FLAGS:
        yes = 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
        return np.concatenate([yes, 1 - yes], axis=-1)
    if meaning is Meaning.CHOICE:
        shifted = np.exp(wide - wide.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
    return wide


def _same_answers(found: NDArray[Any], expected: NDArray[Any], meaning: Meaning) -> float:
    """The share of positions with the same answer."""
    if meaning is Meaning.FLAGS:
        return float(np.mean(((found > 0) == (expected > 0)).all(axis=-1)))
    return float(np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1)))


def _scales(reference: Sequence[Example]) -> dict[str, NDArray[np.float64]]:
    """How far each number of an output spreads over the examples: what an error is held against."""
    stacked = {name: np.concatenate([each[name].astype(np.float64) for each in reference]) for name in reference[0]}
    return {
        name: np.maximum(rows.std(axis=0), 1e-6 * max(float(np.abs(rows).max()), 1e-300))
        for name, rows in stacked.items()
    }


def why_rejected(accuracy: Accuracy, gates: Gates) -> str | None:
    """Why a candidate is not accurate enough, or None. Each rule is explained in docs/measuring.md."""
    allowed, tail = gates.max_drop, TAIL * gates.max_drop
    reach = math.sqrt(2 * tail)  # what an angle of that drop amounts to; unlike a cosine, it also sees a wrong scale
    differ = 0.0 if accuracy.top1 is None else 1 - accuracy.top1
    if _above(accuracy.drop.high, allowed):
        return f"drop {accuracy.drop.value:.2g} (at most {accuracy.drop.high:.2g}) is above the gate of {allowed:g}"
    if _above(accuracy.worst_drop, tail):
        return f"one example drops by {accuracy.worst_drop:.2g}, more than {TAIL} times the gate of {allowed:g}"
    if _above(accuracy.relative_error, reach):
        return f"one example's relative error is {accuracy.relative_error:.2g}, above {reach:.2g}"
    for cell, drop in accuracy.cells.items():
        if _above(drop, tail):
            return f"cell {cell} drops by {drop:.2g}, more than {TAIL} times the gate of {allowed:g}"
    if _above(differ, max(tail, 1.5 / accuracy.examples)):  # one answer may differ: it may be a tie
        return f"{differ:.1%} of the answers differ, more than {TAIL} times the gate of {allowed:g}"
    return next(filter(None, (metric.why_rejected(allowed) for metric in accuracy.metrics)), None)


def why_unsteady(repeat_error: float, reference: Sequence[Example]) -> str | None:
    """Why outputs that differ between two runs of the same batch are too far apart, or None."""
    scale = max(float(np.abs(array).max(initial=0)) for example in reference for array in example.values())
    if repeat_error <= REPEAT_TOLERANCE * scale:
        return None
    return f"two runs of one batch differ by {repeat_error:.2g} (outputs reach {scale:.2g})"


def _above(value: float, limit: float) -> bool:
    """Whether `value` exceeds `limit` by more than rounding; NaN does."""
    return not value <= limit * (1 + 1e-9)


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Mean over positions of the cosine between rows (the last axis); two rows of zeros are alike."""
    left, right = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    both_zero = (np.abs(left).max(axis=-1, initial=0) == 0) & (np.abs(right).max(axis=-1, initial=0) == 0)
    cosines = np.where(both_zero, 1.0, (left * right).sum(axis=-1) / np.maximum(norms, 1e-300))
    return float(np.clip(cosines, -1, 1).mean())
