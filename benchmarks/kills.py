"""Kill runs, build workers and measuring workers at random moments; check the store each time, then let a run finish.

    python benchmarks/kills.py CHECKPOINT [--kills 20] [--json FILE]

For each victim: start `optimize CHECKPOINT --recipe export-onnx --recipe cast-dtype` on a cache of its own, wait until
the victim lives, wait a random time more, `kill -9` it; note how the run ended and whether every published artifact
still has its digests. After all kills of a victim, the next run has to complete on the same cache with exit code 0.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from optimize.pipeline.store import Damage, Store

OPTIONS = ["--recipe", "export-onnx", "--recipe", "cast-dtype", "--workload", "1x8,2x16", "--budget", "10s",
           "--min-speedup", "0.01"]  # fmt: skip
# victim -> the log whose existence says that it lives, and how long it may live on before the kill, in seconds
VICTIMS = {"run": ("build.log", 25.0), "build worker": ("build.log", 12.0), "measuring worker": ("baseline.log", 30.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {victim: trials(victim, arguments.checkpoint, arguments.kills) for victim in VICTIMS}
    command = " ".join(["python", "benchmarks/kills.py", *sys.argv[1:]])
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")
    for victim, result in results.items():
        print(victim, {key: value for key, value in result.items() if key != "kills"})


def trials(victim: str, checkpoint: Path, kills: int) -> dict[str, object]:
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        cache, chance = Path(scratch, "cache"), random.Random(victim)
        for number in range(kills):
            for key in Store(cache / "store").keys() if number % 2 else ():
                Store(cache / "store").discard(key)  # every second time it builds, else it finds
            done.append(kill_once(victim, checkpoint, cache, Path(scratch, f"out{number}"), chance))
            print(victim, number, done[-1], flush=True)
        after = start(checkpoint, cache, Path(scratch, "after"))
        after.communicate()
    return {
        "kills": done,
        "damaged_artifacts": sum(each["damaged"] for each in done),
        "processes_left": sum(each["left"] for each in done),
        "next_run_exit_code": after.returncode,
    }


def kill_once(victim: str, checkpoint: Path, cache: Path, out: Path, chance: random.Random) -> dict[str, object]:
    before = set(cache.glob("runs/*"))
    run = start(checkpoint, cache, out)
    log, most = VICTIMS[victim]
    while run.poll() is None and not any(
        (folder / "logs" / log).exists() for folder in set(cache.glob("runs/*")) - before
    ):
        time.sleep(0.02)
    delay = chance.uniform(0, most)
    time.sleep(delay)
    workers: list[psutil.Process] = []
    if run.poll() is None:
        parent = psutil.Process(run.pid)
        workers = parent.children()
        target = parent if victim == "run" else chance.choice(workers) if workers else None
        if target is not None:
            target.kill()
    run.communicate()
    left = psutil.wait_procs(workers, timeout=5)[1]
    store = Store(cache / "store")
    damaged = sum(isinstance(store.get(key), Damage) for key in store.keys())  # noqa: SIM118
    return {"after_seconds": round(delay, 2), "exit_code": run.returncode, "damaged": damaged, "left": len(left),
            "artifacts": len(store.keys()), "emitted": out.exists()}  # fmt: skip


def start(checkpoint: Path, cache: Path, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "optimize.pipeline.cli", str(checkpoint), *OPTIONS, "--out", str(out)]
    environment = os.environ | {"OPTIMIZE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


if __name__ == "__main__":
    main()
