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
from functools import partial
from pathlib import Path
from typing import Any

from optimize.pipeline.batches import NEW, UNTIMED
from optimize.pipeline.contract import Artifact, Cell, Context, Kind, Target

PR_SET_PDEATHSIG = 1
MAX_BATCH, MAX_CALL = 256, 1.0  # of a sweep: rows, seconds
MAX_GENERATION = 8.0  # seconds of a generation in a sweep
WARM = 8  # tokens of the prompt that warms up
GAIN = 1.05  # what a larger batch must bring for the sweep to go on


class Call:
    """What is timed of one batch: a forward pass, or a generation."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        self.run: Callable[[], Any] = partial(session.run, batch)
        self.warm = self.tell = self.run  # untimed: with a few tokens; with what else is known of each token
        self.prompts: list[Any] = []

    def phases(self, outputs: Any) -> tuple[float, ...]:
        """Seconds of parts of a call, from what it returned."""
        return ()

    def renew(self) -> None:
        """Before each call, untimed: that a runtime has been asked the same before must not help it."""


class GenerationCall(Call):
    """Warmed up by a few tokens: a whole call takes seconds."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        from optimize.targets.runtimes.generating import generate

        self.batch, self._session = batch, session
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.prompts = [row[mask != 0] for row, mask in rows]
        self.run = partial(generate, session, self.prompts, int(batch[NEW]))
        self.tell = partial(generate, session, self.prompts, int(batch[NEW]), logprobs=True)
        self.warm = partial(generate, session, [self.prompts[0][:WARM]], 2)

    def phases(self, outputs: Any) -> tuple[float, ...]:
        first = outputs.seconds[0]
        return first, outputs.seconds[-1] - first

    def renew(self) -> None:
        if hasattr(self._session, "forget"):
            self._session.forget()


def call_of(session: Any, batch: Mapping[str, Any]) -> Call:
    """The call that a batch stands for; arrays that are no inputs of the session are left out."""
    if NEW in batch:
        return GenerationCall(session, batch)
    return Call(session, {name: batch[name] for name in session.inputs if name in batch})


class Worker:
    """The operations, by name. Paths travel as text; arrays travel as .npz files."""

    def __init__(self) -> None:
        self._session: Any = None  # a Session or a Generator
        self._cells: list[Call] = []

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
        """Encode text with the checkpoint's tokenizer into evaluation.npz, calibration.npz and cells.npz.

        Where the text is `labelled`, evaluation.npz also has what turns outputs into answers (see answers.py). A
        language model's labelled `questions` stand behind the windows of its text.
        """
        from optimize.models import encoding, language
        from optimize.models.questions import encode_questions
        from optimize.models.tasks import TASKS
        from optimize.pipeline.batches import save_batches

        source, target = Path(folder), Path(out)
        if TASKS[task].generates:
            windows = language.encode_windows(source, evaluation, max_length)
            asked = encode_questions(source, questions or [], max_length)
            save_batches(target / "evaluation.npz", [*windows, *asked])
            if calibration:
                save_batches(target / "calibration.npz", language.encode_windows(source, calibration, max_length))
            prompts = language.encode_prompts(source, evaluation, [Cell(*cell) for cell in cells])
            save_batches(target / "cells.npz", prompts)
            return
        batches = encoding.encode(source, evaluation, max_length, encoding.BATCH_SIZES, labelled=labelled)
        save_batches(target / "evaluation.npz", batches)
        if calibration:
            save_batches(target / "calibration.npz", encoding.encode(source, calibration, max_length, (1,)))
        shapes = [(batch, sequence) for batch, sequence, _ in cells]
        save_batches(target / "cells.npz", encoding.encode_cells(source, evaluation, shapes))

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
        _let_go()
        _reset_peak_memory()
        start = time.perf_counter()
        facts = instance.run(artifact, context, Path(out))
        instance.ensures(Path(out))
        return {"seconds": time.perf_counter() - start, "peak_memory": peak_memory(), "facts": facts}

    def open(self, kind: str, path: str, task: str, cores: int, cells: str, tokenizer: str) -> dict[str, float]:
        """Open an artifact and run every cell once: seconds of opening and of the first call, most bytes resident."""
        from optimize.pipeline.batches import load_batches
        from optimize.targets.runtimes import open_session

        batches = [batch for batch in load_batches(Path(cells)) if UNTIMED not in batch]
        _reset_peak_memory()
        start = time.perf_counter()
        self._session = open_session(Kind(kind), Path(path), task, cores, Path(tokenizer))
        loaded = time.perf_counter()
        self._cells = [call_of(self._session, batch) for batch in batches]
        self._cells[0].run()
        first = time.perf_counter()
        for cell in self._cells[1:]:  # so that peak memory is that of the whole workload
            cell.run()
        return {"load": loaded - start, "first": first - loaded, "memory": peak_memory()}

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

        Of a language model, tokens that are generated, after the shortest prompt. No batch is begun after `within`
        seconds.
        """
        import numpy as np

        generates = NEW in self._cells[0].batch
        widest = min if generates else max
        cell = widest((cell.batch for cell in self._cells), key=lambda batch: int(batch["input_ids"].shape[1]))
        tokens = int(cell[NEW]) if generates else int(cell["input_ids"].shape[1])
        longest = MAX_GENERATION if generates else MAX_CALL
        best, batch, idle, seconds = {"batch": 0, "tokens_per_second": 0.0}, 1, 0, 0.0
        begun = time.perf_counter()
        while batch <= MAX_BATCH and idle < 2 and seconds < longest and time.perf_counter() - begun < within:
            rows = {name: np.resize(array, (batch, array.shape[1])) for name, array in cell.items() if array.ndim == 2}
            call = call_of(self._session, {**cell, **rows})
            calls = []
            for _ in range(3):  # the first warms up
                call.renew()
                start = time.perf_counter()
                call.run()
                calls.append(time.perf_counter() - start)
            seconds = min(calls[1:])
            rate = batch * tokens / seconds
            idle = idle + 1 if rate < best["tokens_per_second"] * GAIN else 0
            if rate > best["tokens_per_second"]:
                best = {"batch": batch, "tokens_per_second": rate}
            batch *= 2
        return best

    def score(self, windows: str, reference: str | None, out: str, folder: str) -> dict[str, Any]:
        """Score every window of an .npz (see language.score), at the tokens that the reference's scores name; and
        answer every question behind them, with the tokenizer in a checkpoint's `folder`.
        """
        import numpy as np

        from optimize.pipeline.batches import load_batches, save_batches
        from optimize.pipeline.language import IDS, LOSS, score
        from optimize.pipeline.questions import ANSWERS, CHARACTERS, ENDS, LIKELIHOODS, sequences

        session = self._session
        batches = load_batches(Path(windows))
        named = [each.get(IDS) for each in load_batches(Path(reference))] if reference else [None] * len(batches)
        found = []
        for batch, ids in zip(batches, named, strict=True):
            if ENDS in batch:
                found.append({ANSWERS: np.array(self._answers(batch, Path(folder)), dtype=np.str_)})
                continue
            scores = []
            for tokens, first in sequences(batch):
                scored = tokens[first:]
                logits = session.logits(tokens[:-1], len(scored))
                if problems := _wrong(logits, len(scored)):
                    return {"problems": problems, "repeat_error": 0.0}
                scores.append(score(logits, scored, ids))
                del logits  # before there are the next
            likelihoods = np.array([-each[LOSS].sum(dtype=np.float64) for each in scores])
            found.append({LIKELIHOODS: likelihoods} if CHARACTERS in batch else scores[0])
        save_batches(Path(out), found)
        tokens = batches[0]["input_ids"]
        repeat = float(np.abs(session.logits(tokens, 1) - session.logits(tokens, 1)).max())
        return {"problems": [], "repeat_error": repeat}

    def _answers(self, batch: Mapping[str, Any], folder: Path) -> list[str]:
        """What the session writes behind each prompt of a batch, to the end of the line."""
        from optimize.models.encoding import load_tokenizer
        from optimize.models.questions import answer_text, is_over
        from optimize.pipeline.questions import ENDS
        from optimize.targets.runtimes.generating import write_until

        tokenizer, ends = load_tokenizer(folder), batch[ENDS].tolist()
        prompts = call_of(self._session, batch).prompts
        written = write_until(
            self._session, prompts, int(batch[NEW]), lambda tokens: is_over(tokenizer, tokens, ends)
        )  # fmt: skip
        return [answer_text(tokenizer, tokens, ends) for tokens in written]

    def gives_logits(self) -> bool:
        """Whether what is open is judged by its logits; else by its tokens alone."""
        return hasattr(self._session, "logits")

    def spell(self, folder: str) -> list[str]:
        """Where the runtime's own tokenizer differs from that of a checkpoint's folder."""
        from optimize.models.spelling import spelling_problems

        return spelling_problems(Path(folder), self._session)

    def guess(self, windows: str, out: str) -> dict[str, Any]:
        """In place of `score`, for a session that gives no logits: its next token at places all over every window."""
        import numpy as np

        from optimize.pipeline.batches import FIRST, load_batches, save_batches
        from optimize.pipeline.language import TOKENS
        from optimize.pipeline.tokens import ENDS, GUESSES, PLACES

        session, found = self._session, []
        batches = [each for each in load_batches(Path(windows)) if FIRST in each and each[FIRST].ndim == 0]  # the text
        for batch in batches:
            tokens, first, places = batch["input_ids"], int(batch[FIRST]), list[int]()
            scored = len(tokens) - first
            wanted = np.linspace(0, scored, max(GUESSES // len(batches), 1), endpoint=False, dtype=int)
            for start, end in zip(wanted, [*wanted[1:], scored], strict=True):
                says = (place for place in range(start, end) if session.says(tokens[: first + place]))
                places += [place for place in [next(says, None)] if place is not None]
            guesses = [session.generate([tokens[: first + place]], 1).tokens[0, 0] for place in places]
            ends = np.array(session.ends, dtype=np.int64)
            found.append({TOKENS: np.array(guesses, np.int64), PLACES: np.array(places, np.int64), ENDS: ends})
        save_batches(Path(out), found)
        return {"problems": [], "repeat_error": 0.0}

    def write_on(self, prompts: str, out: str) -> dict[str, Any]:
        """Continue every prompt of an .npz greedily, and hold each token against the session's own scoring, if it has
        one. Else `repeat_error` is the share of the first prompts' tokens that differ the second time.
        """
        import numpy as np

        from optimize.pipeline.batches import load_batches, save_batches
        from optimize.pipeline.language import REGRET, TOKENS, regrets, score
        from optimize.pipeline.tokens import ENDS, LOGPROBS

        session, scores = self._session, self.gives_logits()
        found: list[dict[str, Any]] = []
        calls = [call_of(session, batch) for batch in load_batches(Path(prompts))]
        # all of them first: some runtimes have one model to generate and another to score, and hold one at a time
        written = [call.run() if scores else call.tell() for call in calls]
        for call, made in zip(calls, written, strict=True):
            expected = (len(call.prompts), int(call.batch[NEW]))
            if made.tokens.shape != expected:
                return {"problems": [f"tokens of {made.tokens.shape} for {expected}"], "repeat_error": 0.0}
            for index, (prompt, tokens) in enumerate(zip(call.prompts, made.tokens, strict=True)):
                if scores:
                    logits = session.logits(np.concatenate([prompt, tokens[:-1]]), len(tokens))
                    found.append(score(logits, tokens) | {TOKENS: tokens, REGRET: regrets(logits, tokens)})
                else:
                    ends = np.array(session.ends, dtype=np.int64)
                    found.append({TOKENS: tokens, LOGPROBS: made.logprobs[index], ENDS: ends})
        save_batches(Path(out), found)
        if scores:
            return {"problems": [], "repeat_error": 0.0}
        calls[0].renew()
        first = np.stack([each[TOKENS] for each in found[: len(calls[0].prompts)]])
        return {"problems": [], "repeat_error": float((calls[0].run().tokens != first).mean())}

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
            examples += judged_outputs(TASKS[task], outputs, batch["attention_mask"], pooling)
        save_batches(Path(out), examples)
        first, again = self._run(loaded[0]), self._run(loaded[0])
        repeat = max(float(np.abs(first[name] - again[name]).max(initial=0)) for name in TASKS[task].outputs)
        return {"problems": [], "repeat_error": repeat}

    def time(self, cell: int, seconds: float, least: int) -> list[list[float]]:
        """Seconds of each call of one cell, by phase: calls for `seconds`, at least `least`, after one to warm up.

        One forward pass has one phase. A generation has three: all of it, up to the first token, and the rest.
        """
        call, clock = self._cells[cell], time.perf_counter
        call.warm()
        samples: list[tuple[float, ...]] = []
        gc.disable()
        try:
            end = clock() + seconds
            while len(samples) < least or clock() < end:
                call.renew()
                start = clock()
                outputs = call.run()
                total = clock() - start
                samples.append((total, *call.phases(outputs)))
                del outputs
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
    rows, tokens = batch["input_ids"].shape
    for name, array in outputs.items():
        if array.dtype != np.float32:
            found.append(f"{name} is {array.dtype}, not float32")
        elif array.shape[0] != rows or (array.ndim > 2 and array.shape[1] != tokens):
            found.append(f"{name} has shape {list(array.shape)} for inputs of {[rows, tokens]}")
        elif not np.isfinite(array).all():
            found.append(f"{name} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
    return found


def _wrong(logits: Any, tokens: int) -> list[str]:
    """What is wrong with the logits of one sequence by themselves."""
    import numpy as np

    if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != tokens:
        return [f"logits are {logits.dtype} of {list(logits.shape)} for {tokens} tokens"]
    bad = int((~np.isfinite(logits)).sum())
    return [f"logits has {bad} values that are NaN or infinite"] if bad else []


def peak_memory() -> int:
    """Bytes of this process in memory, at most since the last reset, with those of the processes that it started."""
    import psutil

    if not Path("/proc/self/status").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    return sum(map(_peak_of, pids))


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _reset_peak_memory() -> None:
    with suppress(OSError):  # not Linux, or not permitted: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _let_go() -> None:
    """Give back what earlier steps left, so that the next one does not come on top of it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library of another kind
        ctypes.CDLL(None).malloc_trim(0)


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
