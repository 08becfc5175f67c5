"""Toolchains: Python environments that stand apart, since what is pinned in them cannot live together.

What each of them is stands in targets/toolchains/; installing.py makes them under the cache. Where the variable
`OPTIMIZE_TOOLCHAIN_NAME` names an interpreter (of a vendor's container, on a host without a network), that one is used
and nothing is installed. Nothing here imports what a toolchain holds: its metadata is read, in its own process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from optimize.pipeline.contract import DEFAULT
from optimize.pipeline.errors import ToolchainError
from optimize.pipeline.toolchain_files import Toolchain, read_toolchain

OLDEST = SpecifierSet(">=3.10")  # Python that our worker runs on
PROBE_LIMIT, IMPORT_LIMIT = 60.0, 300.0  # seconds

_PROBE = """
import json, sys
from importlib.metadata import distributions
found = [(each.metadata["Name"], each.version) for each in distributions()]  # in the order in which imports look
python = ".".join(map(str, sys.version_info[:3]))
print(json.dumps({"python": python, "packages": [pair for pair in found if all(pair)]}))
"""


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


@dataclass(frozen=True)
class Record:
    """Of an environment that was made: written in the cache when it was whole."""

    folder: str  # its name beside the record
    seconds: float  # that making it took
    bytes: int  # on disk


class Toolchains:
    """Finds environments under one cache. Each is probed once."""

    def __init__(self, cache: Path, asked: Path | None = None) -> None:
        self.root = cache / "toolchains"
        self._asked = asked  # what --cache was given, for the commands that errors name
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

    def remedy(self, toolchain: Toolchain, command: str = "install") -> str:
        """What to do where it is not there, or broken."""
        where = f" --cache {shlex.quote(str(self._asked))}" if self._asked else ""
        return f"run: optimize toolchain {command} {toolchain.name}{where}" if toolchain.lock else toolchain.otherwise

    def made(self, toolchain: Toolchain) -> Path | None:
        """The folder of the environment that was made and came to its end, or None."""
        record = self.record(toolchain)
        return self.root / record.folder if record and (self.root / record.folder).is_dir() else None

    def record(self, toolchain: Toolchain) -> Record | None:
        """What was written when it was whole, or None for nothing, and for what is none."""
        stem = self.stem(toolchain)
        try:
            found = json.loads(stem.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return None
        kinds: dict[str, Any] = {"folder": str, "seconds": (int, float), "bytes": int}
        whole = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        if not whole or not re.fullmatch(rf"{re.escape(stem.name)}-\w{{1,32}}", found["folder"]):
            return None
        return Record(**{key: found[key] for key in kinds})

    def try_imports(self, name: str) -> None:
        """Import what the toolchain is for, in its own process. Raises ToolchainError with the end of what it said."""
        environment, toolchain = self.find(name), read_toolchain(name)
        code = "; ".join(f"import {module}" for module in ("numpy", *toolchain.imports))
        try:
            _output([environment.python, "-c", code], IMPORT_LIMIT)
        except (OSError, subprocess.SubprocessError) as error:
            modules = ", ".join(toolchain.imports)
            raise ToolchainError(
                f"toolchain {name} does not import {modules}: {what_it_said(error)}",
                hint=f"{self.remedy(toolchain, 'remove')}, and install it again"
                if toolchain.lock
                else toolchain.otherwise,
            ) from error

    def _look(self, toolchain: Toolchain) -> Environment:
        name, chosen = toolchain.name, os.environ.get(toolchain.variable)
        if chosen:
            return self._named(toolchain, Path(shutil.which(chosen) or chosen).absolute())
        folder = self.made(toolchain)
        if folder is None:
            reason = "is not installed" if toolchain.lock else f"cannot be installed here: {toolchain.elsewhere}"
            raise ToolchainError(f"toolchain {name} {reason}", hint=self.remedy(toolchain), absent=True)
        try:
            version, packages = probe(python_in(folder))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            why = what_it_said(error)
            raise ToolchainError(
                f"toolchain {name} is broken: its interpreter does not start ({why})", hint=self.remedy(toolchain)
            ) from error
        if wrong := toolchain.differs(version, packages):
            raise ToolchainError(f"toolchain {name} was changed: {wrong}", hint=self.remedy(toolchain))
        if missing := toolchain.lacks(packages):
            raise ToolchainError(
                f"toolchain {name} does not have {missing}", hint="add it to the toolchain's requirements and lock"
            )
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
        if missing := toolchain.lacks(packages):
            raise ToolchainError(f"{where} does not have {missing}", hint="install it there, or name another")
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


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def probe(python: Path) -> tuple[str, dict[str, str]]:
    """The version of an interpreter, and of every distribution that it has, by canonical name.

    Raises OSError, subprocess.SubprocessError or ValueError for what is no Python that starts.
    """
    lines = _output([python, "-c", _PROBE], PROBE_LIMIT).splitlines()
    try:
        answer = json.loads(lines[-1])
        packages = reversed(answer["packages"])  # of two of one name, the first is imported
        return str(answer["python"]), {canonicalize_name(name): str(version) for name, version in packages}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("it does not answer as Python does") from error


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
    return kept | {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def what_it_said(error: Exception) -> str:
    """The last line of a process that failed, or what the system says of it."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it did not answer within {error.timeout:.0f} s"
    return str(error)
