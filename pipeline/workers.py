"""Worker processes seen from the parent: start, ask with a time limit, pause, resume, kill.

A worker is a session leader of its own, so that killing it takes its compilers along and Ctrl-C reaches only the
parent, which then kills its workers in order. If the parent itself is killed, the kernel kills the worker, and a guard
what the worker started: a process that is stopped would outlive it, with all that it holds of a GPU.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optimize.pipeline.errors import WorkerError
from optimize.pipeline.gpus import GpuMemory, GpuMeter, ran_out
from optimize.pipeline.memory import GIB
from optimize.pipeline.toolchains import Environment, worker_environment
from optimize.pipeline.worker import PROTOCOL

# waits until nobody holds the other end of its input any more, and kills a process group: stopped ones die of it too
GUARD = 'read -r _; kill -s KILL -- "-$0"'
STEP_LIMIT = float(os.environ.get("OPTIMIZE_STEP_LIMIT", "1800"))  # seconds for one pass or one request
CALL_LIMIT = min(300.0, STEP_LIMIT)  # and for a cell's timed calls of one block
LOG_TAIL = 12  # lines shown of a failed worker's log
POLL_SECONDS = 0.2
ELSEWHERE = re.compile("root cause|background process|died")  # an error that another process's text in the log explains
ROOM = "what would help: a smaller --workload, nothing else on the GPU (see nvidia-smi), or other recipes (--recipe)"


class WorkerProcess:
    """One child process with its log. Use as a context manager: leaving it ends the process."""

    def __init__(self, log: Path, environment: Environment | None = None, gpus: int = 0) -> None:
        """Start it: in a toolchain's environment, or with this interpreter. Raises WorkerError if that is gone.

        It computes on the first `gpus` of those that are visible.
        """
        self.log, self.name = log, log.stem
        self._gpus = GpuMeter(gpus) if gpus else None
        self._scratch = log.with_suffix(".tmp")  # compilers and loaders leave files behind when they are killed
        self._scratch.mkdir(parents=True, exist_ok=True)
        python = environment.python if environment is not None else sys.executable
        own = worker_environment(environment, self._scratch) if environment is not None else os.environ
        read_end, write_end = os.pipe()
        variables = own | {
            "OPTIMIZE_ANSWERS": str(write_end),
            "OPTIMIZE_PARENT": str(os.getpid()),
            "HF_HUB_OFFLINE": "1",  # what a worker needs was fetched before
            "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime reports home, and keeps a database in the user's cache
            "VLLM_NO_USAGE_STATS": "1",  # vLLM reports home too
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as the driver counts GPUs
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self._scratch.absolute()),
            "PYTHONSAFEPATH": "1",  # the user's folder may have files with a module's name
        }
        # compiled headers and kernels, which torch would keep in the temporary folder, serve every later build
        variables.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [python, "-m", "optimize.pipeline.worker"], stdin=subprocess.PIPE, stdout=output,
                    stderr=subprocess.STDOUT, pass_fds=(write_end,), env=variables, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            os.close(read_end)
            if not Path(python).exists():  # a toolchain that was removed meanwhile
                message = f"the worker's interpreter {python} is gone"
                raise WorkerError(message, kind="died", worker=self.name) from error
            raise
        finally:
            os.close(write_end)
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, str(self.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.set_blocking(read_end, False)
        self._answers = read_end
        self._received = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self, operation: str, *, limit: float, progress: Callable[[], None] = lambda: None, **arguments: Any
    ) -> Any:
        """The operation's result. Calls `progress` a few times a second while waiting.

        Raises WorkerError when the worker answers with an error, dies, or takes longer than `limit` seconds; after
        the latter two it is gone.
        """
        assert self._process.stdin is not None
        request = json.dumps({"protocol": PROTOCOL, "operation": operation, "arguments": arguments})
        logged = self.log.stat().st_size if self.log.exists() else 0
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death(operation, logged) from None
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if time.monotonic() > deadline:
                    self.kill()
                    raise WorkerError(
                        f"{operation} took longer than its limit of {limit:.0f} s and was stopped",
                        kind="timeout", log_tail=self.log_tail(), worker=self.name,
                    )  # fmt: skip
                progress()
                ended = not self.alive  # before the look at the pipe, which children of the dead may hold open
                if selector.select(POLL_SECONDS):
                    data = os.read(self._answers, 1 << 16)
                    ended = not data
                    self._received += data
                if ended and b"\n" not in self._received:
                    raise self._death(operation, logged)
        line, self._received = self._received.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(answer, logged)
        return answer["result"]

    def gpu_memory(self) -> GpuMemory | None:
        """What it and all that it started hold of GPU memory now; None on a processor: see GpuMeter.read."""
        return self._gpus.read(self.pid) if self._gpus else None

    def others_on_gpu(self) -> float | None:
        """While it and all of ours are paused: see GpuMeter.others. None on a processor."""
        return self._gpus.others() if self._gpus else None

    def pause(self) -> None:
        """Stop the process, so that its spinning threads do not tax what is being timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process and everything it started."""
        self._guard.kill()  # first: the process's number may soon be another's
        self._guard.wait()
        self._signal(signal.SIGKILL)
        self._process.wait()

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-LOG_TAIL:])

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing, and let go of its pipes."""
        self.kill()
        for each in (self._process, self._guard):
            assert each.stdin is not None
            with suppress(BrokenPipeError):
                each.stdin.close()
        os.close(self._answers)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(self._process.pid, number)

    def _failure(self, answer: dict[str, Any], logged: int) -> WorkerError:
        """What was answered with an error; the log from `logged` on belongs to it."""
        text, kind = answer["error"], answer["kind"]
        if kind == "error":
            words = ran_out(text)
            if words is None and ELSEWHERE.search(text):
                words = ran_out(self._logged_since(logged))
            if words is not None:
                return self._out_of_memory(answer["doing"], words)
        return WorkerError(text, hint=answer["hint"], kind=kind, log_tail=self.log_tail(), worker=self.name)

    def _out_of_memory(self, doing: str, words: str) -> WorkerError:
        free = self._gpus.free if self._gpus else None
        begun = "" if free is None else f"; {free / GIB:.1f} GiB were free before it was opened"
        words = f": {words}" if words else ""
        return WorkerError(
            f"out of GPU memory {doing}{words}{begun}", hint=ROOM, kind="memory", log_tail=self.log_tail(),
            worker=self.name,
        )  # fmt: skip

    def _logged_since(self, size: int) -> str:
        with self.log.open("rb") as log:
            log.seek(size)
            return log.read().decode(errors="replace")

    def _death(self, operation: str, logged: int) -> WorkerError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        if self.log.exists() and (words := ran_out(self._logged_since(logged))) is not None:
            return self._out_of_memory(f"during {operation}, of which it died", words)
        if code is not None and code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += " (the kernel does this when memory runs out)"
        else:
            reason = f"ended with exit code {code}"
        message = f"the worker {reason} during {operation}"
        return WorkerError(message, kind="died", log_tail=self.log_tail(), worker=self.name)


@contextmanager
def running(worker: WorkerProcess) -> Iterator[WorkerProcess]:
    """Let a paused worker run for the length of the block."""
    worker.resume()
    try:
        yield worker
    finally:
        worker.pause()
