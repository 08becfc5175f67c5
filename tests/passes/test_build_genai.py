"""Folders of ONNX Runtime GenAI of every architecture that is built: the logits are the eager model's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimize.models.checkpoint import resolve
from optimize.models.encoding import load_tokenizer
from optimize.models.spelling import spelling_problems
from optimize.passes._onnx import GRAPH
from optimize.passes.build_genai import ROPES, BuildGenai
from optimize.pipeline.contract import Artifact, Context, Kind
from optimize.pipeline.language import score
from optimize.targets.cpu import probe
from optimize.targets.runtimes import eager, genai
from optimize.targets.runtimes.generating import generate
from tests.conftest import MakeCheckpoint

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PHI3 = {"pad_token_id": 0, "original_max_position_embeddings": 256}
CASES = {
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "granite": ("GraniteForCausalLM", {"rope_parameters": LINEAR}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    "lfm2": ("Lfm2ForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-scaled": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "nemotron": ("NemotronForCausalLM", {"head_dim": 32}),
    "phi": ("PhiForCausalLM", {"num_attention_heads": 2}),
    "phi3": ("Phi3ForCausalLM", PHI3),
    "qwen2": ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
}
MISSPELT = {"qwen2": 2}  # transformers gives it a tokenizer of its own, which composes accents
TOKENS = np.random.default_rng(0).integers(5, 500, 256)  # all that these models take
Build = Callable[[Path, BuildGenai], genai.GenaiSession]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a checkpoint and open what came out."""

    def run(folder: Path, step: BuildGenai) -> genai.GenaiSession:
        out = tmp_path / f"{step.precision}-{step.mixed}-{folder.parent.name}"
        out.mkdir()
        assert step.requires(resolve(str(folder)), probe()) is None
        facts = step.run(Artifact(Kind.CHECKPOINT, folder, "", ""), Context("text-generation", probe()), out)
        step.ensures(out)
        assert sum(facts["products"].values()) > 5
        return genai.open_session(out, "text-generation", 2)

    return run


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_transformers_does(case: str, make_language_model: MakeCheckpoint, build: Build) -> None:
    architecture, options = CASES[case]
    folder = make_language_model(architecture, **options)
    session, reference = build(folder, BuildGenai()), eager.open_session(folder, "text-generation", 2)
    found, expected = (each.logits(TOKENS, 256) for each in (session, reference))  # type: ignore[attr-defined]
    assert np.abs(expected).max() > 1, "a model whose logits are all alike would test nothing"
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    prompts = [TOKENS[:5], np.array([*TOKENS[:17], 2, 0]), TOKENS[:40]]  # one ends with what pads and ends texts
    written = generate(reference, prompts, 8).tokens
    assert (generate(session, prompts, 8).tokens == written).mean() > 0.9  # near ties fall either way
    for each in (session, reference):
        each.prefill(prompts, 3)  # type: ignore[attr-defined]
    for tokens in written.T[:2]:
        found, expected = (each.step(tokens) for each in (session, reference))  # type: ignore[attr-defined]
        assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    assert len(spelling_problems(folder, session)) == MISSPELT.get(case, 0)


@pytest.mark.parametrize(("tied", "width"), [(False, 96), (True, 96), (True, 128)])
def test_fewer_bits_lose_more(tied: bool, width: int, make_language_model: MakeCheckpoint, build: Build) -> None:
    folder = make_language_model("LlamaForCausalLM", tie_word_embeddings=tied, intermediate_size=width)
    logits = eager.open_session(folder, "text-generation", 2).logits(TOKENS, 256)  # type: ignore[attr-defined]
    reference = score(logits, TOKENS)
    losses = []
    for step in (BuildGenai(), BuildGenai("int8"), BuildGenai("int4"), BuildGenai("int4", mixed=False)):
        found = score(build(folder, step).logits(TOKENS, 256), TOKENS, reference["ids"])
        losses.append(float(np.abs(np.exp(found["logs"]) - np.exp(reference["logs"])).sum(axis=-1).mean()))
    assert losses[0] < 1e-4 < losses[1] < 0.05 < losses[2] < losses[3]


def test_a_text_is_timed_past_what_ends_it(make_language_model: MakeCheckpoint, build: Build) -> None:
    session = build(make_language_model("LlamaForCausalLM"), BuildGenai())
    written = session.generate([TOKENS[:9]], 8).tokens
    path = session._path / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = [int(written[0, 1]), 2]
    path.write_text(json.dumps(config))
    assert (genai.open_session(session._path, "text-generation", 2).generate([TOKENS[:9]], 8).tokens == written).all()


def test_a_conversation_is_spelt_as_transformers_does(make_language_model: MakeCheckpoint, build: Build) -> None:
    folder = make_language_model("LlamaForCausalLM")
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": ""}]
    expected = load_tokenizer(folder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert build(folder, BuildGenai()).render(messages) == expected


def test_what_is_built_wrong_is_refused_in_the_plan(make_language_model: MakeCheckpoint) -> None:
    def why(architecture: str, **options: object) -> str:
        return str(BuildGenai().requires(resolve(str(make_language_model(architecture, **options))), probe()))

    assert "none of those" in why("OlmoForCausalLM")
    assert "linear" in why("LlamaForCausalLM", rope_parameters=LINEAR)
    assert "sliding window of 16" in why("Phi3ForCausalLM", sliding_window=16, **PHI3)
    assert set(ROPES) == {architecture for architecture, _ in CASES.values()}, "every architecture is tested"


def test_products_that_were_left_out_are_an_error(make_language_model: MakeCheckpoint, build: Build) -> None:
    folder = make_language_model("LlamaForCausalLM")
    path = build(folder, BuildGenai())._path
    with pytest.raises(RuntimeError, match="not int8"):
        BuildGenai("int8").ensures(path)
    (path / GRAPH).unlink()
    with pytest.raises(RuntimeError, match=r"model\.onnx was not written"):
        BuildGenai().ensures(path)


def test_nothing_is_written_home(make_language_model: MakeCheckpoint, tmp_path: Path, build: Build) -> None:
    """ONNX Runtime's packages keep an identity and a database there, to report what they run."""
    path = build(make_language_model("LlamaForCausalLM"), BuildGenai())._path
    code = f"""
from pathlib import Path
from optimize.pipeline.contract import Kind
from optimize.targets.runtimes import open_session
open_session(Kind.GENAI, Path({str(path)!r}), "text-generation", 1).logits(__import__("numpy").arange(9), 1)
"""
    unset = {"ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME", "GITHUB_ACTIONS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    before = sorted(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert sorted(tmp_path.iterdir()) == before
    assert json.loads((path / "genai_config.json").read_text())["model"]["eos_token_id"] == 2
