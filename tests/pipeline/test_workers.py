"""Real worker processes: they answer, and whatever they do wrong costs one WorkerError and leaves nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from optimize.pipeline.calls import call_of
from optimize.pipeline.contract import Target
from optimize.pipeline.errors import ExitCode, WorkerError
from optimize.pipeline.prepare import unusable
from optimize.pipeline.toolchains import Environment
from optimize.pipeline.trial import problem_text, with_estimate
from optimize.pipeline.worker import Worker
from optimize.pipeline.workers import LOG_TAIL, WorkerProcess, running
from tests.conftest import Install

Build = Callable[..., Any]
LIMIT = 30.0
EASY: dict[str, Any] = {"operation": "calibrate", "seconds": 1e-4, "limit": LIMIT}  # something to ask

PASSES = '''
@dataclass(frozen=True)
class Misbehave(Base):
    """Does what `how` says."""

    name: ClassVar = "misbehave"
    how: str = "well"

    def run(self, source, context, out):
        (out / "made.txt").write_text(source.key)
        return getattr(self, self.how)(out) or {}

    def well(self, out):
        return {"cores": context_free()}

    def prints(self, out):
        print('{"result": "not an answer"}')
        os.write(1, b"from C, unfinished")
        subprocess.run(["echo", "from a child"], check=True)
        print("to stderr", file=sys.stderr)

    def raises(self, out):
        for number in range(20):
            print("compiling unit", number)
        raise ValueError("operator Foo is not supported")

    def dies(self, out):
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def crashes(self, out):
        os.kill(os.getpid(), signal.SIGSEGV)

    def exits(self, out):
        os._exit(17)

    def spins(self, out):
        while True:
            pass

    def spins_a_second(self, out):
        end = time.process_time() + 1.0
        while time.process_time() < end:
            pass

    def waits_for_a_child(self, out):
        child = subprocess.Popen(["sleep", "600"])
        (out / "child.pid").write_text(str(child.pid))
        child.wait()

    def leaves_a_fork_and_dies(self, out):
        if os.fork() == 0:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)

    def runs_out(self, out):
        raise OutOfMemoryError(RAN_OUT)

    def finds_no_room(self, out):
        raise ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")

    def starts_what_runs_out(self, out):
        subprocess.run(["echo", RAN_OUT], check=True)
        raise RuntimeError("initialization failed due to an exception in a background process. See root cause above.")

    def runs_out_and_dies(self, out):
        print(RAN_OUT, flush=True)
        os.abort()

    def recovers_and_fails(self, out):
        print(RAN_OUT)
        raise ValueError("something else")

    def reads_its_input(self, out):
        return {"read": sys.stdin.readline()}

    def reports_a_path(self, out):
        return {"where": out}

    def ensures(self, out):
        if self.how == "breaks_its_promise":
            raise RuntimeError("the graph has a fixed batch")

    def breaks_its_promise(self, out):
        pass


def context_free():
    return 1

class OutOfMemoryError(RuntimeError):
    """As torch has it."""

RAN_OUT = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 3.25 GiB is "
    "free. Including non-PyTorch memory, this process has 75.9 GiB memory in use."
)
'''


@pytest.fixture
def worker(tmp_path: Path, third_party: Install) -> Iterator[WorkerProcess]:
    third_party(PASSES, {"misbehave": "Misbehave"})
    with WorkerProcess(tmp_path / "logs" / "worker.log") as process:
        yield process


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def build(worker: WorkerProcess, out: Path, target: Target) -> Build:
    """Let the worker run the pass that behaves as named."""

    def ask(how: str, limit: float = LIMIT, **arguments: Any) -> Any:
        source = {"kind": "checkpoint", "path": str(out), "key": "the key", "digest": "d"}
        return worker.ask(
            "build", limit=limit, step=f"misbehave{{how={how}}}", source=source, task="fill-mask",
            target=asdict(target), calibration=None, out=str(out), **arguments,
        )  # fmt: skip

    return ask


def gone(pid: int, within: float = 5.0) -> bool:
    """Whether the process ends in time. One that nobody has waited for yet has ended too."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_it_answers_again_and_again(worker: WorkerProcess) -> None:
    assert worker.alive
    counts = [worker.ask(**EASY) for _ in range(3)]
    assert all(10 <= count < 1 << 20 for count in counts)


def test_a_step_is_built_and_what_it_took_is_told(build: Build, out: Path) -> None:
    made = build("well")
    assert made["facts"] == {"cores": 1}
    assert made["seconds"] >= 0
    assert made["peak_memory"] > 1 << 20
    assert (out / "made.txt").read_text() == "the key"


def test_what_libraries_print_goes_to_the_log_and_corrupts_no_answer(build: Build, worker: WorkerProcess) -> None:
    assert build("prints")["facts"] == {}
    assert build("well")["facts"] == {"cores": 1}
    log = worker.log.read_text()
    assert [text in log for text in ("not an answer", "from C", "from a child", "to stderr")] == [True] * 4


def test_an_error_keeps_its_words_its_type_and_the_end_of_the_log(build: Build, worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match="ValueError: operator Foo is not supported") as raised:
        build("raises")
    lines = raised.value.log_tail.splitlines()
    assert len(lines) == LOG_TAIL
    assert lines[-1] == "ValueError: operator Foo is not supported"
    assert raised.value.log_tail == worker.log_tail()
    assert build("well")["facts"] == {"cores": 1}


def test_an_error_that_was_answered_is_of_the_kind_error(build: Build) -> None:
    with pytest.raises(WorkerError) as raised:
        build("raises")
    assert raised.value.kind == "error"


def test_a_promise_that_is_broken_is_an_error(build: Build) -> None:
    with pytest.raises(WorkerError, match="RuntimeError: the graph has a fixed batch"):
        build("breaks_its_promise")


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        ("bake", {}, "has no attribute 'bake'"),
        ("calibrate", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("time", {"cell": 0, "seconds": 0.1, "least": 1}, "IndexError"),
        (
            "prepare",
            {"folder": "/no/such", "evaluation": [{"text": "a"}], "calibration": [], "cells": [], "max_length": 8,
             "out": "/no/such", "task": "fill-mask"},
            "/no/such",
        ),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_is_answered(
    worker: WorkerProcess, operation: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(WorkerError, match=message):
        worker.ask(operation, limit=60, **arguments)
    assert worker.ask(**EASY) > 0


def test_the_hint_of_a_request_error_comes_through(worker: WorkerProcess) -> None:
    arguments = {"source": {}, "task": "", "target": {}, "calibration": None, "out": ""}
    with pytest.raises(WorkerError, match="unknown pass 'melt'") as raised:
        worker.ask("build", limit=LIMIT, step="melt", **arguments)
    assert str(raised.value.hint).startswith("passes: ")


def test_a_gpus_memory_that_runs_out_is_told_in_words(build: Build, worker: WorkerProcess) -> None:
    how_much = "out of GPU memory during build: 20.00 GiB were to be allocated, 3.25 GiB were free"
    for how, message in (
        ("runs_out", how_much),
        ("finds_no_room", "out of GPU memory during build"),
        ("starts_what_runs_out", how_much),
        ("runs_out_and_dies", how_much.replace("build:", "build, of which it died:")),
    ):
        with pytest.raises(WorkerError) as raised:
            build(how)
        assert (raised.value.message, raised.value.kind, raised.value.worker) == (message, "memory", "worker")
        assert "--workload" in str(raised.value.hint) and "--recipe" in str(raised.value.hint)
    assert not worker.alive


def test_what_was_free_and_what_was_planned_is_told(
    build: Build, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_gpus", SimpleNamespace(free=7 << 30))
    with pytest.raises(WorkerError) as raised:
        build("finds_no_room")
    told = with_estimate(raised.value, 5 << 30)
    assert told.message == (
        "out of GPU memory during build; 7.0 GiB were free before it was opened; the plan had estimated 5.0 GiB"
    )
    assert problem_text(told) == f"{told.message}\n  {told.hint}"  # no traceback
    other = WorkerError("something else")
    assert with_estimate(other, 5 << 30) is other
    refused = unusable("the reference does not run", told, "see the logs")  # nothing else is to be done on this GPU
    assert refused.exit_code == ExitCode.REFUSED and refused.hint == told.hint
    assert refused.message == f"the reference does not run: {told.message}"


def test_a_sweep_ends_at_the_last_batch_that_fits() -> None:
    class Session:
        inputs = ("input_ids", "attention_mask")

        def run(self, batch: Any) -> Any:
            if len(batch["input_ids"]) > self.most:
                raise RuntimeError("CUDA out of memory.")
            time.sleep(0.002)
            return {}

        most = 2

    sweeping, session = Worker(), Session()
    batch = {name: np.ones((1, 8), dtype=np.int64) for name in session.inputs}
    sweeping._session, sweeping._cells = session, [call_of(session, batch)]
    assert sweeping.sweep(60)["batch"] == 2
    session.most = 0
    with pytest.raises(RuntimeError):
        sweeping.sweep(60)


def test_what_recovered_is_not_blamed(build: Build) -> None:
    with pytest.raises(WorkerError, match="ValueError: something else"):
        build("recovers_and_fails")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dies", "the worker was killed by SIGKILL (the kernel does this when memory runs out) during build"),
        ("crashes", "the worker was killed by SIGSEGV during build"),
        ("exits", "the worker ended with exit code 17 during build"),
    ],
)
def test_a_death_is_told_by_its_cause(build: Build, worker: WorkerProcess, how: str, message: str) -> None:
    with pytest.raises(WorkerError) as raised:
        build(how)
    assert (raised.value.message, raised.value.kind) == (message, "died")
    assert how != "dies" or raised.value.log_tail.splitlines()[-1] == "about to die"
    assert not worker.alive
    with pytest.raises(WorkerError, match="during calibrate") as again:
        worker.ask(**EASY)
    assert again.value.kind == "died"


def test_a_worker_killed_from_outside_is_noticed(build: Build, worker: WorkerProcess) -> None:
    ticks: list[None] = []

    def progress() -> None:
        ticks.append(None)
        if len(ticks) == 2:
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match="killed by SIGKILL") as raised:
        build("spins", progress=progress)
    assert raised.value.kind == "died"
    assert gone(worker.pid)


def test_a_death_is_noticed_though_a_fork_lives_on(build: Build) -> None:
    build("well")
    with pytest.raises(WorkerError) as raised:
        build("leaves_a_fork_and_dies", limit=1.5)
    assert raised.value.kind == "died"


def test_what_reads_standard_input_finds_it_empty(build: Build) -> None:
    build("well")
    assert build("reads_its_input", limit=1.5)["facts"] == {"read": ""}


def test_facts_that_are_not_json_are_an_error_and_no_death(build: Build, worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError):
        build("reports_a_path")
    assert worker.alive


def test_a_time_limit_takes_the_children_along(build: Build, worker: WorkerProcess, out: Path) -> None:
    build("well")
    start = time.monotonic()
    with pytest.raises(WorkerError, match="build took longer than its limit of 1 s and was stopped") as raised:
        build("waits_for_a_child", limit=1.0)
    assert raised.value.kind == "timeout"
    assert time.monotonic() - start < 4
    assert not worker.alive
    assert gone(int((out / "child.pid").read_text()))


def test_leaving_the_context_ends_a_busy_worker_and_its_children(
    build: Build, worker: WorkerProcess, out: Path
) -> None:
    def give_up() -> None:
        if (out / "child.pid").exists() and (out / "child.pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("waits_for_a_child", progress=give_up)
    child = int((out / "child.pid").read_text())
    assert not gone(child, within=0.1)
    worker.kill()
    assert gone(worker.pid)
    assert gone(child)


def test_progress_is_called_while_waiting(build: Build) -> None:
    ticks: list[None] = []
    with pytest.raises(WorkerError):
        build("waits_for_a_child", limit=1.0, progress=lambda: ticks.append(None))
    assert 4 <= len(ticks) <= 12


def test_a_paused_worker_uses_no_processor_time_and_goes_on(build: Build, worker: WorkerProcess) -> None:
    used: list[float] = []

    def progress() -> None:
        if not used and cpu_seconds(worker.pid) > 0.4:
            worker.pause()
            time.sleep(0.05)
            used.append(cpu_seconds(worker.pid))
            time.sleep(0.4)
            used.append(cpu_seconds(worker.pid))
            worker.resume()

    assert build("spins_a_second", progress=progress)["seconds"] > 1.3
    assert len(used) == 2
    assert used[1] - used[0] < 0.02
    assert cpu_seconds(worker.pid) - used[1] > 0.3


def test_a_worker_runs_for_the_length_of_the_block(worker: WorkerProcess) -> None:
    worker.ask(**EASY)
    worker.pause()
    with running(worker):
        assert worker.ask(**EASY) > 0
    with pytest.raises(WorkerError) as raised:
        worker.ask(**EASY | {"limit": 0.4})
    assert raised.value.kind == "timeout"


def test_a_paused_worker_can_be_killed(worker: WorkerProcess) -> None:
    worker.pause()
    worker.kill()
    assert not worker.alive


@contextmanager
def parent_of(script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs a script, and the worker's number that it prints."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())


@pytest.mark.parametrize("paused", [False, True], ids=["running", "stopped"])
def test_killing_the_parent_kills_the_worker(tmp_path: Path, paused: bool) -> None:
    script = f"""
    import sys, time
    from pathlib import Path
    from optimize.pipeline.workers import WorkerProcess
    worker = WorkerProcess(Path({str(tmp_path)!r}) / "worker.log")
    worker.ask("calibrate", limit=30, seconds=1e-4)
    if {paused}:
        worker.pause()
    print(worker.pid, flush=True)
    time.sleep(60)
    """
    with parent_of(script) as (parent, pid):
        assert not gone(pid, within=0.1)
        parent.kill()
        assert gone(pid, within=2.0)


def test_killing_the_parent_kills_what_a_stopped_worker_started(
    tmp_path: Path, third_party: Install, out: Path, target: Target
) -> None:
    third_party(PASSES, {"misbehave": "Misbehave"})
    source = {"kind": "checkpoint", "path": str(out), "key": "the key", "digest": "d"}
    script = f"""
    import threading, time
    from functools import partial
    from pathlib import Path
    from optimize.pipeline.workers import WorkerProcess
    worker = WorkerProcess(Path({str(tmp_path)!r}) / "worker.log")
    ask = partial(worker.ask, "build", limit=60, step="misbehave{{how=waits_for_a_child}}", source={source!r},
                  task="fill-mask", target={asdict(target)!r}, calibration=None, out={str(out)!r})
    threading.Thread(target=ask, daemon=True).start()
    while not (Path({str(out)!r}) / "child.pid").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    worker.pause()
    print(worker.pid, flush=True)
    time.sleep(60)
    """
    with parent_of(script) as (parent, worker):
        child = int((out / "child.pid").read_text())
        end = time.monotonic() + 5
        while psutil.Process(child).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.02)
        parent.kill()
        assert time.monotonic() < end, "it was never stopped"
        assert gone(child) and gone(worker)


def test_logs_are_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text("earlier\n")
    with WorkerProcess(log) as worker, pytest.raises(WorkerError):
        worker.ask("bake", limit=LIMIT)
    assert log.read_text().startswith("earlier\n")
    assert "has no attribute 'bake'" in log.read_text()


def test_a_worker_that_cannot_start_leaves_no_pipe_open(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(WorkerError, match=r"interpreter .*/gone/python is gone"):
        WorkerProcess(tmp_path / "worker.log", Environment("tiny", tmp_path / "gone" / "python", "3.11"))
    assert psutil.Process().num_fds() == before


def test_no_worker_reports_home(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "worker.log") as worker:
        worker.ask(**EASY)
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    assert b"ORT_DISABLE_TELEMETRY=1" in environment
