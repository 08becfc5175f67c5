"""A worker process: `python -m optimize.pipeline.worker`. It builds, opens, evaluates and times; it decides nothing.

Requests are JSON lines on standard input, answers JSON lines on file descriptor `OPTIMIZE_ANSWERS`; standard output
and error are the log. Whatever crashes, hangs or is killed here costs the caller one step.

It also runs in a toolchain's Python, from 3.10 on, which has no more of what we need than the standard library, numpy
and what the toolchain is for: so nothing that is imported here, or by a pass of a toolchain, may need more.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimize.pipeline.batches import NEW, UNTIMED, judged_positions
from optimize.pipeline.calls import Call, call_of
from optimize.pipeline.contract import Artifact, Cell, Context, Kind, Target
from optimize.pipeline.errors import OptimizeError
from optimize.pipeline.gpus import ran_out
from optimize.pipeline.resident import let_go, peak_memory, reset_peak_memory

PROTOCOL = 1  # of requests and answers; the parent names the one that it speaks
PR_SET_PDEATHSIG = 1
MAX_BATCH, MAX_CALL = 256, 1.0  # of a sweep: rows, seconds
MAX_GENERATION = 8.0  # seconds of a generation in a sweep
DOING = dict.fromkeys(("evaluate", "score", "guess", "write_on"), "while it was judged")  # operations, for errors
GAIN = 1.05  # what a larger batch must bring for the sweep to go on


class Worker:
    """The operations, by name. Paths travel as text; arrays travel as .npz files."""

    def __init__(self) -> None:
        self._session: Any = None  # a Session or a Generator
        self._cells: list[Call] = []
        self._names: Sequence[str] = ()  # of the cells
        self.doing = ""  # for an error: when it came

    def prepare(
        self,
        folder: str,
        evaluation: list[Any],
        calibration: list[Any],
        cells: list[Any],
        max_length: int,
        out: str,
        task: str,
        labelled: bool = False,
        questions: list[Any] | None = None,
    ) -> None:
        """Encode examples as the checkpoint does into evaluation.npz, calibration.npz and cells.npz: tasks.Encoder."""
        from optimize.models.tasks import TASKS, Examples
        from optimize.pipeline.batches import save_batches

        shapes = [Cell(*cell) for cell in cells]
        asked = Examples(evaluation, calibration, questions or [], shapes, max_length, labelled)
        encoded = TASKS[task].encoder.encode_all(Path(folder), asked)
        for name, batches in encoded.items():
            if batches:
                save_batches(Path(out) / f"{name}.npz", batches)

    def build(
        self,
        step: str,
        source: Mapping[str, str],
        task: str,
        target: Mapping[str, Any],
        calibration: str | None,
        out: str,
        workload: Sequence[Mapping[str, int]] = (),
    ) -> dict[str, Any]:
        """Run one pass, given as text, on `source` (an Artifact's fields) and check what it promised."""
        from optimize.pipeline.recipe import parse_pass

        instance = parse_pass(step)
        artifact = Artifact(Kind(source["kind"]), Path(source["path"]), source["key"], source["digest"])
        cells = tuple(Cell(**cell) for cell in workload)
        context = Context(task, Target(**target), Path(calibration) if calibration else None, cells)
        let_go()
        reset_peak_memory()
        start = time.perf_counter()
        facts = instance.run(artifact, context, Path(out))
        instance.ensures(Path(out))
        return {"seconds": time.perf_counter() - start, "peak_memory": peak_memory(), "facts": facts}

    def open(
        self,
        kind: str,
        path: str,
        task: str,
        cores: int,
        cells: str,
        tokenizer: str,
        device: str = "cpu",
        names: Sequence[str] = (),
        dtype: str | None = None,
    ) -> dict[str, float]:
        """Open an artifact and run every cell once: seconds of opening and of the first call, most bytes resident.

        `names` are those of the cells, for errors; `dtype` is the one to compute a checkpoint in, if not its own.
        """
        from optimize.pipeline.batches import load_batches
        from optimize.targets.runtimes import open_session

        batches = [batch for batch in load_batches(Path(cells)) if UNTIMED not in batch]
        self._names, self.doing = names, "while it was loaded"
        reset_peak_memory()
        start = time.perf_counter()
        self._session = open_session(Kind(kind), Path(path), task, cores, Path(tokenizer), device, dtype)
        loaded = time.perf_counter()
        self._cells = [call_of(self._session, batch) for batch in batches]
        self._cell(0).timed()  # which on a GPU waits until it is done
        first = time.perf_counter()
        for index in range(1, len(self._cells)):  # so that peak memory is that of the whole workload
            self._cell(index).timed()
        return {"load": loaded - start, "first": first - loaded, "memory": peak_memory()}

    def _cell(self, index: int) -> Call:
        self.doing = f"at cell {self._names[index]}" if self._names else f"at cell {index + 1}"
        return self._cells[index]

    def memory(self) -> int:
        """Most bytes resident since the artifact was opened."""
        return peak_memory()

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

        self._session = Products(count)
        self._cells = [call_of(self._session, {})]

    def peaks(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """What the host reaches at most: see roofline.Peaks."""
        module = importlib.import_module(f"optimize.targets.{target['name'].replace('-', '_')}")
        found: dict[str, Any] = module.peaks(Target(**target))
        return found

    def work(self) -> list[dict[str, int]]:
        """What each cell cannot do without (see roofline.Work), counted on the eager model that is open."""
        return [self._session.work(cell.batch) for cell in self._cells]

    def sweep(self, within: float) -> dict[str, float]:
        """The throughput of growing batches of the longest cell's rows, until it grows no more: the best of them.

        Of a language model, tokens that are generated, after the shortest prompt; an image counts as one token. No
        batch is begun after `within` seconds, and none that is larger than one that a GPU's memory is too small for.
        """
        import numpy as np

        generates = NEW in self._cells[0].batch
        widest = min if generates else max
        cell = widest((cell.batch for cell in self._cells), key=lambda batch: judged_positions(batch).shape[1])
        tokens = int(cell[NEW]) if generates else judged_positions(cell).shape[1]
        longest = MAX_GENERATION if generates else MAX_CALL
        best, batch, idle, seconds = {"batch": 0, "tokens_per_second": 0.0}, 1, 0, 0.0
        begun = time.perf_counter()
        while batch <= MAX_BATCH and idle < 2 and seconds < longest and time.perf_counter() - begun < within:
            rows = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in cell.items() if array.ndim > 1}
            try:
                call, calls = call_of(self._session, {**cell, **rows}), []
                for _ in range(3):  # the first warms up
                    call.renew()
                    calls.append(call.timed()[0])
            except Exception as error:
                if batch == 1 or ran_out(_text(error)) is None:
                    raise
                break
            seconds = min(calls[1:])
            rate = batch * tokens / seconds
            idle = idle + 1 if rate < best["tokens_per_second"] * GAIN else 0
            if rate > best["tokens_per_second"]:
                best = {"batch": batch, "tokens_per_second": rate}
            batch *= 2
        return best

    def score(self, windows: str, reference: str | None, out: str, folder: str) -> dict[str, Any]:
        """See judging.score_windows."""
        from optimize.pipeline.judging import score_windows

        return score_windows(self._session, windows, reference, out, folder)

    def guess(self, windows: str, out: str) -> dict[str, Any]:
        """See judging.guess_tokens."""
        from optimize.pipeline.judging import guess_tokens

        return guess_tokens(self._session, windows, out)

    def write_on(self, prompts: str, out: str) -> dict[str, Any]:
        """See judging.write_on."""
        from optimize.pipeline.judging import write_on

        return write_on(self._session, prompts, out, scores=self.gives_logits())

    def gives_logits(self) -> bool:
        """Whether what is open is judged by its logits; else by its tokens alone."""
        return hasattr(self._session, "logits")

    def spell(self, folder: str) -> list[str]:
        """Where the runtime's own tokenizer differs from that of a checkpoint's folder."""
        from optimize.models.spelling import spelling_problems

        return spelling_problems(Path(folder), self._session)

    def evaluate(self, task: str, pooling: str | None, batches: str, out: str) -> dict[str, Any]:
        """Run every batch of an .npz and write what is judged of each example to another, with peculiarities."""
        import numpy as np

        from optimize.models.tasks import TASKS, judged_outputs
        from optimize.pipeline.batches import load_batches, save_batches

        loaded = load_batches(Path(batches))
        examples: list[dict[str, Any]] = []
        problems: list[str] = []
        for batch in loaded:
            outputs = self._run(batch)
            problems += _problems(outputs, batch)
            missing = sorted(TASKS[task].outputs.keys() - outputs.keys())
            if missing or problems:
                return {"problems": problems or [f"output {', '.join(missing)} is missing"], "repeat_error": 0.0}
            examples += judged_outputs(TASKS[task], outputs, judged_positions(batch), pooling)
        save_batches(Path(out), examples)
        first, again = self._run(loaded[0]), self._run(loaded[0])
        repeat = max(float(np.abs(first[name] - again[name]).max(initial=0)) for name in TASKS[task].outputs)
        return {"problems": [], "repeat_error": repeat}

    def time(self, cell: int, seconds: float, least: int) -> list[list[float]]:
        """Seconds of each call of one cell, by phase: calls for `seconds`, at least `least`, after one to warm up.

        One forward pass has one phase. A generation has three: all of it, up to the first token, and the rest.
        """
        call, clock = self._cell(cell), time.perf_counter
        call.warm()
        samples: list[tuple[float, ...]] = []
        gc.disable()
        try:
            end = clock() + seconds
            while len(samples) < least or clock() < end:
                call.renew()
                samples.append(call.timed())
        finally:
            gc.enable()
        return [list(phase) for phase in zip(*samples, strict=True)]

    def _run(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = self._session.run({n: batch[n] for n in self._session.inputs if n in batch})
        return outputs


def _problems(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> list[str]:
    """What is wrong with one batch's outputs by themselves: type, leading axes, values that are not finite."""
    import numpy as np

    found = []
    rows, tokens = judged_positions(batch).shape
    for name, array in outputs.items():
        if array.dtype != np.float32:
            found.append(f"{name} is {array.dtype}, not float32")
        elif array.shape[0] != rows or (array.ndim > 2 and array.shape[1] != tokens):
            found.append(f"{name} has shape {list(array.shape)} for inputs of {[rows, tokens]}")
        elif not np.isfinite(array).all():
            found.append(f"{name} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def serve(requests: Any, answers: Any, operations: Worker) -> None:
    """Answer requests until the input ends."""
    for line in requests:
        request = json.loads(line)
        try:
            if request.get("protocol") != PROTOCOL:
                raise OptimizeError(
                    f"the worker speaks protocol {PROTOCOL}, and was asked in {request.get('protocol')}",
                    hint="optimize was changed while it ran: run the same command again",
                )
            operations.doing = DOING.get(request["operation"], f"during {request['operation']}")
            operation: Callable[..., Any] = getattr(operations, request["operation"])
            answer = json.dumps({"result": operation(**request["arguments"])})
        except OptimizeError as error:
            traceback.print_exc()
            answer = json.dumps({"error": error.message, "hint": error.hint, "kind": "refused"})
        except Exception as error:
            traceback.print_exc()
            answer = json.dumps({"error": _text(error), "hint": None, "kind": "error", "doing": operations.doing})
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
    gc.set_threshold(50_000, 20, 100)  # imports make much, and next to none of it is garbage
    requests = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a compiler that reads its standard input must not wait for ever
    with os.fdopen(requests) as lines, os.fdopen(int(os.environ.pop("OPTIMIZE_ANSWERS")), "w") as answers:
        serve(lines, answers, Worker())


if __name__ == "__main__":
    main()
