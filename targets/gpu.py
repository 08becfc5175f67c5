"""The GPU target: one NVIDIA GPU, and the candidate ways to lower a checkpoint for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Checkpoint, Form, Recipe, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.gpus import visible
from optimize.pipeline.recipe import parse
from optimize.targets import cpu

PRODUCT = 8192  # rows of the square matrices that arithmetic is measured with
READ = 1 << 31  # bytes that memory is measured with: more than any cache holds
TRIES = 20
# compute capability from which on a GPU has arithmetic of its own in a dtype
SINCE = {"float32": (0, 0), "float16": (5, 3), "int8": (7, 5), "bfloat16": (8, 0), "float8_e4m3fn": (8, 9)}

FOR_MEMORY = {  # of encoders and language models: uncompiled they are slower than 16 bits
    "torchao-int8": "cast-dtype,quantize-torchao",
    "torchao-fp8": "cast-dtype,quantize-torchao{mode=fp8}",
    "torchao-fp8-compiled": "cast-dtype,quantize-torchao{mode=fp8},compile-cuda",
    "bitsandbytes-int8": "cast-dtype{dtype=float16},quantize-bitsandbytes",
    "bitsandbytes-nf4": "cast-dtype,quantize-bitsandbytes{mode=nf4}",
}
RECIPES = {
    "eager-fp16": "cast-dtype{dtype=float16}",
    "eager-bf16": "cast-dtype",
    "graphs-fp16": "cast-dtype{dtype=float16},compile-cuda{compile=false}",
    "compiled-fp16": "cast-dtype{dtype=float16},compile-cuda",
    "compiled-bf16": "cast-dtype,compile-cuda",
    "compiled-fp16-efficient": "cast-dtype{dtype=float16},compile-cuda{attention=efficient}",
    "compiled-fp16-cudnn": "cast-dtype{dtype=float16},compile-cuda{attention=cudnn}",
    "compiled-fp16-autotuned": "cast-dtype{dtype=float16},compile-cuda{autotune=true}",
    "onnx-cuda-fp16": "export-onnx{fused=true;provider=cuda;dtype=float16},use-provider",
    "tensorrt-fp16": "export-onnx{dtype=float16},build-tensorrt",
    "tensorrt-fp8": "export-onnx,quantize-modelopt{mode=fp8},build-tensorrt",
    "torchao-int8-compiled": "cast-dtype,quantize-torchao,compile-cuda",
    **FOR_MEMORY,
}
IMAGES = (  # those that take them
    "eager-fp16", "eager-bf16", "graphs-fp16", "compiled-fp16", "compiled-bf16", "compiled-fp16-efficient",
    "compiled-fp16-cudnn", "onnx-cuda-fp16",
)  # fmt: skip
TRANSCRIBING = {  # for speech models
    "speech-fp16": "cast-dtype{dtype=float16}",
    "speech-bf16": "cast-dtype",
    "graphs-fp16": "cast-dtype{dtype=float16},compile-cuda{compile=false}",
    "compiled-fp16": "cast-dtype{dtype=float16},compile-cuda",
    "compiled-bf16": "cast-dtype,compile-cuda",
}
GENERATING = {  # for language models
    "eager-fp16": "cast-dtype{dtype=float16}",
    "eager-bf16": "cast-dtype",
    "graphs-bf16": "cast-dtype,compile-cuda{compile=false}",
    "compiled-bf16": "cast-dtype,compile-cuda",
    "vllm-bf16": "cast-dtype,serve-vllm",
    "vllm-bf16-batched": "cast-dtype,serve-vllm{batched=16384}",
    "vllm-fp8": "cast-dtype,serve-vllm{quantization=fp8}",
    "vllm-fp8-cache": "cast-dtype,serve-vllm{quantization=fp8;cache=fp8}",
    "vllm-fp8-static": "cast-dtype,quantize-llm-compressor{mode=fp8-static},serve-vllm",
    "vllm-int8": "cast-dtype,quantize-llm-compressor{mode=int8},serve-vllm",
    "vllm-int4": "cast-dtype,quantize-llm-compressor{mode=int4},serve-vllm",
    "vllm-int4-awq": "cast-dtype,quantize-llm-compressor{mode=int4-awq},serve-vllm",
    "tensorrt-llm": "build-tensorrt-llm",
    "tensorrt-llm-fp8": "build-tensorrt-llm{quantization=fp8}",
    "torchao-int8-weights-compiled": "cast-dtype,quantize-torchao{mode=weights},compile-cuda",
    **FOR_MEMORY,
}
# tried only by name
BY_NAME = frozenset({
    "eager-fp16", "eager-bf16", "graphs-bf16", "compiled-fp16-efficient", "compiled-fp16-cudnn",
    "compiled-fp16-autotuned", "vllm-fp8-cache", "vllm-fp8-static", "vllm-int4-awq", "vllm-bf16-batched",
    *FOR_MEMORY, "torchao-int8-compiled",
})  # fmt: skip
RECOVERIES: dict[str, str] = {}


@dataclass(frozen=True)
class Device:
    """What the driver tells of one GPU."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    used: int  # bytes of them, by whatever process
    nvlinks: int  # that are up
    driver: str
    clock: int  # MHz that its multiprocessors reach at most


def devices() -> tuple[Device, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order. Raises RequestError where its driver tells of none."""
    import pynvml

    try:
        with visible() as handles:
            found = tuple(map(_read, handles))
    except pynvml.NVMLError as error:
        raise RequestError(
            f"this host has no NVIDIA GPU that its driver tells of ({error})",
            hint="use --target cpu; if there is one, nvidia-smi should list it",
        ) from None
    if not found:
        raise RequestError(
            "CUDA_VISIBLE_DEVICES leaves none of this host's GPUs", hint="unset it, or name whole ones (no parts: MIG)"
        )
    return found


def _read(device: Any) -> Device:
    import pynvml

    def is_up(link: int) -> bool:
        try:
            return bool(pynvml.nvmlDeviceGetNvLinkState(device, link))
        except pynvml.NVMLError:  # it has no such link
            return False

    memory, clock = pynvml.nvmlDeviceGetMemoryInfo(device), 0
    with suppress(pynvml.NVMLError):  # a virtual one tells of none
        clock = int(pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_SM))
    return Device(
        pynvml.nvmlDeviceGetName(device), tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device)), int(memory.total),
        int(memory.used), sum(map(is_up, range(pynvml.NVML_NVLINK_MAX_LINKS))), pynvml.nvmlSystemGetDriverVersion(),
        clock,
    )  # fmt: skip


def probe() -> Target:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, asked through its driver. Raises RequestError where none is."""
    return target_of(devices()[:1])


def target_of(found: Sequence[Device]) -> Target:
    """Like GPUs of this host."""
    host, first = cpu.probe(), found[0]
    linked = "NVLink" if all(each.nvlinks for each in found) else "PCIe"
    return Target(
        name="gpu",
        device=first.name,
        arch=f"{first.capability[0]}.{first.capability[1]}",
        features=(),
        dtypes=tuple(dtype for dtype, least in SINCE.items() if first.capability >= least),
        cores=host.cores,
        memory=host.memory,
        gpus=len(found),
        gpu_memory=min(each.memory for each in found),
        gpu_used=max(each.used for each in found),
        gpu_clock=min(each.clock for each in found),
        driver=first.driver,
        links=linked if len(found) > 1 else "",
    )


def recipes(checkpoint: Checkpoint, target: Target) -> tuple[Recipe, ...]:
    """The candidates, cheapest first. A pass that cannot run here says so in the plan."""
    texts = {
        Form.TOKENS: RECIPES,
        Form.IMAGES: {name: RECIPES[name] for name in IMAGES},
        Form.PROMPTS: GENERATING,
        Form.CLIPS: TRANSCRIBING,
    }[TASKS[checkpoint.task].form]
    return tuple(replace(parse(text, name), default=name not in BY_NAME) for name, text in texts.items())


def peaks(target: Target) -> dict[str, Any]:
    """What this GPU reaches at most: see roofline.Peaks. Best of several products of square matrices, TF32 off."""
    import torch

    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        return cpu.reached(target.dtypes, PRODUCT, READ, "cuda", _fastest)
    finally:
        products.fp32_precision = before  # nothing is left changed for whoever computes next


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of TRIES calls, after one to warm up."""
    from optimize.targets.runtimes.cuda import seconds

    call()
    return min((seconds(call) for _ in range(TRIES)), default=math.inf)
