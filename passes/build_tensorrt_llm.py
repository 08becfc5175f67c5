"""build-tensorrt-llm: engines of TensorRT-LLM, or for its lines without engines a quantized checkpoint to serve."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.encoding import load_tokenizer
from optimize.models.tasks import TASKS
from optimize.passes._limits import LONGEST, limits_of
from optimize.passes._links import link_checkpoint
from optimize.passes._tensorrt_llm import (
    FACTS,
    SERVE,
    Quantization,
    build_engine,
    has_engines,
    quantize_checkpoint,
    write_facts,
)
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class BuildTensorrtLlm(Pass):
    """TensorRT-LLM's own compilation of a language model, for the GPUs of the target.

    Up to its line 1.2: engines, one for each of `gpus`, which share every layer. Later: the checkpoint, quantized by
    Model Optimizer, and serve.yaml for trtllm-serve. Calibrated on 128 windows of text.
    Source: https://nvidia.github.io/TensorRT-LLM
    """

    name: ClassVar = "build-tensorrt-llm"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.TENSORRT_LLM
    version: ClassVar = 1
    tools: ClassVar = ("tensorrt-llm", "nvidia-modelopt", "torch", "transformers")
    toolchain: ClassVar = "tensorrt-llm"
    target_facts: ClassVar = ("device",)

    quantization: Quantization = "none"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise RequestError(f"{self.name}: gpus={self.gpus} is not at least 1")

    @property
    def shaped(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return self.quantization != "none"

    @property
    def arithmetic(self) -> str | None:
        return "float8_e4m3fn" if self.quantization == "fp8" else self.dtype

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].form is not Form.PROMPTS:
            return "it is for language models"
        return "it builds on the GPUs that it builds for, and here is none" if not target.gpus else None

    def memory(self, checkpoint: Checkpoint) -> int:
        return 2 * FRAMEWORKS + 2 * 2 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return int({"none": 2, "fp8": 1, "int4_awq": 0.6}[self.quantization] * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        installed = version("tensorrt-llm")
        windows = load_batches(context.calibration) if context.calibration else []
        tokens = [batch["input_ids"] for batch in windows]
        if self.calibrated and not tokens:
            raise RuntimeError("quantization needs calibration data")
        config = json.loads((source.path / "config.json").read_text())
        limits = limits_of(context.workload, config.get("max_position_embeddings", LONGEST))
        if has_engines(installed):
            with tempfile.TemporaryDirectory(prefix="texts-") as folder:
                tokenizer = load_tokenizer(source.path)
                rows = [{"text": tokenizer.decode(each, skip_special_tokens=True)} for each in tokens]
                Path(folder, "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
                build_engine(source.path, out, self.dtype, self.quantization, self.gpus, limits, Path(folder))
        elif self.quantization == "none":
            link_checkpoint(source, out)
        else:
            quantize_checkpoint(source.path, out, self.dtype, self.quantization, tokens)
        return write_facts(out, installed, self.gpus, limits)

    def ensures(self, out: Path) -> None:
        facts = json.loads((out / FACTS).read_text())
        expected = [f"rank{rank}.engine" for rank in range(self.gpus)] if facts["engine"] else [SERVE]
        for name in ("config.json", *expected):
            if not (out / name).is_file():
                raise FileNotFoundError(f"{name} was not written")
