"""torchscript: a traced and frozen model, the form that C++ programs of the past load. Legacy: torch deprecates it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.loading import load_model, sample_inputs
from optimize.passes._torchscript import check, trace, why_not
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class Torchscript(Pass):
    """Trace and freeze the model into TorchScript (legacy: compile-aoti is what torch has in its place).

    Source: https://docs.pytorch.org/docs/stable/jit.html
    """

    name: ClassVar = "torchscript"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.TORCHSCRIPT
    version: ClassVar = 1
    tools: ClassVar = ("torch", "transformers")

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return why_not(checkpoint)

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 4 * checkpoint.weight_bytes

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch

        model = load_model(source.path, context.task)
        with torch.no_grad():
            return {"operations": trace(model, sample_inputs(source.path, context.task), out)}

    def ensures(self, out: Path) -> None:
        check(out)
