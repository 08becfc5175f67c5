"""`optimize doctor --self-test`: whether this host's noise is taken for a difference, and what difference it can show.

Two workers multiply matrices in place of models, and go through the same measurement as models do: once with equal work
(A/A), once with a tenth more on one side (A/B).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optimize.pipeline.contract import Array, Batch, Cell
from optimize.pipeline.errors import ExitCode
from optimize.pipeline.measure import Speed, compare, spread_of_quads
from optimize.pipeline.statistics import EQUIVALENT, Difference, difference, resolution
from optimize.pipeline.workers import WorkerProcess

EXTRA = 0.10  # more work on one side of A/B
CALL_SECONDS = 0.01  # of one call of the lighter side
BUDGETS = (15, 60, 300)  # seconds for which the resolution is foretold
SIZE = 256  # of the square float32 matrices
LIMIT = 60.0


class Products:
    """A session whose call takes as long as that many matrix products."""

    inputs: tuple[str, ...] = ()

    def __init__(self, count: int) -> None:
        random = np.random.default_rng(0)
        self._count = count
        self._left, self._right = random.standard_normal((2, SIZE, SIZE), dtype=np.float32)

    def run(self, batch: Batch) -> dict[str, Array]:
        for _ in range(self._count):
            product = self._left @ self._right
        return {"product": product}


@dataclass(frozen=True)
class SelfTest:
    """What came out, and how long one quad took, in seconds."""

    same: Speed
    heavier: Speed  # the baseline does EXTRA more: a true speedup of 1 + EXTRA
    quad_seconds: float
    resolves: Mapping[int, float]  # seconds of measuring one candidate -> the smallest difference that shows
    exit_code: int

    def describe(self) -> str:
        """In words."""
        outcome = {
            ExitCode.EMITTED: "sound: no difference is seen where there is none, and the known one is seen",
            ExitCode.INCONCLUSIVE: "not sound here and now: measure on a quieter host, or with a larger --budget",
        }[ExitCode(self.exit_code)]
        lines = [
            f"A/A  equal work      {self.same.overall}  {found(self.same)}",
            f"A/B  {EXTRA:.0%} more work   {self.heavier.overall}  {found(self.heavier)}",
            f"noise                {self.same.noise}",
        ]
        for seconds, smallest in self.resolves.items():
            lines.append(f"{seconds:4d} s for one candidate show differences from {smallest:.1%} up")
        return "\n".join([*lines, outcome])


def found(speed: Speed) -> Difference:
    """What a measurement says; on a busy host, nothing."""
    return Difference.INCONCLUSIVE if speed.busy else difference(speed.overall)


def self_test(seconds: float) -> SelfTest:
    """Run A/A and A/B for about `seconds` each."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first, second, third = (stack.enter_context(WorkerProcess(scratch / f"{side}.log")) for side in "abc")
        count = first.ask("calibrate", limit=LIMIT, seconds=CALL_SECONDS)
        heavier = max(count + 1, round(count * (1 + EXTRA)))
        for worker, products in ((first, count), (second, count), (third, heavier)):
            worker.ask("open_products", limit=LIMIT, count=products)
            worker.pause()
        start = time.monotonic()
        same, raw = compare(first, second, [Cell(1, 1)], seconds)
        quad_seconds = (time.monotonic() - start) / (same.quads + 1)
        slower, _ = compare(third, second, [Cell(1, 1)], seconds)
    spread = spread_of_quads(raw)
    sound = found(same) not in (Difference.FASTER, Difference.SLOWER)
    seen = found(slower) is Difference.FASTER
    code = ExitCode.EMITTED if sound and seen else ExitCode.INCONCLUSIVE
    # half the interval for the estimate's own error, half for leaving the margin outside: found nine times out of ten
    half = {budget: resolution(spread, max(int(budget / quad_seconds), 2)) for budget in BUDGETS}
    resolves = {budget: EQUIVALENT * math.exp(1.5 * half[budget]) - 1 for budget in BUDGETS}
    return SelfTest(same, slower, quad_seconds, resolves, code)


def calibrate(seconds: float) -> int:
    """How many products take about that long here: the fastest of several tries."""
    count = 1
    while True:
        session = Products(count)
        session.run({})
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            session.run({})
            tries.append(time.perf_counter() - start)
        if min(tries) > seconds / 2:
            return max(10, round(count * seconds / min(tries)))
        count *= 2
