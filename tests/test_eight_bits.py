"""Linear layers with int8 weights that are read as they are compute what torchao's do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import T5Config, T5EncoderModel

from optimize.models.loading import load_model, sample_inputs
from optimize.passes._compiled_calls import CompiledCalls
from optimize.passes._joint_linears import join_linears
from optimize.targets.runtimes.eight_bits import MOST, EightBitLinear, read_eight_bits

TASK = "feature-extraction"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
WEIGHTS = Int8WeightOnlyConfig(set_inductor_config=False)


def layer(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> Any:
    """As torchao quantizes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=bias)).to(dtype)
    quantize_(model, WEIGHTS)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_torchaos(dtype: torch.dtype, *, bias: bool) -> None:
    model = layer(48, 80, dtype, bias=bias)
    inputs = torch.randn(2, 3, 48, dtype=dtype)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(inputs.float(), model[0].weight.dequantize().float())
        expected = exact + model[0].bias.float() if bias else exact
        assert read_eight_bits(model) == 1
        found = model(inputs)
    assert found.dtype is dtype and found.shape == (2, 3, 80)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, atol=8 * rounding, rtol=4 * rounding)


@pytest.mark.parametrize(("weight", "given"), [(0.01, 1.0), (0.09, 10.0), (1e-4, 1000.0), (2.0, 1.0), (0.0, 1.0)])
def test_sums_fit_into_float16(weight: float, given: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8192, 4, bias=False)).half()
    model[0].weight.data.fill_(weight)
    quantize_(model, WEIGHTS)
    exact = model[0].weight.dequantize().float().sum(dim=1) * given
    assert exact.abs().max() < 65504
    read_eight_bits(model)
    with torch.inference_mode():
        found = model(torch.full((2, 8192), given, dtype=torch.float16))
    torch.testing.assert_close(found.float(), exact.expand(2, 4), atol=0, rtol=2e-3)


def test_a_model_that_looks_at_its_weights_computes_on() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = T5EncoderModel(T5Config(**sizes)).eval()  # its feed-forward layers cast to their weights' dtype
    quantize_(model, WEIGHTS)
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        assert read_eight_bits(model) == 12
        found = model(**inputs).last_hidden_state
        assert join_linears(model, inputs) == 6
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def test_other_quantized_layers_are_left_as_they_are(tiny: Path) -> None:
    configs = (
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        Int8WeightOnlyConfig(set_inductor_config=False, granularity=PerGroup(16)),
        IntxWeightOnlyConfig(torch.int4, PerGroup(16)),
    )
    for config in configs:
        model = torch.nn.Sequential(torch.nn.Linear(32, 16))
        quantize_(model, config)
        assert type(model[0].weight) is not torch.nn.Parameter
        assert read_eight_bits(model) == 0 and type(model[0]) is torch.nn.Linear
    assert read_eight_bits(load_model(tiny, TASK)) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_them_is_compiled_and_opened_without_a_trace(tiny: Path, tmp_path: Path, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = {name: each[:, :8].to(device) for name, each in sample_inputs(tiny).items()}
    rows = inputs["input_ids"].numel()
    assert rows <= MOST  # few, on a GPU

    def made() -> Any:
        model = load_model(tiny, TASK, device=device).to(dtype)
        quantize_(model, WEIGHTS)
        return model

    def rewritten(model: Any) -> Any:
        layers = sum(isinstance(each, torch.nn.Linear) for each in model.modules())
        assert read_eight_bits(model) == layers
        assert join_linears(model, inputs) == 3 * model.config.num_hidden_layers
        return model

    with torch.inference_mode():
        expected = made()(**inputs).last_hidden_state.float().cpu()
        plain = rewritten(made())(**inputs).last_hidden_state.float().cpu()
        built = CompiledCalls(rewritten(made()), tmp_path / "none", autotune=False)
        first = built(**inputs).last_hidden_state.float().cpu()
        built.save(tmp_path / "kept")
        torch._dynamo.reset()
        counters.clear()
        found = CompiledCalls(rewritten(made()), tmp_path / "kept", autotune=False)(**inputs).last_hidden_state
    tolerance = 0.05 if device == "cuda" else 1e-4
    for each in (plain, first, found.float().cpu()):
        np.testing.assert_allclose(each, expected, atol=tolerance)
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 200, MOST])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 100), (2048, 2048), (1000, 8200), (16400, 512)])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_products_of_few_rows_are_exact_to_float32(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    from optimize.targets.runtimes.few_rows import few_rows, plan

    torch.manual_seed(0)
    left = torch.randn(rows, inputs, device="cuda", dtype=dtype)
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
    found = few_rows(left, values)
    assert found.shape == (plan(rows, outputs, inputs).parts, rows, outputs)
    exact = left.double() @ values.double().t()
    torch.testing.assert_close(found.sum(dim=0).double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_few_rows_take_the_kernel_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize.targets.runtimes import few_rows as kernel

    taken, few_rows = list[int](), kernel.few_rows

    def watched(left: Any, values: Any) -> Any:
        taken.append(len(left))
        return few_rows(left, values)

    monkeypatch.setattr(kernel, "few_rows", watched)
    model = layer(64, 96, torch.bfloat16).cuda()
    read_eight_bits(model)
    assert type(model[0]) is EightBitLinear
    with torch.inference_mode():
        many = model(torch.randn(MOST + 1, 64, device="cuda", dtype=torch.bfloat16))
        model(torch.randn(2, 5, 64, device="cuda", dtype=torch.bfloat16))
    assert taken == [10] and len(many) == MOST + 1
