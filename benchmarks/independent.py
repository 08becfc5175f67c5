"""Time an emitted folder against eager float32 with none of optimize's code: two processes that take turns.

    python benchmarks/independent.py EMITTED CHECKPOINT [--rounds 40] [--json FILE]

Each side lives in a process of its own and is timed there with time.perf_counter around each call. The processes take
turns, cell by cell: two calls to warm up, then the median of five; the other process is stopped meanwhile. Reported is
the median over rounds of the ratio of a round's two turns. Runs OpenVINO artifacts as their model card says.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path

CELLS = ((1, 32), (1, 128), (8, 128))

SIDE = """
import json, sys, time
import numpy as np
from transformers import AutoTokenizer
what, folder, cells = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
words = "The tide came in slowly over the flats while the ferry waited for its last passengers of the day . ".split()
tokenizer = AutoTokenizer.from_pretrained(folder)
feeds = [dict(tokenizer([" ".join(words[i:] + words * 20) for i in range(batch)], truncation=True, max_length=length,
                        return_tensors="np")) for batch, length in cells]
assert all(feed["input_ids"].shape == tuple(cell) for feed, cell in zip(feeds, cells))
if what == "eager":
    import torch
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    def call(feed):
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in feed.items()}).last_hidden_state.numpy()
else:
    import os, openvino
    options = json.load(open(os.path.join(folder, "runtime.json")))
    model = openvino.Core().compile_model(os.path.join(folder, "openvino_model.xml"), "CPU", options)
    names = [port.any_name for port in model.inputs]
    def call(feed):
        return np.array(model({name: feed[name] for name in names})["last_hidden_state"])
print("ready", flush=True)
for line in sys.stdin:
    feed = feeds[int(line)]
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        call(feed)
        seconds.append(time.perf_counter() - start)
    print(sorted(seconds[2:])[2], flush=True)
"""


def side(what: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SIDE, what, str(folder), json.dumps(CELLS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    return process


def timed(process: "subprocess.Popen[str]", cell: int) -> float:
    assert process.stdin and process.stdout
    process.send_signal(signal.SIGCONT)
    process.stdin.write(f"{cell}\n")
    process.stdin.flush()
    seconds = float(process.stdout.readline())
    process.send_signal(signal.SIGSTOP)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emitted", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    eager, ours = side("eager", arguments.checkpoint), side("artifact", arguments.emitted)
    samples = [[(timed(eager, cell), timed(ours, cell)) for cell in range(len(CELLS))] for _ in range(arguments.rounds)]
    for process in (eager, ours):
        process.kill()
    ratios = [statistics.median(round_[cell][0] / round_[cell][1] for round_ in samples) for cell in range(len(CELLS))]
    result = {
        "command": f"python benchmarks/independent.py EMITTED CHECKPOINT --rounds {arguments.rounds}",
        "host": {"system": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "recipe": json.loads((arguments.emitted / "optimize.json").read_text())["recipe"],
        "speedup_by_cell": {f"{b}x{s}": round(ratio, 3) for (b, s), ratio in zip(CELLS, ratios, strict=True)},
        "geometric_mean": round(statistics.geometric_mean(ratios), 3),
        "samples_seconds_eager_and_artifact": samples,
    }
    print({key: value for key, value in result.items() if "samples" not in key})
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
