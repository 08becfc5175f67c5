"""The CPU target: what this host is, and the candidate ways to lower a checkpoint for it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from optimize.pipeline.contract import Checkpoint, Recipe, Target
from optimize.pipeline.recipe import parse

# instruction sets that change what compilers and kernels do; other flags do not enter keys
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
            "asimddp", "i8mm", "bf16", "sve")  # fmt: skip

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
    "openvino-int8-keep": "convert-openvino,quantize-openvino{keep=1}",
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
    return tuple(parse(text, name) for name, text in RECIPES.items())


def _cpuinfo() -> tuple[str, set[str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", ""), set(fields.get("flags", fields.get("Features", "")).split())


def _cgroup_limit() -> int:
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else 1 << 62
