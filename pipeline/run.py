"""One run: prepare, build, evaluate and measure, decide, emit. Every intermediate is a file under the run's folder."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optimize.pipeline.contract import Artifact, Kind, Labels, Objective, StepFacts
from optimize.pipeline.emit import emit
from optimize.pipeline.errors import CheckpointError, OptimizeError, PassError, RequestError, WorkerError
from optimize.pipeline.manifest import SCHEMA_VERSION, Baseline, Evaluation, Report, host_of, source_of
from optimize.pipeline.measure import compare
from optimize.pipeline.plan import Plan, PlannedRecipe, Step
from optimize.pipeline.progress import Progress
from optimize.pipeline.store import Damage, Entry, Store
from optimize.pipeline.trial import CELLS, STEP_LIMIT, TEXT, Opened, Trial, problem_text
from optimize.pipeline.verdict import Candidate, Status, StepReport, choose, judge_speed
from optimize.pipeline.workers import WorkerProcess


@dataclass(frozen=True)
class Texts:
    """What models/ read for this run, as plain data: the machine knows no tokenizer and no task."""

    source: str
    evaluation: Sequence[Mapping[str, Any]]
    calibration: Sequence[Mapping[str, Any]]
    labels: Labels | None
    classes: dict[int, str] | None  # the model's own names, where labels are its classes
    pooling: str | None
    top1: bool


@dataclass
class Run:
    """The state of one run. `execute` is the whole of it, in order."""

    plan: Plan
    texts: Texts
    store: Store
    folder: Path  # of this run: logs, encoded text, outputs, samples
    progress: Progress
    objective: Objective = Objective.LATENCY
    candidates: list[Candidate] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # of the recipes that were built, by name
    failed: dict[str, str] = field(default_factory=dict)  # key of a step that failed in this run -> why
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase
    baseline: Baseline | None = None
    samples: dict[str, Any] = field(default_factory=dict)  # raw seconds by candidate: see measure.Samples
    _builder: WorkerProcess | None = None
    _stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of the checkpoint's files, as planned

    def __post_init__(self) -> None:
        self._stamps = self._stamp()

    def execute(self, out: Path) -> Report:
        """Do all of it, and emit the winner into `out` if there is one.

        Raises RequestError when the checkpoint itself cannot be used; what fails later is in the report.
        """
        self.progress.planned(self.plan, self.store)
        (self.folder / "plan.txt").write_text(self.plan.describe(self.store) + "\n")
        try:
            with self._phase("prepare"):
                self._prepare()
                reference = self._reference()
            with self._phase("build"):
                self._build_all()
        finally:
            self._end_builder()
        self._try_all(reference)
        (self.folder / "samples.json").write_text(json.dumps(self.samples))
        winner, code = choose(self.candidates, self.objective)
        if winner is not None:
            self._check_checkpoint()
            with self._phase("emit"):
                emit(self._report(winner, code), winner, self.artifacts[winner.name], self.folder, self.trial, out)
        return self._report(winner, code)

    @property
    def trial(self) -> Trial:
        """What every candidate is tried with."""
        plan, texts = self.plan, self.texts
        return Trial(
            self.folder, self.folder, plan.checkpoint.task, plan.target.cores, plan.workload, plan.gates,
            texts.pooling, texts.top1, texts.labels, texts.classes, self.progress.tick,
        )  # fmt: skip

    @property
    def source(self) -> Artifact:
        """The checkpoint as the artifact that every recipe starts from."""
        key = self.plan.checkpoint_key
        return Artifact(Kind.CHECKPOINT, self.plan.checkpoint.folder, key, key)

    def _prepare(self) -> None:
        """Encode all text. A checkpoint whose tokenizer does not load is refused here, before anything is built."""
        checkpoint, texts = self.plan.checkpoint, self.texts
        self.progress.doing("prepare", "encoding text")
        try:
            self._build_worker("default").ask(
                "prepare", limit=STEP_LIMIT, progress=self.progress.tick, folder=str(checkpoint.folder),
                evaluation=list(texts.evaluation), calibration=list(texts.calibration),
                cells=[(cell.batch, cell.sequence) for cell in self.plan.workload],
                max_length=checkpoint.max_length, out=str(self.folder), labelled=texts.labels is not None,
            )  # fmt: skip
        except WorkerError as error:
            self._check_checkpoint()
            hint = error.hint or f"see {self.folder / 'logs' / 'build.log'}"
            raise _unusable(f"{checkpoint.model_id}: its tokenizer cannot be used", error, hint) from error

    def _reference(self) -> dict[str, list[Any]]:
        """Outputs of the float32 eager model on all text and all cells; kept as reference.*.npz."""
        checkpoint, artifact = self.plan.checkpoint, self.source
        self.progress.doing("prepare", "running the float32 reference")
        try:
            if self.plan.reference is not None:
                artifact = self._build_step(self.plan.reference, artifact)[0].artifact
            with self.trial.open("reference", Kind.CHECKPOINT, artifact.path).worker as worker:
                return {
                    batches: self.trial.outputs(worker, batches, self.folder / f"reference.{batches}.npz")[0]
                    for batches in (TEXT, CELLS)
                }
        except (WorkerError, PassError, ValueError) as error:
            self._check_checkpoint()
            message = f"{checkpoint.model_id}: its float32 reference does not run, so nothing can be judged"
            raise _unusable(message, error, f"see the logs in {self.folder / 'logs'}") from error

    def _build_all(self) -> None:
        for planned in self.plan.recipes:
            candidate = Candidate(planned.recipe.name, planned.text, planned.recipe.produces, Status.NOT_BUILT)
            self.candidates.append(candidate)
            try:
                entry = self._build_recipe(planned, candidate)
            except PassError as error:
                candidate.reason = error.message.splitlines()[0]
                self.progress.problem(candidate.name, str(error))
                continue
            self.artifacts[candidate.name] = entry.artifact if entry else self.source
            candidate.size = entry.size if entry else self.plan.checkpoint.weight_bytes
            candidate.status = Status.BROKEN  # until it has been opened and run

    def _build_recipe(self, planned: PlannedRecipe, candidate: Candidate) -> Entry | None:
        entry: Entry | None = None
        for step in planned.steps:
            self.progress.doing(candidate.name, step.pass_text)
            entry, cached = self._build_step(step, entry.artifact if entry else self.source)
            made = entry.step
            candidate.steps.append(
                StepReport(step.pass_text, step.key, cached, made.seconds, made.peak_memory, made.facts)
            )
            self.progress.built(candidate.name, candidate.steps[-1])
        return entry

    def _build_step(self, step: Step, source: Artifact) -> tuple[Entry, bool]:
        """The artifact of one step, and whether it was in the store. Raises PassError; a step is tried once a run."""
        if step.key in self.failed:
            raise PassError(self.failed[step.key])
        with self.store.lock(step.key, waiting=lambda: self.progress.note(f"{step.text}: another run is building it")):
            found = self.store.get(step.key)
            if isinstance(found, Damage):
                self.progress.note(f"{step.text}: damaged in the store ({found.reason}), building it again")
                self.store.discard(step.key)
            elif found is not None:
                self.store.touch(step.key)
                return found, True
            try:
                return self._build_into_store(step, source), False
            except PassError as error:
                self.failed[step.key] = error.message.splitlines()[0]
                raise

    def _build_into_store(self, step: Step, source: Artifact) -> Entry:
        arguments = {
            "step": step.pass_text,
            "source": {name: str(value) for name, value in asdict(source).items()},
            "task": self.plan.checkpoint.task,
            "target": asdict(self.plan.target),
            "calibration": str(self.folder / "calibration.npz") if step.step.calibrated else None,
        }
        request = self.folder / "steps" / f"{step.key[:10]}-{step.step.name}.json"
        request.parent.mkdir(exist_ok=True)
        request.write_text(json.dumps(arguments, indent=1))
        try:
            with self.store.building(step.key) as out:
                worker = self._build_worker(step.step.toolchain)
                made = worker.ask("build", limit=STEP_LIMIT, progress=self.progress.tick, out=str(out), **arguments)
                self._check_checkpoint()  # its key names the bytes that were planned with
                return self.store.publish(step.key, step.step.produces, out, step.text, StepFacts(**made))
        except (WorkerError, OSError) as error:
            self._end_builder()  # the next step gets a fresh process: this one may hold anything
            tail = error.log_tail if isinstance(error, WorkerError) else ""
            raise PassError(
                f"{step.step.name} failed: {error}" + (f"\n{tail}" if tail else ""),
                hint=f"repeat this step alone: optimize repeat {request}",
            ) from error

    def _build_worker(self, toolchain: str) -> WorkerProcess:
        if self._builder is None:
            self._builder = WorkerProcess(self.folder / "logs" / "build.log", toolchain=toolchain)
        return self._builder

    def _end_builder(self) -> None:
        if self._builder is not None:
            self._builder.close()
            self._builder = None

    def _try_all(self, reference: Mapping[str, list[Any]]) -> None:
        """Judge and time every artifact. The inaccurate too: what a looser gate would give is worth knowing."""
        built = [candidate for candidate in self.candidates if candidate.name in self.artifacts]
        if not built:
            return
        self._check_checkpoint()
        with self._phase("measure"):
            opened = self.trial.open("baseline", Kind.CHECKPOINT, self.plan.checkpoint.folder)
        with opened.worker as baseline:
            baseline.pause()
            for candidate in built:
                self._try(candidate, baseline, reference, self.plan.budget / len(built))
            baseline.resume()
            self.baseline = Baseline(
                opened.load_seconds, opened.first_seconds, baseline.ask("memory", limit=STEP_LIMIT)
            )

    def _try(
        self, candidate: Candidate, baseline: WorkerProcess, reference: Mapping[str, list[Any]], budget: float
    ) -> None:
        artifact = self.artifacts[candidate.name]
        self.progress.doing(candidate.name, "comparing outputs with the reference")
        try:
            with self._phase("evaluate"):
                opened = self.trial.open(candidate.name, artifact.kind, artifact.path)
            with opened.worker as worker:
                with self._phase("evaluate"):
                    self._evaluate(candidate, opened, reference)
                with self._phase("measure"):
                    self._measure(candidate, baseline, worker, budget)
        except (WorkerError, ValueError) as error:
            if not baseline.alive:
                raise OptimizeError(f"the baseline: {error}", hint="run the same command again") from error
            candidate.status = Status.BROKEN if isinstance(error, WorkerError) else Status.INACCURATE
            candidate.reason = str(error).splitlines()[0]
            self.progress.problem(candidate.name, problem_text(error))

    def _evaluate(self, candidate: Candidate, opened: Opened, reference: Mapping[str, list[Any]]) -> None:
        candidate.load_seconds, candidate.first_seconds = opened.load_seconds, opened.first_seconds
        candidate.accuracy, candidate.reason = self.trial.judge(opened.worker, reference)
        candidate.peak_memory = opened.worker.ask("memory", limit=STEP_LIMIT)
        candidate.status = Status.INACCURATE if candidate.reason else Status.PASSED
        self.progress.evaluated(candidate)

    def _measure(self, candidate: Candidate, baseline: WorkerProcess, worker: WorkerProcess, budget: float) -> None:
        self.progress.doing(candidate.name, "timing against the baseline")
        worker.pause()
        candidate.speed, self.samples[candidate.name] = compare(
            baseline, worker, self.plan.workload, budget,
            lambda interval, done, planned: self.progress.measured(candidate.name, interval, done, planned),
        )  # fmt: skip
        if candidate.status == Status.PASSED:
            candidate.status, candidate.reason = judge_speed(candidate.speed, self.plan.gates)
        self.progress.timed(candidate)

    def _report(self, winner: Candidate | None, code: int) -> Report:
        plan, texts = self.plan, self.texts
        return Report(
            schema_version=SCHEMA_VERSION,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            exit_code=code,
            checkpoint=source_of(plan.checkpoint),
            host=host_of(plan.target),
            workload=plan.workload,
            gates=plan.gates,
            objective=self.objective,
            evaluation=Evaluation(
                texts.source, plan.calibration_digest, texts.pooling, texts.top1, texts.labels, texts.classes
            ),
            left_out={left.recipe.name: left.reason for left in plan.left_out},
            candidates=tuple(self.candidates),
            emitted=winner.name if winner is not None else None,
            seconds={name: round(seconds, 2) for name, seconds in self.seconds.items()},
            baseline=self.baseline,
        )

    def _stamp(self) -> dict[str, tuple[int, int, int]]:
        checkpoint = self.plan.checkpoint
        found = {name: (checkpoint.folder / name).stat() for name in checkpoint.files}
        return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}

    def _check_checkpoint(self) -> None:
        """Nothing may be built, timed or emitted from other bytes than were planned with. Raises CheckpointError."""
        try:
            changed = [name for name, stamp in self._stamp().items() if stamp != self._stamps[name]]
        except OSError as error:
            changed = [f"{error.filename} ({error.strerror})"]
        if changed:
            raise CheckpointError(
                f"{self.plan.checkpoint.folder} was changed while the run was going on: {changed[0]}",
                hint="run the same command again, and leave the folder alone meanwhile",
            )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def _unusable(message: str, error: Exception, hint: str) -> OptimizeError:
    """A refusal of the checkpoint; but where a process was killed or hung, the checkpoint is not to blame."""
    cause = error if isinstance(error, WorkerError) else error.__cause__
    if isinstance(cause, WorkerError) and cause.kind != "error":
        return OptimizeError(f"{message}: {cause.message}", hint="run the same command again")
    return RequestError(f"{message}: {error}", hint=hint)


def new_run_folder(cache: Path) -> Path:
    """A fresh folder for one run under the cache, named by time."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    folder = cache / "runs" / f"{stamp}-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    return folder
