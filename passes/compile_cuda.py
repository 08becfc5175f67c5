"""compile-cuda: shapes at which a model is compiled and captured into CUDA graphs, with what was compiled."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.checkpoint import compiles_whole, max_length, read_config
from optimize.models.loading import load_model
from optimize.models.tasks import TASKS
from optimize.passes._captured_generation import CapturedGeneration, language_shapes, speech_shapes
from optimize.passes._cuda_graphs import COMPILED, GRAPHS, Captured, Shape, read_settings, shapes_of
from optimize.passes._links import link_checkpoint
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

ALIBI = ("bloom", "mpt")  # kinds of models; falcon's configuration says so itself


@dataclass(frozen=True)
class CompileCuda(Pass):
    """The checkpoint, and what whoever opens it captures: the cells of the workload, and one shape for all other text.

    `compile` has inductor compile each shape, `autotune` also try kernels for its products, which takes minutes.
    Without either the model's own kernels are captured. `attention` is torch's kernel to take where that can be: torch
    itself does not measure which is fastest. A batch is padded up to the smallest shape that takes it.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, torch.compile
    """

    name: ClassVar = "compile-cuda"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CUDA_GRAPHS
    version: ClassVar = 11
    tools: ClassVar = ("torch", "transformers")
    target_facts: ClassVar = ("device", "arch", "driver")

    compile: bool = True
    autotune: bool = False
    attention: Literal["sdpa", "flash", "efficient", "cudnn"] = "sdpa"

    @property
    def shaped(self) -> bool:
        return True

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if not target.gpus:
            return "it is for NVIDIA GPUs, and here is none"
        if TASKS[checkpoint.task].generates and not compiles_whole(checkpoint):
            return f"transformers has no {checkpoint.architecture} that keeps to a cache of fixed length"
        config = read_config(checkpoint.folder) if TASKS[checkpoint.task].form is Form.PROMPTS else {}
        if config.get("alibi") or config.get("model_type") in ALIBI:
            return "its positions (ALiBi) are made of a mask with two axes, and what is captured has one with four"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return 12 * FRAMEWORKS + 2 * checkpoint.weight_bytes  # compilers, and CUDA's libraries

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        link_checkpoint(source, out)
        config = read_config(source.path)
        shapes = _shapes(source.path, config, context)
        settings = {
            "shapes": shapes, "compile": self.compile, "autotune": self.autotune,
            "attention": self.attention, "fill": config.get("pad_token_id") or 0,
        }  # fmt: skip
        (out / GRAPHS).write_text(json.dumps(settings))
        begun = time.perf_counter()
        model = load_model(source.path, context.task, device="cuda")
        captured: CapturedGeneration | Captured
        if TASKS[context.task].generates:
            captured = CapturedGeneration(out, model)
        else:
            captured = Captured(out, model, context.task)
        seconds = time.perf_counter() - begun
        if self.compile:
            captured.call.save(out / COMPILED)
        return {"shapes": shapes, "capture_seconds": round(seconds, 1)}

    def ensures(self, out: Path) -> None:
        if not read_settings(out)["shapes"]:
            raise ValueError("no shape was captured")


def _shapes(folder: Path, config: dict[str, Any], context: Context) -> list[Shape]:
    form = TASKS[context.task].form
    if form is Form.PROMPTS:
        return language_shapes(context.workload)
    if form is Form.CLIPS:
        return speech_shapes(context.workload, folder)
    return shapes_of(context.workload, max_length(folder, config))
