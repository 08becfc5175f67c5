"""Before anything is built: what is judged is encoded, the host's peaks are known, and the checkpoint is watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimize.pipeline.build import Builder
from optimize.pipeline.contract import Checkpoint, Labelling, Meaning
from optimize.pipeline.errors import CheckpointError, OptimizeError, RequestError, WorkerError
from optimize.pipeline.noise import NOTABLE, NoiseMeter
from optimize.pipeline.plan import Plan
from optimize.pipeline.roofline import Peaks, known_peaks, measure_peaks
from optimize.pipeline.store import stamp_of
from optimize.pipeline.workers import STEP_LIMIT


@dataclass(frozen=True)
class Texts:
    """What models/ read for this run, as plain data: the machine knows no tokenizer and no task."""

    source: str
    evaluation: Sequence[Mapping[str, Any]]
    calibration: Sequence[Mapping[str, Any]]
    labelling: Labelling | None
    pooling: str | None
    meaning: Meaning  # of the judged outputs
    questions: Sequence[Mapping[str, Any]] = ()  # that labels are of, where a language model answers them
    asked: str | None = None  # where the questions came from


class Unchanged:
    """The checkpoint's files as they were planned with, by their stamps."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stamps = self._look()

    def check(self) -> None:
        """Nothing may be built, timed or emitted from other bytes than were planned with. Raises CheckpointError."""
        try:
            changed = [name for name, stamp in self._look().items() if stamp != self._stamps[name]]
        except OSError as error:
            changed = [f"{error.filename} ({error.strerror})"]
        if changed:
            raise CheckpointError(
                f"{self._checkpoint.folder} was changed while the run was going on: {changed[0]}",
                hint="run the same command again, and leave the folder alone meanwhile",
            )

    def _look(self) -> dict[str, tuple[int, ...]]:
        return {name: stamp_of((self._checkpoint.folder / name).stat()) for name in self._checkpoint.files}


def encode_text(builder: Builder, plan: Plan, texts: Texts, unchanged: Unchanged) -> None:
    """Encode all examples. A checkpoint whose tokenizer or image processor does not load is refused here, before
    anything is built.
    """
    checkpoint = plan.checkpoint
    builder.progress.doing("prepare", "encoding examples")
    try:
        builder.worker().ask(
            "prepare", limit=STEP_LIMIT, progress=builder.progress.tick, folder=str(checkpoint.folder),
            evaluation=_on_disk(texts.evaluation, builder.folder),
            calibration=_on_disk(texts.calibration, builder.folder),
            cells=[(cell.batch, cell.sequence, cell.new) for cell in plan.workload],
            task=checkpoint.task, max_length=checkpoint.max_length, out=str(builder.folder),
            labelled=texts.labelling is not None, questions=list(texts.questions),
        )  # fmt: skip
    except WorkerError as error:
        unchanged.check()
        hint = error.hint or f"see {builder.folder / 'logs' / 'build.log'}"
        raise unusable(
            f"{checkpoint.model_id}: its {plan.workload[0].form.reader} cannot be used", error, hint
        ) from error


def _on_disk(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Mapping[str, Any]]:
    """Rows as a request can carry them: files that came as bytes lie in the run's folder."""

    def written(value: Any) -> Any:
        if not isinstance(value, Mapping) or "bytes" not in value:
            return value
        path = folder / "files" / value["sha256"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(value["bytes"])
        return {**{name: each for name, each in value.items() if name != "bytes"}, "path": str(path)}

    return [{name: written(value) for name, value in row.items()} for row in rows]


def find_peaks(builder: Builder) -> Peaks | None:
    """The host's peaks, measured once for each host, while that is quiet. A run goes on without them."""
    cache, target, progress = builder.folder.parents[1], builder.target, builder.progress
    if (known := known_peaks(cache, target)) is not None:
        return known
    progress.doing("prepare", "measuring what this host reaches at most")
    worker = builder.worker()
    meter = NoiseMeter(worker.pid)

    def disturbed() -> bool:
        others = sum(meter.shares())
        if others > NOTABLE and not target.gpus:
            progress.note(
                f"other processes took {others:.0%} of the processors while that was measured: limits may come out "
                "above 100%, and the next run measures again"
            )
            return True
        return False

    try:
        return measure_peaks(
            cache, target,
            lambda: worker.ask("peaks", limit=STEP_LIMIT, progress=progress.tick, target=asdict(target)),
            disturbed=disturbed,
        )  # fmt: skip
    except WorkerError as error:
        builder.end()
        progress.note(f"no roofline: what this host reaches at most could not be measured: {error.message}")
        return None


def unusable(message: str, error: Exception, hint: str) -> OptimizeError:
    """A refusal of the checkpoint; but where a process was killed or hung, the checkpoint is not to blame, and what
    was refused in words has them already.
    """
    cause = error if isinstance(error, WorkerError) else error.__cause__
    if isinstance(cause, WorkerError) and cause.kind == "refused":
        return RequestError(cause.message, hint=cause.hint)
    if isinstance(cause, WorkerError) and cause.kind == "memory":
        return RequestError(f"{message}: {cause.message}", hint=cause.hint)
    if isinstance(cause, WorkerError) and cause.kind != "error":
        return OptimizeError(cause.message, hint="run the same command again")
    return RequestError(f"{message}: {getattr(error, 'message', error)}", hint=hint)
