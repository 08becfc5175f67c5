"""How much of a model a quantizer of linear layers takes: experts, for one, may be no linear layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LEAST = 0.5


def share_of_layers(model: Any, linear: Collection[Any], quantizer: str) -> float:
    """The part of the layers' weights that these linear ones have; embeddings, what picks the next token and scales do
    not count. Raises ValueError for less than half.
    """
    import torch

    outer = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    outer |= {id(head.weight)} if head is not None else set()
    outer |= {id(own) for each in linear for own in each.parameters() if own is not each.weight}
    inner = {id(each): each.numel() for each in model.parameters() if each.dim() > 1 and id(each) not in outer}
    share: float = sum(inner.get(id(each.weight), 0) for each in linear) / sum(inner.values())
    if share < LEAST:
        raise ValueError(f"only {share:.0%} of its layers' weights are linear ones that {quantizer} can quantize so")
    return share
