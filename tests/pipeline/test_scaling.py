"""Scaling efficiency: ratios of speedups with their intervals, and which recipe stands for one GPU."""

import dataclasses
import math
import random

import pytest

from optimize.pipeline.contract import Cell
from optimize.pipeline.measure import CellSpeed, Speed
from optimize.pipeline.recipe import parse, recipe_text
from optimize.pipeline.scaling import alone, quotient, scaling, scalings
from optimize.pipeline.statistics import Interval, mean_interval


def speed(*values: float) -> Speed:
    """The same speedup overall as at the first cell."""
    found = [Interval(value, value / 1.1, value * 1.1) for value in values]
    cells = tuple(CellSpeed(Cell(index + 1, 8), each, 1.0, 1.0) for index, each in enumerate(found))
    return Speed(found[0], cells, 8)


def test_twice_as_fast_on_two_gpus_is_one() -> None:
    found = scaling("one", speed(3.0, 2.0), speed(6.0, 2.0), 2)
    assert (found.against, found.gpus) == ("one", 2)
    assert [each.value for each in (found.overall, *found.cells)] == pytest.approx([1.0, 1.0, 0.5])
    wide = 1.1 ** math.sqrt(2)  # two equal intervals
    assert (found.overall.low, found.overall.high) == pytest.approx((1 / wide, wide))


def test_only_what_was_timed_on_one_gpu_too_is_compared() -> None:
    texts = {"one": "serve-vllm", "copies": "serve-vllm{replicas=4}", "fp8": "serve-vllm{quantization=fp8;gpus=2}",
             "untimed": "serve-vllm{gpus=8}", "other": "cast-dtype"}  # fmt: skip
    recipes = {name: parse(text, name) for name, text in texts.items()}
    timed = {recipe_text(recipe): (name, speed(3.0)) for name, recipe in recipes.items() if name != "untimed"}
    found = scalings(timed, recipes.values())
    assert list(found) == [recipe_text(recipes["copies"])]
    (only,) = found.values()
    assert (only.against, only.gpus, only.overall.value) == ("one", 4, pytest.approx(0.25))


def test_each_end_takes_the_ends_that_make_it_so() -> None:
    sure = Interval(2.0, 2.0, 2.0)
    assert quotient(Interval(6.0, 3.0, 7.0), sure).low == pytest.approx(1.5)
    low = quotient(sure, Interval(1.0, 0.9, 4.0))
    assert (low.low, low.high) == pytest.approx((0.5, 2 / 0.9))


def test_too_few_quads_leave_it_open() -> None:
    open_, some = Interval(2.0, 0.0, math.inf), Interval(1.0, 0.9, 1.1)
    for found in (quotient(open_, some), quotient(some, open_)):
        assert (found.low, found.high) == (0.0, math.inf) and math.isfinite(found.value)


def test_the_interval_covers_as_often_as_it_says() -> None:
    drawn = random.Random(0)

    def ratio(log: float) -> Interval:
        found = mean_interval([drawn.gauss(log, 0.1) for _ in range(20)], 0.9)
        return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high))

    covered = 0
    for _ in range(400):
        found = quotient(ratio(math.log(3)), ratio(math.log(2)), 2)
        covered += found.low <= 0.75 <= found.high
    assert 0.86 <= covered / 400 <= 0.96


@pytest.mark.parametrize(
    ("several", "one"),
    [
        ("cast-dtype,serve-vllm{gpus=2;replicas=4}", "cast-dtype,serve-vllm"),
        ("serve-vllm{quantization=fp8;gpus=4}", "serve-vllm{quantization=fp8}"),
        ("serve-vllm{replicas=2;eager=true}", "serve-vllm{eager=true}"),
        ("cast-dtype,shard-tensors{gpus=4}", "cast-dtype"),
    ],
)
def test_one_gpu_is_the_recipe_without_its_spread(several: str, one: str) -> None:
    assert alone(parse(several)) == recipe_text(parse(one))
    assert dataclasses.astuple(parse(several).passes[-1]) != dataclasses.astuple(parse(one).passes[-1])
