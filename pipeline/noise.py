"""What disturbed a measurement: other processes, the hypervisor, the processor's clock, and what came of it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

Counters = tuple[float, float, float, float]
NOTABLE = 0.05  # a share of processor time that is worth a word


@dataclass(frozen=True)
class Noise:
    """Of one measurement. Shares are of the time of the processors that it may use, while it was made."""

    others: float  # share that processes other than ours used
    stolen: float  # share that the hypervisor kept; 0 where the system does not tell
    load: float  # running or waiting processes, the mean of the last minute before it
    megahertz: tuple[float, float] | None  # the processors' mean clock before and after; None where it is not told
    spread: float  # of the baseline against itself within a quad: root mean square of the log ratio
    gpu: float | None = None  # share of the second before it, or after, in which others' kernels ran; None without GPU,
    # and where its driver does not tell

    def __str__(self) -> str:
        parts = [f"the baseline differs from itself by {self.spread:.1%}"]
        if self.others > NOTABLE:
            parts.append(f"other processes took {self.others:.0%} of the processors")
        if self.stolen > NOTABLE:
            parts.append(f"the hypervisor kept {self.stolen:.0%}")
        if self.gpu is not None and self.gpu > NOTABLE:
            parts.append(f"other processes computed on the GPU for {self.gpu:.0%} of the second before it or after")
        return ", ".join(parts)


class NoiseMeter:
    """Counters of the processors that we may use, and of the processes that measure, since it was made."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids  # with what they started: some runtimes are servers
        self._start = self.counters()
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self._megahertz = _megahertz()

    def shares(self, since: Counters | None = None) -> tuple[float, float]:
        """What other processes used and what the hypervisor kept since then; by default since it was made."""
        total, busy, stolen, ours = (
            now - then for now, then in zip(self.counters(), since or self._start, strict=True)
        )
        total = max(total, 1e-9)
        return max(busy - ours, 0.0) / total, stolen / total

    def read(self, spread: float) -> Noise:
        """The noise since it was made; `spread` is what the raw samples tell."""
        before, after = self._megahertz, _megahertz()
        clock = (before, after) if before is not None and after is not None else None
        return Noise(*self.shares(), self._load, clock, spread)

    def counters(self) -> Counters:
        """Seconds since boot, over our processors: all, busy, stolen, and used by our processes."""
        import psutil

        processors = psutil.cpu_times(percpu=True)
        if hasattr(os, "sched_getaffinity"):
            processors = [processors[index] for index in os.sched_getaffinity(0) if index < len(processors)]
        stolen = sum(getattr(times, "steal", 0.0) for times in processors)
        counted = ("user", "nice", "system", "irq", "softirq")  # `user` includes guests
        busy = sum(getattr(times, name, 0.0) for times in processors for name in counted)
        idle = sum(times.idle + getattr(times, "iowait", 0.0) for times in processors)
        ours = _used(os.getpid(), family=False) + sum(_used(pid, family=True) for pid in self._pids)
        return busy + stolen + idle, busy, stolen, ours


def _used(pid: int, *, family: bool) -> float:
    """Seconds of processor time of a process so far, with those that it started and that have not ended."""
    import psutil

    process, total = psutil.Process(pid), 0.0
    for each in [process, *(process.children(recursive=True) if family else ())]:
        with suppress(psutil.NoSuchProcess):
            used = each.cpu_times()
            total += used.user + used.system
    return total


def _megahertz() -> float | None:
    import psutil

    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return None if clock is None else float(clock.current)
