"""One run: prepare, build, evaluate and measure, decide, emit. Every intermediate is a file under the run's folder."""

from __future__ import annotations

import datetime
import shlex
import statistics
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimize.pipeline.build import Builder
from optimize.pipeline.contract import Artifact, Kind, Objective
from optimize.pipeline.emit import emit
from optimize.pipeline.errors import OptimizeError, PassError, WorkerError
from optimize.pipeline.findings import Findings
from optimize.pipeline.manifest import REPORT, Baseline, Reference, Report
from optimize.pipeline.measure import compare
from optimize.pipeline.memory import DRIVER, FRAMEWORKS
from optimize.pipeline.plan import Plan, PlannedRecipe
from optimize.pipeline.prepare import Texts, Unchanged, encode_text, find_peaks, unusable
from optimize.pipeline.progress import Progress
from optimize.pipeline.roofline import Roof, Work, roofs
from optimize.pipeline.store import Entry, Store
from optimize.pipeline.trial import CELLS, TEXT, Opened, Trial, problem_text, with_estimate
from optimize.pipeline.verdict import Candidate, Status, StepReport, Throughput, choose, judge_speed, why_not_recover
from optimize.pipeline.workers import STEP_LIMIT, WorkerProcess, running

# as a note has it
BY_GROWTH = (
    "the driver names no process of ours, as in a container: told is by how much the used memory of the GPU has grown, "
    "which is right as long as others take and give nothing back there"
)
SWEEP = 0.25  # of a candidate's share of the budget: how long looking for its highest throughput may go on


@dataclass
class Run:
    """The state of one run. `execute` is the whole of it, in order."""

    plan: Plan
    texts: Texts
    store: Store
    folder: Path  # of this run: logs, encoded text, outputs, samples
    progress: Progress
    objective: Objective = Objective.LATENCY
    json_file: Path | None = None  # where the report of a run that is broken off is written, too
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # of the recipes that were built, by name
    _elsewhere: set[str] = field(default_factory=set)  # candidates that this host cannot run, and says so
    _told: bool = False  # how GPU memory is told apart from that of others

    def __post_init__(self) -> None:
        plan = self.plan
        self._unchanged = Unchanged(plan.checkpoint)
        self.found = Findings(plan, self.texts, self.folder, self.objective)
        self._builder = Builder(
            self.store, self.folder, plan.target, plan.checkpoint.task, self._unchanged.check, self.progress,
            plan.environments, plan.workload,
        )  # fmt: skip

    def execute(self, out: Path) -> Report:
        """Do all of it, and emit the winner into `out` if there is one.

        Raises RequestError when the checkpoint itself cannot be used; what fails later is in the report. What breaks
        the run off leaves a report of the candidates that were tried until then.
        """
        try:
            winner, code = self._run(out)
        except BaseException as error:
            if self.found.broken_off(error, self.json_file):
                self.progress.note(f"what was found out until then: {self.folder / REPORT}")
            raise
        report = self.found.report(winner, code)
        self.found.save(report)
        wrong = [each.name for each in self.found.candidates if each.status in (Status.INACCURATE, Status.BROKEN)]
        rejected = [name for name in wrong if name not in self._elsewhere]
        if rejected:
            command = f"optimize explain {shlex.quote(str(self.folder))} --candidate {shlex.quote(rejected[0])}"
            self.progress.note(f"where outputs leave the reference: {command}")
        return report

    def _run(self, out: Path) -> tuple[Candidate | None, int]:
        """The winner and the exit code."""
        self.progress.planned(self.plan, self.store)
        (self.folder / "plan.txt").write_text(self.plan.describe(self.store) + "\n")
        with ExitStack() as workers:
            workers.callback(self._builder.end)
            with self.found.phase("prepare"):
                encode_text(self._builder, plan=self.plan, texts=self.texts, unchanged=self._unchanged)
                self.found.peaks = find_peaks(self._builder)
                reference, baseline = self._reference(workers)
            with self.found.phase("build"):
                self._build_all()
            self._builder.end()
            self._try_all(reference, baseline, workers)
        winner, code = choose(self.found.candidates, self.objective)
        if winner is not None:
            self._unchanged.check()
            with self.found.phase("emit"):
                emit(self.found.report(winner, code), winner, self.artifacts[winner.name], self.folder, self.trial, out)
        return winner, code

    @property
    def trial(self) -> Trial:
        """What every candidate is tried with."""
        plan, texts = self.plan, self.texts
        return Trial(
            self.folder, self.folder, plan.checkpoint.task, plan.target.cores, plan.workload, plan.gates,
            texts.pooling, texts.meaning, texts.labelling, plan.checkpoint.folder, plan.environments,
            plan.target.device_type, self.progress.tick, plan.target.gpus,
        )  # fmt: skip

    @property
    def source(self) -> Artifact:
        """The checkpoint as the artifact that every recipe starts from."""
        key = self.plan.checkpoint_key
        return Artifact(Kind.CHECKPOINT, self.plan.checkpoint.folder, key, key)

    def _reference(self, workers: ExitStack) -> tuple[dict[str, list[Any]], Opened | None]:
        """Outputs of the float32 eager model on all text and all cells; kept as reference.*.npz.

        Of a float32 checkpoint that model is also the baseline: it is returned, paused, and ends with `workers`; but
        where memory does not hold it beside what is built, it has ended already.
        """
        checkpoint, artifact = self.plan.checkpoint, self.source
        self.progress.doing("prepare", "running the float32 reference")
        try:
            if self.plan.reference is not None:
                artifact = self._builder.build(self.plan.reference, artifact)[0].artifact
            same = checkpoint.dtype == "float32"
            if DRIVER + FRAMEWORKS + self.plan.reference_memory > self.plan.target.memory:
                self._builder.end()
            opened = self.trial.open(
                "baseline" if same else "reference", Kind.CHECKPOINT, artifact.path, self.plan.reference_gpus,
                None if self.plan.reference else "float32",
            )  # fmt: skip
            with ExitStack() as stack:
                stack.enter_context(opened.worker)
                outputs = {
                    batches: self.trial.outputs(opened.worker, batches, self.folder / f"reference.{batches}.npz")[0]
                    for batches in (TEXT, CELLS)
                }
                peak = opened.worker.ask("memory", limit=STEP_LIMIT)
                held, planned = opened.worker.gpu_memory(), self.plan.reference_gpu or None
                self.found.reference = Reference(peak, self.plan.reference_memory, held, planned)
                first = [planned for planned in self.plan.recipes if not planned.recipe.after]
                if not same or not self.plan.fits_beside_baseline(first):
                    return outputs, None
                opened.worker.pause()
                workers.push(stack.pop_all())
                return outputs, opened
        except (WorkerError, PassError, ValueError) as error:
            self._unchanged.check()
            message = f"{checkpoint.model_id}: its float32 reference does not run, so nothing can be judged"
            told = with_estimate(error, self.plan.reference_gpu) if isinstance(error, WorkerError) else error
            raise unusable(message, told, f"see the logs in {self.folder / 'logs'}") from error

    def _build_all(self) -> None:
        for planned in self.plan.recipes:
            if not planned.recipe.after:
                self._build(planned)

    def _build(self, planned: PlannedRecipe) -> Candidate:
        candidate = Candidate(planned.recipe.name, planned.text, planned.recipe.produces, Status.NOT_BUILT)
        candidate.predicted_memory, candidate.predicted_gpu_memory = planned.need.run, planned.need.gpu or None
        candidate.arithmetic = planned.recipe.arithmetic(self.plan.checkpoint.dtype)
        self.found.candidates.append(candidate)
        try:
            entry = self._build_recipe(planned, candidate)
        except PassError as error:
            candidate.reason = error.message.splitlines()[0]
            self.progress.problem(candidate.name, str(error))
            return candidate
        self.artifacts[candidate.name] = entry.artifact if entry else self.source
        candidate.size = entry.size if entry else self.plan.checkpoint.weight_bytes
        candidate.status = Status.BROKEN  # until it has been opened and run
        return candidate

    def _build_recipe(self, planned: PlannedRecipe, candidate: Candidate) -> Entry | None:
        entry: Entry | None = None
        for step in planned.steps:
            self.progress.doing(candidate.name, step.pass_text)
            entry, cached = self._builder.build(step, entry.artifact if entry else self.source)
            made = entry.step
            candidate.steps.append(
                StepReport(step.pass_text, step.key, cached, made.seconds, made.peak_memory, made.facts, step.memory)
            )
            self.progress.built(candidate.name, candidate.steps[-1])
        return entry

    def _try_all(self, reference: Mapping[str, list[Any]], opened: Opened | None, workers: ExitStack) -> None:
        """Judge and time every artifact. The inaccurate too: what a looser gate would give is worth knowing."""
        built = [candidate for candidate in self.found.candidates if candidate.name in self.artifacts]
        if not built:
            return
        self._unchanged.check()
        if opened is None or not opened.worker.alive:  # nothing has been timed against it yet
            opened = self._open_baseline(workers)
        self.found.baseline = self._costs(opened)
        for candidate in built:
            self._try(candidate, opened.worker, reference)
        opened = self._recover(opened, reference, workers)
        opened.worker.resume()
        with self.found.phase("measure"):
            self._account_for(opened)

    def _open_baseline(self, workers: ExitStack) -> Opened:
        """Paused; it ends with `workers`."""
        try:
            with self.found.phase("measure"):
                folder, gpus = self.plan.checkpoint.folder, self.plan.baseline_gpus
                opened = self.trial.open("baseline", Kind.CHECKPOINT, folder, gpus)
        except WorkerError as error:
            if error.kind != "memory":
                raise
            message = f"{self.plan.checkpoint.model_id}: its eager model does not run, so nothing can be timed"
            raise unusable(message, with_estimate(error, self.plan.baseline_gpu), "") from error
        workers.enter_context(opened.worker)
        opened.worker.pause()
        return opened

    @property
    def _share(self) -> float:
        """Seconds of the budget that each candidate has; milder recipes, which may follow, have as much each."""
        return self.plan.budget / sum(not planned.recipe.after for planned in self.plan.recipes)

    def _recover(self, opened: Opened, reference: Mapping[str, list[Any]], workers: ExitStack) -> Opened:
        """Build and try what the target has ready for a recipe that proved inaccurate, until one is accurate.

        Returns the baseline, which is opened again where memory does not hold it beside what is built.
        """
        for planned in self.plan.recipes:
            recipe = planned.recipe
            if not recipe.after:
                continue
            before = next((each for each in self.found.candidates if each.name == recipe.after), None)
            reason = why_not_recover(before, self.plan.gates)
            if reason is not None:
                self.found.left_out[recipe.name] = f"{recipe.after} {reason}"
                continue
            if not self.plan.fits_beside_baseline([planned]):
                opened.worker.kill()
            with self.found.phase("build"):
                try:
                    candidate = self._build(planned)
                finally:
                    self._builder.end()  # nothing else may run while there is timing
            if not opened.worker.alive:
                opened = self._open_baseline(workers)
            if candidate.name in self.artifacts:
                self._try(candidate, opened.worker, reference)
        return opened

    def _account_for(self, opened: Opened) -> None:
        """What the baseline costs, and how near every side came to what this host can do."""
        plan, timed = self.plan, [each for each in self.found.candidates if each.speed is not None]
        try:
            self.found.work = tuple(Work(**work) for work in opened.worker.ask("work", limit=STEP_LIMIT))
        except WorkerError as error:
            self.progress.note(f"no roofline: what the model does could not be counted: {error.message}")
        for candidate in timed:
            assert candidate.speed is not None and candidate.size is not None
            seconds = [cell.passes[1] for cell in candidate.speed.cells]
            candidate.roofs = self._roofs(seconds, candidate.arithmetic, candidate.size)
        speeds = [each.speed.cells for each in timed if each.speed is not None]
        seconds = [statistics.median(cell.passes[0] for cell in cells) for cells in zip(*speeds, strict=True)]
        found = self._roofs(seconds, plan.checkpoint.dtype, plan.checkpoint.weight_bytes) if seconds else ()
        self.found.baseline = self._costs(opened, found, self._throughput("baseline", opened.worker))

    def _costs(self, opened: Opened, found: tuple[Roof, ...] = (), throughput: Throughput | None = None) -> Baseline:
        """Of the baseline."""
        plan = self.plan
        return Baseline(
            opened.load_seconds, opened.first_seconds, opened.peak_memory, found, throughput, plan.baseline_memory,
            plan.baseline_gpus, opened.gpu_memory, plan.baseline_gpu or None,
        )  # fmt: skip

    def _throughput(self, name: str, worker: WorkerProcess) -> Throughput | None:
        """For information: that it fails costs no verdict."""
        try:
            return Throughput(**worker.ask("sweep", limit=STEP_LIMIT, within=SWEEP * self._share))
        except WorkerError as error:
            self.progress.note(f"{name}: no throughput: {error.message}")
            return None

    def _roofs(self, seconds: Sequence[float], arithmetic: str, size: int) -> tuple[Roof, ...]:
        return roofs(self.found.work, seconds, arithmetic, size / self.plan.checkpoint.parameters, self.found.peaks)

    def _try(self, candidate: Candidate, baseline: WorkerProcess, reference: Mapping[str, list[Any]]) -> None:
        artifact = self.artifacts[candidate.name]
        self.progress.doing(candidate.name, "comparing outputs with the reference")
        try:
            with self.found.phase("evaluate"):
                opened = self.trial.open(candidate.name, artifact.kind, artifact.path)
            with opened.worker as worker:
                with self.found.phase("evaluate"):
                    self._evaluate(candidate, opened, reference)
                with self.found.phase("measure"):
                    self._measure(candidate, baseline, worker)
        except (WorkerError, ValueError) as error:
            if not baseline.alive:
                raise OptimizeError(f"the baseline: {error}", hint="run the same command again") from error
            candidate.status = Status.BROKEN if isinstance(error, WorkerError) else Status.INACCURATE
            told = (
                with_estimate(error, candidate.predicted_gpu_memory or 0) if isinstance(error, WorkerError) else error
            )
            candidate.reason = _reason(told, baseline)
            self.progress.problem(candidate.name, problem_text(told))
            if isinstance(error, WorkerError) and error.kind == "refused":
                self._elsewhere.add(candidate.name)
                self.progress.note(f"{candidate.name}: what was built for another host is kept: {artifact.path}")
        self.found.tried_to_its_end(candidate)

    def _evaluate(self, candidate: Candidate, opened: Opened, reference: Mapping[str, list[Any]]) -> None:
        candidate.load_seconds, candidate.first_seconds = opened.load_seconds, opened.first_seconds
        candidate.peak_memory, candidate.gpu_memory = opened.peak_memory, opened.gpu_memory
        candidate.accuracy, candidate.reason = self.trial.judge(opened.worker, reference)
        candidate.judged_memory = opened.worker.ask("memory", limit=STEP_LIMIT)
        candidate.judged_gpu_memory = opened.worker.gpu_memory()
        candidate.status = Status.INACCURATE if candidate.reason else Status.PASSED
        self.progress.evaluated(candidate)
        held = candidate.judged_gpu_memory
        if held is not None and not held.by_process and not self._told:
            self._told = True
            self.progress.note(f"GPU memory: {BY_GROWTH}")

    def _measure(self, candidate: Candidate, baseline: WorkerProcess, worker: WorkerProcess) -> None:
        self.progress.doing(candidate.name, "timing against the baseline")
        worker.pause()
        candidate.speed, self.found.samples[candidate.name] = compare(
            baseline, worker, self.plan.workload, self._share, self.plan.gates.max_load,
            lambda interval, done, planned: self.progress.measured(candidate.name, interval, done, planned),
        )  # fmt: skip
        if candidate.status == Status.PASSED:
            candidate.status, candidate.reason = judge_speed(candidate.speed, self.plan.gates)
        if candidate.status == Status.PASSED and not self.plan.allow_archived:
            (planned,) = [each for each in self.plan.recipes if each.recipe.name == candidate.name]
            if planned.archived:
                candidate.status = Status.ARCHIVED
                candidate.reason = f"{planned.archived}: --allow-archived would let it be emitted"
        if candidate.status == Status.PASSED:
            with running(worker):
                candidate.throughput = self._throughput(candidate.name, worker)
        self.progress.timed(candidate)


def _reason(error: WorkerError | ValueError, baseline: WorkerProcess) -> str:
    """Why a candidate is broken, in one line."""
    reason = str(error).splitlines()[0]
    if not isinstance(error, WorkerError):
        return reason
    if error.kind == "memory":
        reason = f"{error.message}; {error.hint}"
    return f"the baseline, beside it: {reason}" if error.worker == baseline.name else reason


def new_run_folder(cache: Path) -> Path:
    """A fresh folder for one run under the cache, named by time."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    folder = cache / "runs" / f"{stamp}-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    return folder
