"""Keys of artifacts: their lineage, known before anything is built. What is not in a key is named here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from optimize.pipeline.contract import Cell, Checkpoint, Pass, Target
from optimize.pipeline.toolchains import Environment
from optimize.pipeline.versions import installed_version

KEY_VERSION = 1  # bump when the meaning of keys changes


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """The key that every recipe starts from: the files' content. Not in it: the id, the folder, the file times."""
    return _sha256({"version": KEY_VERSION, "files": dict(checkpoint.files)})


def step_key(
    source_key: str,
    step: Pass,
    task: str,
    target: Target,
    calibration_digest: str | None,
    environment: Environment | None = None,
    workload: Sequence[Cell] = (),
) -> str:
    """The lineage key of what `step` makes from the artifact `source_key`.

    Not in it, because it does not change the output: the host's name, memory, load and time, the cache folder, the
    worker that runs it, and versions of distributions that the pass does not name; but of a toolchain, all of them.
    """
    some = {} if environment is None else {"toolchain": environment.digest}
    if step.shaped:
        some["workload"] = ",".join(map(str, workload))
    return _sha256(
        some
        | {
            "source": source_key,
            "pass": step.name,
            "version": step.version,
            "options": {option.name: getattr(step, option.name) for option in fields(step)},
            "tools": {tool: tool_version(tool, environment) for tool in step.tools},
            "target": {fact: getattr(target, fact) for fact in step.target_facts},
            "task": task,
            "calibration": calibration_digest if step.calibrated else None,
        }
    )


def tool_version(tool: str, environment: Environment | None) -> str | None:
    """The installed version of a distribution, in this environment or a toolchain's; None where it is not there."""
    return installed_version(tool) if environment is None else environment.packages.get(tool)


def _sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()
