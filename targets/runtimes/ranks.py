"""Processes that compute one model together (ranks, as torch.distributed has it): asked as one, watched, ended as one.

Whoever waits for a rank that died, or that hangs, waits in a collective operation for as long as its library lets it.
So all are watched from here: the first that fails ends all of them, and the error says which, and what it was doing.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from optimize.pipeline.errors import OptimizeError
from optimize.pipeline.workers import STEP_LIMIT

# seconds, of those that the driver gives a whole request, and then kills the worker without a word of ranks
OPENING, CALL = STEP_LIMIT / 2, STEP_LIMIT / 6
POLL = 0.2
GRACE = 1.0  # seconds for a rank to die of what it failed of, or to write down where it is
FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')  # of what faulthandler writes, the innermost first
TOLD = signal.SIGUSR1  # to write that down


class Ranks:
    """A group of processes, each with the same model: see rank.py. They end with this object, and with this process."""

    def __init__(self, count: int, path: Path, task: str, threads: int, device: str) -> None:
        """Open the model in `path` in all of them. Raises what `ask` raises."""
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self._limit, self._ended = CALL, ""
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, self._processes, self._pipes, self._scratch)
        try:
            for rank in range(count):
                self._start(rank, count, threads, device)
            store = str(Path(self._scratch.name, "store"))
            self._ask("opening", OPENING, (str(path), task, threads, device, store, 2 * OPENING))
        except BaseException:
            self._end()
            raise

    def _start(self, rank: int, count: int, threads: int, device: str) -> None:
        ours, theirs = socket.socketpair()
        for each in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # one that is stopped neither reads nor writes on
            ours.setsockopt(socket.SOL_SOCKET, each, struct.pack("ll", int(self._limit) + 1, 0))
        own = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": threads,
            "OPTIMIZE_RANK": theirs.fileno(), "OPTIMIZE_WHERE": self._where(rank), "PYTHONSAFEPATH": 1,
            "GLOO_SOCKET_IFNAME": "lo",  # else it takes the host's name for an address
            "TORCH_NCCL_ENABLE_MONITORING": 0,  # it would take a long pause for a hang
        } | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
        env = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, "-m", "optimize.targets.runtimes.rank"]
        with theirs:  # no session of its own: what pauses or kills the worker and what it started, takes it along
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=env)
        self._processes.append(process)
        self._pipes.append(Connection(ours.detach()))

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the first of them answers, once all have. Raises RuntimeError where one of them dies, fails, or has no
        answer within the limit: then all have ended; and OptimizeError as one raises it.
        """
        return self._ask(operation, self._limit, (operation, arguments))

    def _ask(self, doing: str, limit: float, request: Any) -> Any:
        if self._ended:
            raise RuntimeError(f"its processes have ended: {self._ended}")
        try:
            for pipe in self._pipes:
                with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which is seen below
                    pipe.send(request)
            return self._answer(doing, limit)
        except BaseException as error:
            self._ended = str(error) or type(error).__name__
            self._end()
            if isinstance(error, BlockingIOError):
                raise RuntimeError(f"a rank takes no request ({doing}), or gives half an answer") from None
            raise

    def _answer(self, doing: str, limit: float) -> Any:
        answers: dict[int, Any] = {}
        left = limit  # only what is spent here: a process that is stopped meanwhile has not waited
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = [waiting[pipe] for pipe in wait(list(waiting), POLL) if isinstance(pipe, Connection)]
            if not ready:
                left -= POLL
            if left <= 0:
                raise RuntimeError(
                    f"{doing} took longer than its limit of {limit:.0f} s: {self._whereabouts(waiting.values())}"
                )
            for rank in ready:
                answers[rank] = self._receive(rank, doing)
        return answers[0]

    def _receive(self, rank: int, doing: str) -> Any:
        """A rank's answer. Raises what went wrong in it; a failure may follow from another's death."""
        try:
            found = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            found = None
        if found is not None and "error" not in found:
            return found["answer"]
        time.sleep(GRACE)
        ended = {each: code for each, process in enumerate(self._processes) if (code := process.poll()) is not None}
        died = who_died(ended, rank if found is None else None)
        if died is not None:
            raise RuntimeError(f"{self._name(died)} {_how_it_ended(ended[died])} during {doing}")
        error = found["error"] if found else None
        if isinstance(error, OptimizeError):
            raise error
        raise RuntimeError(f"{self._name(rank)} failed during {doing}: {error or 'it closed its pipe'}")

    def _whereabouts(self, ranks: Iterable[int]) -> str:
        """What ranks that do not answer are doing; first those that do not wait for others."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, TOLD)
        time.sleep(GRACE)
        hang, waits = list[str](), list[str]()
        for rank in ranks:
            path = Path(self._where(rank))
            frames = FRAME.findall(path.read_text() if path.exists() else "")
            inner = list(itertools.takewhile(lambda frame: "/torch/" in frame[0], frames))
            collective = next((frame for frame in inner if "/torch/distributed/" in frame[0]), None)
            if _is_stopped(self._processes[rank].pid):
                hang.append(f"{self._name(rank)} is stopped")
            elif collective is not None:
                waits.append(f"{self._name(rank)} waits for others in {_place(collective)}")
            else:
                hang.append(f"{self._name(rank)} is {f'in {_place(frames[0])}' if frames else 'silent'}")
        return "; ".join([*hang, *waits])

    def _where(self, rank: int) -> str:
        return str(Path(self._scratch.name, f"{rank}.where"))

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {len(self._processes)} (process {self._processes[rank].pid})"


def who_died(ended: dict[int, int], closed: int | None) -> int | None:
    """The rank whose death explains a failure: one that was killed, since others fail after it; else the one that
    closed its pipe without a word. `ended` has the exit codes of those that have ended, as subprocess gives them.
    """
    return next((rank for rank, code in ended.items() if code < 0), closed if closed in ended else None)


def _place(frame: tuple[str, str, str]) -> str:
    path, line, function = frame
    return f"{function} ({Path(path).name}:{line})"


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    memory = " (the kernel does this when memory runs out)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def _end(
    processes: list[subprocess.Popen[bytes]], pipes: list[Connection], scratch: tempfile.TemporaryDirectory[str]
) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for pipe in pipes:
        pipe.close()
    scratch.cleanup()
