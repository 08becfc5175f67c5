"""quantize-bitsandbytes: int8 or nf4 weights inside a transformers checkpoint, opened with bitsandbytes: for memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.casting import align_weights
from optimize.models.checkpoint import quantization, read_config
from optimize.models.loading import copy_carried, load_model, model_without_weights
from optimize.models.weights import inspect_weights
from optimize.passes._share import share_of_layers
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

ROWS, COLUMNS = 32, 64  # its kernel for processors takes nf4 weights in such blocks; a column's block has one scale


@dataclass(frozen=True)
class QuantizeBitsandbytes(Pass):
    """Quantize the weights of every linear layer, but of what picks the next token, in place of activations.

    `int8` is LLM.int8(): a scale for each row, and activations quantized per token, those columns apart that have an
    outlier; it computes in float16. `nf4` has four bits, with a scale for each 64 weights that has eight bits itself,
    and is computed with in the checkpoint's dtype. A layer whose sizes are no multiples of the kernels' blocks is left.
    Source: https://huggingface.co/docs/bitsandbytes, https://arxiv.org/abs/2208.07339, https://arxiv.org/abs/2305.14314
    """

    name: ClassVar = "quantize-bitsandbytes"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 2
    tools: ClassVar = ("bitsandbytes", "accelerate", "torch", "transformers", "safetensors")
    target_facts: ClassVar = ("device",)  # it quantizes with kernels of its own there

    mode: Literal["int8", "nf4"] = "int8"

    @property
    def arithmetic(self) -> str | None:
        return "int8" if self.mode == "int8" else None

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if self.mode == "int8" and target.gpus and "int8" not in target.dtypes:
            return f"{target.device} has no int8 arithmetic"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        # CUDA's libraries, weights as they are mapped and as they become, and one layer in several forms
        return 4 * FRAMEWORKS + 2 * checkpoint.weight_bytes + 32 * checkpoint.largest

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        outer = checkpoint.dimensions.vocabulary * checkpoint.dimensions.hidden  # stays as it is, on either side
        stored = checkpoint.weight_bytes // checkpoint.parameters
        return 2 * stored * outer + int((1.05 if self.mode == "int8" else 0.55) * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig
        from transformers.pytorch_utils import Conv1D

        dtype = inspect_weights(source.path).dtype
        if self.mode == "int8" and dtype != "float16":
            raise ValueError(
                f"its int8 products are made for float16, the checkpoint is {dtype}: "
                "put cast-dtype{dtype=float16} before this pass"
            )
        plain = model_without_weights(source.path, context.task)
        linear = {n: each for n, each in plain.named_modules() if isinstance(each, torch.nn.Linear | Conv1D)}
        head = plain.get_output_embeddings()
        left = sorted(name for name, each in linear.items() if each is head or not _fits(each))
        taken = [each for name, each in linear.items() if name not in left]
        share = share_of_layers(plain, taken, f"bitsandbytes, by blocks of {ROWS} x {COLUMNS},")
        config = BitsAndBytesConfig(
            load_in_8bit=self.mode == "int8", load_in_4bit=self.mode == "nf4", llm_int8_skip_modules=left,
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        model = load_model(source.path, context.task, device=context.target.device_type, quantization=config)
        modules = dict(model.named_modules())
        eligible = linear.keys() & modules.keys()
        # a pooler that was never trained is not there; whoever loads what is saved makes one, which can be no integers
        model.config.quantization_config.llm_int8_skip_modules = [*left, *sorted(linear.keys() - eligible)]
        found = sum(type(each).__module__.startswith("bitsandbytes") for each in modules.values())
        if found != len(eligible - {*left}):
            raise ValueError(f"transformers had {found} layers quantized, not {len(eligible - {*left})}")
        copy_carried(source.path, out)
        model.save_pretrained(out)
        for path in out.glob("*.safetensors"):
            align_weights(path)  # its int8 product on a processor is torch's
        return {"quantized": found, "eligible": len(eligible), "left": left, "share_of_layers": round(share, 3)}

    def ensures(self, out: Path) -> None:
        if quantization(read_config(out)) != "bitsandbytes":
            raise ValueError("nothing was quantized")


def _fits(layer: Any) -> bool:
    """Whether a layer's weights come in whole blocks. Conv1D, of GPT-2, has them transposed."""
    import torch

    rows, columns = layer.weight.shape if isinstance(layer, torch.nn.Linear) else layer.weight.shape[::-1]
    return int(rows) % ROWS == 0 and int(columns) % COLUMNS == 0
