"""Trying one artifact in a clean process: open it, run all text through it, judge what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optimize.pipeline.accuracy import Accuracy, compare_outputs, why_rejected, why_unsteady
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import SPREAD, Cell, Gates, Kind, Labelling, Meaning
from optimize.pipeline.errors import OutputError, WorkerError
from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.language import IDS, LanguageAccuracy, compare_language, why_language_rejected
from optimize.pipeline.manifest import Report
from optimize.pipeline.memory import gib
from optimize.pipeline.metrics import task_metrics
from optimize.pipeline.questions import question_metrics
from optimize.pipeline.tokens import TokenAccuracy, compare_tokens, why_tokens_rejected
from optimize.pipeline.toolchains import Environment
from optimize.pipeline.workers import STEP_LIMIT, WorkerProcess

REPEATED = 0.05  # nats by which logits of one text may differ between two runs
TEXT, CELLS = "evaluation", "cells"  # the two .npz files of inputs


@dataclass(frozen=True)
class Opened:
    """A worker with an artifact open in it, and what that took: seconds, and bytes resident at most."""

    worker: WorkerProcess
    load_seconds: float
    first_seconds: float
    peak_memory: int  # with every cell run once, before outputs pile up to be judged
    gpu_memory: GpuMemory | None = None  # likewise


@dataclass(frozen=True)
class Trial:
    """What every candidate of a run is tried with. `inputs` holds evaluation.npz and cells.npz."""

    inputs: Path
    scratch: Path  # where logs and outputs go
    task: str
    cores: int
    workload: Sequence[Cell]
    gates: Gates
    pooling: str | None
    meaning: Meaning
    labelling: Labelling | None
    tokenizer: Path  # the folder of the checkpoint, or of what carries its files along
    environments: Mapping[str, Environment]  # by toolchain
    device: str = "cpu"  # where sessions compute
    tick: Callable[[], None] = lambda: None
    gpus: int = 0  # that sessions compute on

    @classmethod
    def of_report(
        cls,
        report: Report,
        inputs: Path,
        scratch: Path,
        cores: int,
        tokenizer: Path,
        environments: Mapping[str, Environment],
    ) -> Trial:
        """The trial of a run that is over, on the inputs that it left."""
        evaluation = report.evaluation
        return cls(
            inputs, scratch, report.checkpoint.task, cores, report.workload, report.gates,
            evaluation.pooling, evaluation.meaning, evaluation.labelling, tokenizer, environments,
            report.host.target.device_type, gpus=report.host.target.gpus,
        )  # fmt: skip

    def open(self, name: str, kind: Kind, path: Path, gpus: int = 1, dtype: str | None = None) -> Opened:
        """Open an artifact in a new worker; a checkpoint's layers may lie over several GPUs, one after the other, and
        be computed in another `dtype` than it has.

        Raises WorkerError, and leaves no process behind then.
        """
        log, environment = self.scratch / "logs" / f"{name}.log", self.environments.get(kind.toolchain)
        worker = WorkerProcess(log, environment, self.gpus)
        try:
            took = worker.ask(
                "open", limit=STEP_LIMIT, progress=self.tick, kind=kind, path=str(path), task=self.task,
                cores=self.cores, cells=str(self.inputs / f"{CELLS}.npz"), tokenizer=str(self.tokenizer),
                device=SPREAD if gpus > 1 else self.device, names=list(map(str, self.workload)), dtype=dtype,
            )  # fmt: skip
        except BaseException:
            worker.close()
            raise
        return Opened(worker, took["load"], took["first"], took["memory"], worker.gpu_memory())

    def outputs(self, worker: WorkerProcess, batches: str, out: Path) -> tuple[list[Any], float]:
        """What is judged of every example in `batches`.npz, also written to `out`; and how far two runs of one batch
        are apart.

        Raises OutputError for outputs that are wrong by themselves (type, shape, NaN), WorkerError if it cannot run.
        """
        inputs, out_text = str(self.inputs / f"{batches}.npz"), str(out)
        ask = partial(worker.ask, limit=STEP_LIMIT, progress=self.tick)
        if self.meaning is not Meaning.NEXT:
            answer = ask("evaluate", task=self.task, pooling=self.pooling, batches=inputs, out=out_text)
        elif batches == TEXT:
            reference = self.inputs / f"reference.{TEXT}.npz"
            named = str(reference) if out.resolve() != reference.resolve() else None
            answer = ask("score", windows=inputs, reference=named, out=out_text, folder=str(self.tokenizer))
        else:
            answer = ask("write_on", prompts=inputs, out=out_text)
        if answer["problems"]:
            raise OutputError(answer["problems"][0])
        return load_batches(out), answer["repeat_error"]

    def judge(
        self, worker: WorkerProcess, reference: Mapping[str, list[Any]]
    ) -> tuple[Accuracy | LanguageAccuracy | TokenAccuracy, str | None]:
        """The accuracy of a worker's artifact against the reference's outputs, and why it is rejected, or None."""
        if self.meaning is Meaning.NEXT and not worker.ask("gives_logits", limit=STEP_LIMIT):
            return self._judge_tokens(worker, reference)
        out = self.scratch / f"outputs-{worker.pid}.npz"
        try:
            celled, _ = self.outputs(worker, CELLS, out)  # first: its artifact is open for just that
            evaluated, repeat_error = self.outputs(worker, TEXT, out)
        finally:
            out.unlink(missing_ok=True)
        if self.meaning is Meaning.NEXT:
            found = compare_language(reference[TEXT], evaluated, reference[CELLS], celled)
            if self.labelling is not None:
                batches = load_batches(self.inputs / f"{TEXT}.npz")
                metrics = question_metrics(self.labelling, batches, reference[TEXT], evaluated)
                found = dataclasses.replace(found, metrics=metrics)
            if repeat_error > REPEATED:
                return found, f"two runs of one text differ by {repeat_error:.2g} in their logits"
            return found, self._misspelt(worker) or why_language_rejected(found, self.gates)
        rows: dict[Cell, list[int]] = {}
        position = len(evaluated)
        for cell in self.workload:
            rows[cell] = list(range(position, position + cell.batch))
            position += cell.batch
        expected = [*reference[TEXT], *reference[CELLS]]
        accuracy = compare_outputs(expected, [*evaluated, *celled], meaning=self.meaning, cells=rows)
        if self.labelling is not None:
            batches = load_batches(self.inputs / f"{TEXT}.npz")
            metrics = task_metrics(self.labelling, batches, reference[TEXT], evaluated)
            accuracy = dataclasses.replace(accuracy, metrics=metrics)
        return accuracy, why_unsteady(repeat_error, expected) or why_rejected(accuracy, self.gates)

    def _judge_tokens(
        self, worker: WorkerProcess, reference: Mapping[str, list[Any]]
    ) -> tuple[TokenAccuracy, str | None]:
        out, windows = self.scratch / f"outputs-{worker.pid}.npz", str(self.inputs / f"{TEXT}.npz")
        try:
            worker.ask("guess", limit=STEP_LIMIT, progress=self.tick, windows=windows, out=str(out))
            guessed = load_batches(out)
            continued, repeat_error = self.outputs(worker, CELLS, out)
        finally:
            out.unlink(missing_ok=True)
        scores = [each for each in reference[TEXT] if IDS in each]  # of text: questions follow it
        found = compare_tokens(scores, guessed, reference[CELLS], continued)
        if self.labelling is not None:
            return found, "it gives no logits, so that it cannot be asked the questions of --data: leave them out"
        if repeat_error > 0:
            return found, f"two runs of the same prompts differ in {repeat_error:.0%} of their tokens"
        return found, self._misspelt(worker) or why_tokens_rejected(found, self.gates)

    def _misspelt(self, worker: WorkerProcess) -> str | None:
        found: list[str] = worker.ask("spell", limit=STEP_LIMIT, folder=str(self.tokenizer))
        return next(iter(found), None)


def with_estimate(error: WorkerError, estimate: int) -> WorkerError:
    """An error; where a GPU's memory ran out, with the bytes that the plan had estimated for that worker."""
    if error.kind != "memory" or not estimate:
        return error
    message = f"{error.message}; the plan had estimated {gib(estimate)} GiB"
    return WorkerError(message, hint=error.hint, kind=error.kind, log_tail=error.log_tail, worker=error.worker)


def problem_text(error: WorkerError | ValueError) -> str:
    """An error with the tail of its worker's log, but for one in words of its own."""
    tail = error.log_tail if isinstance(error, WorkerError) and error.kind not in ("refused", "memory") else ""
    return f"{error}\n{tail}".rstrip()
