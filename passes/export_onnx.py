"""export-onnx: an ONNX graph with dynamic batch (and sequence, of text), through transformers' own exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.loading import dynamic_shapes, load_model, sample_inputs
from optimize.models.tasks import TASKS
from optimize.passes._masks import plain_masks
from optimize.passes._onnx import GRAPH, read_graph
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS
from optimize.pipeline.versions import EXPORTERS, why_older


@dataclass(frozen=True)
class ExportOnnx(Pass):
    """A graph in `dtype`; `fused` rewrites it into operators that only ONNX Runtime has, those of `provider`.

    CUDA's have attention as one operation, and count no positions, which ONNX Runtime does on the processor.
    In 16 bits it is for GPUs, whose providers compute in the types that the graph has.
    Source: https://huggingface.co/docs/transformers (exporters), https://onnx.ai/onnx/operators
    """

    name: ClassVar = "export-onnx"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.ONNX
    version: ClassVar = 3
    tools: ClassVar = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")

    opset: Literal[17, 18, 19, 20, 21, 22, 23, 24, 25] = 20
    fused: bool = False
    provider: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float16"] = "float32"  # numpy, which runtimes are fed by, has no bfloat16

    @property
    def arithmetic(self) -> str | None:
        return self.dtype

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].generates:
            return "it exports one forward pass, without a cache: build-genai is for language models"
        if self.provider == "cuda" and not target.gpus:
            return "provider=cuda makes operators for NVIDIA GPUs, and here is none"
        return why_older("transformers", EXPORTERS)

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 2 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return (4 if self.dtype == "float32" else 2) * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter

        model = load_model(source.path, context.task, self.dtype)
        if self.provider == "cuda":
            plain_masks(model)
        inputs = sample_inputs(source.path, context.task, self.dtype)
        config = OnnxConfig(
            dynamic=True,
            dynamic_shapes=dynamic_shapes(source.path, inputs),
            opset_version=self.opset,
            ort_fusions=self.provider if self.fused else None,
        )
        exported = OnnxExporter().export(model, inputs, config=config)
        OnnxExporter.save_program(exported.program, out / GRAPH)
        operators = [node.op_type for node in exported.program.graph.all_nodes()]
        return {"nodes": len(operators), "attention": sum("Attention" in name for name in operators)}

    def ensures(self, out: Path) -> None:
        graph = read_graph(out)
        for tensor in (*graph.input, *graph.output):
            if not tensor.type.tensor_type.shape.dim[0].dim_param:
                raise ValueError(f"{tensor.name} has a fixed batch: it would only run at the traced one")
