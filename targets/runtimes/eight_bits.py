"""Products of few rows with int8 weights that are read as they are: what inductor makes of torchao's writes them out in
16 bits first, so that one row takes longer than with weights in 16 bits.

A row of weights has one scale, by which sums are multiplied. Source: https://docs.pytorch.org/ao (Int8WeightOnlyConfig)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MOST = 256  # rows of inputs: with more, writing weights out costs less than a kernel that is not cuBLAS's
LEAST = -24  # exponent of the least power of two that int8 weights are multiplied by: float16 has no smaller numbers


class EightBitLinear(torch.nn.Module):  # type: ignore[misc]
    """[..., features in] -> [..., features out]."""

    def __init__(self, weight: Any, scale: Any, bias: Any) -> None:
        """Of [features out, features in] in int8, [features out] in float32, and a bias or None."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)  # whose dtype some models look at, and leave their inputs alone
        self.register_buffer("scale", scale)
        # the power of two in each scale: by it weights become 16 bits exactly, and sums are as large as the outputs
        power = torch.exp2((torch.frexp(scale).exponent - 1).clamp(min=LEAST).to(scale.dtype))
        self.register_buffer("power", power)
        self.bias = bias

    def forward(self, inputs: Any) -> Any:
        rows = inputs.reshape(-1, self.in_features)
        if inputs.is_cuda and inputs.dtype in (torch.float16, torch.bfloat16) and len(rows) <= MOST:
            from optimize.targets.runtimes.few_rows import few_rows

            product = few_rows(rows.contiguous(), self.weight).sum(dim=0) * self.scale
        else:
            weight = self.weight.to(inputs.dtype) * self.power.to(inputs.dtype)[:, None]
            product = torch.nn.functional.linear(rows, weight) * (self.scale / self.power)
        found = product.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias


def joined(layers: Sequence[EightBitLinear]) -> EightBitLinear:
    """One layer with the outputs of all, of which all have a bias or none."""
    weight, scale = (torch.cat([getattr(each, name) for each in layers]) for name in ("weight", "scale"))
    biases = [each.bias for each in layers if each.bias is not None]
    bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return EightBitLinear(weight, scale, bias)


def read_eight_bits(model: Any) -> int:
    """Replace the linear layers of `model` whose weights torchao has in int8, and whose inputs it leaves as they are.
    Returns how many were.
    """
    found = [name for name, each in model.named_modules() if _is_eight_bit(each)]
    for name in found:
        layer = model.get_submodule(name)
        weight = layer.weight
        model.set_submodule(name, EightBitLinear(weight.qdata.contiguous(), weight.scale.flatten().float(), layer.bias))
    return len(found)


def _is_eight_bit(layer: Any) -> bool:
    """Whether it is torch's own linear layer, with one scale for each row of weights, evenly to both sides of zero."""
    if type(layer) is not torch.nn.Linear or type(layer.weight).__name__ != "Int8Tensor":
        return False
    weight, rows = layer.weight, layer.out_features
    plain = weight.act_quant_kwargs is None and weight.act_pre_scale is None
    return plain and weight.scale.numel() == rows and (weight.zero_point is None or not weight.zero_point.any())
