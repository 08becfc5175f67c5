"""Products of one input as one product, in a torch model: a small batch then launches fewer and larger kernels.

The first linear layer of a group, in the order in which they are called, computes the product of all of them; each
takes its own columns. (Inductor's freezing does it too, but what it froze is not kept in its cache.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from optimize.passes._layer_inputs import layer_inputs


def join_linears(model: Any, inputs: dict[str, Any]) -> int:
    """Join the linear layers of `model` that are given the same tensor, as seen when it computes on `inputs`.

    Of those that belong to several groups none is joined, nor any whose weights are of a type of their own. Returns how
    many were.
    """
    linears = {name: each for name, each in model.named_modules() if _is_joined(each)}
    calls: dict[int, tuple[Any, list[str]]] = {}  # by the tensor's identity, kept alive so that none is taken twice
    for name, given in layer_inputs(model, linears, inputs):
        calls.setdefault(id(given), (given, []))[1].append(name)
    members: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for _, names in calls.values():
        for name in names:
            members[name].add(tuple(dict.fromkeys(names)))
    groups = {group for found in members.values() for group in found if len(group) > 1}
    joined = [group for group in groups if all(members[name] == {group} for name in group)]
    # each group's own weights are freed before the next one's are copied
    return sum(_join(model, {name: linears.pop(name) for name in group}) for group in joined)


def _is_joined(layer: Any) -> bool:
    """Whether a module is a linear layer, with weights as they are or ours in int8."""
    import torch

    from optimize.targets.runtimes.eight_bits import EightBitLinear

    plain = type(layer) is torch.nn.Linear and type(layer.weight) is torch.nn.Parameter
    return plain or type(layer) is EightBitLinear


def _one_of(layers: Sequence[Any]) -> Any:
    """A linear layer with the outputs of all, which are of one type."""
    import torch

    from optimize.targets.runtimes.eight_bits import EightBitLinear, joined

    if isinstance(layers[0], EightBitLinear):
        return joined(layers)
    one = torch.nn.Linear(layers[0].in_features, sum(each.out_features for each in layers), device="meta")
    one.weight = torch.nn.Parameter(torch.cat([each.weight for each in layers]), requires_grad=False)
    biases = [each.bias for each in layers if each.bias is not None]
    one.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return one


def _join(model: Any, linears: dict[str, Any]) -> int:
    """Replace these, in the order in which they are called, if they are of one type, and all have a bias or none has.
    Returns how many.
    """
    import torch

    class Joint(torch.nn.Module):  # type: ignore[misc]
        """The product of all of them, for as long as some have not taken theirs."""

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.linear = linear
            self.product: Any = None

    class Columns(torch.nn.Module):  # type: ignore[misc]
        """Some columns of the product, which the first of them computes."""

        def __init__(self, joint: Joint, start: int, end: int) -> None:
            super().__init__()
            self.joint, self.start, self.end = joint, start, end

        @property
        def weight(self) -> Any:
            """What the layer had, for models that compute with it otherwise, too."""
            return self.joint.linear.weight[self.start : self.end]

        def forward(self, inputs: Any) -> Any:
            joint = self.joint
            if self.start == 0:
                joint.product = joint.linear(inputs)
            product = joint.product
            if self.end == joint.linear.out_features:
                joint.product = None
            return product[..., self.start : self.end]

    layers = list(linears.values())
    if len({(type(each), each.bias is None) for each in layers}) > 1:
        return 0
    joint, start = Joint(_one_of(layers)), 0
    for name, layer in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Columns(joint, start, start + layer.out_features))
        start += layer.out_features
    return len(layers)
