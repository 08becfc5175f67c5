"""The emitted folder: packaged beside its place, proved there in a clean process, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from optimize.pipeline.batches import load_batches
from optimize.pipeline.card import model_card
from optimize.pipeline.contract import DEFAULT, Artifact
from optimize.pipeline.errors import OptimizeError, OutputError, RequestError
from optimize.pipeline.manifest import FILE, SCHEMA_VERSION, Manifest, Report, to_json
from optimize.pipeline.store import digest_files
from optimize.pipeline.toolchain_files import read_toolchain
from optimize.pipeline.trial import CELLS, TEXT, Trial
from optimize.pipeline.usage import LOCK
from optimize.pipeline.verdict import Candidate

EVIDENCE = "evidence"  # inputs, the reference's outputs, raw samples, plan: what `verify` repeats the gate with
EVIDENCE_FILES = (
    f"{TEXT}.npz", f"{CELLS}.npz", f"reference.{TEXT}.npz", f"reference.{CELLS}.npz", "samples.json", "plan.txt",
)  # fmt: skip


def check_out(out: Path, cache: Path) -> None:
    """Refuse, before anything runs, a place that cannot be emitted to. Raises RequestError."""
    out, cache = out.resolve(), cache.resolve()
    hint = "name another folder with --out"
    if out == cache or cache in out.parents:
        raise RequestError(f"--out {out} lies in the cache {cache}", hint=hint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise RequestError(f"--out {out} {what}: nothing is overwritten", hint="remove it, or " + hint)
    if out.is_mount():
        raise RequestError(
            f"--out {out} is a mount point: a finished folder cannot be renamed into its place",
            hint="name a folder inside it with --out",
        )
    parent = next(each for each in out.parents if each.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror} ({parent})", hint=hint) from None


def emit(report: Report, winner: Candidate, artifact: Artifact, run: Path, trial: Trial, out: Path) -> None:
    """Write `out`: model files, what the checkpoint carries along, evidence, model card, manifest.

    The gate on accuracy runs once more, on the packaged folder. Raises OptimizeError if it fails there or if the disk
    is full; `out` is then not there.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    package = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _fill(package, report, artifact, run)
        reference = {batches: load_batches(run / f"reference.{batches}.npz") for batches in (TEXT, CELLS)}
        try:
            with trial.open("emitted", artifact.kind, package).worker as worker:
                accuracy, reason = trial.judge(worker, reference)
        except OutputError as error:
            raise OptimizeError(f"the packaged artifact has outputs that it had not in the store: {error}") from error
        if reason is not None:
            raise OptimizeError(f"the packaged artifact fails the gate that it passed in the store: {reason}")
        assert winner.speed is not None
        (package / "README.md").write_text(model_card(report, winner))
        manifest = Manifest(
            SCHEMA_VERSION, artifact.kind, winner.recipe, digest_files(package), accuracy, winner.speed, report
        )
        (package / FILE).write_text(to_json(manifest))
        package.chmod(0o755)
        package.rename(out)
    except OSError as error:
        if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise RequestError(
                f"--out {out} is not empty any more: nothing is overwritten",
                hint="name another folder with --out; what was built is kept",
            ) from error
        raise OptimizeError(f"{out} cannot be written: {error}", hint="free some space, then run again") from error
    finally:
        shutil.rmtree(package, ignore_errors=True)


def _fill(package: Path, report: Report, artifact: Artifact, run: Path) -> None:
    shutil.copytree(artifact.path, package, dirs_exist_ok=True, copy_function=shutil.copyfile)
    checkpoint = Path(report.checkpoint.folder)
    for name in report.checkpoint.files:
        if not re.search(r"\.safetensors$", name) and not (package / name).exists():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, package / name)
    if artifact.kind.toolchain != DEFAULT and (lock := read_toolchain(artifact.kind.toolchain).lock):
        (package / LOCK).write_text(lock)
    (package / EVIDENCE).mkdir()
    for name in EVIDENCE_FILES:
        shutil.copyfile(run / name, package / EVIDENCE / name)
    for path in package.rglob("*"):
        with path.open("rb") if path.is_file() else os.scandir(path) as opened:
            if path.is_file():
                os.fsync(opened.fileno())  # type: ignore[union-attr]
