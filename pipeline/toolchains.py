"""Toolchains: Python environments that stand apart, since what is pinned in them cannot live together.

What each of them is stands in targets/toolchains/; installing.py makes them under the cache. Where the variable
`OPTIMIZE_TOOLCHAIN_NAME` names an interpreter (of a vendor's container, on a host without a network), that one is used
and nothing is installed. Nothing here imports what a toolchain holds: its metadata is read, in its own process.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from optimize.pipeline.contract import DEFAULT
from optimize.pipeline.errors import RequestError, ToolchainError

OLDEST = SpecifierSet(">=3.10")  # Python that our worker runs on
CPU = "+cpu"  # ends the version of a CPU build of torch
CUDA = ("nvidia-", "cuda-", "triton")  # what only a CUDA build of torch asks for, but for what we ask for by name
PROBE_LIMIT, IMPORT_LIMIT = 60.0, 300.0  # seconds

_PROBE = """
import json, sys
from importlib.metadata import distributions
found = [(each.metadata["Name"], each.version) for each in distributions()]
python = ".".join(map(str, sys.version_info[:3]))
print(json.dumps({"python": python, "packages": [pair for pair in found if all(pair)]}))
"""


@dataclass(frozen=True)
class Toolchain:
    """What a file in targets/toolchains/ says: TOML, and beside it pip's lock where a registry has it all."""

    name: str
    why: str  # it stands apart
    python: str  # that its wheels are for, such as ">=3.10,<3.14"
    provides: tuple[str, ...]  # distributions that its passes and runtimes use
    imports: tuple[str, ...]  # modules that `doctor` imports, to see that it works
    requirements: tuple[str, ...]  # what the lock was resolved from
    disk: int = 0  # bytes that it takes, as seen on Linux with x86-64
    archived: str = ""  # why nothing that it makes is emitted unless that is asked for
    elsewhere: str = ""  # why it cannot be installed from a registry, and what to do
    lock: str = ""  # pip's requirements with hashes

    @property
    def digest(self) -> str:
        """Of the lock: what is installed from it is the same everywhere."""
        return hashlib.sha256(self.lock.encode()).hexdigest()

    @property
    def variable(self) -> str:
        """The environment variable that names an interpreter to be used in its place."""
        return f"OPTIMIZE_TOOLCHAIN_{self.name.upper().replace('-', '_')}"

    @property
    def otherwise(self) -> str:
        """What to do where it cannot be made."""
        return f"an interpreter that has it can be named: {self.variable}=/path/to/python"

    @property
    def remedy(self) -> str:
        """What to do where it is not there, or broken."""
        return f"run: optimize toolchain install {self.name}" if self.lock else self.otherwise

    def wanted(self, python: str, torch: str) -> list[tuple[Requirement, str]]:
        """What of its lock is installed on this platform for that Python, beside that build of torch; see `locked`.

        Without a build, torch comes in every one that is locked.
        """
        left_out = CUDA if torch.endswith(CPU) else ()
        asked = {Requirement(text).name for text in self.requirements}
        given = {"python_full_version": python, "python_version": ".".join(python.split(".")[:2])}
        every = [(e, text) for e, text in locked(self.lock) if e.name in asked or not e.name.startswith(left_out)]
        here = [(each, text) for each, text in every if each.marker is None or each.marker.evaluate(given)]
        return [(each, text) for each, text in here if not torch or each.name != "torch" or _is_build(each, torch)]


@dataclass(frozen=True)
class Environment:
    """The interpreter that runs a toolchain's workers, with what is installed beside it."""

    toolchain: str
    python: Path
    version: str  # of Python
    packages: Mapping[str, str] = field(default_factory=dict)  # canonical name -> version
    digest: str = ""  # of the lock that it was made from; where the user named it, of its packages
    named: bool = False  # by the user: OPTIMIZE_TOOLCHAIN_NAME
    archived: str = ""  # as the toolchain's file says


def toolchain_names() -> tuple[str, ...]:
    """Every toolchain's name: the files of targets/toolchains/, and of the folders that OPTIMIZE_TOOLCHAINS lists."""
    return tuple(sorted(_files()))


def read_toolchain(name: str) -> Toolchain:
    """What the toolchain's file says. Raises RequestError for a name that no file has, and for a file that is wrong."""
    files = _files()
    if name not in files:
        raise RequestError(f"toolchain {name!r} is not known", hint=f"toolchains: {', '.join(sorted(files))}")
    lock = files[name].with_suffix(".lock")
    try:
        facts = tomllib.loads(files[name].read_text(encoding="utf-8"))
        listed: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in facts.items()}
        found = Toolchain(name=name, lock=lock.read_text(encoding="utf-8") if lock.is_file() else "", **listed)
        locked(found.lock)
        SpecifierSet(found.python)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"toolchain {name}: {files[name]} and its lock cannot be read: {error}",
            hint="docs/writing-a-toolchain.md says what stands in them",
        ) from None
    return found


def locked(lock: str) -> tuple[tuple[Requirement, str], ...]:
    """Each requirement of a lock, pinned to one version, with the text that pip reads for it."""
    texts = re.sub(r"(?m)^\s*#.*\n", "", lock).replace("\\\n", " ").splitlines()
    return tuple((Requirement(text.partition(" --hash")[0]), text) for text in texts if text.strip())


class Toolchains:
    """Finds environments under one cache. Each is probed once."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / "toolchains"
        self._found: dict[str, Environment | ToolchainError] = {}

    def find(self, name: str) -> Environment:
        """The environment of a toolchain, probed. Raises ToolchainError with what to do where it cannot be used."""
        if name not in self._found:
            try:
                self._found[name] = self._look(read_toolchain(name))
            except ToolchainError as error:
                self._found[name] = error
        found = self._found[name]
        if isinstance(found, ToolchainError):
            raise found
        return found

    def find_all(self, names: Iterable[str]) -> dict[str, Environment]:
        """The environments of these, the default one left out. Raises ToolchainError as `find` does."""
        return {name: self.find(name) for name in names if name != DEFAULT}

    def forget(self, name: str) -> None:
        """Probe it again when it is asked for next."""
        self._found.pop(name, None)

    def stem(self, toolchain: Toolchain) -> Path:
        """What the names of all that belongs to it begin with."""
        return self.root / f"{toolchain.name}-{toolchain.digest[:12]}"

    def made(self, toolchain: Toolchain) -> Path | None:
        """The folder of the environment that was made and came to its end, or None."""
        name = self.record(toolchain).get("folder")
        return self.root / name if name and (self.root / name).is_dir() else None

    def record(self, toolchain: Toolchain) -> dict[str, Any]:
        """What was written when it was whole: its folder, the seconds that it took, its bytes; or nothing."""
        try:
            found: dict[str, Any] = json.loads(self.stem(toolchain).with_suffix(".json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def try_imports(self, name: str) -> None:
        """Import what the toolchain is for, in its own process. Raises ToolchainError with the end of what it said."""
        environment, toolchain = self.find(name), read_toolchain(name)
        code = "; ".join(f"import {module}" for module in toolchain.imports)
        try:
            _output([environment.python, "-c", code], IMPORT_LIMIT)
        except (OSError, subprocess.SubprocessError) as error:
            modules = ", ".join(toolchain.imports)
            raise ToolchainError(
                f"toolchain {name} does not import {modules}: {what_it_said(error)}", hint=toolchain.remedy
            ) from error

    def _look(self, toolchain: Toolchain) -> Environment:
        name, chosen = toolchain.name, os.environ.get(toolchain.variable)
        if chosen:
            return self._named(toolchain, Path(shutil.which(chosen) or Path(chosen).expanduser()).absolute())
        folder = self.made(toolchain)
        if folder is None:
            reason = "is not installed" if toolchain.lock else f"cannot be installed here: {toolchain.elsewhere}"
            raise ToolchainError(f"toolchain {name} {reason}", hint=toolchain.remedy, absent=True)
        try:
            version, packages = probe(python_in(folder))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            why = what_it_said(error)
            raise ToolchainError(
                f"toolchain {name} is broken: its interpreter does not start ({why})", hint=toolchain.remedy
            ) from error
        for requirement, _ in toolchain.wanted(version, packages.get("torch", "")):
            found = packages.get(canonicalize_name(requirement.name))
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                raise ToolchainError(
                    f"toolchain {name} was changed: {requirement.name} is {found or 'gone'}, and locked is "
                    f"{str(requirement.specifier).removeprefix('==')}", hint=toolchain.remedy,
                )  # fmt: skip
        return Environment(name, python_in(folder), version, packages, toolchain.digest, archived=toolchain.archived)

    def _named(self, toolchain: Toolchain, python: Path) -> Environment:
        where = f"toolchain {toolchain.name}: {toolchain.variable}={python}"
        try:
            version, packages = probe(python)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            why = what_it_said(error)
            raise ToolchainError(f"{where} is not a Python that starts ({why})", hint="name another") from error
        if not OLDEST.contains(version):
            raise ToolchainError(f"{where} is Python {version}, and the worker needs {OLDEST}", hint="name another")
        missing = [each for each in toolchain.provides if each not in packages]
        if missing:
            absent = ", ".join(missing)
            raise ToolchainError(f"{where} does not have {absent}", hint="install it there, or name another")
        digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode()).hexdigest()
        return Environment(toolchain.name, python, version, packages, digest, True, toolchain.archived)


def worker_environment(environment: Environment, scratch: Path) -> dict[str, str]:
    """The variables with which a toolchain's interpreter finds our source, and nothing else of ours.

    `scratch` gets a folder that holds this package alone: beside it, in site-packages, lies what must not be seen.
    """
    import optimize

    source = scratch / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "optimize").unlink(missing_ok=True)
    (source / "optimize").symlink_to(Path(optimize.__file__).resolve().parent)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    path = f"{environment.python.parent}{os.pathsep}{kept.get('PATH', '')}"  # its compilers and console scripts
    return kept | {"PYTHONPATH": str(source.absolute()), "PYTHONNOUSERSITE": "1", "PATH": path}


def _files() -> dict[str, Path]:
    """By name. One that we ship cannot be replaced."""
    shipped = Path(str(importlib.resources.files("optimize.targets"))) / "toolchains"
    more = filter(None, os.environ.get("OPTIMIZE_TOOLCHAINS", "").split(os.pathsep))
    return {path.stem: path for folder in (*map(Path, more), shipped) for path in folder.glob("*.toml")}


def _is_build(requirement: Requirement, version: str) -> bool:
    """Whether a requirement of torch pins the build that is there: 2.13.0 and 2.13.0+cpu are two."""
    return str(requirement.specifier).endswith(CPU) == version.endswith(CPU)


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def probe(python: Path) -> tuple[str, dict[str, str]]:
    """The version of an interpreter, and of every distribution that it has, by canonical name.

    Raises OSError, subprocess.SubprocessError or ValueError for what is no Python that starts.
    """
    answer = json.loads(_output([python, "-c", _PROBE], PROBE_LIMIT).splitlines()[-1])
    return answer["python"], {canonicalize_name(name): version for name, version in answer["packages"]}


def _output(words: Sequence[str | Path], limit: float) -> str:
    with tempfile.TemporaryDirectory() as folder:  # not here, where files may lie that have a module's name
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=plain_environment(), timeout=limit,
            check=True, cwd=folder,
        )  # fmt: skip
    return done.stdout


def plain_environment() -> dict[str, str]:
    """Our variables without those that would show another interpreter what is installed for this one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    return kept | {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}


def what_it_said(error: Exception) -> str:
    """The last line of a process that failed, or what the system says of it."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    return str(error)
