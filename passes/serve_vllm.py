"""serve-vllm: a checkpoint with the configuration that vLLM is to serve it by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.checkpoint import dimensions, max_length, read_config
from optimize.models.tasks import TASKS
from optimize.passes._limits import LONGEST, Limits, limits_of
from optimize.passes._links import link_checkpoint
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Form, Kind, Pass, Placement, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import FRAMEWORKS

SERVE = "serve.yaml"  # for vllm serve --config
FACTS = "vllm.json"  # what it is measured with beside that
PAGE = 128  # tokens of the KV cache that are taken at once, at most
SPARE = 1.25  # times the pages that the workload fills


@dataclass(frozen=True)
class ServeVllm(Pass):
    """The checkpoint, serve.yaml for `vllm serve`, and how much of the GPU is taken while it is measured.

    `quantization` has vLLM quantize the weights as it loads them, and activations as they come; `cache` is the dtype of
    the KV cache. `gpus` share every layer, and `replicas` of them divide prompts among them. `batched` tokens are
    computed in one step at most (0: as many as vLLM chooses). `eager` leaves out compilation and CUDA graphs: a server
    is up in seconds then, and slower.
    Source: https://docs.vllm.ai/en/latest/serving/engine_args.html
    """

    name: ClassVar = "serve-vllm"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.VLLM
    version: ClassVar = 1
    tools: ClassVar = ()  # nothing but files is written: vLLM itself is the runtime's

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: Literal["none", "fp8"] = "none"
    cache: Literal["auto", "fp8"] = "auto"
    gpus: int = 1
    replicas: int = 1
    batched: int = 0
    eager: bool = False

    def __post_init__(self) -> None:
        for option in ("gpus", "replicas"):
            if getattr(self, option) < 1:
                raise RequestError(f"{self.name}: {option}={getattr(self, option)} is not at least 1")
        if self.batched and self.batched < LONGEST:
            raise RequestError(
                f"{self.name}: batched={self.batched} is less than {LONGEST}",
                hint="a sequence is judged in one step",
            )

    @property
    def shaped(self) -> bool:
        return True

    @property
    def placement(self) -> Placement:
        return Placement(self.gpus, self.replicas)

    def on_one_gpu(self) -> Pass | None:
        return replace(self, gpus=1, replicas=1)

    @property
    def arithmetic(self) -> str | None:
        return "float8_e4m3fn" if self.quantization == "fp8" else self.dtype

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].form is not Form.PROMPTS:
            return "it serves language models"
        needed = "float8_e4m3fn" if "fp8" in (self.quantization, self.cache) else self.dtype
        if needed not in target.dtypes:
            return f"{target.device} has no {needed} arithmetic"
        if self.placement.gpus > target.gpus > 0:  # without GPUs, processes take their place
            return f"it is for {self.placement.gpus} GPUs, and here are {target.gpus}"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS  # files are copied

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        link_checkpoint(source, out)
        config = read_config(source.path)
        limits = limits_of(context.workload, max_length(source.path, config))
        if 0 < self.batched <= limits.sequence:
            raise ValueError(f"batched={self.batched} is not more than {limits.sequence}, which are judged in one step")
        facts = {
            "limits": asdict(limits),
            "cache_bytes": cache_bytes(config, context.workload, limits, 4 if self.dtype == "float32" else 2),
        }
        (out / FACTS).write_text(json.dumps(facts, indent=1))
        (out / SERVE).write_text(json.dumps(self._settings(context.target), indent=1))  # which is YAML too
        return facts

    def _settings(self, target: Target) -> dict[str, Any]:
        """Options of `vllm serve`, those apart that it chooses anyway."""
        chosen = {
            "quantization": "" if self.quantization == "none" else self.quantization,
            "kv-cache-dtype": "" if self.cache == "auto" else self.cache,
            "tensor-parallel-size": self.gpus if self.gpus > 1 else 0,
            "data-parallel-size": self.replicas if self.replicas > 1 else 0,
            "max-num-batched-tokens": self.batched,
            "enforce-eager": self.eager,
        }
        share = 0.9 if target.gpus else 0.5  # of a processor's, it is the host's memory
        return {"dtype": self.dtype, "gpu-memory-utilization": share} | {
            name: value for name, value in chosen.items() if value
        }

    def ensures(self, out: Path) -> None:
        for name in ("config.json", SERVE, FACTS):
            if not (out / name).is_file():
                raise FileNotFoundError(f"{name} was not written")


def cache_bytes(config: dict[str, Any], cells: tuple[Cell, ...], limits: Limits, width: int) -> int:
    """Of a KV cache that holds the largest cell, and the longest text that is judged: numbers of `width` bytes."""
    pages = [cell.batch * -(-(cell.sequence + cell.new) // PAGE) for cell in cells]
    tokens = PAGE * (1 + max(*pages, limits.batch + limits.sequence // PAGE))
    return int(SPARE * width * dimensions(config).cache * tokens)
