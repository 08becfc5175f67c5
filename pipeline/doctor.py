"""`optimize doctor`: what this host has of what the passes and runtimes need."""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from optimize.pipeline.contract import DEFAULT, Kind
from optimize.pipeline.driver import find_target
from optimize.pipeline.errors import OptimizeError, ToolchainError, WorkerError
from optimize.pipeline.recipe import pass_class, pass_names
from optimize.pipeline.roofline import measure_peaks
from optimize.pipeline.toolchains import Toolchains
from optimize.pipeline.versions import installed_version, ollama_version
from optimize.pipeline.workers import WorkerProcess

LIMIT = 120.0  # seconds for measuring the peaks


@dataclass(frozen=True)
class Finding:
    """One row: what was looked for, what was found, what that means."""

    what: str
    found: str
    meaning: str
    good: bool = True


def peaks(cache: Path) -> Finding:
    """Measure what this host reaches at most, and remember it for the runs to come: some seconds."""
    target, _ = find_target(None)
    with tempfile.TemporaryDirectory() as scratch, WorkerProcess(Path(scratch) / "peaks.log") as worker:
        try:
            found = measure_peaks(cache, target, lambda: worker.ask("peaks", limit=LIMIT, target=asdict(target)))
        except (WorkerError, OSError) as error:
            return Finding("peaks", "not measured", f"no roofline: {error}", good=False)
    return Finding("peaks", str(found), "what the roofline in reports is drawn with; the best that was seen here")


def findings(cache: Path) -> list[Finding]:
    """Look at the interpreter, the processor, the compilers, the cache's disk and every pass's distributions."""
    target, _ = find_target(None)
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    compiler = shutil.which("g++") or shutil.which("clang++")
    rows = [
        Finding("python", sys.version.split()[0], sys.executable),
        Finding("processor", target.device, f"{target.cores} cores; {', '.join(target.features)}"),
        Finding(
            "memory",
            f"{target.memory / 2**30:.0f} GiB",
            "the float32 reference of a checkpoint needs 4 bytes a parameter and 1 GiB",
        ),
        _gpus(),
        Finding("C++ compiler", compiler or "none", "compile-aoti needs one", good=compiler is not None),
        Finding("ollama", ollama_version() or "none", "for create-ollama; without it a GGUF is emitted for llama.cpp"),
        Finding("cache", f"{free / 2**30:.0f} GiB free", str(cache), good=free > 2 << 30),
    ]
    needs: dict[str, list[str]] = {}
    apart: dict[str, list[str]] = {}
    for name in pass_names():
        found = pass_class(name)
        if found.toolchain != DEFAULT:
            apart.setdefault(found.toolchain, []).append(name)
            continue
        for tool in found.tools:
            needs.setdefault(tool, []).append(name)
    for kind in Kind:
        if kind.toolchain != DEFAULT:
            apart.setdefault(kind.toolchain, []).append(f"{kind} folders")
    for tool, passes in sorted(needs.items()):
        version = installed_version(tool)
        meaning = f"for {', '.join(passes)}" + ("" if version else f": pip install {tool}")
        rows.append(Finding(tool, version or "not installed", meaning, good=version is not None))
    return rows + [_toolchain(Toolchains(cache), name, passes) for name, passes in sorted(apart.items())]


def _gpus() -> Finding:
    """To have none is no fault."""
    try:
        target, _ = find_target("gpu")
    except OptimizeError as error:
        return Finding("GPU", "none", error.message)
    with suppress(OptimizeError):
        target, _ = find_target("multi-gpu")
    several = f"{target.gpus} like ones over {target.links}; " if target.gpus > 1 else ""
    return Finding(
        "GPU", target.device,
        f"{several}{target.gpu_memory / 2**30:.0f} GiB, compute capability {target.arch}, driver {target.driver}: "
        f"--target {target.name}",
    )  # fmt: skip


def _toolchain(toolchains: Toolchains, name: str, passes: list[str]) -> Finding:
    """A toolchain that nobody installed is no fault; one that is broken is."""
    meaning = f"for {', '.join(passes)}"
    try:
        found = toolchains.find(name)
    except OptimizeError as error:
        absent = isinstance(error, ToolchainError) and error.absent
        state = "not there" if absent else "unusable"
        return Finding(f"toolchain {name}", state, f"{meaning}: {error.hint}", good=absent)
    return Finding(f"toolchain {name}", f"Python {found.version}", f"{meaning}: {found.python}")
