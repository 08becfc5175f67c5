"""What a run has found out, and the report that it amounts to: at its end, and at every moment before."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimize.pipeline.contract import Objective
from optimize.pipeline.errors import ExitCode, OptimizeError
from optimize.pipeline.manifest import (
    REPORT,
    SCHEMA_VERSION,
    Baseline,
    Evaluation,
    Reference,
    Report,
    host_of,
    source_of,
    to_json,
    write_whole,
)  # fmt: skip
from optimize.pipeline.plan import Plan
from optimize.pipeline.prepare import Texts
from optimize.pipeline.roofline import Peaks, Work
from optimize.pipeline.scaling import scalings
from optimize.pipeline.verdict import Candidate, Status

GOING_ON = "the run was going on when this was written, or was killed"
SAMPLES = "samples.json"


@dataclass
class Findings:
    """Filled as the run goes on. Its files lie in the run's folder."""

    plan: Plan
    texts: Texts
    folder: Path
    objective: Objective
    candidates: list[Candidate] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # recipe -> why it was not tried
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    baseline: Baseline | None = None
    reference: Reference | None = None
    samples: dict[str, Any] = field(default_factory=dict)  # raw seconds by candidate: see measure.Samples
    peaks: Peaks | None = None
    work: tuple[Work, ...] = ()  # of the cells
    tried: set[str] = field(default_factory=set)  # candidates that were tried to the end

    def __post_init__(self) -> None:
        self.left_out = {left.recipe.name: left.reason for left in self.plan.left_out}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds until it is left as that phase's."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def report(self, winner: Candidate | None, code: int, unfinished: str | None = None) -> Report:
        """Of a run that is `unfinished`, and why: candidates that were not tried to their end are left out in it."""
        plan, texts, candidates, left_out = self.plan, self.texts, self.candidates, self.left_out
        if plan.target.gpus > 1:  # without GPUs, processes take their place
            self._scale()
        if unfinished is not None:
            known = (*self.tried, *(each.name for each in candidates if each.status is Status.NOT_BUILT), *left_out)
            rest = [each.recipe.name for each in plan.recipes if each.recipe.name not in known]
            candidates = [each for each in candidates if each.name not in rest]
            left_out = left_out | dict.fromkeys(rest, f"not tried to its end: {unfinished}")
        return Report(
            schema_version=SCHEMA_VERSION,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            exit_code=code,
            checkpoint=source_of(plan.checkpoint),
            host=host_of(plan.target, plan.environments),
            workload=plan.workload,
            gates=plan.gates,
            objective=self.objective,
            evaluation=Evaluation(
                texts.source, plan.calibration_digest, texts.pooling, texts.meaning, texts.labelling, texts.asked
            ),
            left_out=left_out,
            candidates=tuple(candidates),
            emitted=winner.name if winner is not None else None,
            seconds={name: round(seconds, 2) for name, seconds in self.seconds.items()},
            baseline=self.baseline,
            peaks=self.peaks,
            work=self.work,
            reference=self.reference,
            unfinished=unfinished,
        )

    def save(self, report: Report) -> None:
        """Write it into the folder, and every raw timing."""
        write_whole(self.folder / SAMPLES, json.dumps(self.samples))
        write_whole(self.folder / REPORT, to_json(report))

    def tried_to_its_end(self, candidate: Candidate) -> None:
        """Save what there is: the run may be killed before there is more."""
        self.tried.add(candidate.name)
        self.save(self.report(None, ExitCode.INTERRUPTED, unfinished=GOING_ON))

    def broken_off(self, error: BaseException, json_file: Path | None) -> bool:
        """Save what was found out until then, also into `json_file`; whether there was anything, and it could be.

        Whatever goes wrong here must not hide the error.
        """
        if not self.tried:
            return False
        why, code = f"{type(error).__name__}: {error}", ExitCode.BUG
        if isinstance(error, KeyboardInterrupt):
            why, code = "interrupted", ExitCode.INTERRUPTED
        elif isinstance(error, OptimizeError):
            why, code = error.message, error.exit_code
        with suppress(OSError):
            report = self.report(None, code, unfinished=why)
            self.save(report)
            if json_file is not None:
                json_file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(json_file, to_json(report))
            return True
        return False

    def _scale(self) -> None:
        """Say of candidates on several GPUs what these bring, where the same recipe was timed on one."""
        timed = {each.recipe: (each.name, each.speed) for each in self.candidates if each.speed is not None}
        found = scalings(timed, [planned.recipe for planned in self.plan.recipes])
        for candidate in self.candidates:
            candidate.scaling = found.get(candidate.recipe)
