"""Time what all tools made of one model together, interleaved, and judge it on the same text.

    python benchmarks/peers/compare.py OUT [--rounds 40] [--json FILE] [--only NAME ...]

OUT is what make_all.py filled. Each artifact lives in a process of its own (serve.py, in its tool's environment), on as
many threads as there are cores; all but one are stopped (SIGSTOP) at any time. A round visits every cell, and in each
cell all artifacts in a new random order: two calls to warm up, five timed, of which the median counts. An artifact's
ratio in one round is the geometric mean over the cells; the rounds are the samples of a signed-rank interval (99%),
the product's own arithmetic. Everything else here is independent of the product.

Accuracy is judged on the held-out text: for an encoder the drop is 1 - mean cosine of sentence embeddings (mean-pooled,
normalised) against eager float32, for a classifier what it loses of accuracy; the share of answers that differ is shown
beside it.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from inputs import CELLS
from make_all import SCRIPTS, python_of
from record import anonymous
from table import OURS, show, within

from optimize.pipeline.statistics import Interval, ratio_interval

HERE = Path(__file__).parent
BASELINE = "eager-f32"
CORES = len(os.sched_getaffinity(0))
Samples = list[list[list[float]]]  # seconds by round, cell and call


class Side:
    """One artifact's process; stopped whenever it is not asked something."""

    def __init__(self, line: dict[str, Any], out: Path, venvs: Path) -> None:
        self.name: str = line["name"]
        words = [HERE / "serve.py", line["runtime"], line["path"], out / "inputs", json.dumps(line["options"]), CORES]
        log = out / "logs" / f"{self.name}.log"
        log.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python_of(SCRIPTS[line["tool"]], venvs), *map(str, words)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._log = log
        self._reply()
        self.open_seconds = round(time.monotonic() - started, 1)
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, request: str) -> Any:
        """Raises RuntimeError with the end of its log if the process dies of it."""
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self._reply()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def memory(self) -> float:
        """Megabytes resident at most so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1e3, 1)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _reply(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self.close()
            words = [each for each in self._log.read_text(errors="replace").splitlines() if each.strip()]
            raise RuntimeError(anonymous(" ".join(words[-3:]))[-500:] or f"exit code {self._process.returncode}")
        return json.loads(line)


def open_all(lines: list[dict[str, Any]], out: Path, venvs: Path) -> dict[str, Side]:
    """A process for each artifact that was made; those that do not open get an error in their line."""
    sides = {}
    for line in lines:
        if "error" in line:
            continue
        try:
            sides[line["name"]] = Side(line, out, venvs)
            line["open_seconds"] = sides[line["name"]].open_seconds
        except RuntimeError as error:
            line["error"] = f"does not open: {error}"
        print(f"{line['name']}: open {line.get('open_seconds', line.get('error'))}", file=sys.stderr, flush=True)
    return sides


def measure(sides: dict[str, Side], rounds: int) -> dict[str, Samples]:
    """The seconds of every timed call."""
    samples: dict[str, Samples] = {name: [] for name in sides}
    for done in range(rounds):
        for name in sides:
            samples[name].append([])
        for cell in range(len(CELLS)):
            order = list(sides.values())
            random.shuffle(order)
            for side in order:
                samples[side.name][-1].append(side.ask(f"time {cell}"))
        print(f"round {done + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


def ratio(over: Samples, under: Samples, cells: range) -> Interval:
    """How many times `under` is as fast as `over`, in geometric mean over cells."""
    logs = [
        statistics.fmean(math.log(statistics.median(a[cell]) / statistics.median(b[cell])) for cell in cells)
        for a, b in zip(over, under, strict=True)
    ]
    return ratio_interval(logs)


def judge(found: np.ndarray, expected: np.ndarray, labels: list[int] | None) -> dict[str, float]:
    """The drop of one artifact, and for a classifier its accuracy on the labels."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise ValueError(f"outputs of shape {list(found.shape)}, finite: {bool(np.isfinite(found).all())}")
    if labels is None:
        cosines = (found.astype(np.float64) * expected).sum(axis=1)
        return {"drop": float(1 - cosines.mean()), "worst_drop": float(1 - cosines.min())}
    answers, wanted = found.argmax(axis=1), expected.argmax(axis=1)
    right, before = (float((each == np.array(labels)).mean()) for each in (answers, wanted))
    return {"drop": before - right, "accuracy": right, "differing": float((answers != wanted).mean())}


def accuracies(sides: dict[str, Side], out: Path) -> dict[str, dict[str, float]]:
    """Of every artifact against the baseline, on the same text in the same batches."""
    labels = json.loads((out / "inputs" / "labels.json").read_text())
    outputs = {}
    for name, side in sides.items():
        path = out / "logs" / f"{name}.npy"
        side.ask(f"outputs {path}")
        outputs[name] = np.load(path, allow_pickle=False)
    return {name: judge(found, outputs[BASELINE], labels) for name, found in outputs.items()}


def host() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    features = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": fields.get("model name"), "cores": CORES, "features": features, "memory": memory,
            "system": platform.platform(), "python": platform.python_version()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="names; the baseline always takes part")
    parser.add_argument("--venvs", type=Path, default=Path("out/peers"))
    given = parser.parse_args()
    files = (given.out / f"{tool}.jsonl" for tool in SCRIPTS)
    lines = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    if given.only:
        lines = [line for line in lines if line["name"] in (BASELINE, *given.only)]
    load_before = os.getloadavg()
    sides = open_all(lines, given.out, given.venvs)
    try:
        samples = measure(sides, given.rounds)
        accuracy = accuracies(sides, given.out)
        memory = {name: side.memory() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    everything = range(len(CELLS))
    for line in lines:
        line.pop("path", None)  # of this machine
        name = line["name"]
        if name not in sides:
            continue
        own = samples[name]
        line |= {"speedup": vars(ratio(samples[BASELINE], own, everything)), **accuracy[name]}
        line["speedup_by_cell"] = [vars(ratio(samples[BASELINE], own, range(c, c + 1))) for c in everything]
        line["seconds_by_cell"] = [statistics.median(t for r in own for t in r[cell]) for cell in everything]
        line["ours_over_it"] = {each: vars(ratio(own, samples[each], everything)) for each in OURS if each in sides}
        line |= {"within": within(line["drop"]), "peak_megabytes": memory[name], "samples_seconds": own}
    report = {
        "command": f"python benchmarks/peers/compare.py {given.out} --rounds {given.rounds}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": {**host(), "load_before": load_before, "load_after": os.getloadavg()},
        "cells": CELLS,
        "rounds": given.rounds,
        "artifacts": lines,
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report) + "\n")
    print(show(report))


if __name__ == "__main__":
    main()
