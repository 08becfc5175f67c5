"""quantize-llm-compressor: a language model's linear layers in fp8, int8 or int4, as compressed-tensors, for vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.loading import copy_carried, load_model
from optimize.models.tasks import TASKS, read_json
from optimize.passes._groups import why_no_groups
from optimize.passes._share import share_of_layers
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

HEAD = "lm_head"  # picks the next token: it stays as it is


@dataclass(frozen=True)
class QuantizeLlmCompressor(Pass):
    """Every linear layer but the last, by LLM Compressor.

    `fp8` has a scale for each output channel, and one for each token where it runs; of `fp8-static` both are one for
    the whole tensor, measured on calibration text. `int8` quantizes weights by GPTQ, after SmoothQuant, and tokens
    where it runs; `int4` weights alone, by GPTQ, `group` of a row together; `int4-awq` likewise by AWQ.
    Source: https://docs.vllm.ai/projects/llm-compressor
    """

    name: ClassVar = "quantize-llm-compressor"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 1
    tools: ClassVar = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    toolchain: ClassVar = "llm-compressor"

    mode: Literal["fp8", "fp8-static", "int8", "int4", "int4-awq"] = "fp8"
    group: Literal[32, 64, 128] = 128

    @property
    def calibrated(self) -> bool:
        return self.mode != "fp8"

    @property
    def arithmetic(self) -> str | None:
        return {"fp8": "float8_e4m3fn", "fp8-static": "float8_e4m3fn", "int8": "int8"}.get(self.mode)

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if TASKS[checkpoint.task].form is not Form.PROMPTS:
            return "it is for language models"
        if "fp8" in self.mode and "float8_e4m3fn" not in target.dtypes:
            return f"{target.device} has no float8_e4m3fn arithmetic"
        if "awq" in self.mode and not target.gpus:
            return "its AWQ runs on GPUs alone, and here is none"
        return why_no_groups(checkpoint, self.group) if "int4" in self.mode else None

    def memory(self, checkpoint: Checkpoint) -> int:
        return 2 * FRAMEWORKS + 3 * checkpoint.weight_bytes

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        outer = checkpoint.dimensions.vocabulary * checkpoint.dimensions.hidden  # stays as it is
        stored = checkpoint.weight_bytes // checkpoint.parameters
        return 2 * stored * outer + int((0.6 if "int4" in self.mode else 1.05) * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch
        from datasets import Dataset
        from llmcompressor import oneshot

        model = load_model(source.path, context.task, device=context.target.device_type)
        data: dict[str, Any] = {}
        if self.calibrated:
            if context.calibration is None:
                raise RuntimeError("quantization needs calibration data")
            windows = [batch["input_ids"].tolist() for batch in load_batches(context.calibration)]
            rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in windows]
            data = {"dataset": Dataset.from_list(rows), "num_calibration_samples": len(rows),
                    "max_seq_length": max(map(len, windows))}  # fmt: skip
        oneshot(model=model, recipe=self._recipe(), tokenizer=str(source.path), **data)
        linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
        left = sorted(name for name, each in linear.items() if getattr(each, "quantization_scheme", None) is None)
        quantized = [linear[name] for name in linear.keys() - set(left)]
        share = share_of_layers(model, quantized, "LLM Compressor")
        copy_carried(source.path, out)
        model.save_pretrained(out, save_compressed=True)
        return {"quantized": len(quantized), "eligible": len(linear), "left": left, "share_of_layers": round(share, 3)}

    def _recipe(self) -> list[Any]:
        """LLM Compressor's modifiers."""
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        preset = {"fp8": "FP8_DYNAMIC", "fp8-static": "FP8", "int8": "W8A8", "int4": "W4A16", "int4-awq": "W4A16_ASYM"}
        scheme = preset_name_to_scheme(preset[self.mode], ["Linear"])
        if "int4" in self.mode:
            scheme.weights.group_size = self.group
        options = {"config_groups": {"group_0": scheme}, "ignore": [HEAD]}
        if self.mode == "int8":
            return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**options)]
        if self.mode == "int4":
            return [GPTQModifier(**options)]
        if self.mode == "int4-awq":
            return [AWQModifier(), QuantizationModifier(**options)]
        return [QuantizationModifier(**options)]

    def ensures(self, out: Path) -> None:
        if read_json(out / "config.json").get("quantization_config", {}).get("quant_method") != "compressed-tensors":
            raise ValueError("nothing was quantized")
