"""quantize-torchao: int8, int4 or fp8 weights in a transformers checkpoint, which transformers opens with torchao."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.casting import align_weights
from optimize.models.loading import copy_carried, load_model, sample_inputs
from optimize.models.tasks import TASKS
from optimize.passes._layer_inputs import layer_inputs
from optimize.passes._share import share_of_layers
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

GROUP = 32  # weights of one row that share a four-bit scale
LEAST = 1e-12  # of an fp8 row's largest number: of a row of zeros, which padding has, torchao (0.18) makes 0 / 0
BLOCK = 16  # torch's four-bit kernel takes output features in such blocks, its fp8 product both kinds


@dataclass(frozen=True)
class QuantizeTorchao(Pass):
    """Quantize every linear layer's weights: int8 with activations quantized per token, int8 alone, int4 alone, or fp8
    with activations quantized per token.

    What picks the next token is quantized too with int8, and for that untied from the embeddings; otherwise it stays as
    it is. Where activations are int8, so does a pooler or a head that is given one row a sample: torch's product of
    int8 on GPUs needs more than 16 rows. Four-bit values are stored in bytes, since torchao's packed form for CPUs has
    no safetensors form and fits one kind of processor: targets/runtimes/packing.py packs them where they are opened.
    Source: https://docs.pytorch.org/ao, https://huggingface.co/docs/transformers/quantization/torchao
    """

    name: ClassVar = "quantize-torchao"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 3
    tools: ClassVar = ("torch", "torchao", "transformers", "safetensors")

    mode: Literal["int8", "weights", "int4", "fp8"] = "int8"

    @property
    def arithmetic(self) -> str | None:
        return {"int8": "int8", "fp8": "float8_e4m3fn"}.get(self.mode)

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if self.mode == "fp8" and "float8_e4m3fn" not in target.dtypes:
            return f"{target.device} has no float8_e4m3fn arithmetic"
        if self.mode == "int4" and target.gpus:
            return "its four-bit weights are packed for processors; on a GPU, quantize-bitsandbytes{mode=nf4} has some"
        if self.mode == "int4" and "bfloat16" not in target.dtypes:
            return f"torch's four-bit kernel computes in bfloat16, which {target.device} has no arithmetic for"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 2 * checkpoint.weight_bytes + checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        outer = checkpoint.dimensions.vocabulary * checkpoint.dimensions.hidden  # embeddings stay as they are
        stored = checkpoint.weight_bytes // checkpoint.parameters
        return stored * outer * (2 if self.mode == "fp8" else 1) + int(1.13 * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import torch
        from torchao.quantization import quantize_
        from transformers import TorchAoConfig
        from transformers.quantizers.auto import AutoHfQuantizer

        model = load_model(source.path, context.task)
        if self.mode in ("int4", "fp8") and model.dtype != torch.bfloat16:
            raise ValueError(
                f"torch's kernel for {self.mode} is made for bfloat16, the checkpoint is {model.dtype}: "
                "put cast-dtype before this pass"
            )
        head = model.get_output_embeddings()
        if self.mode not in ("int4", "fp8") and head is not None and model.config.tie_word_embeddings:
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
        chosen = {name for name, each in linear.items() if self._takes(each, each is head)}
        if self.mode == "int8" and not TASKS[context.task].generates:
            chosen -= _once_a_sample(
                model, linear, sample_inputs(source.path, context.task, str(model.dtype).removeprefix("torch."))
            )
        share = share_of_layers(model, [linear[name] for name in chosen], "torchao")
        config = _config(self.mode)
        if self.mode in ("int4", "fp8"):
            quantized = _in_four_bits if self.mode == "int4" else _in_fp8
            for name in chosen:
                linear[name].weight = torch.nn.Parameter(quantized(linear[name].weight), requires_grad=False)
        else:
            quantize_(model, config, filter_fn=lambda _, name: name in chosen)
        left = sorted(linear.keys() - chosen)
        model.config.quantization_config = TorchAoConfig(config, modules_to_not_convert=left)
        model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
        copy_carried(source.path, out)
        model.save_pretrained(out)
        for path in out.glob("*.safetensors"):
            align_weights(path)
        return {"quantized": len(chosen), "eligible": len(linear), "left": left, "share_of_layers": round(share, 3)}

    def _takes(self, layer: Any, is_head: bool) -> bool:
        rows, columns = layer.weight.shape
        if self.mode not in ("int4", "fp8"):
            return True
        return not is_head and rows % BLOCK == 0 and columns % (GROUP if self.mode == "int4" else BLOCK) == 0

    def ensures(self, out: Path) -> None:
        from safetensors import safe_open

        for path in out.glob("*.safetensors"):
            with safe_open(path, framework="pt") as weights:
                if any(name.endswith("._weight_qdata") for name in weights.keys()):  # noqa: SIM118 (it is no dict)
                    return
        raise ValueError("no quantized weights were written")


def _config(mode: str) -> Any:
    import torch
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        PerRow,
    )

    if mode == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=LEAST, set_inductor_config=False
        )
    if mode == "int4":
        return IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), MappingType.ASYMMETRIC)
    # inductor's options are the compiler's business: compile-generate
    config = Int8DynamicActivationInt8WeightConfig if mode == "int8" else Int8WeightOnlyConfig
    return config(set_inductor_config=False)


def _in_four_bits(weight: Any) -> Any:
    """Evenly between the least and the most of each group. torchao's own choice rounds the zero point to a whole
    number, and computes in bfloat16.
    """
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor

    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)  # with 0 in it, zero points are small
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
    zero = (-8 - low / scale.float()).bfloat16()
    data = (groups / scale.float()[..., None] + zero.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    return IntxUnpackedToInt8Tensor(
        data.flatten(1), scale, zero, torch.int4, (1, GROUP), weight.dtype, activation_quantization=None
    )


def _in_fp8(weight: Any) -> Any:
    """Each row by its largest number. As torchao does it, which asks for a GPU first."""
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    config = _config("fp8")
    per_token = QuantizeTensorToFloat8Kwargs(config.activation_dtype, PerRow(), hp_value_lb=LEAST)
    return Float8Tensor.from_hp(
        weight.detach(), config.weight_dtype, PerRow(), config.mm_config, LEAST, act_quant_kwargs=per_token
    )


def _once_a_sample(model: Any, layers: dict[str, Any], inputs: dict[str, Any]) -> set[str]:
    """Names of the layers that are given one row for each sample of `inputs`."""
    samples = len(next(iter(inputs.values())))
    return {name for name, given in layer_inputs(model, layers, inputs) if given.shape[:-1].numel() == samples}
