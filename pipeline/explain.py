"""`optimize explain`: the pass, then the layer, at which a rejected candidate's outputs leave the reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from optimize.pipeline.accuracy import cosine
from optimize.pipeline.batches import judged_positions, load_batches
from optimize.pipeline.contract import Artifact, Kind
from optimize.pipeline.driver import LIVE, cache_folder
from optimize.pipeline.emit import EVIDENCE, EVIDENCE_FILES
from optimize.pipeline.errors import ArtifactError, RequestError, WorkerError
from optimize.pipeline.manifest import FILE, REPORT, Report, read_manifest, read_report
from optimize.pipeline.store import Damage, Store, check_files
from optimize.pipeline.toolchains import Toolchains
from optimize.pipeline.trial import CELLS, TEXT, Trial
from optimize.pipeline.verdict import Candidate, Status
from optimize.pipeline.verify import find_checkpoint
from optimize.pipeline.workers import STEP_LIMIT, WorkerProcess

BATCHES = 3  # of the evaluation text that layers are compared on: 11 examples, since every layer of them is kept
SHOWN = 6  # layers in the text


@dataclass(frozen=True)
class Stage:
    """The artifact after one step, tried as candidates are."""

    step: str  # the pass's text; "checkpoint" for what the recipe starts from
    kind: Kind
    drop: float | None  # None where it does not run, or its outputs are wrong by themselves
    reason: str | None  # why the gate rejects it


@dataclass(frozen=True)
class LayerDrop:
    """One layer of two artifacts: 1 - cosine over valid positions, on the first texts."""

    layer: str
    drop: float  # infinite where only the later artifact's output is not finite
    module: str = ""  # of the checkpoint: whose weights it multiplies by, or "after" the last such before it

    def __str__(self) -> str:
        return f"{self.layer} ({self.module})" if self.module else self.layer


@dataclass(frozen=True)
class Explanation:
    """What was found. The layers are in the order of execution."""

    candidate: str
    gate: float
    stages: tuple[Stage, ...]
    culprit: int | None  # index of the first stage that the gate rejects; None when none is
    layers: tuple[LayerDrop, ...]
    remark: str | None  # why no layers are there, or what was seen of an overflow

    @property
    def leaves(self) -> LayerDrop | None:
        """The first layer above the gate."""
        return next((each for each in self.layers if not each.drop <= self.gate), None)

    @property
    def jump(self) -> LayerDrop | None:
        """The layer at which the drop grows most over the largest one before it."""
        highest, best, found = 0.0, 0.0, None
        for each in self.layers:
            growth = each.drop - highest
            if growth > best:
                best, found = growth, each
            highest = max(highest, each.drop)
        return found

    def describe(self) -> str:
        """As lines for a terminal."""
        lines = [f"{self.candidate}, gate {self.gate:g}"]
        for index, stage in enumerate(self.stages):
            drop = "does not run" if stage.drop is None else f"drop {stage.drop:.2g}"
            mark = "  <- leaves the reference here" if index == self.culprit else ""
            lines.append(f"  {stage.step:<40} {drop}{mark}")
            if index == self.culprit:
                lines.append(f"    {stage.reason}")
        if self.culprit is None:
            lines.append("every stage passes the gate on accuracy")
        if self.leaves is not None and self.jump is not None:
            lines.append(f"first layer above the gate:  {self.leaves}: drop {self.leaves.drop:.2g}")
            lines.append(f"the drop grows most at:      {self.jump}: to {self.jump.drop:.2g}")
        elif self.layers:
            lines.append("no layer by itself is above the gate on these texts")
        worst = sorted(self.layers, key=lambda each: -each.drop)[:SHOWN]
        if worst:
            lines.append(f"the {len(worst)} largest of {len(self.layers)} layers, in the order of execution:")
            lines += [f"  {each.drop:<8.2g} {each}" for each in self.layers if each in worst]
        return "\n".join([*lines, *([self.remark] if self.remark else [])])


def explain(folder: Path, name: str | None, cache: Path | None) -> Explanation:
    """Explain the candidate `name`, or the first rejected one, of a run's folder or an emitted folder.

    Every step's artifact is taken from the store under `cache` (if None, of a run's folder that which it lies in) and
    tried again on the run's own text. Raises RequestError for a candidate that is not there, ArtifactError where the
    folder, checkpoint or an artifact is gone.
    """
    report, inputs = _read(folder)
    candidate = _candidate(report, name)
    if inputs != folder:
        return _explain(report, inputs, candidate, cache)
    if cache is None and folder.resolve().parent.name == "runs":
        cache = folder.resolve().parents[1]
    with _kept(folder):
        return _explain(report, inputs, candidate, cache)


def _explain(report: Report, inputs: Path, candidate: Candidate, cache: Path | None) -> Explanation:
    checkpoint = find_checkpoint(report.checkpoint)
    if checkpoint is None:
        raise ArtifactError(
            f"the checkpoint {report.checkpoint.model_id} is not at {report.checkpoint.folder} now, or has changed",
            hint="run optimize again where it is now, then explain that run",
        )
    chain = [("checkpoint", Artifact(Kind.CHECKPOINT, checkpoint, "", ""))]
    cache = cache_folder(cache)
    chain += _artifacts(candidate, Store(cache / "store"))
    with tempfile.TemporaryDirectory(prefix="optimize-explain-") as scratch:
        environments = Toolchains(cache).find_all([artifact.kind.toolchain for _, artifact in chain])
        trial = Trial.of_report(report, inputs, Path(scratch), report.host.target.cores, checkpoint, environments)
        reference = {batches: load_batches(inputs / f"reference.{batches}.npz") for batches in (TEXT, CELLS)}
        stages = [_stage(trial, step, artifact, reference) for step, artifact in chain]
        # a checkpoint in 16 bits may be rejected by itself, and what is exported from it in 32 bits not
        passing = [index for index, stage in enumerate(stages) if stage.reason is None]
        culprit = max(passing, default=-1) + 1 if stages[-1].reason is not None else None
        layers: tuple[LayerDrop, ...] = ()
        remark = None
        if culprit == 0:
            remark = "the checkpoint in its own dtype is above the gate by itself, and so is all that is made of it"
        elif culprit is not None:
            before, after = chain[culprit - 1][1], chain[culprit][1]
            layers, remark = _compare_layers(trial, before, after, chain[0][1])
    return Explanation(candidate.name, report.gates.max_drop, tuple(stages), culprit, layers, remark)


@contextmanager
def _kept(run: Path) -> Iterator[None]:
    """Hold a run's folder, so that `cache prune` leaves it alone meanwhile."""
    lock = FileLock(run / LIVE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(f"{run} is in use", hint="wait until the run, or what explains it, is over") from None
    except OSError:  # a folder that nobody may write to, and so nobody prunes
        pass
    try:
        yield
    finally:
        lock.release()


def _read(folder: Path) -> tuple[Report, Path]:
    if (folder / FILE).is_file():
        manifest, inputs = read_manifest(folder), folder / EVIDENCE
        report = manifest.report
        names = [f"{EVIDENCE}/{name}" for name in EVIDENCE_FILES]
        check_files(folder, {name: manifest.files.get(name, "") for name in names})
    elif (folder / REPORT).is_file():
        report, inputs = read_report(folder), folder
    else:
        raise ArtifactError(
            f"{folder} has neither {REPORT} nor {FILE}: it is not the folder of a run that came to its end",
            hint="a run that rejects a candidate names its folder in a note above its table",
        )
    try:
        for name in (each for each in EVIDENCE_FILES if each.endswith(".npz")):
            load_batches(inputs / name)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{inputs / name} cannot be read: {error}",
            hint="run the same optimize command again, then explain that run",
        ) from None
    return report, inputs


def _candidate(report: Report, name: str | None) -> Candidate:
    known = {each.name: each for each in report.candidates}
    if name is not None:
        if name in report.left_out:
            raise RequestError(f"{name} was left out: {report.left_out[name]}", hint=f"candidates: {', '.join(known)}")
        if name not in known:
            raise RequestError(f"there is no candidate {name!r}", hint=f"candidates: {', '.join(known)}")
        return known[name]
    rejected = [each for each in report.candidates if each.status in (Status.INACCURATE, Status.BROKEN)]
    if not rejected:
        until = f", which did not come to its end ({report.unfinished})" if report.unfinished else ""
        raise RequestError(
            f"no candidate of this run{until} was rejected for its outputs",
            hint=f"name one with --candidate: {', '.join(known)}",
        )
    return rejected[0]


def _artifacts(candidate: Candidate, store: Store) -> list[tuple[str, Artifact]]:
    if candidate.status is Status.NOT_BUILT:
        raise RequestError(f"{candidate.name} was not built: {candidate.reason}", hint="its log is in the run's folder")
    found = []
    for step in candidate.steps:
        entry = store.get(step.key)
        if entry is None or isinstance(entry, Damage):
            raise ArtifactError(
                f"what {step.text} made is {'not' if entry is None else 'damaged'} in the store {store.root}",
                hint="run the same optimize command again, then explain that run",
            )
        found.append((step.text, entry.artifact))
    return found


def _stage(trial: Trial, step: str, artifact: Artifact, reference: Mapping[str, list[Any]]) -> Stage:
    try:
        with trial.open(f"{len(step)}-{artifact.kind}", artifact.kind, artifact.path).worker as worker:
            accuracy, reason = trial.judge(worker, reference)
    except (WorkerError, ValueError) as error:
        return Stage(step, artifact.kind, None, str(error).splitlines()[0])
    return Stage(step, artifact.kind, accuracy.drop.value, reason)


def _compare_layers(
    trial: Trial, before: Artifact, after: Artifact, checkpoint: Artifact
) -> tuple[tuple[LayerDrop, ...], str | None]:
    """The layers of `after` against those of `before`, under the names that the checkpoint's modules have."""
    try:
        environment = trial.environments.get(after.kind.toolchain)
        with WorkerProcess(trial.scratch / "logs" / "layers.log", environment) as worker:
            sides = []
            for artifact in (before, after):
                seen = _look(trial, worker, artifact, BATCHES)
                if seen is None:
                    return (), f"the layers of {artifact.kind} are compiled into one: they cannot be looked at"
                sides.append(seen)
            (expected, known), (found, answer) = sides
            modules = {} if after.kind == checkpoint.kind else _modules(trial, worker, checkpoint, before, known)
    except WorkerError as error:
        return (), f"its layers cannot be looked at: {error.message}"
    names = {name: name for name in found[0]} if before.kind == after.kind else _by_weights(known, answer)
    masks = [judged_positions(batch) != 0 for batch in load_batches(trial.inputs / f"{TEXT}.npz")[:BATCHES]]
    drops, last = [], ""
    for name, other in names.items():
        last = modules.get(other, last)
        if other in expected[0] and expected[0][other].shape == found[0][name].shape:
            pairs = zip(expected, found, masks, strict=True)
            drop = _drop([(one[other], two[name], mask) for one, two, mask in pairs])
            drops.append(LayerDrop(name, drop, modules.get(other, last and f"after {last}")))
    remark = None if drops else f"no layer of {before.kind} could be matched with one of {after.kind}"
    return tuple(drops), answer["overflow"] or remark


def _look(
    trial: Trial, worker: WorkerProcess, artifact: Artifact, count: int
) -> tuple[list[Any], dict[str, Any]] | None:
    """What an artifact computes on the way for the first `count` batches of text, and what the worker says of it."""
    out = trial.scratch / "layers.npz"
    answer = worker.ask(
        "layers", limit=STEP_LIMIT, kind=artifact.kind, path=str(artifact.path), task=trial.task,
        batches=str(trial.inputs / f"{TEXT}.npz"), count=count, out=str(out),
    )  # fmt: skip
    return None if answer is None else (load_batches(out), answer)


def _modules(
    trial: Trial, worker: WorkerProcess, checkpoint: Artifact, before: Artifact, known: dict[str, Any]
) -> dict[str, str]:
    """Names of products in `before` -> names of the checkpoint's modules that have their weights."""
    if before.kind == checkpoint.kind:
        return {name: name for name in known["products"]}
    seen = _look(trial, worker, checkpoint, 1)
    return _by_weights(seen[1], known) if seen is not None else {}


def _by_weights(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Names in `after` -> names in `before` of the products with the same weights."""
    waiting: dict[str, list[str]] = {}
    for name, key in before["products"].items():
        waiting.setdefault(key, []).append(name)
    return {name: waiting[key].pop(0) for name, key in after["products"].items() if waiting.get(key)}


def _drop(batches: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]]) -> float:
    """1 - cosine, averaged over valid positions of all batches. Infinite where only what is found is not finite."""
    total, positions = 0.0, 0
    for expected, found, mask in batches:
        if expected.shape[: mask.ndim] == mask.shape:
            expected, found = expected[mask], found[mask]  # padding differs between runtimes
        if not np.isfinite(found).all():
            return math.inf if np.isfinite(expected).all() else 0.0
        count = int(np.prod(expected.shape[:-1]))
        total += (1 - cosine(found, expected)) * count
        positions += count
    return total / max(positions, 1)
