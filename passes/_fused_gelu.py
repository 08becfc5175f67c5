"""GELU as the end of the product before it: cuBLASLt computes both in one kernel, in GELU's tanh form.

That form and the exact one differ by at most 0.0005, which is about what half precision rounds away; so it is for
half precision alone. Source: https://docs.nvidia.com/cuda/cublas (CUBLASLT_EPILOGUE_GELU_BIAS)
"""

from __future__ import annotations

from typing import Any


def fuse(graph_module: Any) -> int:
    """Fuse in a graph as dynamo gives it, whose values have their shapes and dtypes. Returns how many were."""
    import torch

    graph, fused = graph_module.graph, 0
    for gelu in list(graph.nodes):
        if gelu.target is not torch._C._nn.gelu:
            continue
        linear = gelu.args[0]
        if linear.target is not torch._C._nn.linear or len(linear.users) > 1 or not _takes(linear):
            continue
        source, weight, bias = linear.args
        shape = linear.meta["example_value"].shape
        with graph.inserting_before(gelu):
            rows = graph.call_function(torch.flatten, (source, 0, -2))
            columns = graph.call_function(torch.t, (weight,))
            product = graph.call_function(torch._addmm_activation, (bias, rows, columns), {"use_gelu": True})
            found = graph.call_function(torch.reshape, (product, tuple(shape)))
        gelu.replace_all_uses_with(found)
        graph.erase_node(gelu)
        graph.erase_node(linear)
        fused += 1
    graph_module.recompile()
    return fused


def _takes(linear: Any) -> bool:
    """Whether a linear layer has a bias, half precision, and weights as they are: quantized ones have products of
    their own.
    """
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if len(linear.args) != 3 or linear.args[2] is None:
        return False
    value, weight = linear.meta.get("example_value"), linear.args[1].meta.get("example_value")
    return value.dtype in (torch.float16, torch.bfloat16) and not is_traceable_wrapper_subclass(weight)
