"""quantize-torchao and compile-generate: near the eager model, and opened by transformers without this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

from optimize.models.checkpoint import resolve
from optimize.passes.cast_dtype import CastDtype
from optimize.passes.compile_generate import CompileGenerate
from optimize.passes.quantize_torchao import QuantizeTorchao
from optimize.pipeline.contract import Artifact, Context, Kind, Pass
from optimize.targets.cpu import probe
from optimize.targets.runtimes import eager
from optimize.targets.runtimes.compiled import CompiledGenerator
from optimize.targets.runtimes.generating import generate
from tests.conftest import MakeCheckpoint

TASK = "text-generation"
TOKENS = np.random.default_rng(0).integers(5, 500, 48)
PROMPTS = [TOKENS[:5], TOKENS[5:15]]  # as many as there are heads, and with NEW as long as a head
NEW = 6
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.tensor([[0] * 5 + TOKENS[:5], TOKENS[5:15]])
    written = model.generate(ids, attention_mask=(torch.arange(10) >= torch.tensor([[5], [0]])).long(),
                             max_new_tokens=NEW, do_sample=False)
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0].float()
    static = hasattr(model, "_previous_max_cache_length")  # set where transformers makes a static cache
    found[folder] = {"tokens": written[:, 10:].tolist(), "logits": logits.tolist(), "static": static}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(make_language_model: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint, and what each pass makes of it, by name."""
    base = tmp_path_factory.mktemp("torch")
    # one layer, since it is compiled
    found = {"eager": make_language_model("LlamaForCausalLM", num_hidden_layers=1, tie_word_embeddings=True)}

    def run(step: Pass, source: str, name: str) -> None:
        found[name] = base / name
        found[name].mkdir()
        step.run(Artifact(Kind.CHECKPOINT, found[source], "", ""), Context(TASK, probe()), found[name])
        step.ensures(found[name])

    run(CastDtype(), "eager", "bf16")
    run(QuantizeTorchao(), "eager", "int8")
    run(QuantizeTorchao(mode="weights"), "bf16", "weights")
    run(QuantizeTorchao(mode="int4"), "bf16", "int4")
    run(QuantizeTorchao(mode="fp8"), "bf16", "fp8")
    run(CompileGenerate(), "eager", "compiled")
    run(CompileGenerate(freeze=True), "int8", "int8-compiled")
    return found


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """Tokens and logits of every folder in a process that knows transformers alone."""
    code = PLAIN.replace("TOKENS", str(TOKENS.tolist())).replace("NEW", str(NEW))
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(folder) for name, folder in folders.items() if name != "fp8")],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: {key: np.array(value) for key, value in found[str(folder)].items()}
        for name, folder in folders.items()
        if str(folder) in found
    }


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """KL in nats, on average over the positions of [tokens, vocabulary]."""
    theirs, ours = (torch.log_softmax(torch.from_numpy(np.asarray(each)), dim=-1) for each in (expected, found))
    return float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())


@pytest.mark.parametrize(("name", "most"), [("bf16", 1e-3), ("int8", 5e-3), ("weights", 5e-3), ("int4", 0.1)])
def test_quantized_weights_stay_near_and_open_as_they_are(
    name: str, most: float, folders: dict[str, Path], plain: dict[str, dict[str, np.ndarray]]
) -> None:
    session = eager.open_session(folders[name], TASK, 2)
    assert isinstance(session, eager.EagerGenerator)
    logits = session.logits(TOKENS, len(TOKENS))
    assert np.abs(plain["eager"]["logits"]).max() > 1, "a model whose logits are all alike would test nothing"
    assert divergence(logits, plain["eager"]["logits"]) < most
    # but for int4, whose fast kernel sums in another order, it is the very same computation
    assert divergence(logits, plain[name]["logits"]) < (1e-3 if name == "int4" else 1e-6)
    if name != "int4":
        assert (generate(session, PROMPTS, NEW).tokens == plain[name]["tokens"]).all()


def test_fp8_has_a_scale_for_each_row_and_quantizes_each_token(folders: dict[str, Path]) -> None:
    """Weights alone: what multiplies them is a GPU's, see tests/test_gpu.py."""
    models = {name: eager.open_session(folders[name], TASK, 2).model for name in ("fp8", "bf16")}
    original = dict(models["bf16"].named_parameters())
    kinds = {name: type(weight).__name__ for name, weight in models["fp8"].named_parameters() if weight.dim() == 2}
    left = {"model.embed_tokens.weight"}  # and what picks the next token, which is the same
    assert {name for name, kind in kinds.items() if kind != "Float8Tensor"} == left
    for name in kinds.keys() - left:
        weight, expected = models["fp8"].get_parameter(name), original[name].float()
        assert weight.qdata.dtype is torch.float8_e4m3fn and tuple(weight.scale.shape) == (len(expected), 1)
        assert (weight.dequantize().float() - expected).norm() < 0.03 * expected.norm()
        assert weight.act_quant_kwargs.float8_dtype is torch.float8_e4m3fn
        assert type(weight.act_quant_kwargs.granularity).__name__ == "PerRow"
        # of nothing but zeros, which is what attention leaves of padding, there is no largest number to go by
        tokens = _choose_quant_func_and_quantize_tensor(torch.zeros(2, 64).bfloat16(), weight.act_quant_kwargs)
        assert not tokens.dequantize().float().any()
    config = json.loads((folders["fp8"] / "config.json").read_text())["quantization_config"]
    assert config["quant_type"]["default"]["_type"] == "Float8DynamicActivationFloat8WeightConfig"


def test_weights_are_quantized_when_opened(folders: dict[str, Path]) -> None:
    def parameters(name: str) -> dict[str, str]:
        model = eager.open_session(folders[name], TASK, 2).model
        return {key: type(weight).__name__ for key, weight in model.named_parameters() if weight.dim() == 2}

    int8, int4 = parameters("int8"), parameters("int4")
    assert {key for key, kind in int8.items() if kind != "Int8Tensor"} == {"model.embed_tokens.weight"}
    assert {key for key, kind in int4.items() if kind != "Int4OpaqueTensor"} == {"model.embed_tokens.weight"}  # tied


@pytest.mark.parametrize("name", ["int8", "weights", "int4", "fp8"])
def test_quantized_weights_lie_where_vectors_can_read_them(name: str, folders: dict[str, Path]) -> None:
    for path in folders[name].glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        tensors = json.loads(data[8 : 8 + length])
        begins = [8 + length + tensors[key]["data_offsets"][0] for key in tensors if key.endswith("qdata")]
        assert begins and not any(begin % 16 for begin in begins)


@torch._inductor.config.patch(force_disable_caches=True)  # what an earlier run left is no part of this one
def test_a_compiled_step_gives_the_eager_tokens(
    folders: dict[str, Path], plain: dict[str, dict[str, np.ndarray]]
) -> None:
    session = eager.open_session(folders["compiled"], TASK, 2)
    assert isinstance(session, CompiledGenerator)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (generate(session, PROMPTS, NEW).tokens == plain["eager"]["tokens"]).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "nothing was compiled"
    more = [*PROMPTS, TOKENS[:30]]
    expected = generate(eager.open_session(folders["eager"], TASK, 2), more, NEW).tokens
    assert (generate(session, more, NEW).tokens == expected).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "another shape was compiled anew"


def test_plain_transformers_uses_the_static_cache(
    folders: dict[str, Path], plain: dict[str, dict[str, np.ndarray]]
) -> None:
    assert (plain["compiled"]["tokens"] == plain["eager"]["tokens"]).all()
    assert (plain["int8-compiled"]["tokens"] == plain["int8"]["tokens"]).all()
    assert [name for name in plain if plain[name]["static"]] == ["compiled", "int8-compiled"]


def test_what_ends_a_text_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["eager"], tmp_path / "source")
    (source / "generation_config.json").unlink()  # transformers takes it from config.json then
    CompileGenerate().run(Artifact(Kind.CHECKPOINT, source, "", ""), Context(TASK, probe()), tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == json.loads((source / "config.json").read_text())["eos_token_id"] == 2


def test_steps_over_a_static_cache_are_the_eager_steps(folders: dict[str, Path]) -> None:
    ours, theirs = (eager.open_session(folders[name], TASK, 2) for name in ("compiled", "eager"))
    assert isinstance(ours, eager.EagerGenerator) and isinstance(theirs, eager.EagerGenerator)
    with torch.compiler.set_stance("force_eager"):  # the compiler has its own test
        found, expected = ours.prefill(PROMPTS, NEW), theirs.prefill(PROMPTS, NEW)
        for _ in range(NEW):
            assert np.abs(found - expected).max() < 1e-4
            tokens = expected.argmax(axis=-1)
            found, expected = ours.step(tokens), theirs.step(tokens)
    assert np.abs(found - expected).max() < 1e-4


def test_what_cannot_run_is_refused_in_the_plan(
    folders: dict[str, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, target = resolve(str(folders["eager"])), probe()
    assert "has no float8_e4m3fn arithmetic" in str(QuantizeTorchao(mode="fp8").requires(checkpoint, target))
    assert CompileGenerate().requires(checkpoint, target) is None
    assert "continues no text" in str(CompileGenerate().requires(resolve(str(tiny)), target))
    config = json.loads((folders["eager"] / "config.json").read_text())
    neo = shutil.copytree(folders["eager"], tmp_path / "neo")
    (neo / "config.json").write_text(
        json.dumps(config | {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"})
    )
    assert "no GPTNeoForCausalLM that compiles" in str(CompileGenerate().requires(resolve(str(neo)), target))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler" in str(CompileGenerate().requires(checkpoint, target))


@pytest.mark.parametrize("mode", ["int4", "fp8"])
def test_some_modes_want_bfloat16(mode: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    source = Artifact(Kind.CHECKPOINT, folders["eager"], "", "")
    with pytest.raises(ValueError, match=f"kernel for {mode} is made for bfloat16, .*: put cast-dtype before"):
        QuantizeTorchao(mode=mode).run(source, Context(TASK, probe()), tmp_path)


def test_layers_that_torchao_cannot_take_are_not_passed_over(
    make_language_model: MakeCheckpoint, tmp_path: Path
) -> None:
    source = Artifact(Kind.CHECKPOINT, make_language_model("GPT2LMHeadModel"), "", "")  # its products are no nn.Linear
    with pytest.raises(ValueError, match="of its layers' weights are linear"):
        QuantizeTorchao().run(source, Context(TASK, probe()), tmp_path)


@pytest.mark.parametrize(("mode", "left"), [("int8", ["pooler.dense"]), ("weights", [])])
def test_what_is_given_one_row_a_sample_has_no_activations_in_int8(
    mode: Any, left: list[str], tiny: Path, tmp_path: Path
) -> None:
    source = Artifact(Kind.CHECKPOINT, tiny, "", "")
    facts = QuantizeTorchao(mode=mode).run(source, Context("feature-extraction", probe()), tmp_path)
    assert facts["left"] == left and facts["quantized"] + len(left) == facts["eligible"] > 6
