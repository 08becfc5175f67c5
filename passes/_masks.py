"""Masks for transformers' attention that take fewer operations: none where nothing is masked, or one of padding alone.

Up to 5.17, transformers makes a mask of ones wherever a model is traced or captured. Its last axis is one value that
is repeated, which none of torch's fast kernels for attention takes: what is left computes in float32, step by step.
Traced, a mask of padding is looked up at positions, which ONNX Runtime counts on the processor.
"""

from __future__ import annotations

from typing import Any

from optimize.passes._attention import attend_by

SPARED, PLAIN = "spared", "plain"  # names of our attention for transformers


def spare_masks(model: Any) -> None:
    """Have attention to all of the sequence take no mask, in a model that is given none and attends by torch's SDPA."""
    attend_by(model, SPARED, mask=_spared)


def plain_masks(model: Any) -> None:
    """Have attention to all of the sequence but padding take what is added to its scores, made of the padding alone, in
    a model that attends by torch's SDPA.
    """
    attend_by(model, PLAIN, mask=_padding)


def _spared(*, attention_mask: Any = None, local_size: int | None = None, **options: Any) -> Any:
    """As transformers' mask functions; `allow_is_bidirectional_skip` is said of what attends to all, both ways."""
    from transformers.masking_utils import sdpa_mask

    if options.get("allow_is_bidirectional_skip") and attention_mask is None and local_size is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **options)


def _padding(*, attention_mask: Any = None, local_size: int | None = None, dtype: Any = None, **options: Any) -> Any:
    """As _spared. [batch, 1, queries, sequence] of `dtype`: 0 for a token, the least number for padding."""
    import torch

    whole = options.get("allow_is_bidirectional_skip") and local_size is None
    if not whole or attention_mask is None or attention_mask.dim() != 2:
        return _spared(attention_mask=attention_mask, local_size=local_size, dtype=dtype, **options)
    added = (1 - attention_mask[:, None, None].to(dtype)) * torch.finfo(dtype).min
    return added.expand(-1, -1, options["q_length"], -1)
