"""GELU as the end of a product, on the graphs that dynamo gives."""

from typing import Any

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from optimize.passes._fused_gelu import fuse


class Layer(torch.nn.Module):
    """A linear layer and what follows it."""

    def __init__(self, *, bias: bool = True, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(32, 48, bias=bias)
        self.twice = twice

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Of [batch, sequence, 32]: [batch, sequence, 48]."""
        product = self.linear(inputs)
        found = torch.nn.functional.gelu(product)
        return found + product if self.twice else found


def fused(model: torch.nn.Module, inputs: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many were, and what the graph then computes."""
    counts: list[int] = []

    def backend(graph_module: Any, examples: Any) -> Any:
        counts.append(fuse(graph_module))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.inference_mode():
        outputs = torch.compile(model, backend=backend)(inputs)
    return counts[0], outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_the_same_in_half_precision(dtype: torch.dtype) -> None:
    model, inputs = Layer().to(dtype).eval(), torch.randn(2, 5, 32).to(dtype)
    count, found = fused(model, inputs)
    assert count == 1 and found.shape == (2, 5, 48) and found.dtype == dtype
    with torch.inference_mode():
        torch.testing.assert_close(found, model(inputs), atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(Layer(), torch.float32), (Layer(bias=False), torch.float16), (Layer(twice=True), torch.float16)],
    ids=["float32", "without a bias", "product is used twice"],
)
def test_others_stay_as_they_are(model: Layer, dtype: torch.dtype) -> None:
    model, inputs = model.to(dtype).eval(), torch.randn(2, 5, 32).to(dtype)
    count, found = fused(model, inputs)
    assert count == 0
    with torch.inference_mode():
        torch.testing.assert_close(found, model(inputs), atol=0, rtol=0)


def test_a_quantized_product_stays_as_it_is() -> None:
    model, inputs = Layer().bfloat16().eval(), torch.randn(2, 5, 32).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    count, found = fused(model, inputs)
    assert count == 0
    with torch.inference_mode():
        torch.testing.assert_close(found, model(inputs), atol=0, rtol=0)
