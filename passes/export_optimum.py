"""export-optimum: the ONNX graph that `optimum-cli export onnx` makes, in an environment of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.tasks import TASKS
from optimize.passes._onnx import GRAPH, read_graph
from optimize.passes._optimum import export
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

MODEL = (GRAPH, "model.onnx_data")


@dataclass(frozen=True)
class ExportOptimum(Pass):
    """optimum-onnx's exporter, traced by TorchScript; `level` is one of ONNX Runtime's optimization levels.

    O4 computes in float16, which ONNX Runtime does on GPUs alone.
    Source: https://huggingface.co/docs/optimum-onnx
    """

    name: ClassVar = "export-optimum"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.ONNX
    version: ClassVar = 1
    tools: ClassVar = ("torch", "transformers", "optimum-onnx", "onnx", "onnxruntime")
    toolchain: ClassVar = "optimum-onnx"

    level: Literal["none", "O1", "O2", "O3", "O4"] = "none"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].generates:
            return "no runtime here runs what it makes of a language model"
        if self.level == "O4" and not target.gpus:
            return "level O4 computes in float16, which ONNX Runtime does on GPUs alone"
        return None

    @property
    def arithmetic(self) -> str | None:
        return "float16" if self.level == "O4" else "float32"

    def memory(self, checkpoint: Checkpoint) -> int:
        return 2 * FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return (2 if self.level == "O4" else 4) * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        words = [] if self.level == "none" else ["--optimize", self.level]
        export(source.path, context.task, out, "onnx", "--dtype", "fp32", *words)
        for path in out.iterdir():  # the checkpoint's own files are carried along by whoever emits the folder
            if path.name not in MODEL:
                path.unlink()
        return {"nodes": len(read_graph(out).node)}

    def ensures(self, out: Path) -> None:
        for port in read_graph(out).input:
            if not all(axis.dim_param for axis in port.type.tensor_type.shape.dim):
                raise ValueError(f"{port.name} has a fixed shape")
