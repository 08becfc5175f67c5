"""Four-bit weights of a torchao checkpoint, packed for this processor's kernel when they are opened."""

from __future__ import annotations

from typing import Any

import torch


def pack_int4(model: Any) -> None:
    """Replace four-bit weights that lie in bytes, whose products unpack them first, by what torch's kernel reads.

    The kernel is made for bfloat16: other models are left alone.
    Source: https://github.com/pytorch/ao/blob/main/torchao/prototype/quantization/int4/int4_opaque_tensor.py
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if (
            isinstance(weight, IntxUnpackedToInt8Tensor)
            and (weight.target_dtype, weight.dtype) == (torch.int4, torch.bfloat16)
            and weight.activation_quantization is None
        ):
            layer.weight = torch.nn.Parameter(_packed(weight), requires_grad=False)


def _packed(weight: Any) -> Any:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    scale = weight.scale
    zero = -scale * weight.zero_point  # the kernel's zero is a weight: that of the value in the middle
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.qdata.int() + 8, 1)
    scales = pack_tinygemm_scales_and_zeros(scale, zero, scale.dtype)
    return Int4OpaqueTensor(data, scales, list(weight.block_size), weight.shape)
