"""What a run tells while it works: to a terminal as a live view, to anything else as plain lines."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from optimize.pipeline.measure import Speed
from optimize.pipeline.statistics import Interval

if TYPE_CHECKING:
    from rich.console import Console

    from optimize.pipeline.plan import Plan
    from optimize.pipeline.store import Store
    from optimize.pipeline.verdict import Candidate, StepReport


class Progress:
    """Says nothing: what `optimize.compile` uses. The two below say it as lines and as a live view."""

    def planned(self, plan: Plan, store: Store) -> None:
        """The run begins."""

    def doing(self, name: str, what: str) -> None:
        """Work on one candidate (or phase) begins."""

    def tick(self) -> None:
        """Called a few times a second while a worker works."""

    def built(self, name: str, step: StepReport) -> None:
        """One step of a candidate is there."""

    def evaluated(self, candidate: Candidate) -> None:
        """A candidate's accuracy is known."""

    def measured(self, name: str, interval: Interval, done: int, planned: int) -> None:
        """One more quad of a candidate's timing is in."""

    def timed(self, candidate: Candidate) -> None:
        """A candidate's speed is known."""

    def problem(self, name: str, text: str) -> None:
        """A candidate failed; the text has the log's tail and the command that repeats the step."""

    def note(self, text: str) -> None:
        """Something worth knowing that is no failure."""

    def close(self) -> None:
        """The run is over, or was broken off."""


QUIET = 60.0  # seconds after which a line says that work goes on


class Lines(Progress):
    """One line for each thing that happened, and for each minute in which nothing did."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._began = self._spoke = time.monotonic()
        self._what = "starting"

    def planned(self, plan: Plan, store: Store) -> None:
        self._say(plan.describe(store) + "\n", stamp=False)

    def doing(self, name: str, what: str) -> None:
        self._now(f"{name}: {what}")
        self._say(f"{self._what} ...")

    def tick(self) -> None:
        if time.monotonic() - self._spoke > QUIET:
            self._say(f"{self._what}, for {time.monotonic() - self._began:.0f} s ...")

    def measured(self, name: str, interval: Interval, done: int, planned: int) -> None:
        self._what = f"{name}: timing, {done} of {planned} quads, speedup {interval}"

    def built(self, name: str, step: StepReport) -> None:
        self._say(f"{name}: {step.text} {built_text(step)}")

    def evaluated(self, candidate: Candidate) -> None:
        self._say(f"{candidate.name}: {accuracy_text(candidate)}{_gpu_text(candidate)}")

    def timed(self, candidate: Candidate) -> None:
        assert candidate.speed is not None
        self._say(f"{candidate.name}: speedup {candidate.speed.overall} ({_quads(candidate.speed)})")

    def problem(self, name: str, text: str) -> None:
        self._say(f"FAILED {name}: {text}")

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def _now(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()

    def _say(self, text: str, *, stamp: bool = True) -> None:
        self._spoke = time.monotonic()
        when = f"[{time.monotonic() - self._started:6.1f} s] " if stamp else ""
        self._console.print(when + text, markup=False, highlight=False, soft_wrap=True)


class Live(Lines):
    """The same lines, above one that shows what is being done and the interval as it shrinks."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        from rich.live import Live as RichLive

        self._live = RichLive(console=console, refresh_per_second=8, transient=True, get_renderable=self._view)
        self._live.start()

    def doing(self, name: str, what: str) -> None:
        self._now(f"{name}: {what}")

    def tick(self) -> None:
        """The view shows the time by itself."""

    def close(self) -> None:
        self._live.stop()

    def _view(self) -> Any:
        from rich.spinner import Spinner
        from rich.text import Text

        return Spinner("dots", Text(f"{self._what} ({time.monotonic() - self._began:.0f} s)"))


class NoteHandler(logging.Handler):
    """Hands warnings that models/ logs (an unreachable hub, say) to a Progress."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note(record.getMessage())


def _quads(speed: Speed) -> str:
    again = f", {speed.disturbed} disturbed" if speed.disturbed else ""
    return f"{speed.quads} quads{again}"


def _gpu_text(candidate: Candidate) -> str:
    if candidate.judged_gpu_memory is None:
        return ""
    predicted = candidate.predicted_gpu_memory
    beside = "" if predicted is None else f", {predicted / 2**20:.0f} predicted"
    return f" ({candidate.judged_gpu_memory.most / 2**20:.0f} MiB of a GPU{beside})"


def built_text(step: StepReport) -> str:
    """How a step was come by: its time and memory when it was built."""
    coverage = ""
    if "quantized" in step.facts:
        coverage = f", {step.facts['quantized']} of {step.facts['eligible']} matrix products quantized"
    how = "cached: it was built" if step.cached else "built"
    predicted = "" if step.predicted_memory is None else f" of {step.predicted_memory / 2**20:.0f} predicted"
    return f"{how} ({step.seconds:.1f} s, {step.peak_memory / 2**20:.0f} MiB{predicted}{coverage})"


def accuracy_text(candidate: Candidate) -> str:
    """A candidate's accuracy in one line."""
    accuracy = candidate.accuracy
    if accuracy is None:
        return "not known"
    return str(accuracy) + "".join(f", {metric.name} {metric.candidate:.4f}" for metric in accuracy.metrics)
