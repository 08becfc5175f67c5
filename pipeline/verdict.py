"""Accuracy and speed of each candidate against the gates, and which one is emitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimize.pipeline.accuracy import Accuracy
from optimize.pipeline.contract import Gates, Kind, Objective, Word
from optimize.pipeline.errors import ExitCode
from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.language import LanguageAccuracy
from optimize.pipeline.measure import Speed
from optimize.pipeline.roofline import Roof
from optimize.pipeline.scaling import Scaling
from optimize.pipeline.statistics import Difference, Interval, difference
from optimize.pipeline.tokens import TokenAccuracy

HOPELESS = 10  # times the gate: so large a drop does not come from a few layers
MOST_TIMES = 50  # the budget: nobody waits longer


class Status(Word):
    """What became of a candidate. The first three never reach the speed gate."""

    NOT_BUILT = "not built"
    BROKEN = "broken"  # built, but it cannot be opened or run
    INACCURATE = "inaccurate"
    NOT_FASTER = "not faster"
    INCONCLUSIVE = "inconclusive"
    ARCHIVED = "archived"  # it passes, but what it is made with is not maintained, and that was not allowed
    PASSED = "passed"


@dataclass
class StepReport:
    """One step as it went in this run."""

    text: str  # the pass with its options
    key: str
    cached: bool
    seconds: float  # that building took, now or when it was cached
    peak_memory: int  # bytes
    facts: Mapping[str, Any] = field(default_factory=dict)
    predicted_memory: int | None = None  # what the plan said of peak_memory


@dataclass(frozen=True)
class Throughput:
    """Of one process alone, on growing batches: where it grows no more."""

    batch: int
    tokens_per_second: float


@dataclass
class Candidate:
    """One recipe with everything that was found out about it."""

    name: str
    recipe: str
    kind: Kind
    status: Status
    reason: str | None = None  # why it lost, in words
    steps: list[StepReport] = field(default_factory=list)
    size: int | None = None  # bytes on disk
    load_seconds: float | None = None
    first_seconds: float | None = None  # the first call after loading
    peak_memory: int | None = None  # bytes resident while it ran, at most
    accuracy: Accuracy | LanguageAccuracy | TokenAccuracy | None = None
    speed: Speed | None = None
    arithmetic: str = "float32"  # the dtype of its matrix products
    roofs: tuple[Roof, ...] = ()  # of the cells, where the host's peak for that dtype is known
    throughput: Throughput | None = None
    judged_memory: int | None = None  # bytes resident at most, what it was judged on included
    predicted_memory: int | None = None  # what the plan said of that
    gpu_memory: GpuMemory | None = None  # held when every cell had been run
    judged_gpu_memory: GpuMemory | None = None  # and when it had been judged
    predicted_gpu_memory: int | None = None  # what the plan said of that, in bytes of each GPU
    scaling: Scaling | None = None  # of several GPUs, where the same recipe was timed on one

    @property
    def build_seconds(self) -> float:
        """What building all its steps takes, whether or not they were cached."""
        return sum(step.seconds for step in self.steps)


def judge_speed(speed: Speed, gates: Gates) -> tuple[Status, str | None]:
    """Whether an accurate candidate is faster than the gate demands, by its interval and not by its estimate."""
    interval, gate = speed.overall, gates.min_speedup
    if speed.busy:
        words = f"speedup {interval} was measured on a busy host, and holds for no other: {speed.noise}; measure again"
        return Status.INCONCLUSIVE, f"{words} when it is quieter, or allow it with --max-load"
    if interval.low > gate:
        return Status.PASSED, None
    if interval.high < gate:
        found = difference(interval)
        words = f", {found} against eager" if found in (Difference.SLOWER, Difference.NONE) else ""
        return Status.NOT_FASTER, f"speedup {interval} is below the gate of {gate:g}{words}"
    words = f"speedup {interval} may be on either side of the gate of {gate:g}; {_what_would_tell(interval, gate)}"
    return Status.INCONCLUSIVE, words if speed.noise is None else f"{words}; {speed.noise}"


def _what_would_tell(interval: Interval, gate: float) -> str:
    """An interval shrinks with the root of the time spent: how much more would leave the gate outside."""
    if min(interval.low, interval.value) <= 0 or interval.value == gate:
        times = math.inf
    else:
        margin, distance = math.log(interval.high / interval.low) / 2, math.log(interval.value / gate)
        times = (margin / distance) ** 2
    if times > MOST_TIMES:
        return "it is too close to the gate for any budget"
    return f"about {math.ceil(times)} times the budget would tell, if the host stays as it is"


def why_not_recover(candidate: Candidate | None, gates: Gates) -> str | None:
    """Why there is no point in a milder recipe than this candidate's, or None when there is."""
    if candidate is None:
        return "was not tried"
    if candidate.status is not Status.INACCURATE:
        return f"is {candidate.status}, not inaccurate"
    if candidate.accuracy is None:
        return "has outputs that are wrong by themselves"
    if candidate.accuracy.drop.value > HOPELESS * gates.max_drop:
        return f"drops by more than {HOPELESS} times the gate"
    return None


def choose(
    candidates: Sequence[Candidate], objective: Objective = Objective.LATENCY
) -> tuple[Candidate | None, ExitCode]:
    """The candidate to emit: of those that passed, the best at the objective; speeds by their interval's lower end.

    Without one, the exit code names the stage that the best of them reached.
    """
    passed = _passed(candidates)
    if passed:
        return max(
            passed, key=lambda each: (_merit(each, objective), _merit(each, Objective.LATENCY))
        ), ExitCode.EMITTED
    reached = {each.status for each in candidates}
    for status, code in (
        (Status.INCONCLUSIVE, ExitCode.INCONCLUSIVE),
        (Status.ARCHIVED, ExitCode.NOT_FASTER),
        (Status.NOT_FASTER, ExitCode.NOT_FASTER),
        (Status.INACCURATE, ExitCode.NOT_ACCURATE),
        (Status.BROKEN, ExitCode.NOT_ACCURATE),
    ):
        if status in reached:
            return None, code
    return None, ExitCode.NOT_BUILT


def pareto(candidates: Sequence[Candidate]) -> frozenset[str]:
    """Names of those that passed and that no other one beats at something while being as good at everything else."""
    merits = {each.name: tuple(_merit(each, objective) for objective in Objective) for each in _passed(candidates)}
    return frozenset(
        name
        for name, own in merits.items()
        if not any(
            other != own and all(theirs >= ours for theirs, ours in zip(other, own, strict=True))
            for other in merits.values()
        )
    )


def _passed(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [each for each in candidates if each.status == Status.PASSED and each.speed is not None]


def _merit(candidate: Candidate, objective: Objective) -> tuple[float, ...]:
    """Larger is better, the first number before the next. Only for candidates that were measured."""
    assert candidate.speed is not None
    if objective is Objective.LATENCY:
        return (candidate.speed.overall.low,)
    if objective is Objective.THROUGHPUT:
        largest = max(candidate.speed.cells, key=lambda each: each.cell.tokens)
        return (largest.speedup.low,)
    if objective is Objective.SIZE:
        return (_saved(candidate.size),)
    held = candidate.gpu_memory  # on a processor nobody has any
    return _saved(held.most if held else None), _saved(candidate.peak_memory)


def _saved(cost: int | None) -> float:
    return -math.inf if cost is None else -float(cost)
