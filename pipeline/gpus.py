"""GPUs as their driver tells of them: which are visible, and what a worker holds of their memory.

The command asks, not the worker: a toolchain's Python may lack the driver's library, and only the driver counts what
CUDA's context, graphs, every framework's allocator and processes that the worker started hold.
Source: https://docs.nvidia.com/deploy/nvml-api
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from optimize.pipeline.resident import with_children

# what torch, CUDA's libraries, ONNX Runtime, TensorRT and vLLM say where a GPU's memory runs out
_RAN_OUT = re.compile(
    r"\b(CUDA|HIP)\b.{0,40}out of memory|\bOutOfMemory(Error)?\b|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|Free memory on device .{0,80}is less than desired GPU memory utilization"
)
RESTED = 1.5  # seconds after a process's last kernel in which the driver's mean over the last second forgets it
_TRIED, _FREE = re.compile(r"Tried to allocate ([\d.]+ \w+)"), re.compile(r"of which ([\d.]+ \w+) is free")


@dataclass(frozen=True)
class GpuMemory:
    """What a process and those that it started hold of GPU memory."""

    most: int  # bytes, of the GPU that they hold most of
    by_process: bool = True  # else by how much all that is used there had grown, with what others took meanwhile


class GpuMeter:
    """GPU memory since before a process was begun, on the first `gpus` of those that are visible."""

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._before = self._memory()

    @property
    def free(self) -> int | None:
        """Bytes that were free before it was begun, of the GPU with least; None where no driver tells."""
        return min((total - used for used, total in self._before), default=None)

    def read(self, pid: int) -> GpuMemory | None:
        """What the process holds now. The driver knows no peak, but allocators keep what they took: ask it when all
        that it is to do was done.

        In a container the driver may know processes by other numbers, or none at all. Then it is what is used more
        than before; None where that is no more, or no driver tells.
        """
        family = set(with_children(pid))
        held = max((sum(size for each, size in found if each in family) for found in self._processes()), default=0)
        if held:
            return GpuMemory(held)
        pairs = zip(self._before, self._memory(), strict=False)  # there are none where a driver is silent
        grown = max((now - then for (then, _), (now, _) in pairs), default=0)
        return GpuMemory(grown, by_process=False) if grown > 0 else None

    def others(self) -> float | None:
        """The share of a second in which others' kernels ran, if ours are paused: waits until ours are forgotten."""
        time.sleep(RESTED)
        return busy(self._gpus)

    def _memory(self) -> list[tuple[int, int]]:
        """Bytes that are used of each GPU, by whatever process, and that it has."""
        import pynvml

        with suppress(pynvml.NVMLError), visible() as devices:
            found = map(pynvml.nvmlDeviceGetMemoryInfo, devices[: self._gpus])
            return [(int(memory.used), int(memory.total)) for memory in found]
        return []

    def _processes(self) -> list[list[tuple[int, int]]]:
        """Of each GPU, the processes that compute there: number, and bytes where the driver tells them."""
        import pynvml

        with suppress(pynvml.NVMLError), visible() as devices:
            found = map(pynvml.nvmlDeviceGetComputeRunningProcesses, devices[: self._gpus])
            return [[(int(each.pid), int(each.usedGpuMemory or 0)) for each in processes] for processes in found]
        return []


def busy(gpus: int) -> float | None:
    """The share of about the last second in which somebody's kernels ran: of the busiest of the first `gpus` of those
    that are visible. None where no driver tells, as under MIG.
    """
    import pynvml

    percents = []
    with suppress(pynvml.NVMLError), visible() as devices:
        for device in devices[:gpus]:
            with suppress(pynvml.NVMLError):
                percents.append(int(pynvml.nvmlDeviceGetUtilizationRates(device).gpu))
    return max(percents) / 100 if percents else None


def ran_out(text: str) -> str | None:
    """What an error's text says of GPU memory that ran out, in few words, or in none; None where it is about others."""
    if _RAN_OUT.search(text) is None:
        return None
    tried, free = _TRIED.search(text), _FREE.search(text)
    words = [f"{tried[1]} were to be allocated"] if tried else []
    return ", ".join([*words, *([f"{free[1]} were free"] if free else [])])


@contextmanager
def visible() -> Iterator[list[Any]]:
    """The driver's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order. Raises pynvml.NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield _handles()
    finally:
        pynvml.nvmlShutdown()


def _handles() -> list[Any]:
    """By index, or by what an identifier begins with; CUDA leaves out all from the first that names none."""
    import pynvml

    every = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return every
    chosen: list[Any] = []
    for word in (each.strip() for each in visible.split(",")):
        if word.isdigit():
            named = every[int(word) : int(word) + 1]
        else:
            named = [each for each in every if word and pynvml.nvmlDeviceGetUUID(each).startswith(word)]
        if len(named) != 1:
            break
        chosen += named
    return chosen
