"""Compiled calls: kept in files, opened without a trace, and compiled again where that cannot be."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from optimize.models.loading import load_model
from optimize.passes._compiled_calls import INDEX, CompiledCalls, form_of
from optimize.passes._cuda_graphs import COMPILED, GRAPHS, Captured, attending
from tests.conftest import MakeCheckpoint


class Model(torch.nn.Module):
    """Tied layers, a buffer, and outputs of which one is an input and one no tensor."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)

    def forward(self, tokens: torch.Tensor, pair: tuple[torch.Tensor, ...] = (), *, times: int = 1) -> dict[str, Any]:
        """Of [batch, 32]."""
        inner = torch.nn.functional.gelu(self.first(tokens)) * self.scale.to(tokens.dtype) * times
        for each in pair:
            inner = inner + each
        return {"last": self.second(inner), "inner": inner, "tokens": tokens, "times": times}


def compiled(model: Any, folder: Path) -> CompiledCalls:
    torch._dynamo.reset()
    counters.clear()
    return CompiledCalls(model, folder, autotune=False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By what is tested: torch has records of its own."""
    return [each.getMessage() for each in caplog.records if each.name == CompiledCalls.__module__]


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(4, 32)


@pytest.fixture
def kept(inputs: torch.Tensor, tmp_path: Path) -> Path:
    """A folder with two calls."""
    calls = compiled(Model().eval(), tmp_path / "none")
    with torch.inference_mode():
        calls(tokens=inputs)
        calls(tokens=inputs, pair=(inputs + 1, inputs - 1), times=2)
    calls.save(tmp_path / "kept")
    return tmp_path / "kept"


def test_calls_are_opened_with_the_weights_of_whoever_opens(
    kept: Path, inputs: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model().eval()
    with torch.inference_mode():
        model.first.weight.add_(0.1)
        calls = compiled(model, kept)
        for given in ({"tokens": inputs + 1}, {"tokens": inputs, "pair": (inputs - 1, inputs + 1), "times": 2}):
            expected, found = model(**given), calls(**given)
            torch.testing.assert_close(found.last, expected["last"])
            torch.testing.assert_close(found["inner"], expected["inner"])
            assert found.tokens is given["tokens"] and found.keys() == {"last", "inner", "tokens"}
        assert not counters["stats"]["unique_graphs"] and not said(caplog)
        for given in (  # that were not kept
            {"tokens": inputs[:3]},
            {"tokens": inputs, "times": 3},
            {"tokens": inputs, "pair": (inputs, inputs), "times": 2},
        ):
            torch.testing.assert_close(calls(**given)["last"], model(**given)["last"])
        assert counters["stats"]["unique_graphs"] == 3


def cut_off(kept: Path) -> None:
    file = kept / "0.graph"
    file.write_bytes(file.read_bytes()[:-5000])


def of_other_tensors(kept: Path) -> None:
    index = json.loads((kept / INDEX).read_text())
    for call in index["calls"].values():
        call["inputs"] = ["model.third.weight"]
    (kept / INDEX).write_text(json.dumps(index))


def of_an_h100(kept: Path) -> None:
    (kept / INDEX).write_text((kept / INDEX).read_text().replace('"device": "cpu"', '"device": "H100"'))


def nothing(kept: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, "RuntimeError"),
        (of_other_tensors, "ValueError: there is no model.third.weight"),
        (of_an_h100, "it is for H100, and here is cpu"),
        (lambda kept: (kept / INDEX).write_text("{"), "JSONDecodeError"),
        (lambda kept: (kept / INDEX).unlink(), "FileNotFoundError"),
        (nothing, r"torch \S+ did not write it"),
    ],
)
def test_what_cannot_be_opened_is_compiled_again_and_said(
    kept: Path, inputs: torch.Tensor, damage: Callable[[Path], None], words: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    damage(kept)
    if damage is nothing:
        monkeypatch.setattr("torch._inductor.codecache.torch_key", lambda: b"of another torch")
    model = Model().eval()
    calls = compiled(model, kept)
    with torch.inference_mode():
        torch.testing.assert_close(calls(tokens=inputs)["last"], model(inputs)["last"])
        calls(tokens=inputs, pair=(inputs + 1, inputs - 1), times=2)
    assert counters["stats"]["unique_graphs"] == 2
    (line,) = said(caplog)  # once, not for each call
    assert re.search(f"compiled again, since {words}", line)


def test_a_call_of_tensors_that_nobody_can_name_is_not_kept(
    inputs: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model().eval()
    del model.scale
    model.scale = torch.full((1,), 3.0)  # neither a parameter nor a buffer
    calls = compiled(model, tmp_path / "none")
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(calls(tokens=inputs)["last"], model(inputs)["last"])
    calls.save(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / INDEX).read_text())["calls"] == {}
    assert "a call of Model is compiled again wherever it is opened" in said(caplog)


def test_quantized_weights_are_kept(inputs: torch.Tensor, tmp_path: Path) -> None:
    def quantized() -> Any:
        model = Model().bfloat16().eval()
        quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        return model

    given = {"tokens": inputs.bfloat16()}
    with torch.inference_mode():
        calls = compiled(quantized(), tmp_path / "none")
        calls(**given)
        expected = calls(**given)
        calls.save(tmp_path / "kept")
        found = compiled(quantized(), tmp_path / "kept")(**given)
        torch.testing.assert_close(found.last, expected.last, atol=0, rtol=0)
    assert not counters["stats"]["unique_graphs"]


def test_an_encoder_is_opened_without_a_trace(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder, task = tmp_path / "a", "feature-extraction"
    shutil.copytree(make_checkpoint(), folder)
    (folder / GRAPHS).write_text(json.dumps({"shapes": [(2, 8)], "compile": True, "autotune": False, "fill": 0}))
    built = Captured(folder, load_model(folder, task), task)
    built.call.save(folder / COMPILED)
    torch._dynamo.reset()
    counters.clear()
    found = Captured(folder, load_model(folder, task), task)
    batch = {"input_ids": np.arange(5, 21).reshape(2, 8), "attention_mask": np.ones((2, 8), np.int64)}
    outputs = []
    for captured in (built, found):
        graph = captured.graph(batch)
        assert graph is not None
        _, replay, buffers, tensors = graph
        for name, array in batch.items():
            buffers[name].copy_(torch.from_numpy(array))
        replay()
        outputs.append(tensors["last_hidden_state"].numpy())
    np.testing.assert_array_equal(*outputs)
    assert not counters["stats"]["unique_graphs"]


def test_a_calls_form_has_all_that_it_was_compiled_for() -> None:
    ids = torch.ones((2, 8), dtype=torch.int64)
    found = form_of({"input_ids": ids, "use_cache": True, "encoder_outputs": (ids[:1].bool(), ids)})
    assert found == (
        "input_ids: int64[2, 8], use_cache=True, encoder_outputs.0: bool[1, 8], encoder_outputs.1 is input_ids"
    )


class Attention(torch.nn.Module):
    """Torch's, and twice that."""

    device = torch.device("cpu")

    def forward(self, query: torch.Tensor) -> dict[str, Any]:
        """Of [batch, heads, sequence, size]."""
        return {"last": 2 * torch.nn.functional.scaled_dot_product_attention(query, query, query)}


def test_what_is_compiled_for_one_kernel_of_attention_is_not_taken_for_another(tmp_path: Path) -> None:
    query, found = torch.randn(2, 4, 16, 8), list[tuple[str, int]]()
    with fresh_cache():
        for attention in ("sdpa", "sdpa", "cudnn", "efficient", "efficient"):
            calls = compiled(Attention(), tmp_path / "none")
            with attending({"attention": attention}), torch.inference_mode():
                calls(query=query)
            found.append((attention, counters["aot_autograd"]["autograd_cache_hit"]))
    assert found == [("sdpa", 0), ("sdpa", 1), ("cudnn", 0), ("efficient", 0), ("efficient", 1)]
