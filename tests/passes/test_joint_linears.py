"""Linear layers that are given one tensor compute one product, and the model answers as before."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from optimize.models.loading import load_model, sample_inputs
from optimize.passes._joint_linears import join_linears
from optimize.targets.runtimes.eight_bits import EightBitLinear, read_eight_bits

TASK = "feature-extraction"


class Products(TorchDispatchMode):
    """Counts matrix products by weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def run(model: Any, inputs: dict[str, Any]) -> tuple[Any, int]:
    with torch.no_grad(), Products() as products:
        outputs = model(**inputs)
    return (outputs if isinstance(outputs, torch.Tensor) else outputs.last_hidden_state), products.count


def test_queries_keys_and_values_are_one_product(tiny: Path) -> None:
    model, inputs = load_model(tiny, TASK), sample_inputs(tiny)
    expected, before = run(model, inputs)
    layers, key = model.config.num_hidden_layers, model.encoder.layer[1].attention.self.key.weight.clone()
    assert join_linears(model, inputs) == 3 * layers
    assert torch.equal(model.encoder.layer[1].attention.self.key.weight, key)  # for whoever computes with it otherwise
    found, after = run(model, inputs)
    assert after == before - 2 * layers
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    again, _ = run(model, {name: value[:1, :5] for name, value in inputs.items()})
    assert again.shape[:2] == (1, 5)
    assert not [each for each in model.modules() if getattr(each, "product", None) is not None]  # nothing is held
    assert join_linears(model, inputs) == 0  # none is left


@pytest.mark.parametrize("ours", [False, True])
def test_quantized_layers_are_joined_with_their_like_where_they_are_ours(tiny: Path, *, ours: bool) -> None:
    model, inputs = load_model(tiny, TASK), sample_inputs(tiny)
    some = {f"encoder.layer.0.attention.self.{name}" for name in ("query", "key")}
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=lambda _, name: name in some)
    expected, _ = run(model, inputs)
    if ours:
        assert read_eight_bits(model) == 2
    mixed = join_linears(model, inputs) - 3 * (model.config.num_hidden_layers - 1)
    assert mixed == 0  # layers of one input that are not of one type
    found, _ = run(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert type(model.get_submodule(min(some))) is (EightBitLinear if ours else torch.nn.Linear)


def test_what_inductor_makes_of_it_is_kept_in_its_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, inputs = load_model(tiny, TASK), sample_inputs(tiny)
    expected, _ = run(model, inputs)
    join_linears(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        found = torch.compile(model, dynamic=False, fullgraph=True)(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert counters["inductor"]["fxgraph_cache_miss"] == 1 and not counters["inductor"]["fxgraph_cache_bypass"]


@pytest.mark.parametrize("ours", [False, True])
def test_weights_that_are_joined_are_not_held_apart_too(*, ours: bool) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("query", "key")})
    model.forward = lambda inputs: model["query"](inputs) + model["key"](inputs)  # type: ignore[assignment]
    if ours:
        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        read_eight_bits(model)
    names = ("weight", "scale") if ours else ("weight", "bias")
    held = [weakref.ref(getattr(each, name)) for each in model.values() for name in names]
    assert join_linears(model, {"inputs": torch.randn(3, 8)}) == 2
    gc.collect()
    assert not [each for each in held if each() is not None]


class Twice(torch.nn.Module):
    """Layers that share no input every time, that have no bias, and that have one each but not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.plain, self.other = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 6, bias=False)
        self.with_bias, self.without = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        once = self.first(inputs) + self.second(inputs)
        twice = self.first(once)  # by itself this time
        apart = twice * 2
        alike = torch.cat([self.plain(apart), self.other(apart)], dim=-1)
        last = twice - 1
        return alike.sum() + self.with_bias(last).sum() + self.without(last).sum()


def test_layers_that_are_not_always_together_or_not_alike_stay_apart() -> None:
    torch.manual_seed(0)
    model, inputs = Twice(), {"inputs": torch.randn(3, 8)}
    expected, before = run(model, inputs)
    assert join_linears(model, inputs) == 2
    found, after = run(model, inputs)
    torch.testing.assert_close(found, expected)
    assert after == before - 1  # plain and other alone
    assert type(model.first) is type(model.with_bias) is torch.nn.Linear
