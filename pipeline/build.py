"""Building: every step of a recipe becomes an artifact in the store, in a worker process of the step's toolchain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from optimize.pipeline.contract import DEFAULT, Artifact, Cell, StepFacts, Target
from optimize.pipeline.errors import PassError, WorkerError
from optimize.pipeline.plan import Step
from optimize.pipeline.progress import Progress
from optimize.pipeline.store import Damage, Entry, Store
from optimize.pipeline.toolchains import Environment
from optimize.pipeline.workers import STEP_LIMIT, WorkerProcess


@dataclass
class Builder:
    """Builds steps, one at a time. Its worker lives until `end` or until a step fails."""

    store: Store
    folder: Path  # of the run: logs, requests, calibration.npz
    target: Target
    task: str
    check: Callable[[], None]  # raises when the checkpoint is no longer what was planned with
    progress: Progress
    environments: Mapping[str, Environment] = field(default_factory=dict)  # by toolchain
    workload: Sequence[Cell] = ()
    failed: dict[str, str] = field(default_factory=dict)  # key of a step that failed in this run -> why
    _worker: WorkerProcess | None = None
    _toolchain: str = DEFAULT  # of the worker

    def build(self, step: Step, source: Artifact) -> tuple[Entry, bool]:
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

    def worker(self, toolchain: str = DEFAULT) -> WorkerProcess:
        """The one that builds; it also encodes text, since it has imported what that takes. One at a time."""
        if toolchain != self._toolchain:
            self.end()
        if self._worker is None:
            name = "build" if toolchain == DEFAULT else f"build-{toolchain}"
            self._worker = WorkerProcess(self.folder / "logs" / f"{name}.log", self.environments.get(toolchain))
            self._toolchain = toolchain
        return self._worker

    def end(self) -> None:
        """End the worker. The next step gets a fresh one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _build_into_store(self, step: Step, source: Artifact) -> Entry:
        arguments = {
            "step": step.pass_text,
            "source": {name: str(value) for name, value in asdict(source).items()},
            "task": self.task,
            "target": asdict(self.target),
            "calibration": str(self.folder / "calibration.npz") if step.step.calibrated else None,
            "workload": [asdict(cell) for cell in self.workload],
        }
        request = self.folder / "steps" / f"{step.key[:10]}-{step.step.name}.json"
        request.parent.mkdir(exist_ok=True)
        request.write_text(json.dumps({"toolchain": step.step.toolchain, **arguments}, indent=1))
        try:
            with self.store.building(step.key) as out:
                worker = self.worker(step.step.toolchain)
                made = worker.ask("build", limit=STEP_LIMIT, progress=self.progress.tick, out=str(out), **arguments)
                self.check()  # the key names the bytes that were planned with
                return self.store.publish(step.key, step.step.produces, out, step.text, StepFacts(**made))
        except (WorkerError, OSError) as error:
            self.end()  # it may hold anything now
            tail = error.log_tail if isinstance(error, WorkerError) else ""
            raise PassError(
                f"{step.step.name} failed: {error}" + (f"\n{tail}" if tail else ""),
                hint=f"repeat this step alone: optimize repeat {request}",
            ) from error
