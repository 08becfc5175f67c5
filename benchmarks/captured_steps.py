"""What `compile-cuda` captures of Llama's shapes: in bfloat16, with torchao's int8 weights, and with its fp8.

    python benchmarks/captured_steps.py [--sizes 1b 7b] [--weights bf16 int8] [--calls 20] [--json ...]

Each is compiled in a process of its own; then all take turns, in random order, on random prompts. Nothing is judged.
"""

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu import SEVEN, llama_shape

SIZES: dict[str, dict[str, int]] = {"1b": {}, "7b": SEVEN}
SHAPES = {"1b": [(1, 64, 16), (8, 64, 16), (64, 64, 16), (256, 64, 16)], "7b": [(1, 128, 32), (8, 128, 32)]}
WEIGHTS = ("bf16", "int8", "fp8")


def serve(size: str, weights: str, pipe: Connection) -> None:
    """Compile one model, say what it is, and answer each shape with the seconds of a call: to each of its tokens."""
    import numpy as np
    import torch
    from torchao.quantization import quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimize.passes import quantize_torchao
    from optimize.passes._captured_generation import CapturedGeneration
    from optimize.passes._cuda_graphs import GRAPHS
    from optimize.targets.runtimes.captured import CapturedGenerator

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**llama_shape(**SIZES[size]))).eval()
    if weights != "bf16":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # as the pass does
        config = quantize_torchao._config({"int8": "weights", "fp8": "fp8"}[weights])
        chosen = {"int8": None, "fp8": lambda each, _: isinstance(each, torch.nn.Linear) and each is not head}[weights]
        quantize_(model, config, filter_fn=chosen)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"shapes": SHAPES[size], "compile": True, "autotune": False, "fill": 0}
        (Path(folder) / GRAPHS).write_text(json.dumps(settings))
        session = CapturedGenerator(model, CapturedGeneration(Path(folder), model), "cuda")
    pipe.send({
        "capture_seconds": round(time.perf_counter() - begun, 1), "allocated": torch.cuda.memory_allocated(),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    })  # fmt: skip
    draw = np.random.default_rng(0)
    while (shape := pipe.recv()) is not None:
        batch, prompt, new = shape
        pipe.send(session.generate([draw.integers(5, 32000, prompt) for _ in range(batch)], new).seconds)


def measure(size: str, kinds: list[str], calls: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = dict[str, Connection](), []
    for weights in kinds:
        pipes[weights], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(size, weights, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    found: dict[str, Any] = {"models": {weights: pipe.recv() for weights, pipe in pipes.items()}, "shapes": {}}
    turns = [(shape, weights) for shape in SHAPES[size] for weights in kinds]
    times: dict[Any, list[list[float]]] = {turn: [] for turn in turns}
    for round_ in range(calls + 2):  # the first two are not counted
        for shape, weights in random.sample(turns, len(turns)):
            pipes[weights].send(shape)
            seconds = pipes[weights].recv()
            if round_ > 1:
                times[shape, weights].append([round(each * 1e3, 4) for each in seconds])
    for (shape, weights), rows in times.items():
        batch, prompt, new = shape
        step = statistics.median((row[-1] - row[0]) / (new - 1) for row in rows)
        found["shapes"].setdefault(f"{batch}x{prompt}+{new}", {})[weights] = {
            "whole_ms": round(statistics.median(row[-1] for row in rows), 3),
            "first_ms": round(statistics.median(row[0] for row in rows), 3),
            "step_ms": round(step, 4), "tokens_per_second": round(batch / step * 1e3),
            "calls_ms": [[row[0], row[-1]] for row in rows],
        }  # fmt: skip
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--weights", nargs="*", default=["bf16", "int8"], choices=WEIGHTS)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu-captured-steps.json")
    arguments = parser.parse_args()
    words = ["python", "benchmarks/captured_steps.py", *sys.argv[1:]]
    found: dict[str, Any] = {"command": " ".join(words), "python": platform.python_version(), "sizes": {}}
    for size in arguments.sizes:
        found["sizes"][size] = measure(size, arguments.weights, arguments.calls)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        for shape, each in found["sizes"][size]["shapes"].items():
            for weights, one in each.items():
                print(size, shape, weights, one["whole_ms"], one["first_ms"], one["step_ms"])


if __name__ == "__main__":
    main()
