"""Paired, interleaved timing of a candidate against the baseline. The reasons are in docs/measuring.md.

Two workers live side by side; the one that is not being timed is stopped. A quad is four blocks of every cell of the
workload, A B B A or B A A B by the toss of a coin: its log ratio is free of any drift that is linear over the quad, and
for equal sides its sign is a fair coin whatever the host does. The quads are the independent samples; their number is
fixed before the first is looked at. Quads during which foreign work took more of the host than is allowed are made
again: how much it took says nothing of the sign.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optimize.pipeline.contract import Cell, Gates
from optimize.pipeline.noise import Noise, NoiseMeter
from optimize.pipeline.statistics import Interval, ratio_interval
from optimize.pipeline.workers import CALL_LIMIT, WorkerProcess, running

BLOCK_SECONDS = 0.05  # of calls for one cell in one block, beside one call to warm up
SHORTEST_QUAD = 4 * BLOCK_SECONDS  # in which what others take of the host, told in hundredths of a second, still shows
MIN_QUADS, MAX_QUADS = 8, 200  # fewer than 8 have no distribution-free interval at 99%
BEYOND = 10  # calls that must lie beyond a percentile for it to be stated
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class PhaseSpeed:
    """A part of a cell's calls: the speedup, and the medians of both sides in seconds."""

    speedup: Interval
    baseline_seconds: float
    seconds: float


@dataclass(frozen=True)
class CellSpeed:
    """One cell: the speedup, and the medians of both sides' calls in seconds."""

    cell: Cell
    speedup: Interval
    baseline_seconds: float
    seconds: float
    percentiles: Mapping[int, float] = field(default_factory=dict)  # of the candidate's calls, where enough were made
    first: PhaseSpeed | None = None  # of a generation: up to the first token
    rest: PhaseSpeed | None = None  # and the tokens after it

    @property
    def passes(self) -> tuple[float, float]:
        """Seconds of one pass through the model, of the baseline and the candidate: of a generation, of one step."""
        if self.rest is None:
            return self.baseline_seconds, self.seconds
        steps = max(self.cell.new - 1, 1)
        return self.rest.baseline_seconds / steps, self.rest.seconds / steps

    @property
    def tokens_per_second(self) -> float | None:
        """That are generated after the first, in all rows of a batch together."""
        return None if self.rest is None else self.cell.batch * (self.cell.new - 1) / self.rest.seconds


@dataclass(frozen=True)
class Speed:
    """A candidate against the baseline. `overall` is the geometric mean of the cells, each by its weight."""

    overall: Interval
    cells: tuple[CellSpeed, ...]
    quads: int
    noise: Noise | None = None
    disturbed: int = 0  # quads that foreign work disturbed, and that are not among the samples
    busy: bool = False  # the host: too few quads were undisturbed, so all are among the samples; or others' GPU work


# seconds of each call, by quad, block, cell and call: the raw figures behind a Speed. A generation's cell is three, one
# for each phase. A quad's blocks are put down as A B B A, in whichever of the two orders they were run
Samples = list[list[list[list[float]]]]


def compare(
    baseline: WorkerProcess,
    candidate: WorkerProcess,
    cells: Sequence[Cell],
    budget: float,
    max_load: float = Gates.max_load,
    progress: Callable[[Interval, int, int], None] = lambda interval, done, planned: None,
) -> tuple[Speed, Samples]:
    """Time both workers (each with an open session, both paused) for about `budget` seconds.

    The first quad warms both up and tells how many fit; it is not among the samples. Blocks are shorter where the least
    number of quads would not fit otherwise. `progress` is shown the interval
    as it shrinks, and decides nothing. Quads during which foreign work took more than `max_load` of the host are made
    again, until as many are disturbed as were wanted: for at most twice the budget. Of a GPU only its driver's mean
    over a second is known, and not whose work it was: it is asked before and after, while ours rest.
    """
    seconds = block_seconds(budget, len(cells))
    on_gpu = [candidate.others_on_gpu()]
    started, meter = time.monotonic(), NoiseMeter(baseline.pid, candidate.pid)
    _quad(baseline, candidate, len(cells), seconds)
    planned = int(min(max(budget / max(time.monotonic() - started, 1e-3) - 1, MIN_QUADS), MAX_QUADS))
    quiet: Samples = []
    disturbed: Samples = []
    while max(len(quiet), len(disturbed)) < planned:
        begin = meter.counters()
        quad = _quad(baseline, candidate, len(cells), seconds)
        (quiet if min(sum(meter.shares(begin)), 1.0) <= max_load else disturbed).append(quad)
        if len(quiet) > 1:
            progress(summarize(quiet, cells).overall, len(quiet), planned)
    few = len(quiet) < MIN_QUADS
    raw = quiet + disturbed if few else quiet
    noise = meter.read(_spread(raw))
    on_gpu.append(candidate.others_on_gpu())
    gpu = max((share for share in on_gpu if share is not None), default=None)
    noise = dataclasses.replace(noise, gpu=gpu)
    busy = few or (gpu or 0.0) > max_load
    speed = dataclasses.replace(summarize(raw, cells), noise=noise, disturbed=len(disturbed), busy=busy)
    return speed, raw


def block_seconds(budget: float, cells: int) -> float:
    """How long one cell is called in one block: less than usual where the least number of quads would not fit in the
    budget, but for no quads shorter than those of one cell.
    """
    return min(max(budget / (MIN_QUADS + 1), SHORTEST_QUAD) / (4 * cells), BLOCK_SECONDS)


def summarize(raw: Samples, cells: Sequence[Cell]) -> Speed:
    """The speed that raw samples amount to: per cell, and as the geometric mean over cells."""
    ratios, speeds = _log_ratios(raw), []

    def phase(column: int) -> PhaseSpeed:
        ours, theirs = _calls(raw, column, (1, 2)), _calls(raw, column, (0, 3))
        interval = ratio_interval([quad[column] for quad in ratios])
        return PhaseSpeed(interval, statistics.median(theirs), statistics.median(ours))

    wholes = _wholes(cells)
    for cell, column in zip(cells, wholes, strict=True):
        whole = phase(column)
        parts = (phase(column + 1), phase(column + 2)) if cell.new else (None, None)
        stated = percentiles(_calls(raw, column, (1, 2)))
        speeds.append(CellSpeed(cell, whole.speedup, whole.baseline_seconds, whole.seconds, stated, *parts))
    total = sum(cell.weight for cell in cells)
    means = [math.fsum(c.weight * quad[at] for c, at in zip(cells, wholes, strict=True)) / total for quad in ratios]
    overall = ratio_interval(means)
    return Speed(overall, tuple(speeds), len(raw))


def _wholes(cells: Sequence[Cell]) -> list[int]:
    """Where each cell's whole calls stand in a block."""
    widths = [3 if cell.new else 1 for cell in cells]
    return [sum(widths[:index]) for index in range(len(cells))]


def _calls(raw: Samples, column: int, blocks: Sequence[int]) -> list[float]:
    return [call for quad in raw for block in blocks for call in quad[block][column]]


def percentiles(seconds: Sequence[float]) -> dict[int, float]:
    """Those of PERCENTILES that have at least BEYOND calls beyond them."""
    ordered = sorted(seconds)
    stated = [percent for percent in PERCENTILES if len(ordered) * (100 - percent) >= 100 * BEYOND]
    return {percent: ordered[len(ordered) * percent // 100] for percent in stated}


def spread_of_quads(raw: Samples) -> float:
    """The standard deviation of the quads' log ratios, over all their cells: what the interval is made of."""
    return statistics.stdev(math.fsum(quad) / len(quad) for quad in _log_ratios(raw))


def _log_ratios(raw: Samples) -> list[list[float]]:
    """log(baseline / candidate), by quad and cell."""
    return [[_log_ratio(blocks) for blocks in zip(*quad, strict=True)] for quad in raw]


def _spread(raw: Samples) -> float:
    """Of the baseline against itself: its first block over its last, root mean square over the quads."""
    logs = [
        statistics.fmean(
            math.log(statistics.median(a) / statistics.median(b)) for a, b in zip(quad[0], quad[3], strict=True)
        )
        for quad in raw
    ]
    return math.sqrt(statistics.fmean(log * log for log in logs))


def _quad(baseline: WorkerProcess, candidate: WorkerProcess, cells: int, seconds: float) -> list[list[list[float]]]:
    swapped = bool(random.getrandbits(1))
    outer, inner = (candidate, baseline) if swapped else (baseline, candidate)
    first, second, third, fourth = (_block(worker, cells, seconds) for worker in (outer, inner, inner, outer))
    return [second, first, fourth, third] if swapped else [first, second, third, fourth]


def _block(worker: WorkerProcess, cells: int, seconds: float) -> list[list[float]]:
    with running(worker):
        asked = (worker.ask("time", limit=CALL_LIMIT, cell=cell, seconds=seconds, least=1) for cell in range(cells))
        return [phase for phases in asked for phase in phases]


def _log_ratio(blocks: Sequence[Sequence[float]]) -> float:
    """log(baseline / candidate) of one cell in one quad, from the medians of its four blocks."""
    first, second, third, fourth = (math.log(statistics.median(block)) for block in blocks)
    return (first - second - third + fourth) / 2
