"""hint-openvino: choose what OpenVINO computes a model's floating-point operations in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes.convert_openvino import carry_along, graphs, write_runtime_options
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class HintOpenvino(Pass):
    """Have OpenVINO compute in 16 bits: the same graph, whose float weights are stored in 16 bits, half the size.

    Source: https://docs.openvino.ai (precision control: inference_precision)
    """

    name: ClassVar = "hint-openvino"
    accepts: ClassVar = Kind.OPENVINO
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 2
    tools: ClassVar = ("openvino",)

    precision: Literal["bf16", "f16"] = "bf16"

    @property
    def arithmetic(self) -> str | None:
        return {"bf16": "bfloat16", "f16": "float16"}[self.precision]

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        dtype = self.arithmetic
        return None if dtype in target.dtypes else f"{target.device} has no {dtype} arithmetic"

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + int(1.5 * checkpoint.weight_bytes)  # mapped, and written constant by constant

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return min(checkpoint.weight_bytes, 2 * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import openvino

        for name in graphs(source.path):
            openvino.save_model(openvino.Core().read_model(source.path / name), out / name, compress_to_fp16=True)
        write_runtime_options(out, self.precision)
        carry_along(source.path, out)
        return {}
