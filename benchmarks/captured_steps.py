"""What `compile-cuda` captures of Llama's shapes: in bfloat16, with torchao's int8 weights, and with its fp8.

    python benchmarks/captured_steps.py [--sizes 1b 7b] [--weights bf16 int8] [--calls 20] [--json ...]

Each is compiled in a process of its own; then those of one size take turns, in random order, on random prompts. Nothing
is judged.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu import SEVEN, llama_shape

from optimize.targets.gpu import peaks, probe

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
        "read": read_in_a_step(model),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    })  # fmt: skip
    draw = np.random.default_rng(0)
    while (shape := pipe.recv()) is not None:
        batch, prompt, new = shape
        pipe.send(session.generate([draw.integers(5, 32000, prompt) for _ in range(batch)], new).seconds)


def read_in_a_step(model: Any) -> int:
    """Bytes of the weights, each once, and of the embeddings none where they are no head."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    looked_up = model.get_input_embeddings().weight
    if looked_up is not model.get_output_embeddings().weight:
        tensors.pop(id(looked_up))
    return sum(each.numel() * each.element_size() for each in tensors.values())


@dataclass
class Served:
    """One model's process."""

    pipe: Connection
    process: BaseProcess


def started(size: str, weights: str) -> Served:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(size, weights, theirs), daemon=True)
    process.start()
    theirs.close()
    return Served(ours, process)


def measure(size: str, served: dict[str, Served], calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {"models": {name: each.pipe.recv() for name, each in served.items()}, "shapes": {}}
    turns = [(shape, weights) for shape in SHAPES[size] for weights in served]
    times: dict[Any, list[list[float]]] = {turn: [] for turn in turns}
    for round_ in range(calls + 2):  # the first two are not counted
        for shape, weights in random.sample(turns, len(turns)):
            served[weights].pipe.send(shape)
            seconds = served[weights].pipe.recv()
            if round_ > 1:
                times[shape, weights].append([round(each * 1e3, 4) for each in seconds])
    for (shape, weights), rows in times.items():
        batch, prompt, new = shape
        step = statistics.median((row[-1] - row[0]) / (new - 1) for row in rows)
        found["shapes"].setdefault(f"{batch}x{prompt}+{new}", {})[weights] = {
            "whole_ms": round(statistics.median(row[-1] for row in rows), 3),
            "first_ms": round(statistics.median(row[0] for row in rows), 3),
            "step_ms": round(step, 4), "tokens_per_second": round(batch / step * 1e3),
            "bytes_per_second": round(found["models"][weights]["read"] / step * 1e3),
            "calls_ms": [[row[0], row[-1]] for row in rows],
        }  # fmt: skip
    for each in served.values():
        each.pipe.send(None)
    for each in served.values():
        each.process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--weights", nargs="*", default=["bf16", "int8"], choices=WEIGHTS)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu-captured-steps.json")
    arguments = parser.parse_args()
    words = ["python", "benchmarks/captured_steps.py", *sys.argv[1:]]
    models = {size: {each: started(size, each) for each in arguments.weights} for size in arguments.sizes}
    for served in models.values():  # none is timed while another compiles
        for each in served.values():
            each.pipe.poll(None)
    found: dict[str, Any] = {
        "command": " ".join(words), "python": platform.python_version(),
        "bandwidth": peaks(probe())["bandwidth"], "sizes": {},
    }  # fmt: skip
    for size, served in models.items():
        found["sizes"][size] = measure(size, served, arguments.calls)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        for shape, each in found["sizes"][size]["shapes"].items():
            for weights, one in each.items():
                roof = f"{one['bytes_per_second'] / found['bandwidth']:.0%} of the memory's bandwidth"
                print(size, shape, weights, one["whole_ms"], one["first_ms"], one["step_ms"], roof)


if __name__ == "__main__":
    main()
