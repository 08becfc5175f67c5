"""`optimize verify`: an emitted folder's digests, then the gates again, here, in a clean process."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from optimize.pipeline.accuracy import Accuracy
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Kind, Target
from optimize.pipeline.driver import cache_folder, find_target
from optimize.pipeline.emit import EVIDENCE, EVIDENCE_FILES
from optimize.pipeline.errors import ArtifactError, ExitCode, OptimizeError, OutputError, WorkerError
from optimize.pipeline.language import LanguageAccuracy
from optimize.pipeline.manifest import FILE, Manifest, Source, read_manifest
from optimize.pipeline.measure import Speed, compare
from optimize.pipeline.statistics import Interval
from optimize.pipeline.store import compare_digests, digest_files, sha256_of
from optimize.pipeline.tokens import TokenAccuracy
from optimize.pipeline.toolchains import Toolchains
from optimize.pipeline.trial import CELLS, TEXT, Trial, problem_text
from optimize.pipeline.verdict import Status, judge_speed

MAX_PATH = 4096  # characters, as Linux has it: asking for a longer one raises
SPEED_CODES = {
    Status.PASSED: ExitCode.EMITTED,
    Status.NOT_FASTER: ExitCode.NOT_FASTER,
    Status.INCONCLUSIVE: ExitCode.INCONCLUSIVE,
}


@dataclass(frozen=True)
class Verification:
    """What was found. On another host than it was emitted on, speed is reported and does not decide."""

    exit_code: int
    files: int
    host: Target
    same_host: bool
    accuracy: Accuracy | LanguageAccuracy | TokenAccuracy
    rejected: str | None
    speed: Speed | None
    remark: str | None  # on speed: why it was not measured, or what was found
    emitted: Interval  # the speedup that the folder was emitted with, which is not asked for again
    min_speedup: float

    def describe(self) -> str:
        """As lines for a terminal."""
        lines = [
            f"digests   {self.files} files, all as emitted",
            f"accuracy  {self.accuracy} on {self.accuracy.examples} examples: {self.rejected or 'passes the gate'}",
            *(f"          {metric}" for metric in self.accuracy.metrics),
            f"speed     {self.speed.overall if self.speed else 'not measured'}"
            + (f": {self.remark}" if self.remark else ""),
            f"          emitted with {self.emitted}; asked for is above {self.min_speedup:g}"
            + (f"; now {self.speed.noise}" if self.speed and self.speed.noise else ""),
        ]
        if not self.same_host:
            lines.append(
                f"host      {self.host.device}: another one than it was emitted on; speed does not decide here"
            )
        return "\n".join([*lines, "verified" if self.exit_code == 0 else f"not verified (exit code {self.exit_code})"])


def verify_folder(folder: Path, budget: float, max_load: float | None = None) -> Verification:
    """Check `folder`; measure for `budget` seconds if the checkpoint that it came from is at hand.

    `max_load` takes the place of what the folder was emitted with: this host may be a busier one.

    Raises ArtifactError for a folder that is damaged or not an emitted one, OptimizeError if it does not run here.
    """
    manifest = read_manifest(folder)
    found = {name: digest for name, digest in digest_files(folder).items() if name != FILE}
    difference = compare_digests(manifest.files, found)
    if difference is not None:
        raise ArtifactError(f"{folder}: {difference}", hint="emit it again, or copy it again from where it is whole")
    missing = [name for name in EVIDENCE_FILES if f"{EVIDENCE}/{name}" not in found]
    if missing:
        raise ArtifactError(f"{folder} has no {EVIDENCE}/{missing[0]}: there is nothing to repeat the gates with")
    report = manifest.report
    if max_load is not None:
        report = replace(report, gates=replace(report.gates, max_load=max_load))
    host, _ = find_target(report.host.target.name)
    same_host = (host.device, host.features, host.cores) == (
        report.host.target.device, report.host.target.features, report.host.target.cores,
    )  # fmt: skip
    environments = Toolchains(cache_folder(None)).find_all([manifest.kind.toolchain])
    with tempfile.TemporaryDirectory(prefix="optimize-verify-") as scratch:
        evidence = folder / EVIDENCE
        trial = Trial.of_report(report, evidence, Path(scratch), host.cores, folder, environments)
        try:
            reference = {name: load_batches(evidence / f"reference.{name}.npz") for name in (TEXT, CELLS)}
            with trial.open("artifact", manifest.kind, folder).worker as worker:
                accuracy, rejected = trial.judge(worker, reference)
                worker.pause()
                speed, remark = None, None
                if rejected is None:
                    speed, remark = _speed(trial, manifest, worker, budget)
        except OutputError as error:
            raise OutputError(
                f"{folder}: {error}", hint="not verified: on this host it does not answer right"
            ) from error
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise ArtifactError(
                f"{folder / FILE} does not fit the evidence: {type(error).__name__}: {error}",
                hint="emit it again, or copy it again from where it is whole",
            ) from error
        except WorkerError as error:
            raise OptimizeError(f"{folder} does not run on this host: {problem_text(error)}") from error
    code = ExitCode.NOT_ACCURATE if rejected else ExitCode.EMITTED
    if speed is not None and same_host:
        status, remark = judge_speed(speed, report.gates)
        code = SPEED_CODES[status]
    return Verification(
        code, len(found), host, same_host, accuracy, rejected, speed, remark,
        manifest.speed.overall, report.gates.min_speedup,
    )  # fmt: skip


def _speed(trial: Trial, manifest: Manifest, worker: object, budget: float) -> tuple[Speed | None, str | None]:
    checkpoint = find_checkpoint(manifest.report.checkpoint)
    if checkpoint is None:
        return None, f"the checkpoint {manifest.report.checkpoint.model_id} is not on this host"
    was = manifest.report.baseline
    with trial.open("baseline", Kind.CHECKPOINT, checkpoint, was.gpus if was else 1).worker as baseline:
        baseline.pause()
        speed, _ = compare(baseline, worker, trial.workload, budget, trial.gates.max_load)  # type: ignore[arg-type]
    return speed, None


def find_checkpoint(source: Source) -> Path | None:
    """The folder of the checkpoint that was lowered, if it is on this host and has the same bytes."""
    folder = Path(source.folder)
    if not source.files or len(source.folder) > MAX_PATH:
        return None
    if not folder.is_dir() and source.revision is not None:
        hub = importlib.import_module("optimize.models.hub")
        try:
            folder = hub.fetch(source.model_id, source.revision).folder
        except OptimizeError:
            return None
    same = all(
        (folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in source.files.items()
    )
    return folder if same and folder.is_dir() else None
