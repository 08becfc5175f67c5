"""The GPU target: one NVIDIA GPU, and the candidate ways to lower a checkpoint for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Checkpoint, Recipe, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse
from optimize.targets import cpu

PRODUCT = 8192  # rows of the square matrices that arithmetic is measured with
READ = 1 << 31  # bytes that memory is measured with: more than any cache holds
TRIES = 20
# compute capability from which on a GPU has arithmetic of its own in a dtype
SINCE = {"float32": (0, 0), "float16": (5, 3), "int8": (7, 5), "bfloat16": (8, 0), "float8_e4m3fn": (8, 9)}

RECIPES = {
    "eager-fp16": "cast-dtype{dtype=float16}",
    "eager-bf16": "cast-dtype",
    "graphs-fp16": "cast-dtype{dtype=float16},compile-cuda{compile=false}",
    "compiled-fp16": "cast-dtype{dtype=float16},compile-cuda",
    "compiled-bf16": "cast-dtype,compile-cuda",
    "compiled-fp16-autotuned": "cast-dtype{dtype=float16},compile-cuda{autotune=true}",
    "onnx-cuda-fp16": "export-onnx{dtype=float16},use-provider",
    "tensorrt-fp16": "export-onnx{dtype=float16},build-tensorrt",
    "tensorrt-fp8": "export-onnx,quantize-modelopt{mode=fp8},build-tensorrt",
}
GENERATING = {  # for language models
    "eager-fp16": "cast-dtype{dtype=float16}",
    "eager-bf16": "cast-dtype",
    "vllm-bf16": "serve-vllm",
    "vllm-fp8": "serve-vllm{quantization=fp8}",
    "vllm-fp8-cache": "serve-vllm{quantization=fp8;cache=fp8}",
    "tensorrt-llm": "build-tensorrt-llm",
    "tensorrt-llm-fp8": "build-tensorrt-llm{quantization=fp8}",
}
BY_NAME = frozenset({"eager-fp16", "eager-bf16", "compiled-fp16-autotuned"})  # tried only by name
RECOVERIES: dict[str, str] = {}


def probe() -> Target:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, asked through its driver. Raises RequestError where none is."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            capability = pynvml.nvmlDeviceGetCudaComputeCapability(device)
            found = (pynvml.nvmlDeviceGetName(device), pynvml.nvmlDeviceGetMemoryInfo(device).total,
                     pynvml.nvmlSystemGetDriverVersion())  # fmt: skip
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise RequestError(
            f"this host has no NVIDIA GPU that its driver tells of ({error})",
            hint="use --target cpu, or see nvidia-smi",
        ) from None
    name, memory, driver = found
    host = cpu.probe()
    return Target(
        name="gpu",
        device=name,
        arch=f"{capability[0]}.{capability[1]}",
        features=(),
        dtypes=tuple(dtype for dtype, least in SINCE.items() if tuple(capability) >= least),
        cores=host.cores,
        memory=host.memory,
        gpus=1,
        gpu_memory=int(memory),
        driver=driver,
    )


def recipes(checkpoint: Checkpoint, target: Target) -> tuple[Recipe, ...]:
    """The candidates, cheapest first. A pass that cannot run here says so in the plan."""
    texts = GENERATING if TASKS[checkpoint.task].generates else RECIPES
    return tuple(replace(parse(text, name), default=name not in BY_NAME) for name, text in texts.items())


def peaks(target: Target) -> dict[str, Any]:
    """What this GPU reaches at most: see roofline.Peaks. Best of several products of square matrices, TF32 off."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    dtypes = (each for each in target.dtypes if each != "float8_e4m3fn")
    return cpu.reached(dtypes, PRODUCT, READ, "cuda", _fastest)


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of TRIES calls, after one to warm up."""
    from optimize.targets.runtimes.cuda import seconds

    call()
    return min((seconds(call) for _ in range(TRIES)), default=math.inf)
