"""cast-dtype: store the checkpoint's weights in another floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.loading import cast_checkpoint
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class CastDtype(Pass):
    """Cast every floating-point weight; transformers then computes in that type, but for what it keeps in float32."""

    name: ClassVar = "cast-dtype"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 2
    tools: ClassVar = ("torch", "transformers", "safetensors")

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def arithmetic(self) -> str | None:
        return self.dtype

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if self.dtype not in target.dtypes:
            return f"{target.device} has no {self.dtype} arithmetic"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS  # whatever the size: see cast_weights

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return checkpoint.parameters * (4 if self.dtype == "float32" else 2)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        cast, weights = cast_checkpoint(source.path, out, self.dtype, context.task)
        return {"cast": cast, "weights": weights}
