"""GGUF files of every family that is written, run by llama.cpp: the logits are the eager model's."""

import json
from pathlib import Path

import numpy as np
import pytest

from optimize.models.checkpoint import read_config, resolve
from optimize.models.spelling import spelling_problems
from optimize.passes._gguf_families import FAMILIES, why_not
from optimize.passes.convert_gguf import ConvertGguf
from optimize.pipeline.contract import Artifact, Context, Kind
from optimize.targets.cpu import probe
from optimize.targets.runtimes import eager, llamacpp
from optimize.targets.runtimes.generating import generate
from tests.conftest import MakeCheckpoint

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-scaled": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-experts": ("Qwen3MoeForCausalLM", QWEN_EXPERTS),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6,
                                     "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", {}),
}  # fmt: skip
# the gate sees what no conversion can mend: qwen2 has a tokenizer of its own in transformers, which composes accents,
# and llama.cpp strips what follows a special token of phi3, as Phi's own tokens want it and these do not
MISSPELT = {"qwen2": 2, "phi3": 2}


def converted(folder: Path, out: Path, kind: str) -> Path:
    out.mkdir()
    step = ConvertGguf(type=kind)  # type: ignore[arg-type]
    assert step.requires(resolve(str(folder)), probe()) is None
    step.run(Artifact(Kind.CHECKPOINT, folder, "", ""), Context("text-generation", probe()), out)
    step.ensures(out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(
    case: str, make_language_model: MakeCheckpoint, tmp_path: Path
) -> None:
    architecture, options = CASES[case]
    folder = make_language_model(architecture, **options)
    session = llamacpp.open_session(converted(folder, tmp_path / "out", "f32"), "text-generation", 2)
    reference = eager.open_session(folder, "text-generation", 2)
    tokens = np.random.default_rng(0).integers(5, 500, 48)
    found, expected = (each.logits(tokens, 48) for each in (session, reference))  # type: ignore[attr-defined]
    assert np.abs(expected).max() > 1, "a model whose logits are all alike would test nothing"
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()  # llama.cpp's cache has 16 bits
    prompts = [tokens[:5], tokens[:17]]
    assert (generate(session, prompts, 8).tokens == generate(reference, prompts, 8).tokens).all()
    assert len(spelling_problems(folder, session)) == MISSPELT.get(case, 0)


def test_a_head_of_its_own_is_kept_where_config_json_calls_it_tied(
    make_language_model: MakeCheckpoint, tmp_path: Path
) -> None:
    """As transformers does; else the file would be another model."""
    folder = make_language_model("LlamaForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    session = llamacpp.open_session(converted(folder, tmp_path / "out", "f32"), "text-generation", 2)
    reference = eager.open_session(folder, "text-generation", 2)
    tokens = np.random.default_rng(0).integers(5, 500, 48)
    found, expected = (each.logits(tokens, 48) for each in (session, reference))  # type: ignore[attr-defined]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_fewer_bits_lose_more(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_language_model("LlamaForCausalLM", hidden_size=256, intermediate_size=512)  # rows fill the blocks
    tokens = np.random.default_rng(0).integers(5, 500, 48)
    expected = eager.open_session(folder, "text-generation", 2).logits(tokens, 48)  # type: ignore[attr-defined]
    errors = [
        np.abs(
            llamacpp.open_session(converted(folder, tmp_path / kind, kind), "text-generation", 2).logits(tokens, 48)
            - expected
        ).mean()
        for kind in ("f32", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
    ]
    assert errors == sorted(errors) and errors[0] < errors[1] / 2, errors


def test_k_quants_mix_types_as_llama_cpp_does(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    import gguf

    folder = make_language_model("LlamaForCausalLM", hidden_size=256, intermediate_size=320, num_hidden_layers=4)
    reader = gguf.GGUFReader(converted(folder, tmp_path / "out", "q4_k_m") / "model.gguf")
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert found["blk.0.attn_q.weight"] == "Q4_K" and found["output.weight"] == "Q6_K"
    # rows of 320 fill no block of 256; the third and the last layer keep more bits
    assert [found[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q5_0", "Q5_0", "Q8_0", "Q8_0"]


def test_what_cannot_be_written_is_refused_in_the_plan(make_language_model: MakeCheckpoint) -> None:
    config = read_config(make_language_model("LlamaForCausalLM"))
    assert "yarn" in str(why_not("LlamaForCausalLM", config | {"rope_parameters": {"rope_type": "yarn"}}))
    assert "none of those" in str(why_not("FalconForCausalLM", config))
    assert why_not("LlamaForCausalLM", config) is None
    assert set(FAMILIES) == {architecture for architecture, _ in CASES.values()}, "every family is tested"
