"""vLLM's first tokens and steps on a GPU, in bfloat16 and fp8: Llama shapes, dummy weights, the product's runtime.

    python benchmarks/vllm_steps.py [--json benchmarks/results/gpu-vllm-steps.json] [--variants 1b 1b-fp8 7b 7b-fp8]

In a Python that has vLLM and the product. All engines open at once, in a process each, and are timed one after the
other while the others wait: medians, not paired.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu import SEVEN, llama_shape

from optimize.targets.gpu import devices

VARIANTS = ["1b", "1b-fp8", "7b", "7b-fp8"]
CALLS = 8
CACHE = 4 << 30  # bytes of each engine's KV cache
SIZES: dict[str, dict[str, int]] = {"1b": {}, "7b": SEVEN}
CELLS = {"1b": [(1, 64, 16), (8, 64, 16), (256, 64, 16)], "7b": [(1, 128, 32), (8, 128, 32)]}  # batch, prompt, new


def engine(variant: str, pipe: Connection) -> None:
    """One process: opens, says so, and times when it is asked to."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    import numpy as np
    from transformers import LlamaConfig
    from vllm import LLM

    from optimize.targets.runtimes.vllm import VllmSession

    size, _, quantization = variant.partition("-")
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**llama_shape(**SIZES[size]), architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=512,
            disable_log_stats=True, max_num_seqs=256, kv_cache_memory_bytes=CACHE, gpu_memory_utilization=0.4,
            dtype="bfloat16", quantization=quantization or None,
        )  # fmt: skip
        session, opened = VllmSession(llm), time.perf_counter() - start
        pipe.send("open")
        pipe.recv()
        for batch, prompt, new in CELLS[size]:
            prompts = list(np.random.default_rng(0).integers(5, 30000, (batch, prompt)))
            session.generate(prompts, new)
            calls = []
            for _ in range(CALLS):
                start = time.perf_counter()
                seconds = session.generate(prompts, new).seconds
                calls.append((time.perf_counter() - start, seconds[0], seconds[-1] - seconds[0]))
            whole, first, rest = np.median(calls, axis=0).tolist()
            rows.append({
                "shape": [batch, prompt, new], "whole_ms": whole * 1e3, "first_ms": first * 1e3,
                "step_ms": rest * 1e3 / (new - 1), "tokens_per_s": batch * (new - 1) / rest,
                "calls": calls,  # seconds: whole, up to the first token, from there
            })  # fmt: skip
    pipe.send({"variant": variant, "open_s": opened, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu-vllm-steps.json")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    arguments = parser.parse_args()
    context, processes, pipes = multiprocessing.get_context("spawn"), [], []
    found: dict[str, Any] = {"command": " ".join(["python", "benchmarks/vllm_steps.py", *sys.argv[1:]]), **host()}
    found["engines"] = []
    try:
        for variant in arguments.variants:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=engine, args=(variant, theirs)))
            processes[-1].start()
            theirs.close()  # so that it is told when the process has died
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("time")
            found["engines"].append(pipe.recv())
    finally:
        for process in processes:
            process.kill()  # vLLM's own end may hang, and one that waits would wait for ever
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def host() -> dict[str, str]:
    import torch
    import vllm

    gpu = devices()[0]
    return {"device": gpu.name, "driver": gpu.driver, "torch": torch.__version__, "vllm": vllm.__version__}


if __name__ == "__main__":
    main()
