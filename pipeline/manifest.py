"""`optimize.json`: everything needed to know, verify and repeat an emitted artifact.

The types here are the schema: docs/optimize.schema.json is generated from them (`make docs`), and reading a manifest
validates it. A field that is added is a new minor SCHEMA_VERSION; one that changes its meaning is a new major.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.pipeline.accuracy import Accuracy
from optimize.pipeline.contract import Cell, Checkpoint, Gates, Kind, Labelling, Meaning, Objective, Target
from optimize.pipeline.errors import ArtifactError
from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.language import LanguageAccuracy
from optimize.pipeline.measure import Speed
from optimize.pipeline.roofline import Peaks, Roof, Work
from optimize.pipeline.store import check_files
from optimize.pipeline.tokens import TokenAccuracy
from optimize.pipeline.toolchains import Environment
from optimize.pipeline.verdict import Candidate, Throughput
from optimize.pipeline.versions import installed_version, ollama_version

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA_VERSION = "2.8"
FILE = "optimize.json"
REPORT = "report.json"  # in a run's folder
RECORDED = ("optimize", "torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "numpy", "tokenizers",
            "gguf", "torchao", "bitsandbytes", "accelerate", "xllamacpp", "onnxruntime-genai", "openvino-genai",
            "openvino-tokenizers", "pillow", "soundfile")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The checkpoint that was lowered. `files` are the digests of what was read."""

    model_id: str
    folder: str  # where it lay when this was emitted: a hint for `verify`, checked by the digests
    revision: str | None
    task: str
    architecture: str
    dtype: str
    parameters: int
    files: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """What accuracy was judged on; the inputs and the reference's outputs lie in evidence/."""

    source: str
    calibration_digest: str | None
    pooling: str | None  # how tokens become the sentence embedding that is judged
    meaning: Meaning  # of the judged outputs
    labelling: Labelling | None  # where --data had labels
    questions: str | None = None  # where those came from that a language model answers; `source` is then that of text


@dataclass(frozen=True)
class Baseline:
    """What the eager model costs: seconds to load and for the first call, bytes at most."""

    load_seconds: float
    first_seconds: float
    peak_memory: int
    roofs: tuple[Roof, ...] = ()  # of the cells
    throughput: Throughput | None = None
    predicted_memory: int | None = None  # bytes, by the plan, also while it reads all text
    gpus: int = 1  # over which its layers lie
    gpu_memory: GpuMemory | None = None  # held when every cell had been run
    predicted_gpu_memory: int | None = None  # bytes of each GPU, by the plan, also while it reads all text


@dataclass(frozen=True)
class Reference:
    """What the float32 model took while it read all text: bytes at most, seen and by the plan."""

    peak_memory: int
    predicted_memory: int
    gpu_memory: GpuMemory | None = None  # held when it had read all text
    predicted_gpu_memory: int | None = None


@dataclass(frozen=True)
class ToolchainFacts:
    """An environment that stood apart."""

    python: str  # its version
    digest: str  # of the lock that it was made from; where the user named it, of its packages
    named: bool  # by the user, who answers for what is in it
    packages: dict[str, str]


@dataclass(frozen=True)
class Host:
    """Where it was proved."""

    target: Target
    system: str
    python: str
    packages: dict[str, str]
    toolchains: dict[str, ToolchainFacts] = field(default_factory=dict)  # that recipes of the run used


@dataclass(frozen=True)
class Report:
    """The outcome of a run: what `--json` writes. `emitted` names the candidate in the emitted folder.

    Of a run that was broken off it has what was tried until then: see `unfinished`.
    """

    schema_version: str
    created: str  # ISO 8601, UTC
    exit_code: int
    checkpoint: Source
    host: Host
    workload: tuple[Cell, ...]
    gates: Gates
    evaluation: Evaluation
    left_out: dict[str, str]
    candidates: tuple[Candidate, ...]
    emitted: str | None
    objective: Objective  # what the emitted one is best at, of those that passed
    seconds: dict[str, float]  # of the run's phases: prepare, build, evaluate, measure, emit
    baseline: Baseline | None  # None when nothing was timed
    peaks: Peaks | None = None  # what the host was seen to reach at most
    work: tuple[Work, ...] = ()  # what each cell cannot do without
    reference: Reference | None = None
    unfinished: str | None = None  # why the run did not come to its end; left_out then names what was not tried, too


@dataclass(frozen=True)
class Manifest:
    """optimize.json. `files` are digests of every other file in the folder."""

    schema_version: str
    kind: Kind
    recipe: str
    files: dict[str, str]
    accuracy: Accuracy | LanguageAccuracy | TokenAccuracy
    speed: Speed
    report: Report


def source_of(checkpoint: Checkpoint) -> Source:
    """The checkpoint's part of a report."""
    return Source(
        checkpoint.model_id, str(checkpoint.folder), checkpoint.revision, checkpoint.task, checkpoint.architecture,
        checkpoint.dtype, checkpoint.parameters, dict(checkpoint.files),
    )  # fmt: skip


def host_of(target: Target, environments: Mapping[str, Environment] | None = None) -> Host:
    """This host's part of a report."""
    versions = {name: installed_version(name) for name in RECORDED} | {"ollama": ollama_version()}
    packages = {name: version for name, version in versions.items() if version is not None}
    toolchains = {
        name: ToolchainFacts(each.version, each.digest, each.named, dict(each.packages))
        for name, each in (environments or {}).items()
    }
    return Host(target, platform.platform(), platform.python_version(), packages, toolchains)


def adapter(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's reader and writer for one of the types here."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_json(value: Report | Manifest) -> str:
    """As indented JSON."""
    return adapter(type(value)).dump_json(value, indent=1).decode() + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever this process is killed."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an emitted folder. Raises ArtifactError if there is none, or it is not a valid one."""
    if not (folder / FILE).exists() and (folder / REPORT).exists():
        unfinished = read_report(folder).unfinished
        raise ArtifactError(
            f"{folder} is a run's folder, not an emitted one"
            + (f"; that run did not come to its end: {unfinished}" if unfinished else ""),
            hint="run the same optimize command again, and name its --out" if unfinished else "name the run's --out",
        )
    if not (folder / FILE).exists() and (near := _near(folder)):
        raise ArtifactError(f"{folder} has no {FILE}", hint=f"one lies in {', '.join(map(str, near[:3]))}")
    manifest: Manifest = _read(folder / FILE, Manifest)
    return manifest


def _near(folder: Path) -> list[Path]:
    """Emitted folders in this one, in those, and above."""
    return sorted(path.parent for path in (*folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}"), folder.parent / FILE)
                  if path.is_file())  # fmt: skip


def read_report(folder: Path) -> Report:
    """The report of a run's folder. Raises ArtifactError if there is none, or it is not a valid one."""
    report: Report = _read(folder / REPORT, Report)
    return report


def read_intact(folder: Path) -> Manifest:
    """optimize.json of an emitted folder whose every file is as it was emitted, evidence aside.

    Raises ArtifactError if one is not.
    """
    manifest = read_manifest(folder)
    check_files(folder, {name: digest for name, digest in manifest.files.items() if not name.startswith("evidence/")})
    return manifest


def _read(path: Path, kind: Any) -> Any:
    from pydantic import ValidationError

    try:
        text = path.read_text(encoding="utf-8")
        found = str(json.loads(text)["schema_version"])
        if found.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ArtifactError(
                f"{path} has schema version {found}, this optimize reads {SCHEMA_VERSION}",
                hint="use the optimize that is named in its report.host.packages",
            )
        return adapter(kind).validate_json(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{path.parent} has no {path.name}: it was not emitted by optimize",
            hint=f"emit one with: optimize {path.parent} --out DIR, if that is a checkpoint; then name DIR",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{path} is not a valid {kind.__name__.lower()}: {where}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a valid {kind.__name__.lower()}: {type(error).__name__}: {error}") from None


def schema() -> dict[str, Any]:
    """The JSON Schema of optimize.json."""
    return {"title": "optimize.json", "version": SCHEMA_VERSION} | adapter(Manifest).json_schema()
