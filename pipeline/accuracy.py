"""A candidate's outputs against the float32 reference's, on the same real text. See docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import Example
from optimize.pipeline.contract import Cell, Gates
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval, mean_interval

TAIL = 10  # no single example may drop by more than this many times the gate; answers may differ as often
REPEAT_TOLERANCE = 1e-3  # of the output's largest magnitude, between two runs of one batch


@dataclass(frozen=True)
class Accuracy:
    """What was found. `drop` is 1 - cosine, averaged over an example's positions and then over examples.

    Where the largest element is an answer, outputs are compared as probabilities, and so are the errors.
    """

    drop: Interval
    worst_drop: float
    relative_error: float  # of the worst example: |candidate - reference| / |reference|
    max_error: float  # largest absolute difference of one element
    top1: float | None  # share of answers (largest element) that are the reference's
    cells: Mapping[str, float]  # drop on each cell of the workload
    examples: int
    metrics: tuple[Metric, ...] = ()  # the task's own, on labelled data


def compare_outputs(
    reference: Sequence[Example], candidate: Sequence[Example], *, top1: bool, cells: Mapping[Cell, Sequence[int]]
) -> Accuracy:
    """Compare examples pairwise: as they are, or where the largest element is an answer (`top1`) as probabilities.

    `cells` says which of the examples (by index) are a cell's; the others are text.
    Raises ValueError when shapes differ: then nothing can be compared.
    """
    if len(reference) != len(candidate):
        raise ValueError(f"{len(candidate)} examples came back, not {len(reference)}")
    drops, errors, largest, agreements = [], [], 0.0, []
    for ours, theirs in zip(candidate, reference, strict=True):
        cosines, relative, same = [], [], []
        for name, expected in theirs.items():
            found = ours[name]
            if found.shape != expected.shape:
                raise ValueError(f"{name} has shape {list(found.shape)}, the reference {list(expected.shape)}")
            same.append(float(np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))))
            if top1:
                found, expected = probabilities(found), probabilities(expected)
            cosines.append(cosine(found, expected))
            difference = np.abs(found - expected)
            largest = max(largest, float(difference.max(initial=0)))
            relative.append(float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-12)))
        drops.append(1 - float(np.mean(cosines)))
        errors.append(max(relative))
        agreements.append(float(np.mean(same)))
    in_cells = {index for indices in cells.values() for index in indices}
    text = [index for index in range(len(drops)) if index not in in_cells]
    return Accuracy(
        drop=mean_interval([drops[index] for index in text], 0.95),
        worst_drop=max(drops),
        relative_error=max(errors),
        max_error=largest,
        top1=float(np.mean([agreements[index] for index in text])) if top1 else None,
        cells={str(cell): float(np.mean([drops[index] for index in indices])) for cell, indices in cells.items()},
        examples=len(text),
    )


def probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """What logits stand for: softmax over the last axis; of a single one, as rerankers have, sigmoid and its rest.

    Two logits that nearly cancel, as a two-class head's do where it is unsure, point anywhere.
    """
    wide = logits.astype(np.float64)
    if wide.shape[-1] == 1:
        wide = np.concatenate([wide, np.zeros_like(wide)], axis=-1)
    shifted = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


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
