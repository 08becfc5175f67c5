"""shard-tensors: a checkpoint whose layers are shared out over several GPUs where it is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.checkpoint import parallel_plan, read_config
from optimize.models.tasks import TASKS
from optimize.passes._links import link_checkpoint
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Placement, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import EAGER, FRAMEWORKS

FACTS = "tensor_parallel.json"
# of config.json: what is cut into as many parts as there are GPUs
HEADS = {"num_attention_heads": "attention heads", "num_key_value_heads": "heads of keys and values"}
SIZES = {
    "intermediate_size": "units of its feed-forward layers", "moe_intermediate_size": "units of its experts",
    "shared_expert_intermediate_size": "units of its shared expert", "vocab_size": "tokens of its vocabulary",
}  # fmt: skip
WHOLE_HEADS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")  # layers that are cut between heads


@dataclass(frozen=True)
class ShardTensors(Pass):
    """The checkpoint, and over how many processes transformers is to share its layers out: tensor parallelism.

    Each of `gpus` holds its part of every layer's weights and of the KV cache, and they add up what they found twice in
    each layer. Nothing is cut here: each process reads its parts of the files.
    Source: https://huggingface.co/docs/transformers/tensor_parallelism
    """

    name: ClassVar = "shard-tensors"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.TENSOR_PARALLEL
    version: ClassVar = 1
    tools: ClassVar = ()  # nothing but files is written: transformers itself is the runtime's

    gpus: int = 2

    def __post_init__(self) -> None:
        if self.gpus < 2:
            raise RequestError(f"{self.name}: gpus={self.gpus} is not at least 2", hint="without it, one has it all")

    @property
    def placement(self) -> Placement:
        return Placement(self.gpus)

    def on_one_gpu(self) -> Pass | None:
        return None

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].form is not Form.PROMPTS:
            return "it is for language models"
        if self.gpus > target.gpus > 0:  # without GPUs, processes take their place
            return f"it is for {self.gpus} GPUs, and here {'is one' if target.gpus == 1 else f'are {target.gpus}'}"
        config = read_config(checkpoint.folder)
        plan = parallel_plan(checkpoint.architecture, str(config.get("model_type", "")))
        if not plan:
            return f"transformers has no tensor parallel plan for {checkpoint.architecture}"
        return why_uneven(config, plan, self.gpus)

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS  # files are copied

    def extra_memory(self, checkpoint: Checkpoint) -> int:
        return self.gpus * EAGER  # a process for each

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        quantized = (read_config(source.path).get("quantization_config") or {}).get("quant_method")
        if quantized:
            raise RuntimeError(f"weights that {quantized} quantized are not shared out: leave the step before it out")
        link_checkpoint(source, out)
        facts = {"ranks": self.gpus}
        (out / FACTS).write_text(json.dumps(facts))
        return facts

    def ensures(self, out: Path) -> None:
        for name in ("config.json", FACTS):
            if not (out / name).is_file():
                raise FileNotFoundError(f"{name} was not written")


def why_uneven(config: Mapping[str, Any], plan: Mapping[str, str], gpus: int) -> str | None:
    """Why a model of that configuration has no equal parts for so many GPUs; None where it has."""
    by_heads = any(how == "colwise" and name.rsplit(".", 1)[-1] in WHOLE_HEADS for name, how in plan.items())
    for name, words in ((HEADS if by_heads else {}) | SIZES).items():
        size = config.get(name)
        if isinstance(size, int) and size % gpus:
            return f"its {size} {words} do not divide by {gpus}"
    return None
