"""What more GPUs bring: a candidate's speed against that of the same recipe on one GPU, by the number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from optimize.pipeline.contract import Recipe
from optimize.pipeline.measure import CellSpeed, Speed
from optimize.pipeline.recipe import recipe_text
from optimize.pipeline.statistics import LARGEST_LOG, Interval


@dataclass(frozen=True)
class Scaling:
    """Scaling efficiency: 1 where twice the GPUs are twice as fast. Each was timed against the baseline, so it is the
    ratio of two speedups by the number of GPUs: see `quotient`.
    """

    against: str  # the candidate on one GPU
    gpus: int
    overall: Interval
    cells: tuple[Interval, ...]


def alone(recipe: Recipe) -> str:
    """The text of a recipe as it would be on one GPU."""
    *before, last = recipe.passes
    one = last.on_one_gpu()
    return recipe_text(Recipe("", tuple(before) if one is None else (*before, one)))


def scalings(timed: Mapping[str, tuple[str, Speed]], recipes: Iterable[Recipe]) -> dict[str, Scaling]:
    """By the text of a recipe for several GPUs, where it and the same one for one GPU were timed. `timed` are names of
    candidates and their speeds, by the text of their recipes.
    """
    found = {}
    for recipe in recipes:
        if (gpus := recipe.placement.gpus) > 1:
            text, one = recipe_text(recipe), alone(recipe)
            if one != text and text in timed and one in timed:
                found[text] = scaling(*timed[one], timed[text][1], gpus)
    return found


def scaling(against: str, one: Speed, several: Speed, gpus: int) -> Scaling:
    """Of `several` GPUs against `one` (of the candidate of that name), each timed against the same baseline."""
    pairs: Sequence[tuple[CellSpeed, CellSpeed]] = list(zip(several.cells, one.cells, strict=True))
    cells = tuple(quotient(more.speedup, less.speedup, gpus) for more, less in pairs)
    return Scaling(against, gpus, quotient(several.overall, one.overall, gpus), cells)


def quotient(above: Interval, below: Interval, count: int = 1) -> Interval:
    """Two independent ratios divided, and by `count`: their logarithms' distances to each end add in quadrature.

    Source: Zou and Donner, Construction of confidence limits about effect measures (Statistics in Medicine, 2008)
    """
    value, low, high = (_log(end) for end in (above.value, above.low, above.high))
    under, under_low, under_high = (_log(end) for end in (below.value, below.low, below.high))
    estimate = value - under
    down = math.hypot(value - low, under_high - under)
    up = math.hypot(high - value, under - under_low)
    logs = (estimate, estimate - down, estimate + up)
    return Interval(*(math.inf if each > LARGEST_LOG else math.exp(each) / count for each in logs))


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf
