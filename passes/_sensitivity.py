"""Which matrix products int8 harms most: shared by the passes that quantize."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.errors import RequestError

SAMPLES = 16  # calibration texts that products are ranked on


def check_options(name: str, *, samples: int, keep: int, ranks: bool = True) -> None:
    """Raise RequestError for numbers that the pass `name` cannot do with; `ranks`: whether it can keep products."""
    if samples < 1:
        raise RequestError(f"{name}: samples={samples} is not at least 1")
    if keep < 0 or (keep and not ranks):
        raise RequestError(f"{name}: keep={keep} is {'not at least 0' if keep < 0 else 'for mode=static alone'}")


def noisiest(names: Sequence[str], runs: Iterable[Sequence[NDArray[Any]]], count: int) -> list[str]:
    """Names of the `count` products whose inputs int8 represents worst, worst first.

    Each of `runs` holds one input array for each name. An input's noise is that of rounding its whole range to 255
    steps, against its root mean square. In BERT's kin the first layers' feed-forward outputs come out on top.
    """
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    squares, elements = np.zeros(len(names)), np.zeros(len(names))
    for arrays in runs:
        for index, array in enumerate(arrays):
            low[index], high[index] = min(low[index], array.min()), max(high[index], array.max())
            squares[index] += np.square(array, dtype=np.float64).sum()
            elements[index] += array.size
    noise = (high - low) / 255 / math.sqrt(12) / np.sqrt(squares / np.maximum(elements, 1))
    return [names[index] for index in np.argsort(-noise, kind="stable")[:count]]
