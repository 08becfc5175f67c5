"""Versions of what is installed, asked without importing or starting it: that would take seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

EXPORTERS = "5.23"  # of transformers: whose exporters give programs of one kind


@cache
def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, from its metadata."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def why_older(distribution: str, least: str) -> str | None:
    """Why an installed distribution is too old for something; None where it is not, or is not there at all."""
    from packaging.version import Version

    found = installed_version(distribution)
    if found is None or Version(found) >= Version(least):
        return None
    return f"it needs {distribution} {least} or newer, and {found} is installed: pip install '{distribution}>={least}'"


@cache
def ollama_version() -> str | None:
    """Version of the `ollama` on PATH, or "unknown"; None where there is none. It asks no server."""
    executable = shutil.which("ollama")
    if executable is None:
        return None
    try:
        environment = os.environ | {"OLLAMA_HOST": "127.0.0.1:1"}  # where nobody listens: it then names its own
        done = subprocess.run(
            [executable, "--version"], capture_output=True, text=True, env=environment, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"version is (\S+)\s*$", done.stdout)
    return found[1] if found else "unknown"
