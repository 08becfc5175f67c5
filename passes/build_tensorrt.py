"""build-tensorrt: an engine for the GPU that it is built on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.passes._tensorrt import build, check
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class BuildTensorrt(Pass):
    """TensorRT: an engine for this GPU and this version of TensorRT, and for no other.

    Source: https://docs.nvidia.com/deeplearning/tensorrt
    """

    name: ClassVar = "build-tensorrt"
    accepts: ClassVar = Kind.ONNX
    produces: ClassVar = Kind.TENSORRT
    version: ClassVar = 1
    tools: ClassVar = ("tensorrt",)
    toolchain: ClassVar = "tensorrt"
    target_facts: ClassVar = ("device",)

    @property
    def shaped(self) -> bool:
        return True

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return "it times kernels on the GPU that it builds for, and here is none" if not target.gpus else None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import tensorrt

        return build(tensorrt, source.path, out, context.workload, ())

    def ensures(self, out: Path) -> None:
        check(out)
