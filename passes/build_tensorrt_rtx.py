"""build-tensorrt-rtx: an engine for RTX GPUs, which its runtime compiles to the end where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.passes._tensorrt import build, check, check_capabilities
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class BuildTensorrtRtx(Pass):
    """TensorRT for RTX: an engine for the compute capabilities that are named (8.6+8.9), built with or without a GPU.

    It runs on 7.5, 8.x and 12.x alone. Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx
    """

    name: ClassVar = "build-tensorrt-rtx"
    accepts: ClassVar = Kind.ONNX
    produces: ClassVar = Kind.TENSORRT_RTX
    version: ClassVar = 1
    tools: ClassVar = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")
    toolchain: ClassVar = "tensorrt-rtx"

    capabilities: str = ""

    def __post_init__(self) -> None:
        check_capabilities(self.name, self.capabilities)

    @property
    def shaped(self) -> bool:
        return True

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if not target.gpus and not self.capabilities:
            return "here is no GPU: name the compute capabilities that it is for, as in capabilities=8.9"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import tensorrt_rtx_bindings

        capabilities = check_capabilities(self.name, self.capabilities)
        return build(tensorrt_rtx_bindings, source.path, out, context.workload, capabilities)

    def ensures(self, out: Path) -> None:
        check(out)
