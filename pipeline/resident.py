"""What this process and those that it started have resident, as the system tells."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Bytes of this process in memory, at most since the last reset, with those of the processes that it started."""
    if not Path("/proc/self/status").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return sum(map(_peak_of, with_children(os.getpid())))


def with_children(pid: int) -> list[int]:
    """A process and all that descend from it. By hand: a toolchain's Python has no psutil."""
    try:
        found = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:  # it has ended
        found = []
    return [pid, *(each for child in found for each in with_children(int(child)))]


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def reset_peak_memory() -> None:
    with suppress(OSError):  # not Linux, or not permitted: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def let_go() -> None:
    """Give back what earlier steps left, so that the next one does not come on top of it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library of another kind
        ctypes.CDLL(None).malloc_trim(0)
