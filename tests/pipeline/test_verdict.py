"""Verdicts: the speed gate at its borders, which candidate wins, and the exit code of every mixture."""

import dataclasses
import itertools

import pytest

from optimize.pipeline.contract import Cell, Gates, Kind, Objective
from optimize.pipeline.errors import ExitCode
from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.measure import CellSpeed, Speed
from optimize.pipeline.noise import Noise
from optimize.pipeline.statistics import Interval
from optimize.pipeline.verdict import Candidate, Status, StepReport, choose, judge_speed, pareto

ABOVE, BELOW = 1.0500001, 1.0499999


def speed(low: float, value: float, high: float) -> Speed:
    interval = Interval(value, low, high)
    return Speed(interval, (CellSpeed(Cell(1, 32), interval, 0.02, 0.01),), 10)


def candidate(status: Status, name: str = "x", measured: Speed | None = None) -> Candidate:
    if status in (Status.PASSED, Status.NOT_FASTER, Status.INCONCLUSIVE):
        measured = measured or speed(1.1, 1.2, 1.3)
    return Candidate(name, "export-onnx", Kind.ONNX, status, speed=measured)


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (1.2, 1.4, Status.PASSED),
        (ABOVE, 1.4, Status.PASSED),
        (1.05, 1.4, Status.INCONCLUSIVE),
        (BELOW, 1.4, Status.INCONCLUSIVE),
        (0.9, 1.2, Status.INCONCLUSIVE),
        (0.9, ABOVE, Status.INCONCLUSIVE),
        (0.9, 1.05, Status.INCONCLUSIVE),
        (0.9, BELOW, Status.NOT_FASTER),
        (0.5, 0.6, Status.NOT_FASTER),
        (1.05, 1.05, Status.INCONCLUSIVE),
        (0.0, float("inf"), Status.INCONCLUSIVE),
    ],
)
def test_the_interval_decides_and_not_the_estimate(low: float, high: float, status: Status) -> None:
    for value in (low, high):
        found, reason = judge_speed(speed(low, value, high), Gates(min_speedup=1.05))
        assert found is status
        assert (reason is None) is (status is Status.PASSED)


def test_the_reason_tells_the_interval_and_the_gate() -> None:
    gates = Gates(min_speedup=1.05)
    assert judge_speed(speed(0.8, 0.9, 1.0), gates)[1] == "speedup 0.90 [0.80, 1.00] is below the gate of 1.05"
    _, reason = judge_speed(speed(1.0, 1.1, 1.2), gates)
    assert reason is not None
    assert reason.startswith("speedup 1.10 [1.00, 1.20] may be on either side of the gate of 1.05; about 4 times")


@pytest.mark.parametrize("low", [0.5, 1.04, 2.0])
def test_on_a_busy_host_no_interval_decides(low: float) -> None:
    noise = Noise(others=0.62, stolen=0.0, load=3.0, megahertz=None, spread=0.9)
    busy = dataclasses.replace(speed(low, 1.5 * low, 2 * low), noise=noise, busy=True)
    status, reason = judge_speed(busy, Gates(min_speedup=1.05))
    assert status is Status.INCONCLUSIVE
    assert reason is not None
    assert "busy host" in reason and "other processes took 62%" in reason and "--max-load" in reason


@pytest.mark.parametrize("order", list(itertools.permutations(("sure", "high", "slow"))))
def test_the_winner_has_the_best_lower_end(order: tuple[str, ...]) -> None:
    speeds = {"sure": speed(1.50, 1.55, 1.60), "high": speed(1.20, 1.90, 3.00), "slow": speed(1.10, 1.20, 1.30)}
    winner, code = choose([candidate(Status.PASSED, name, speeds[name]) for name in order])
    assert winner is not None
    assert (winner.name, code) == ("sure", ExitCode.EMITTED)


def test_what_did_not_pass_never_wins() -> None:
    fast = speed(9.0, 9.5, 10.0)
    others = [candidate(status, status, fast) for status in Status if status is not Status.PASSED]
    passed = candidate(Status.PASSED, "passed", speed(1.1, 1.2, 1.3))
    assert choose([*others, passed]) == (passed, ExitCode.EMITTED)
    assert choose(others)[0] is None


CODES = {  # the best stage that was reached tells the code: from the best to the worst
    Status.PASSED: 0,
    Status.INCONCLUSIVE: 6,
    Status.NOT_FASTER: 5,
    Status.INACCURATE: 4,
    Status.BROKEN: 4,
    Status.NOT_BUILT: 3,
}


@pytest.mark.parametrize(
    "mixture",
    [each for size in range(1, len(CODES) + 1) for each in itertools.combinations(CODES, size)],
    ids=lambda mixture: "+".join(status.name.lower() for status in mixture),
)
def test_the_exit_code_of_every_mixture(mixture: tuple[Status, ...]) -> None:
    candidates = [candidate(status) for status in mixture]
    expected = next(code for status, code in CODES.items() if status in mixture)
    for order in (candidates, candidates[::-1]):
        winner, code = choose(order)
        assert int(code) == expected
        assert (winner is not None) is (expected == 0)


def test_no_candidates_is_nothing_built() -> None:
    assert choose([]) == (None, ExitCode.NOT_BUILT)


def test_the_exit_codes_are_the_contract() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "EMITTED": 0, "BUG": 1, "REFUSED": 2, "NOT_BUILT": 3, "NOT_ACCURATE": 4, "NOT_FASTER": 5, "INCONCLUSIVE": 6,
        "WORSE": 7, "INTERRUPTED": 130,
    }  # fmt: skip


def test_build_seconds_count_cached_steps_too() -> None:
    built = candidate(Status.PASSED)
    built.steps += [StepReport("export-onnx", "k", True, 2.0, 1), StepReport("quantize-onnx", "l", False, 0.5, 1)]
    assert built.build_seconds == 2.5


def costing(name: str, low: float, largest: float, memory: int, size: int) -> Candidate:
    """A candidate that passed, with the lower ends of its speedups overall and at 8x128."""
    cells = tuple(
        CellSpeed(cell, Interval(end, end, end), 1.0, 1.0)
        for cell, end in ((Cell(1, 32), 9.0), (Cell(8, 128), largest), (Cell(1, 128), 9.0))
    )
    measured = Speed(Interval(low + 0.1, low, low + 0.2), cells, 8)
    return Candidate(name, "export-onnx", Kind.ONNX, Status.PASSED, speed=measured, peak_memory=memory, size=size)


FOUR = [costing("quick", 3.0, 1.5, 900, 90), costing("wide", 2.0, 2.5, 800, 80), costing("lean", 1.5, 1.2, 300, 70),
        costing("small", 1.2, 1.1, 400, 20)]  # fmt: skip


@pytest.mark.parametrize(("objective", "name"), list(zip(Objective, ("quick", "wide", "lean", "small"), strict=True)))
def test_the_objective_chooses_among_those_that_passed(objective: Objective, name: str) -> None:
    better = [dataclasses.replace(each, name="lost", status=Status.INACCURATE) for each in FOUR]
    winner, code = choose([*better, *FOUR], objective)
    assert winner is not None
    assert (winner.name, code) == (name, ExitCode.EMITTED)


def test_on_a_gpu_its_memory_comes_before_the_hosts() -> None:
    small, large = GpuMemory(2 << 30), GpuMemory(3 << 30, by_process=False)
    held = dict(zip(("quick", "wide", "lean", "small"), (small, small, large, None), strict=True))
    found = [dataclasses.replace(each, gpu_memory=held[each.name]) for each in FOUR]
    winner, _ = choose(found, Objective.MEMORY)
    assert winner is not None and winner.name == "wide"  # less of the host than quick; small was not measured
    assert pareto(found) == {"quick", "wide", "lean", "small"}


def test_the_pareto_set_leaves_out_only_what_another_one_beats() -> None:
    beaten = costing("beaten", 1.9, 2.5, 800, 80)
    twin = costing("twin", 2.0, 2.5, 800, 80)
    assert pareto([*FOUR, beaten]) == {"quick", "wide", "lean", "small"}
    assert pareto([*FOUR, twin]) == {"quick", "wide", "twin", "lean", "small"}
    assert pareto([dataclasses.replace(each, status=Status.NOT_FASTER) for each in FOUR]) == frozenset()
