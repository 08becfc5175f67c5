"""The roofline: how near a call comes to what this host's arithmetic and memory allow. See docs/measuring.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.pipeline.contract import Target, Word
from optimize.pipeline.versions import installed_version

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
EXPLAINED = 0.5  # share of the time that arithmetic or memory must account for, to be what limits it


class Limit(Word):
    """What a call's time goes into."""

    ARITHMETIC = "arithmetic"
    MEMORY = "memory"
    OVERHEAD = "overhead"  # neither: launching, converting, copying, waiting for threads


@dataclass(frozen=True)
class Peaks:
    """What this host was seen to reach at most, on all cores that a run may use."""

    operations: Mapping[str, float]  # multiplications and additions a second, by dtype
    bandwidth: float  # bytes read a second

    def __str__(self) -> str:
        parts = [f"{name} {peak / 1e9:.0f}" for name, peak in self.operations.items()]
        return f"{', '.join(parts)} GFLOP/s; memory {self.bandwidth / 1e9:.1f} GB/s"


@dataclass(frozen=True)
class Work:
    """What one call of one cell cannot do without."""

    operations: int  # multiplications and additions of its matrix products, convolutions and attention
    weights: int  # elements of the weights that they read
    arrays: int  # bytes of its inputs and outputs


@dataclass(frozen=True)
class Roof:
    """One cell of one side: the least time its work takes on this host, and how much of the measured time that is."""

    seconds: float
    share: float  # above 1 where the peaks were measured on a busier host, or a runtime multiplies faster than torch
    limit: Limit

    def __str__(self) -> str:
        return f"{self.limit} {self.share:.0%}"


def roof(work: Work, measured: float, arithmetic: str, weight_bytes: float, peaks: Peaks) -> Roof:
    """The roof of a call that took `measured` seconds.

    `arithmetic` is the dtype of its matrix products, `weight_bytes` the size of one stored weight element. Weights,
    inputs and outputs count once; what lies between is taken to stay in the caches. So the roof is an optimistic one.
    Source: Williams, Waterman and Patterson, Roofline (CACM 2009)
    """
    computing = work.operations / peaks.operations[arithmetic]
    reading = (work.weights * min(weight_bytes, BYTES[arithmetic]) + work.arrays) / peaks.bandwidth
    share = max(computing, reading) / measured
    limit = Limit.ARITHMETIC if computing >= reading else Limit.MEMORY
    return Roof(max(computing, reading), share, limit if share >= EXPLAINED else Limit.OVERHEAD)


def roofs(
    works: Sequence[Work], measured: Sequence[float], arithmetic: str, weight_bytes: float, peaks: Peaks | None
) -> tuple[Roof, ...]:
    """The roof of every cell; none where the work or the host's peak for that dtype is not known."""
    if not works or peaks is None or arithmetic not in peaks.operations:
        return ()
    return tuple(
        roof(work, seconds, arithmetic, weight_bytes, peaks) for work, seconds in zip(works, measured, strict=True)
    )


def known_peaks(cache: Path, target: Target) -> Peaks | None:
    """What was measured on this host before."""
    try:
        return Peaks(**json.loads(_file(cache, target).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def measure_peaks(
    cache: Path, target: Target, ask: Callable[[], Mapping[str, Any]], *, disturbed: Callable[[], bool] = lambda: False
) -> Peaks:
    """Measure with `ask` (a worker's operation `peaks`), and remember the best that was ever seen on this host.

    Where `disturbed` says afterwards that the host was busy, nothing is remembered: see known_peaks.
    """
    found, known = Peaks(**ask()), known_peaks(cache, target)
    if known is not None:
        best = {name: max(peak, known.operations.get(name, 0.0)) for name, peak in found.operations.items()}
        found = Peaks(best, max(found.bandwidth, known.bandwidth))
    if disturbed():
        return found
    path = _file(cache, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(dataclasses.asdict(found), file)
    Path(file.name).replace(path)  # whole or not at all: two runs may write it
    return found


def _file(cache: Path, target: Target) -> Path:
    fingerprint = {**dataclasses.asdict(target), "gpu_used": 0, "torch": installed_version("torch")}
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "peaks" / f"{name}.json"
