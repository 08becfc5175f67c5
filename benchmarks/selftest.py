"""How often a difference is claimed where there is none (A/A), and seen where there is one (A/B), on this host.

    python benchmarks/selftest.py [--same 200] [--heavier 40] [--load 0] [--json FILE]

Every run has fresh processes, as every candidate has in a real run. A/A runs are quick (3 s); A/B runs, where one side
does a tenth more, take what a candidate gets of the default budget (15 s). `--load N` keeps N processors busy.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from optimize.pipeline.contract import Cell
from optimize.pipeline.measure import Speed, compare
from optimize.pipeline.selftest import EXTRA, found
from optimize.pipeline.workers import WorkerProcess

QUICK, DEFAULT = 3.0, 15.0  # seconds
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=200)
    parser.add_argument("--heavier", type=int, default=40)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        for _ in range(arguments.load):
            stack.callback(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]).kill)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with WorkerProcess(scratch / "calibrate.log") as worker:
            count = worker.ask("calibrate", limit=60, seconds=0.01)
        same = [run(scratch, count, count, QUICK) for _ in range(arguments.same)]
        heavier = [run(scratch, round(count * (1 + EXTRA)), count, DEFAULT) for _ in range(arguments.heavier)]
    words = {name: [found(speed) for speed in speeds] for name, speeds in
             (("same", same), ("heavier", heavier))}  # fmt: skip
    counts = {name: dict(collections.Counter(map(str, found))) for name, found in words.items()}
    print(counts)
    if arguments.json:
        result = {
            "command": " ".join(["python", "benchmarks/selftest.py", *sys.argv[1:]]),
            "host": {"system": platform.platform(), "cores": os.cpu_count()},
            "products_per_call": count,
            "counts": counts,
            "same": [dataclasses.asdict(speed) for speed in same],
            "heavier": [dataclasses.asdict(speed) for speed in heavier],
        }
        arguments.json.write_text(json.dumps(result) + "\n")


def run(scratch: Path, baseline: int, candidate: int, seconds: float) -> Speed:
    with WorkerProcess(scratch / "a.log") as first, WorkerProcess(scratch / "b.log") as second:
        for worker, products in ((first, baseline), (second, candidate)):
            worker.ask("open_products", limit=60, count=products)
            worker.pause()
        speed, _ = compare(first, second, [Cell(1, 1)], seconds)
    print(
        f"{speed.overall} {speed.quads} quads, {speed.disturbed} disturbed, {found(speed)}; {speed.noise}", flush=True
    )
    return speed


if __name__ == "__main__":
    main()
