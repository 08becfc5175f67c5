"""optimize-ipex: Intel's extension for torch, in an environment of its own. Archived upstream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.loading import load_model, sample_inputs
from optimize.passes._torchscript import check, trace, why_not
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class OptimizeIpex(Pass):
    """intel-extension-for-pytorch: weights laid out for the processor, operations fused, traced and frozen.

    The extension is archived, with known security issues: what is made with it is emitted where that is asked for.
    Source: https://intel.github.io/intel-extension-for-pytorch
    """

    name: ClassVar = "optimize-ipex"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.IPEX
    version: ClassVar = 1
    tools: ClassVar = ("torch", "transformers", "intel-extension-for-pytorch")
    toolchain: ClassVar = "ipex"
    target_facts: ClassVar = ("arch", "features")

    mode: Literal["bf16", "fp32", "int8"] = "bf16"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if target.gpus or target.arch != "x86_64":
            return "the extension is for x86-64 processors"
        if self.mode == "bf16" and "bfloat16" not in target.dtypes:
            return f"{target.device} has no bfloat16 arithmetic"
        return why_not(checkpoint)

    @property
    def arithmetic(self) -> str | None:
        return "float32" if self.mode == "fp32" else "bfloat16"

    def memory(self, checkpoint: Checkpoint) -> int:
        return 3 * FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return {"fp32": 4, "bf16": 2, "int8": 1}[self.mode] * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import intel_extension_for_pytorch as ipex
        import torch

        model = load_model(source.path, context.task, "float32")
        inputs = sample_inputs(source.path, context.task)
        dtype = torch.float32 if self.mode == "fp32" else torch.bfloat16
        # not where weights are int8: traced under autocast, its second call gave NaN (release 2.8)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mode == "bf16"):
            fit = _weights_in_int8(model, inputs) if self.mode == "int8" else ipex.optimize(model, dtype=dtype)
            return {"operations": trace(fit, inputs, out)}

    def ensures(self, out: Path) -> None:
        check(out)


def _weights_in_int8(model: Any, inputs: dict[str, Any]) -> Any:
    from intel_extension_for_pytorch import quantization

    mapping = quantization.get_weight_only_quant_qconfig_mapping(
        weight_dtype=quantization.WoqWeightDtype.INT8, lowp_mode=quantization.WoqLowpMode.BF16
    )
    prepared = quantization.prepare(model, mapping, example_kwarg_inputs=inputs, inplace=True)
    return quantization.convert(prepared, inplace=True)
