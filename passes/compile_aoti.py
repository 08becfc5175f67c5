"""compile-aoti: an AOTInductor package, the publishable form of torch.compile."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.loading import dynamic_shapes, load_model, sample_inputs
from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS, MIB
from optimize.pipeline.versions import EXPORTERS, why_older

COMPILERS = 500 * MIB  # processes that it starts


@dataclass(frozen=True)
class CompileAoti(Pass):
    """Trace with dynamic batch (and sequence, of text), compile for this processor, package with the weights.

    The package needs the same torch minor version and the same instruction sets wherever it is loaded.
    Source: https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/torch.compiler_aot_inductor.html
    """

    name: ClassVar = "compile-aoti"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.AOTI
    version: ClassVar = 2
    tools: ClassVar = ("torch", "transformers")
    target_facts: ClassVar = ("arch", "features", "cores")  # inductor bakes the thread count into its loops

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].generates:
            return "it compiles one forward pass, without a cache: compile-generate is for language models"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "no C++ compiler on this host: install g++ or clang++"
        return why_older("transformers", EXPORTERS)

    def memory(self, checkpoint: Checkpoint) -> int:
        # the weights mapped, as the package's constants and in its archive; and compilers beside it
        return FRAMEWORKS + COMPILERS + 4 * checkpoint.weight_bytes

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch
        from transformers.exporters.configs import DynamoConfig
        from transformers.exporters.exporter_dynamo import DynamoExporter

        torch.set_num_threads(context.target.cores)
        model = load_model(source.path, context.task)
        dtype = str(model.dtype).removeprefix("torch.")
        inputs = sample_inputs(source.path, context.task, dtype)
        config = DynamoConfig(dynamic=True, dynamic_shapes=dynamic_shapes(source.path, inputs))
        program = DynamoExporter().export(model, inputs, config=config).program
        # a plain dictionary of outputs: transformers' own classes could not be read back without transformers
        names = [name for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)]
        program.module_call_graph[0].signature.out_spec = torch.utils._pytree.tree_structure(dict.fromkeys(names, 0))
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(out / "model.pt2"),
            inductor_configs={"aot_inductor.metadata": {"inputs": ",".join(inputs), "dtype": dtype}},
        )
        return {"dtype": dtype, "inputs": list(inputs)}

    def ensures(self, out: Path) -> None:
        if not (out / "model.pt2").is_file():
            raise FileNotFoundError("the compiler wrote no model.pt2")
