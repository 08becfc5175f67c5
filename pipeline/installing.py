"""Making a toolchain's environment: by venv and pip, from exact versions with hashes.

    CACHE/toolchains/NAME-LOCK.json     names the folder of the whole environment; written last, in one piece
    CACHE/toolchains/NAME-LOCK-XXXX/    one try at making it: a virtual environment cannot be renamed
    CACHE/toolchains/NAME-LOCK.lock     held by the process that makes or removes it
    CACHE/toolchains/NAME-LOCK.log      what pip said

A kill at any moment leaves no environment or a whole one; the next try removes what it left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from optimize.pipeline.errors import ToolchainError
from optimize.pipeline.toolchain_files import CPU, Toolchain, read_toolchain
from optimize.pipeline.toolchains import (
    Environment,
    Record,
    Toolchains,
    plain_environment,
    probe,
    python_in,
    what_it_said,
)

PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10")
LOG_TAIL = 8  # lines
FULL = 1 << 20  # bytes that are free at most on a disk that is full
# of pip's variables, those that say where packages come from; others would say where they go
SOURCES = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "TRUSTED_HOST", "PROXY", "CERT", "CLIENT_CERT",
           "KEYRING_PROVIDER", "CONFIG_FILE", "CACHE_DIR", "NO_CACHE_DIR", "TIMEOUT", "DEFAULT_TIMEOUT",
           "RETRIES")  # fmt: skip
Note = Callable[[str], None]


def install(toolchains: Toolchains, name: str, note: Note = lambda _: None) -> Environment:
    """Make the environment, unless it is there and whole. Raises ToolchainError with the log's tail."""
    toolchain = read_toolchain(name)
    if os.environ.get(toolchain.variable):
        return toolchains.find(name)
    if not toolchain.lock:
        raise ToolchainError(f"toolchain {name} cannot be installed: {toolchain.elsewhere}", hint=toolchain.otherwise)
    with _held(toolchains, toolchain, lambda: note(f"toolchain {name}: another process is making it")):
        toolchains.forget(name)
        try:
            return toolchains.find(name)
        except ToolchainError:
            toolchains.forget(name)
        _make(toolchains, toolchain, note)
        return toolchains.find(name)


def install_missing(
    toolchains: Toolchains, names: Iterable[str], consent: Callable[[Toolchain], bool], note: Note
) -> None:
    """Install those that can be, are not there or broken, and that `consent` says yes to. Raises ToolchainError."""
    for toolchain in map(read_toolchain, names):
        try:
            toolchains.find(toolchain.name)
        except ToolchainError:
            if toolchain.lock and not os.environ.get(toolchain.variable) and consent(toolchain):
                install(toolchains, toolchain.name, note)


def remove(toolchains: Toolchains, name: str) -> int:
    """Remove the environment, those of earlier locks, and what killed tries left. Returns how many bytes that freed."""
    toolchain = read_toolchain(name)
    with _held(toolchains, toolchain):
        toolchains.forget(name)
        own = re.compile(rf"{re.escape(name)}-[0-9a-f]{{12}}\b")
        ours = [path for path in toolchains.root.iterdir() if own.match(path.name)]
        for path in ours:
            if path.suffix in (".json", ".log") and not path.is_dir():
                path.unlink()
        freed = sum(_sweep(path) for path in ours if path.is_dir())
        if left := [path for path in ours if path.is_dir()]:
            raise ToolchainError(f"toolchain {name}: {left[0]} could not be removed", hint="remove it by hand")
        return freed


def size_of(toolchains: Toolchains, name: str) -> int:
    """Bytes on disk of the environment when it was made; 0 where there is none."""
    record = toolchains.record(read_toolchain(name))
    return record.bytes if record else 0


def _make(toolchains: Toolchains, toolchain: Toolchain, note: Note) -> None:
    name, root, stem = toolchain.name, toolchains.root, toolchains.stem(toolchain)
    base = _base_python(toolchain)
    for leftover in _tries(toolchains, toolchain):
        _sweep(leftover)
    free = shutil.disk_usage(root).free
    if free < toolchain.disk:
        raise ToolchainError(
            f"toolchain {name} takes {toolchain.disk / 1e9:.1f} GB, and {root} has {free / 1e9:.1f} free",
            hint="make room, or name another folder with --cache",
        )
    began, log = time.monotonic(), stem.with_suffix(".log")
    folder = Path(tempfile.mkdtemp(prefix=f"{stem.name}-", dir=root))
    note(f"toolchain {name}: installing what it needs, which can take minutes; log: {log}")
    try:
        with log.open("wb") as output:
            _run([base, "-m", "venv", folder], output)
            _fill(toolchain, folder, output)
        if wrong := toolchain.differs(*probe(python_in(folder))):
            raise ValueError(f"pip came to its end, but {wrong}")
    except BaseException as error:
        _sweep(folder)
        if isinstance(error, OSError | subprocess.SubprocessError | ValueError):
            full = shutil.disk_usage(root).free < FULL
            why = f"{root} is full" if full else what_it_said(error)
            raise ToolchainError(
                f"toolchain {name} could not be installed: {why}\n{_tail(log)}",
                hint=f"the whole log is {log}; the same command tries again, or {toolchain.otherwise}",
            ) from error
        raise
    record = Record(folder.name, round(time.monotonic() - began, 1), _bytes(folder))
    written = folder / "toolchain.json"
    written.write_text(json.dumps(asdict(record)))
    written.replace(stem.with_suffix(".json"))
    note(f"toolchain {name}: {record.bytes / 1e9:.2f} GB in {record.seconds:.0f} s")


def _fill(toolchain: Toolchain, folder: Path, output: Any) -> None:
    """First torch, if it is wanted: a CPU build where pip finds one, and then without CUDA's libraries."""
    python = python_in(folder)
    version, _ = probe(python)
    wanted = toolchain.wanted(version, "")
    torch = sorted((text for each, text in wanted if each.name == "torch"), key=lambda text: CPU not in text)
    for build in torch:
        try:
            _pip(python, [build], output)
        except subprocess.CalledProcessError:
            if build == torch[-1]:
                raise
            continue
        wanted = toolchain.wanted(version, probe(python)[1]["torch"])
        break
    _pip(python, [text for _, text in wanted if text not in torch], output)


def _pip(python: Path, requirements: Sequence[str], output: Any) -> None:
    if not requirements:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        words = ["--require-hashes", "--no-deps", "--no-input", "--disable-pip-version-check"]
        _run([python, "-m", "pip", "install", *words, "-r", file.name], output)


def _base_python(toolchain: Toolchain) -> Path:
    """An interpreter that the toolchain's wheels are for: this one, or one on PATH."""
    asked = SpecifierSet(toolchain.python)
    seen = {}
    for found in (sys.executable, *filter(None, map(shutil.which, PYTHONS))):
        try:
            seen[found], _ = probe(Path(found))
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
        if asked.contains(seen[found]):
            return Path(found)
    listed = ", ".join(f"{path} ({version})" for path, version in seen.items())
    raise ToolchainError(
        f"toolchain {toolchain.name} needs Python {toolchain.python}, and here is only {listed}",
        hint=f"put one on PATH, or {toolchain.otherwise}",
    )


@contextmanager
def _held(toolchains: Toolchains, toolchain: Toolchain, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        toolchains.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(toolchains.stem(toolchain).with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
    except OSError as error:
        raise ToolchainError(
            f"{toolchains.root} cannot be written: {error.strerror}", hint="name another folder with --cache"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _tries(toolchains: Toolchains, toolchain: Toolchain) -> list[Path]:
    return [each for each in toolchains.root.glob(f"{toolchains.stem(toolchain).name}-*") if each.is_dir()]


def _sweep(folder: Path) -> int:
    size = _bytes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size


def _run(words: Sequence[str | Path], output: Any) -> None:
    """With all that it starts, ended with us. Not in the folder that we are in: its files may have a module's name."""
    kept = {name: value for name, value in plain_environment().items() if _harmless(name)}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=kept, cwd=folder, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise subprocess.CalledProcessError(code, list(map(str, words)))


def _harmless(variable: str) -> bool:
    return not variable.startswith("PIP_") or variable.removeprefix("PIP_") in SOURCES


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
    except OSError:
        return ""


def _bytes(folder: Path) -> int:
    """Of all files; those that vanish meanwhile have none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total
