"""The multi-GPU target: several like GPUs of one host, and the ways to spread a language model over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Checkpoint, Form, Recipe, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse
from optimize.targets import gpu

PRECISIONS = {"bf16": "", "fp8": "quantization=fp8;"}


def spread(gpus: int) -> dict[str, str]:
    """Recipes for so many GPUs: one, to compare with; then for each number of GPUs that share the weights, one copy of
    them, and as many as there are GPUs for. Last those that need nothing but transformers.
    """
    found = {}
    for precision, options in PRECISIONS.items():
        for shards in (2**power for power in range(gpus.bit_length())):
            for copies in dict.fromkeys((1, gpus // shards)):
                parts = ["vllm", precision, f"tp{shards}" if shards > 1 else "", f"x{copies}" if copies > 1 else ""]
                found["-".join(filter(None, parts))] = (
                    f"cast-dtype,serve-vllm{{{options}gpus={shards};replicas={copies}}}"
                )
    for shards in (2**power for power in range(1, gpus.bit_length())):
        found[f"eager-bf16-tp{shards}"] = f"cast-dtype,shard-tensors{{gpus={shards}}}"
    return found


RECIPES: dict[str, str] = {}
GENERATING = spread(2)  # of two GPUs
BY_NAME = frozenset(name for name in GENERATING if "fp8" in name)  # tried only by name
RECOVERIES: dict[str, str] = {}


def probe() -> Target:
    """All GPUs that CUDA_VISIBLE_DEVICES leaves. Raises RequestError for fewer than two, and for unlike ones."""
    found = gpu.devices()
    if len(found) < 2:
        raise RequestError("this host has one NVIDIA GPU", hint="use --target gpu")
    names = {each.name for each in found}
    if len(names) > 1:
        raise RequestError(
            f"this host's GPUs are unlike: {', '.join(sorted(names))}",
            hint="leave those of one kind in CUDA_VISIBLE_DEVICES",
        )
    return replace(gpu.target_of(found), name="multi-gpu")


def recipes(checkpoint: Checkpoint, target: Target) -> tuple[Recipe, ...]:
    """The candidates for a language model. What fits is the plan's to say, and which is best the objective's: GPUs that
    share the weights are for latency, copies for throughput.
    """
    if TASKS[checkpoint.task].form is not Form.PROMPTS:
        raise RequestError(f"{checkpoint.task} is not spread over several GPUs", hint="use --target gpu")
    return tuple(replace(parse(text, name), default="fp8" not in name) for name, text in spread(target.gpus).items())


def peaks(target: Target) -> dict[str, Any]:
    """What one of them reaches at most: see roofline.Peaks."""
    return gpu.peaks(target)
