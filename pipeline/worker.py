"""A worker process: `python -m optimize.pipeline.worker`. It builds, opens, evaluates and times; it decides nothing.

Requests are JSON lines on standard input, answers JSON lines on file descriptor `OPTIMIZE_ANSWERS`; standard output
and error are the log. Whatever crashes, hangs or is killed here costs the caller one step.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimize.pipeline.contract import Artifact, Context, Kind, Session, Target

PR_SET_PDEATHSIG = 1
MAX_BATCH, MAX_CALL = 256, 1.0  # of a sweep: rows, seconds
GAIN = 1.05  # what a larger batch must bring for the sweep to go on


class Worker:
    """The operations, by name. Paths travel as text; arrays travel as .npz files."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._cells: list[dict[str, Any]] = []

    def prepare(
        self,
        folder: str,
        evaluation: list[Any],
        calibration: list[Any],
        cells: list[Any],
        max_length: int,
        out: str,
        labelled: bool = False,
    ) -> dict[str, Any]:
        """Encode text with the checkpoint's tokenizer into evaluation.npz, calibration.npz and cells.npz.

        Where the text is `labelled`, evaluation.npz also has what turns outputs into answers (see answers.py).
        """
        from optimize.models import encoding
        from optimize.pipeline.batches import save_batches

        source, target = Path(folder), Path(out)
        batches = encoding.encode(source, evaluation, max_length, encoding.BATCH_SIZES, labelled=labelled)
        save_batches(target / "evaluation.npz", batches)
        if calibration:
            save_batches(target / "calibration.npz", encoding.encode(source, calibration, max_length, (1,)))
        save_batches(target / "cells.npz", encoding.encode_cells(source, evaluation, cells))
        return {"batches": len(batches), "tokens": int(sum(batch["attention_mask"].sum() for batch in batches))}

    def build(
        self,
        step: str,
        source: Mapping[str, str],
        task: str,
        target: Mapping[str, Any],
        calibration: str | None,
        out: str,
    ) -> dict[str, Any]:
        """Run one pass, given as text, on `source` (an Artifact's fields) and check what it promised."""
        from optimize.pipeline.recipe import parse_pass

        instance = parse_pass(step)
        artifact = Artifact(Kind(source["kind"]), Path(source["path"]), source["key"], source["digest"])
        context = Context(task, Target(**target), Path(calibration) if calibration else None)
        _reset_peak_memory()
        start = time.perf_counter()
        facts = instance.run(artifact, context, Path(out))
        instance.ensures(Path(out))
        return {"seconds": time.perf_counter() - start, "peak_memory": peak_memory(), "facts": facts}

    def open(self, kind: str, path: str, task: str, cores: int, cells: str) -> dict[str, float]:
        """Open an artifact and run every cell once: seconds of opening and of the first call, most bytes resident."""
        from optimize.pipeline.batches import load_batches
        from optimize.targets.runtimes import open_session

        self._cells = load_batches(Path(cells))
        _reset_peak_memory()
        start = time.perf_counter()
        self._session = open_session(Kind(kind), Path(path), task, cores)
        loaded = time.perf_counter()
        self._cells = [{name: cell[name] for name in self._session.inputs if name in cell} for cell in self._cells]
        self._session.run(self._cells[0])
        first = time.perf_counter()
        for cell in self._cells[1:]:  # so that peak memory is that of the whole workload
            self._session.run(cell)
        return {"load": loaded - start, "first": first - loaded, "memory": peak_memory()}

    def layers(self, kind: str, path: str, task: str, batches: str, count: int, out: str) -> dict[str, Any] | None:
        """Write what an artifact computes on the way for the first `count` batches; None where it cannot be seen."""
        from optimize.pipeline.batches import load_batches, save_batches
        from optimize.targets.runtimes import layers

        found = layers(Kind(kind), Path(path), task, load_batches(Path(batches))[:count])
        if found is None:
            return None
        save_batches(Path(out), found.outputs)
        return {"products": dict(found.products), "overflow": found.overflow}

    def calibrate(self, seconds: float) -> int:
        """How many of the self-test's products take about that long."""
        from optimize.pipeline.selftest import calibrate

        return calibrate(seconds)

    def open_products(self, count: int) -> None:
        """Open the self-test's session in place of an artifact."""
        from optimize.pipeline.selftest import Products

        self._session, self._cells = Products(count), [{}]

    def peaks(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """What the host reaches at most: see roofline.Peaks."""
        module = importlib.import_module(f"optimize.targets.{target['name'].replace('-', '_')}")
        found: dict[str, Any] = module.peaks(Target(**target))
        return found

    def work(self) -> list[dict[str, int]]:
        """What each cell cannot do without (see roofline.Work), counted on the eager model that is open."""
        session: Any = self._session
        return [session.work(cell) for cell in self._cells]

    def sweep(self, within: float) -> dict[str, float]:
        """The throughput of growing batches of the longest cell's rows, until it grows no more: the best of them.

        No batch is begun after `within` seconds.
        """
        import numpy as np

        assert self._session is not None
        longest = max(self._cells, key=lambda cell: int(cell["input_ids"].shape[1]))
        tokens = int(longest["input_ids"].shape[1])
        best, batch, idle, seconds = {"batch": 0, "tokens_per_second": 0.0}, 1, 0, 0.0
        begun = time.perf_counter()
        while batch <= MAX_BATCH and idle < 2 and seconds < MAX_CALL and time.perf_counter() - begun < within:
            feed = {name: np.resize(array, (batch, tokens)) for name, array in longest.items()}
            calls = []
            for _ in range(3):  # the first warms up
                start = time.perf_counter()
                self._session.run(feed)
                calls.append(time.perf_counter() - start)
            seconds = min(calls[1:])
            rate = batch * tokens / seconds
            idle = idle + 1 if rate < best["tokens_per_second"] * GAIN else 0
            if rate > best["tokens_per_second"]:
                best = {"batch": batch, "tokens_per_second": rate}
            batch *= 2
        return best

    def evaluate(self, task: str, pooling: str | None, batches: str, out: str) -> dict[str, Any]:
        """Run every batch of an .npz and write what is judged of each example to another, with peculiarities."""
        import numpy as np

        from optimize.models.tasks import TASKS, judged_outputs
        from optimize.pipeline.batches import load_batches, save_batches

        assert self._session is not None
        loaded = load_batches(Path(batches))
        examples: list[dict[str, Any]] = []
        problems: list[str] = []
        for batch in loaded:
            outputs = self._run(batch)
            problems += _problems(outputs, batch)
            missing = sorted(TASKS[task].outputs.keys() - outputs.keys())
            if missing or problems:
                return {"problems": problems or [f"output {', '.join(missing)} is missing"], "repeat_error": 0.0}
            examples += judged_outputs(TASKS[task], outputs, batch["attention_mask"], pooling)
        save_batches(Path(out), examples)
        first, again = self._run(loaded[0]), self._run(loaded[0])
        repeat = max(float(np.abs(first[name] - again[name]).max(initial=0)) for name in TASKS[task].outputs)
        return {"problems": [], "repeat_error": repeat}

    def time(self, cell: int, seconds: float, least: int) -> list[float]:
        """Seconds of each call of one cell: one call to warm up, then calls for `seconds`, at least `least`."""
        assert self._session is not None
        batch, run, clock = self._cells[cell], self._session.run, time.perf_counter
        run(batch)
        samples: list[float] = []
        gc.disable()
        try:
            end = clock() + seconds
            while len(samples) < least or clock() < end:
                start = clock()
                outputs = run(batch)
                samples.append(clock() - start)
                del outputs
        finally:
            gc.enable()
        return samples

    def _run(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        return self._session.run({name: batch[name] for name in self._session.inputs if name in batch})


def _problems(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> list[str]:
    """What is wrong with one batch's outputs by themselves: type, leading axes, values that are not finite."""
    import numpy as np

    found = []
    rows, tokens = batch["input_ids"].shape
    for name, array in outputs.items():
        if array.dtype != np.float32:
            found.append(f"{name} is {array.dtype}, not float32")
        elif array.shape[0] != rows or (array.ndim > 2 and array.shape[1] != tokens):
            found.append(f"{name} has shape {list(array.shape)} for inputs of {[rows, tokens]}")
        elif not np.isfinite(array).all():
            found.append(f"{name} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
    return found


def peak_memory() -> int:
    """Bytes of this process in memory, at most since the last reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _reset_peak_memory() -> None:
    with suppress(OSError):  # not Linux, or not permitted: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def serve(requests: Any, answers: Any, operations: Worker) -> None:
    """Answer requests until the input ends."""
    for line in requests:
        request = json.loads(line)
        try:
            operation: Callable[..., Any] = getattr(operations, request["operation"])
            answer = json.dumps({"result": operation(**request["arguments"])})
        except Exception as error:
            traceback.print_exc()
            answer = json.dumps({"error": f"{type(error).__name__}: {error}", "hint": getattr(error, "hint", None)})
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    """Die with the parent; keep the answers apart from whatever libraries print."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.pop("OPTIMIZE_PARENT")):
            sys.exit("the parent died before the worker began")
    requests = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a compiler that reads its standard input must not wait for ever
    with os.fdopen(requests) as lines, os.fdopen(int(os.environ.pop("OPTIMIZE_ANSWERS")), "w") as answers:
        serve(lines, answers, Worker())


if __name__ == "__main__":
    main()
