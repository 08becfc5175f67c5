"""What the layers of a torch model are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def layer_inputs(model: Any, layers: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A layer's name and the first tensor that it is given, for each call in their order as `model` computes on
    `inputs`.
    """
    import torch

    calls: list[tuple[str, Any]] = []

    def record(name: str) -> Any:
        return lambda _, given: calls.append((name, given[0]))

    hooks = [each.register_forward_pre_hook(record(name)) for name, each in layers.items()]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return calls
