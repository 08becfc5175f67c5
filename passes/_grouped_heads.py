"""Heads of a step's query that share keys attend as rows of one query.

By default, with a mask, keys and values are copied for each of them, which is most of what a step of a large batch
reads. On a GPU a kernel of ours computes it in 16 bits: torch's have one program for each sequence and head of keys.
"""

from __future__ import annotations

from typing import Any

from optimize.passes._attention import attend_by

GROUPED = "grouped"  # the name of this attention for transformers
WIDEST = 256  # numbers of a head, of whose keys and values GPUs of all kinds hold two tiles


def group_heads(model: Any) -> None:
    """Have a model attend so, where it attends by torch's function."""
    attend_by(model, GROUPED, attention=_grouped)


def _grouped(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """As transformers' attention functions: [batch, heads, tokens, size] each, the answer with tokens before heads."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens, size = query.shape
    mask = attention_mask  # by whose name some models give it
    shared = key.shape[1]
    plain = tokens == 1 and options.get("position_bias") is None and options.get("softcap") is None
    common = mask is None or (mask.shape[1] == 1 and mask.dtype is torch.bool)
    ours = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and value.shape[-1] == size <= WIDEST
    if not (plain and common) or not (ours or (mask is not None and heads > shared)):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    rows, scale = query.view(batch, shared, heads // shared, size), options.get("scaling")
    if ours:
        from optimize.targets.runtimes.one_query import attended

        found = attended(rows, key, value, mask, size**-0.5 if scale is None else scale)
    else:
        found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return found.reshape(batch, 1, heads, value.shape[-1]), None
