"""compile-generate: a checkpoint whose generation runs compiled, over a KV cache of fixed length."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.checkpoint import compiles_whole
from optimize.models.tasks import TASKS
from optimize.passes._links import link_checkpoint
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS, MIB

COMPILER = 500 * MIB  # in the process that runs it
COMPILING = "compile.json"  # what transformers.CompileConfig is made with: generation_config.json has no place for it


@dataclass(frozen=True)
class CompileGenerate(Pass):
    """Have transformers compile each step after the prompt, where the model is opened, once in each process.

    Dynamic shapes: one program for a single sequence, one for more, whatever their lengths. `freeze` makes constants
    of the weights, which torch's int8 products with quantized activations need to become one operation.
    Source: https://huggingface.co/docs/transformers/llm_optims (static KV cache and torch.compile)
    """

    name: ClassVar = "compile-generate"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 1
    tools: ClassVar = ("torch", "transformers")

    freeze: bool = False

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].form is not Form.PROMPTS:
            return f"{checkpoint.task} continues no text: compile-aoti compiles a forward pass"
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "no C++ compiler on this host: install g++ or clang++"
        if not compiles_whole(checkpoint):
            return f"transformers has no {checkpoint.architecture} that compiles with a static cache"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS  # files are copied

    def extra_memory(self, checkpoint: Checkpoint) -> int:
        return COMPILER + (checkpoint.weight_bytes if self.freeze else 0)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        from transformers import AutoConfig, GenerationConfig

        link_checkpoint(source, out)
        path = out / "generation_config.json"
        if not path.is_file():  # what transformers takes then: a file of ours alone would lose what ends a text
            config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
            GenerationConfig.from_model_config(config).save_pretrained(out)
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()  # it may be a link to the source's own
        path.write_text(json.dumps(settings | {"cache_implementation": "static"}, indent=2), encoding="utf-8")
        options = {"options": {"freezing": True}} if self.freeze else {}
        (out / COMPILING).write_text(json.dumps({"mode": None, "dynamic": True} | options), encoding="utf-8")
        return {}
