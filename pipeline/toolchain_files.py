"""Toolchains as files: what each is, why it stands apart, and pip's lock beside it. They lie in targets/toolchains/,
and in folders of one's own.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from optimize.pipeline.errors import RequestError

CPU = "+cpu"  # ends the version of a CPU build of torch
CUDA = ("nvidia-", "cuda-", "triton")  # what only a CUDA build of torch asks for, but for what we ask for by name
OWN = "OPTIMIZE_TOOLCHAINS"  # folders of toolchains of one's own


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

    def differs(self, python: str, packages: Mapping[str, str]) -> str:
        """In what an environment with that Python differs from the lock, or nothing."""
        for requirement, _ in self.wanted(python, packages.get("torch", "")):
            found = packages.get(canonicalize_name(requirement.name))
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                pinned = str(requirement.specifier).removeprefix("==")
                return f"{requirement.name} is {found or 'gone'}, and locked is {pinned}"
        return ""

    def lacks(self, packages: Mapping[str, str]) -> str:
        """What is not there of what it provides, and of what our worker needs."""
        needed = dict.fromkeys((*self.provides, "numpy"))
        return ", ".join(each for each in needed if canonicalize_name(each) not in packages)


def toolchain_names() -> tuple[str, ...]:
    """Every toolchain's name: the files of targets/toolchains/, and of the folders that OPTIMIZE_TOOLCHAINS lists."""
    return tuple(sorted(_files()))


def read_toolchain(name: str) -> Toolchain:
    """What the toolchain's file says. Raises RequestError for a name that no file has, and for a file that is wrong."""
    file = toolchain_file(name)
    lock = file.with_suffix(".lock")
    try:
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        if wrong := _wrong_fields(facts):
            raise ValueError(wrong)
        listed: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in facts.items()}
        found = Toolchain(name=name, lock=lock.read_text(encoding="utf-8") if lock.is_file() else "", **listed)
        SpecifierSet(found.python)
        for text in found.requirements:
            Requirement(text)
        if not locked(found.lock):
            found = replace(found, lock="")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"toolchain {name}: {file} and its lock cannot be read: {error}",
            hint="docs/writing-a-toolchain.md says what stands in them",
        ) from None
    if not found.lock and not found.elsewhere:
        return replace(found, elsewhere=f"{lock} is missing, which targets/toolchains/relock.py writes")
    return found


def _wrong_fields(facts: Mapping[str, Any]) -> str:
    """What is wrong with the names and types of a file's fields, or nothing."""
    texts, lists = ("why", "python", "archived", "elsewhere"), ("provides", "imports", "requirements")
    for key, value in facts.items():
        if key not in (*texts, *lists, "disk"):
            return f"{key!r} is not a field"
        if key in texts and not isinstance(value, str):
            return f"{key} is not a text"
        if key in lists and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            return f"{key} is not a list of texts"
        if key == "disk" and not isinstance(value, int):
            return "disk is not a number of bytes"
    if unlikely := [each for each in facts.get("imports", ()) if not re.fullmatch(r"[\w.]+", each)]:
        return f"{unlikely[0]!r} is no module"
    missing = [key for key in ("why", "python", *lists) if key not in facts]
    return f"{', '.join(missing)} is missing" if missing else ""


def locked(lock: str) -> tuple[tuple[Requirement, str], ...]:
    """Each requirement of a lock, pinned to one version, with the text that pip reads for it."""
    texts = re.sub(r"(?m)^\s*#.*$", "", lock).replace("\\\n", " ").splitlines()
    return tuple((Requirement(text.partition(" --hash")[0]), text) for text in texts if text.strip())


def _files() -> dict[str, Path]:
    """By name. Raises RequestError for a folder that is not there, a name that is none, and one that is taken."""
    shipped = Path(str(importlib.resources.files("optimize.targets"))) / "toolchains"
    found = {path.stem: path for path in shipped.glob("*.toml")}
    for folder in map(Path, filter(None, os.environ.get(OWN, "").split(os.pathsep))):
        if not folder.is_dir():
            raise RequestError(f"{OWN} names {folder}, which is no folder", hint="name folders of NAME.toml files")
        for path in sorted(folder.glob("*.toml")):
            if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", path.stem):
                raise RequestError(f"{path}: {path.stem!r} is no toolchain's name", hint="use a-z, 0-9 and -")
            if path.stem in found:
                raise RequestError(
                    f"{path}: there is a toolchain {path.stem} already, {found[path.stem]}", hint="use another name"
                )
            found[path.stem] = path
    return found


def toolchain_file(name: str) -> Path:
    """The file of a toolchain. Raises RequestError for a name that no file has."""
    files = _files()
    if name not in files:
        raise RequestError(
            f"toolchain {name!r} is not known",
            hint=f"toolchains: {', '.join(sorted(files))}; folders of your own are named in {OWN}",
        )
    return files[name]


def _is_build(requirement: Requirement, version: str) -> bool:
    """Whether a requirement of torch pins the build that is there: 2.13.0 and 2.13.0+cpu are two."""
    return str(requirement.specifier).endswith(CPU) == version.endswith(CPU)
