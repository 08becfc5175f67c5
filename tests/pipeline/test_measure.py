"""What raw samples amount to: the known ratio, whatever drifts and outliers lie on top of it."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from optimize.pipeline import measure
from optimize.pipeline.contract import Cell, Gates
from optimize.pipeline.measure import (
    BLOCK_SECONDS,
    MIN_QUADS,
    Samples,
    Speed,
    block_seconds,
    compare,
    percentiles,
    spread_of_quads,
    summarize,
)
from optimize.pipeline.noise import Counters, Noise, NoiseMeter
from optimize.pipeline.verdict import Status, judge_speed

CELLS = (Cell(1, 32), Cell(8, 128))
BASELINE = (0.010, 0.200)  # seconds of one call of each cell


def samples(
    speedups: tuple[float, ...],
    *,
    quads: int = 8,
    calls: int = 5,
    factor: Callable[[int, int, int], float] = lambda quad, block, call: 1.0,
) -> Samples:
    """Raw samples of an A B B A experiment, each call's time multiplied by `factor`."""
    return [
        [
            [
                [
                    BASELINE[cell] / (speedup if block in (1, 2) else 1.0) * factor(quad, block, call)
                    for call in range(calls)
                ]
                for cell, speedup in enumerate(speedups)
            ]
            for block in range(4)
        ]
        for quad in range(quads)
    ]


@pytest.mark.parametrize("speedup", [0.5, 1.0, 1.25, 8.0])
def test_a_known_ratio_is_recovered_exactly(speedup: float) -> None:
    speed = summarize(samples((speedup, speedup)), CELLS)
    for interval in (speed.overall, *(cell.speedup for cell in speed.cells)):
        assert (interval.low, interval.value, interval.high) == pytest.approx((speedup,) * 3)
    assert speed.quads == 8


@pytest.mark.parametrize(("speedup", "sign"), [(1.5, 1), (1 / 1.5, -1)])
def test_a_faster_candidate_has_a_ratio_above_one(speedup: float, sign: int) -> None:
    speed = summarize(samples((speedup, speedup)), CELLS)
    assert sign * math.log(speed.overall.low) > 0
    assert sign * (speed.cells[0].baseline_seconds - speed.cells[0].seconds) > 0


def test_a_known_ratio_lies_in_the_interval_under_noise() -> None:
    chance = random.Random(5)
    raw = samples((1.3, 1.3), quads=20, factor=lambda quad, block, call: math.exp(chance.gauss(0, 0.05)))
    overall = summarize(raw, CELLS).overall
    assert overall.low < 1.3 < overall.high
    assert overall.high / overall.low < 1.1


@pytest.mark.parametrize("slope", [-0.4, 0.1, 1.0])
def test_drift_that_is_linear_over_a_quad_cancels(slope: float) -> None:
    raw = samples((2.0, 2.0), factor=lambda quad, block, call: math.exp(slope * block + 0.3 * quad))
    overall = summarize(raw, CELLS).overall
    assert (overall.low, overall.value, overall.high) == pytest.approx((2.0,) * 3)


def test_drift_that_is_not_linear_does_not_cancel() -> None:
    raw = samples((2.0, 2.0), factor=lambda quad, block, call: 3.0 if block == 3 else 1.0)
    assert summarize(raw, CELLS).overall.value == pytest.approx(2.0 * math.sqrt(3.0))


@pytest.mark.parametrize("block", range(4))
def test_an_outlier_within_a_block_does_not_matter(block: int) -> None:
    raw = samples((1.5, 1.5), factor=lambda quad, where, call: 100.0 if (where, call) == (block, 2) else 1.0)
    overall = summarize(raw, CELLS).overall
    assert (overall.low, overall.value, overall.high) == pytest.approx((1.5,) * 3)


def test_one_disturbed_quad_widens_the_interval() -> None:
    raw = samples((1.5, 1.5), factor=lambda quad, block, call: 2.0 if quad == 3 and block == 1 else 1.0)
    overall = summarize(raw, CELLS).overall
    assert overall.low < 1.4
    assert (overall.value, overall.high) == pytest.approx((1.5, 1.5))  # but does not move the estimate


def test_overall_is_the_geometric_mean_of_the_cells() -> None:
    speed = summarize(samples((1.0, 4.0)), CELLS)
    assert [cell.speedup.value for cell in speed.cells] == pytest.approx([1.0, 4.0])
    assert [cell.cell for cell in speed.cells] == list(CELLS)
    assert speed.overall.value == pytest.approx(2.0)
    weighted = [dataclasses.replace(CELLS[0], weight=3), CELLS[1]]
    assert summarize(samples((1.0, 4.0)), weighted).overall.value == pytest.approx(4.0**0.25)


def test_a_cells_seconds_are_the_medians_of_all_its_calls() -> None:
    raw = samples((2.0, 4.0), factor=lambda quad, block, call: (0.5, 1.0, 1.0, 1.0, 9.0)[call])
    cells = summarize(raw, CELLS).cells
    assert [cell.baseline_seconds for cell in cells] == pytest.approx(BASELINE)
    assert [cell.seconds for cell in cells] == pytest.approx([0.005, 0.05])


def test_blocks_may_have_unlike_numbers_of_calls() -> None:
    raw = samples((2.0, 2.0))
    raw[0][0][0] = raw[0][0][0][:1]
    assert summarize(raw, CELLS).overall.value == pytest.approx(2.0)


@pytest.mark.parametrize(("calls", "stated"), [(19, []), (20, [50]), (99, [50]), (100, [50, 90]), (1000, [50, 90, 99])])
def test_percentiles_are_stated_only_with_ten_calls_beyond(calls: int, stated: list[int]) -> None:
    found = percentiles([float(second) for second in range(calls)])
    assert list(found) == stated
    for percent, seconds in found.items():
        assert sum(second > seconds for second in range(calls)) >= 9
        assert seconds == pytest.approx(calls * percent / 100, abs=1)


def test_the_spread_of_quads_is_what_the_interval_is_made_of() -> None:
    raw = samples((2.0, 2.0), quads=3, factor=lambda quad, block, call: (1.0, 1.1, 1.21)[quad] if block == 0 else 1.0)
    assert spread_of_quads(raw) == pytest.approx(math.log(1.1) / 2)


@pytest.mark.parametrize(
    ("budget", "cells", "seconds"),
    [
        (600.0, 4, BLOCK_SECONDS),
        (0.0, 1, BLOCK_SECONDS),  # a quad is never shorter than that
        (0.0, 4, BLOCK_SECONDS / 4),
        (4.5, 5, 0.025),  # nine quads of four blocks of five cells
    ],
)
def test_blocks_are_shorter_where_the_budget_is_short(budget: float, cells: int, seconds: float) -> None:
    assert block_seconds(budget, cells) == pytest.approx(seconds)


class StubProcess:
    """Stands for a worker where nobody talks to it."""

    pid = 0

    def __init__(self, on_gpu: Sequence[float | None] = (None, None)) -> None:
        self._on_gpu = iter(on_gpu)

    def others_on_gpu(self) -> float | None:
        return next(self._on_gpu)


@pytest.fixture
def compare_under(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Speed, Samples]]:
    """Compare for less than a second, where each quad meets the next of these foreign loads, and takes that much longer
    on the candidate's side.
    """

    def of(
        loads: Sequence[float], max_load: float, on_gpu: tuple[float | None, float | None] = (None, None)
    ) -> tuple[Speed, Samples]:
        endless, current = itertools.cycle(loads), [0.0]

        class Meter(NoiseMeter):
            def __init__(self, *pids: int) -> None:
                pass

            def counters(self) -> Counters:
                return 0.0, 0.0, 0.0, 0.0

            def shares(self, since: Counters | None = None) -> tuple[float, float]:
                return current[0], 0.0

            def read(self, spread: float) -> Noise:
                return Noise(current[0], 0.0, 0.0, None, spread)

        def quad(*given: Any) -> list[list[list[float]]]:
            current[0] = next(endless)
            return [[[0.01]], [[0.01 + current[0]]], [[0.01 + current[0]]], [[0.01]]]

        monkeypatch.setattr(measure, "NoiseMeter", Meter)
        monkeypatch.setattr(measure, "_quad", quad)
        stub: Any = StubProcess(on_gpu)
        return compare(stub, stub, [Cell(1, 8)], 0.0, max_load)

    return of


def test_disturbed_quads_are_made_again(compare_under: Callable[..., tuple[Speed, Samples]]) -> None:
    speed, raw = compare_under([0.0, 0.0, 0.5], 0.2)
    assert (speed.quads, speed.busy) == (MIN_QUADS, False)
    assert speed.disturbed == MIN_QUADS // 2
    assert (speed.overall.low, speed.overall.high) == pytest.approx((1.0, 1.0)), "they are not among the samples"
    assert len(raw) == MIN_QUADS


def test_where_hardly_a_quad_is_undisturbed_the_host_is_busy(
    compare_under: Callable[..., tuple[Speed, Samples]],
) -> None:
    speed, raw = compare_under([0.5, 0.5, 0.0], 0.2)
    assert speed.busy
    assert speed.disturbed == MIN_QUADS
    assert speed.quads == len(raw) > MIN_QUADS, "all of them are shown"


@pytest.mark.parametrize("on_gpu", [(0.93, 0.0), (0.0, 0.93)])
def test_work_of_others_on_the_gpu_before_or_after_makes_the_host_busy(
    compare_under: Callable[..., tuple[Speed, Samples]], on_gpu: tuple[float, float]
) -> None:
    speed, _ = compare_under([0.0], 0.2, on_gpu)
    assert speed.busy and speed.noise is not None and speed.noise.gpu == 0.93
    assert judge_speed(speed, Gates())[0] is Status.INCONCLUSIVE
    assert "computed on the GPU for 93%" in str(speed.noise)
    allowed, _ = compare_under([0.0], 1.0, on_gpu)
    idle, _ = compare_under([0.0], 0.2, (0.04, 0.0))
    processor, _ = compare_under([0.0], 0.2)
    assert not (allowed.busy or idle.busy or processor.busy)
    assert processor.noise is not None and processor.noise.gpu is None


def test_load_that_is_allowed_does_not_disturb(compare_under: Callable[..., tuple[Speed, Samples]]) -> None:
    speed, _ = compare_under([0.5, 0.5, 1.5], 1.0)  # counters are coarse, and may add up to more than there is
    assert (speed.quads, speed.disturbed, speed.busy) == (MIN_QUADS, 0, False)
