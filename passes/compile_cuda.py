"""compile-cuda: shapes at which an encoder is compiled and captured into CUDA graphs, with a warm compile cache."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.checkpoint import max_length, read_config
from optimize.models.loading import load_model
from optimize.models.tasks import TASKS
from optimize.passes._cuda_graphs import CACHE, GRAPHS, Captured, shapes_of
from optimize.passes._links import link_checkpoint
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class CompileCuda(Pass):
    """The checkpoint, and what whoever opens it captures: the cells of the workload, and one shape for all other text.

    `compile` has inductor compile each shape, `autotune` also try kernels for its products, which takes minutes.
    Without either the model's own kernels are captured. A batch is padded up to the smallest shape that takes it.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, torch.compile
    """

    name: ClassVar = "compile-cuda"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CUDA_GRAPHS
    version: ClassVar = 2
    tools: ClassVar = ("torch", "transformers")
    target_facts: ClassVar = ("device", "arch", "driver")

    compile: bool = True
    autotune: bool = False

    @property
    def shaped(self) -> bool:
        return True

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if not target.gpus:
            return "it is for NVIDIA GPUs, and here is none"
        if TASKS[checkpoint.task].generates:
            return "it captures one forward pass: a language model's cache grows"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return 12 * FRAMEWORKS + 2 * checkpoint.weight_bytes  # compilers, and CUDA's libraries

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch

        link_checkpoint(source, out)
        config = read_config(source.path)
        shapes = shapes_of(context.workload, max_length(source.path, config))
        settings = {
            "shapes": shapes, "compile": self.compile, "autotune": self.autotune,
            "fill": config.get("pad_token_id") or 0,
        }  # fmt: skip
        (out / GRAPHS).write_text(json.dumps(settings))
        begun = time.perf_counter()
        Captured(out, load_model(source.path, context.task, device="cuda"), context.task)
        seconds = time.perf_counter() - begun
        saved = torch.compiler.save_cache_artifacts() if self.compile else None
        if saved is not None:
            (out / CACHE).write_bytes(saved[0])
        return {"shapes": shapes, "capture_seconds": round(seconds, 1), "cache_bytes": len(saved[0]) if saved else 0}

    def ensures(self, out: Path) -> None:
        if not json.loads((out / GRAPHS).read_text())["shapes"]:
            raise ValueError("no shape was captured")
