"""Memory as the plan reckons with it: estimates in bytes, what there is, and how both are written.

An estimate is an upper bound of what a process has resident, weights that are mapped from files counted like others.
What the factors come from is in docs/measuring.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from optimize.pipeline.errors import RequestError

MIB, GIB = 1 << 20, 1 << 30
DRIVER = 150 * MIB  # the command itself, which plans, waits and judges
FRAMEWORKS = 900 * MIB  # a worker that builds: what it imports, and what its earlier steps left behind
CUDA = 600 * MIB  # of the host, more in each worker where a GPU is: torch's build for it, and its driver
MORE = "raise --memory if it was given, run on a host with more, or give a smaller checkpoint"
EAGER = 600 * MIB  # a worker that runs the eager model, without weights
_UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": MIB, "mib": MIB, "mb": 10**6}


@dataclass(frozen=True)
class Need:
    """Bytes that the worker which builds a recipe has resident at most, and the one that runs its artifact."""

    build: int = 0
    run: int = 0
    gpu: int = 0  # bytes of each GPU that its artifact runs on
    gpus: int = 1  # that share it, of the eager model: more where one does not hold it

    def beside(self, baseline: int) -> int:
        """Bytes of all processes at once. The baseline is closed for building where both do not fit."""
        return DRIVER + max(self.build, self.run + baseline)


def why_too_large(need: Need, baseline: int, memory: int) -> str | None:
    """Why a recipe cannot be built, or run beside the baseline, in `memory` bytes; None where it can."""
    there = f"{memory / GIB:.1f} may be used"
    if DRIVER + need.build > memory:
        return f"needs about {gib(DRIVER + need.build)} GiB to build; {there}"
    if need.beside(baseline) > memory:
        return f"needs about {gib(need.beside(baseline))} GiB to run beside the baseline; {there}"
    return None


def why_gpu_too_small(need: Need, baseline: Need, free: int) -> str | None:
    """Why an artifact does not fit beside the baseline into `free` bytes of a GPU; None where it does."""
    if need.gpu + baseline.gpu <= free:
        return None
    return (
        f"needs about {gib(need.gpu)} GiB of each of its GPUs, and {gib(baseline.gpu)} for the baseline; "
        f"{free / GIB:.1f} are free"
    )


def what_would_fit(needs: Mapping[str, Need], baseline: int, memory: int) -> str:
    """Of recipes by name: the one that needs least, and whether that is there."""
    name, need = min(needs.items(), key=lambda item: item[1].beside(baseline))
    least = f"{name} needs least: about {gib(need.beside(baseline))} GiB"
    if need.beside(baseline) <= memory:
        return f"{least}, which fits: --recipe {name}"
    return f"{least}; {MORE}"


def gib(size: int) -> str:
    """`7.9`, rounded up: of what is needed."""
    return f"{-(-size * 10 // GIB) / 10:.1f}"


def parse_memory(text: str) -> int:
    """Bytes of `6GiB`, `6G`, `6` (GiB), `500MB`. Raises RequestError for anything else, and below 64 MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise RequestError(f"--memory {text!r} is not a size", hint="for example 6GiB or 500MiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 64 * MIB:
        raise RequestError(f"--memory {text!r} is less than 64 MiB: nothing runs in that", hint="for example 6GiB")
    return size


def reference_memory(parameters: int) -> int:
    """What the float32 reference takes at least, whatever is judged with it."""
    return EAGER + 4 * parameters
