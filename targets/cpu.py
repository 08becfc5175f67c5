"""The CPU target: what this host is, and the candidate ways to lower a checkpoint for it."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Checkpoint, Form, Recipe, Target
from optimize.pipeline.recipe import parse

# instruction sets that change what compilers and kernels do; other flags do not enter keys
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
            "asimddp", "i8mm", "bf16", "sve")  # fmt: skip

PRODUCT = 2048  # rows of the square matrices that arithmetic is measured with
READ = 1 << 28  # bytes that memory is measured with: more than any cache holds
TRYING = 0.5  # seconds for each peak

RECIPES = {
    "eager-bf16": "cast-dtype",
    "aoti": "compile-aoti",
    "aoti-bf16": "cast-dtype,compile-aoti",
    "onnx": "export-onnx",
    "onnx-fused": "export-onnx{fused=true}",
    "onnx-int8-dynamic": "export-onnx,quantize-onnx",
    "onnx-int8-static": "export-onnx,quantize-onnx{mode=static}",
    "openvino": "convert-openvino",
    "openvino-bf16": "convert-openvino,hint-openvino",
    "openvino-int8-weights": "convert-openvino,quantize-openvino{mode=weights}",
    "openvino-int8": "convert-openvino,quantize-openvino",
    "torchscript": "torchscript",
    "ipex-bf16": "optimize-ipex",
    "ipex-int8-weights": "optimize-ipex{mode=int8}",
    "optimum-onnx": "export-optimum",
    "optimum-onnx-O3": "export-optimum{level=O3}",
    "optimum-onnx-int8": "export-optimum,quantize-onnx",
    "optimum-intel": "export-optimum-intel",
    "optimum-intel-bf16": "export-optimum-intel,hint-openvino",
    "optimum-intel-int8": "export-optimum-intel{weights=int8}",
    "openvino-int8-keep1": "convert-openvino,quantize-openvino{keep=1}",
    "openvino-int8-keep4": "convert-openvino,quantize-openvino{keep=4}",
    "onnx-int8-dynamic-keep2": "export-onnx,quantize-onnx{keep=2}",
    "onnx-int8-dynamic-keep6": "export-onnx,quantize-onnx{keep=6}",
}
GENERATING = {  # for language models
    "eager-bf16": "cast-dtype",
    "openvino": "convert-openvino",
    "openvino-bf16": "convert-openvino,hint-openvino",
    "openvino-int8-weights": "convert-openvino,quantize-openvino{mode=weights}",
    "openvino-int8-weights-smooth": "convert-openvino,quantize-openvino{mode=weights;smooth=true}",
    "openvino-int8-weights-bf16": "convert-openvino,quantize-openvino{mode=weights},hint-openvino",
    "openvino-int4": "convert-openvino,quantize-openvino{mode=int4}",
    "openvino-int4-bf16": "convert-openvino,quantize-openvino{mode=int4},hint-openvino",
    "gguf-bf16": "convert-gguf{type=bf16}",
    "gguf-q8_0": "convert-gguf",
    "gguf-q4_k_m": "convert-gguf{type=q4_k_m}",
    "gguf-q4_1": "convert-gguf{type=q4_1}",
    "gguf-q4_0": "convert-gguf{type=q4_0}",
    "ollama-q8_0": "convert-gguf,create-ollama",
    "ollama-q4_1": "convert-gguf{type=q4_1},create-ollama",
    "genai": "build-genai",
    "genai-int8": "build-genai{precision=int8}",
    "genai-int4": "build-genai{precision=int4}",
    "torchao-int8": "quantize-torchao",
    "torchao-int4": "cast-dtype,quantize-torchao{mode=int4}",
    "compiled": "compile-generate",
    "compiled-bf16": "cast-dtype,compile-generate",
    "torchao-int8-compiled": "quantize-torchao,compile-generate{freeze=true}",
    "torchao-int8-weights-compiled": "cast-dtype,quantize-torchao{mode=weights},compile-generate",
    "torchao-int4-compiled": "cast-dtype,quantize-torchao{mode=int4},compile-generate",
    "optimum-intel-int8": "export-optimum-intel{weights=int8}",
    "optimum-intel-int8-bf16": "export-optimum-intel{weights=int8},hint-openvino",
}
TRANSCRIBING = {  # for speech models
    "eager-bf16": "cast-dtype",
    "openvino": "convert-openvino",
    "openvino-bf16": "convert-openvino,hint-openvino",
    "openvino-int8-weights": "convert-openvino,quantize-openvino{mode=weights}",
}
# tried only by name, of encoders and of language models: benchmarks/README.md shows what beats each of them everywhere,
# or that it is too inaccurate; of each toolchain one recipe is tried wherever that is installed
BY_NAME = frozenset({
    "torchscript", "ipex-int8-weights", "optimum-onnx", "optimum-onnx-int8", "optimum-intel", "optimum-intel-int8",
})  # fmt: skip
GENERATING_BY_NAME = frozenset({
    "eager-bf16", "openvino", "openvino-bf16", "openvino-int4-bf16", "gguf-bf16", "gguf-q4_0", "genai", "compiled",
    "torchao-int8", "torchao-int4", "torchao-int8-compiled", "torchao-int8-weights-compiled", "torchao-int4-compiled",
    "optimum-intel-int8",
})  # fmt: skip
# recipe -> the one that must have proved inaccurate before this one, which keeps more in floating point, is built
RECOVERIES = {
    "openvino-int8-keep1": "openvino-int8",
    "openvino-int8-keep4": "openvino-int8-keep1",
    "onnx-int8-dynamic-keep2": "onnx-int8-dynamic",
    "onnx-int8-dynamic-keep6": "onnx-int8-dynamic-keep2",
}


def probe() -> Target:
    """This host's processor. bfloat16 is listed only where the processor multiplies in it."""
    import psutil

    model, flags = _cpuinfo()
    features = tuple(feature for feature in FEATURES if feature in flags)
    dtypes = ["float32"]
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(features):
        dtypes.append("bfloat16")
    if {"avx512_fp16", "asimdhp"} & flags:
        dtypes.append("float16")
    return Target(
        name="cpu",
        device=model or platform.processor() or platform.machine(),
        arch=platform.machine(),
        features=features,
        dtypes=tuple(dtypes),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=min(psutil.virtual_memory().total, _cgroup_limit()),
    )


def recipes(checkpoint: Checkpoint, target: Target) -> tuple[Recipe, ...]:
    """The candidates, cheapest first. A pass that cannot run here says so in the plan."""
    texts, by_name = {
        Form.PROMPTS: (GENERATING, GENERATING_BY_NAME),
        Form.CLIPS: (TRANSCRIBING, frozenset[str]()),
    }.get(TASKS[checkpoint.task].form, (RECIPES, BY_NAME))
    return tuple(
        replace(parse(text, name), default=name not in by_name, after=RECOVERIES.get(name, ""))
        for name, text in texts.items()
    )


def peaks(target: Target) -> dict[str, Any]:
    """What this host reaches at most: see roofline.Peaks. Best of several tries of products of square matrices.

    Takes about three seconds, and torch: only a worker calls it.
    """
    import torch

    torch.set_num_threads(target.cores)
    return reached((*target.dtypes, "int8"), PRODUCT, READ, "cpu", _fastest)


def reached(
    dtypes: Iterable[str], rows: int, size: int, device: str, fastest: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    """Operations a second of products of square matrices of `rows`, by dtype, and bytes a second of reading `size`.

    `fastest` gives the seconds of the fastest of several calls.
    """
    import torch

    operations = {}
    for dtype in dtypes:
        if dtype == "int8":
            left, right = torch.randint(-100, 100, (2, rows, rows), dtype=torch.int8, device=device)
            product = partial(torch._int_mm, left, right.t())  # as layers store weights: GPUs are slow with others
        else:
            left, right = torch.rand((2, rows, rows), device=device).to(getattr(torch, dtype))
            product = partial(torch.matmul, left, right)
        if dtype == "float8_e4m3fn":
            one = torch.ones((), device=device)
            product = partial(torch._scaled_mm, left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        with suppress(RuntimeError):  # a library has no such product here
            operations[dtype] = 2 * rows**3 / fastest(product)
    read = torch.ones(size // 4, device=device)
    return {"operations": operations, "bandwidth": size / fastest(read.sum)}


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls that fit into TRYING, after one to warm up."""
    call()
    best, end = math.inf, time.perf_counter() + TRYING
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _cpuinfo() -> tuple[str, set[str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", ""), set(fields.get("flags", fields.get("Features", "")).split())


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process's control group may use, or any group around it. Source: cgroups(7)."""
    limits = [1 << 62]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            folder = root / controllers / path.lstrip("/")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            inside = (each for each in (folder, *folder.parents) if each.is_relative_to(root))
            texts = [each.read_text().strip() for each in (above / name for above in inside) if each.is_file()]
            limits += [int(text) for text in texts if text.isdigit()]
    return min(limits)
