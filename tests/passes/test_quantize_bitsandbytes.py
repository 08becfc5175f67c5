"""quantize-bitsandbytes: near the eager model, smaller, and opened by transformers as it is: on a processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optimize.models.checkpoint import resolve
from optimize.models.loading import load_model, quantized_by
from optimize.models.weights import SINGLE
from optimize.passes.cast_dtype import CastDtype
from optimize.passes.quantize_bitsandbytes import QuantizeBitsandbytes
from optimize.pipeline.contract import Artifact, Context, Kind, Pass
from optimize.pipeline.errors import CheckpointError
from optimize.targets.cpu import probe
from optimize.targets.runtimes import eager
from optimize.targets.runtimes.generating import generate
from tests.conftest import MakeCheckpoint

TASK = "text-generation"
TOKENS = np.random.default_rng(0).integers(5, 500, 48)
MODES: dict[str, Any] = {"int8": "float16", "nf4": "bfloat16"}  # and what each computes in


def run(step: Pass, source: Path, out: Path, task: str = TASK) -> dict[str, Any]:
    out.mkdir()
    facts = step.run(Artifact(Kind.CHECKPOINT, source, "", ""), Context(task, probe()), out)
    step.ensures(out)
    return facts


@pytest.fixture(scope="module", params=MODES)
def made(
    request: pytest.FixtureRequest, make_language_model: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, dict[str, Any]]:
    """A mode, the checkpoint in its dtype, what it makes of it, and what it says of that."""
    base, source = tmp_path_factory.mktemp(request.param), make_language_model(tie_word_embeddings=True)
    run(CastDtype(dtype=MODES[request.param]), source, base / "cast")
    return request.param, base / "cast", base / "made", run(
        QuantizeBitsandbytes(mode=request.param), base / "cast", base / "made"
    )  # fmt: skip


def test_quantized_weights_stay_near_and_open_as_they_are(made: tuple[str, Path, Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    mode, source, out, _ = made
    session, before = (eager.open_session(folder, TASK, 2) for folder in (out, source))
    assert isinstance(session, eager.EagerGenerator) and isinstance(before, eager.EagerGenerator)
    layer, original = (each.model.model.layers[1].mlp.up_proj for each in (session, before))
    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
    error = (weight - original.weight.float()).norm() / original.weight.float().norm()
    assert 0 < error < (0.01 if mode == "int8" else 0.11)
    found, expected = (each.logits(TOKENS, len(TOKENS)) for each in (session, before))
    assert np.abs(expected).max() > 1, "a model whose logits are all alike would test nothing"
    near = torch.nn.functional.cosine_similarity(torch.from_numpy(found), torch.from_numpy(expected), dim=-1)
    assert near.mean() > (0.998 if mode == "int8" else 0.93)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert str(plain.dtype) == str(session.model.dtype) == f"torch.{MODES[mode]}"
    with torch.inference_mode():
        logits = plain(torch.from_numpy(TOKENS)[None]).logits[0].float().numpy()
    np.testing.assert_allclose(found, logits, atol=1e-6)
    assert generate(session, [TOKENS[:5], TOKENS[5:15]], 4).tokens.shape == (2, 4)


def test_what_is_quantized_and_what_is_left_is_told(made: tuple[str, Path, Path, dict[str, Any]]) -> None:
    mode, source, out, facts = made
    # 96 columns are no whole blocks; the head is the embeddings, which stay as they are
    assert facts["left"] == ["lm_head", *(f"model.layers.{index}.mlp.down_proj" for index in range(2))]
    assert (facts["quantized"], facts["eligible"]) == (12, 15)
    session = eager.open_session(out, TASK, 2)
    kinds = {type(each).__name__ for name, each in session.model.named_modules() if name.endswith("up_proj")}
    assert kinds == {"Linear8bitLt" if mode == "int8" else "Linear4bit"}
    assert quantized_by(out) == "bitsandbytes" and not quantized_by(source)
    checkpoint = resolve(str(source))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    named = 200 * facts["eligible"] + 1300 * facts["quantized"]  # headers and tables, whatever the weights' size
    predicted = QuantizeBitsandbytes(mode=mode).weight_bytes(checkpoint)  # type: ignore[arg-type]
    assert size - named < predicted < 2 * size


def test_what_was_quantized_is_not_taken_as_a_checkpoint(made: tuple[str, Path, Path, dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"quantized already \(by bitsandbytes, as config"):
        resolve(str(made[2]))


def test_an_encoder_with_a_classifier_is_quantized_too(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    task, source = "text-classification", make_checkpoint("BertForSequenceClassification", dtype="bfloat16")
    facts = run(QuantizeBitsandbytes(mode="nf4"), source, tmp_path / "out", task)
    assert facts["left"] == ["classifier"] and facts["share_of_layers"] > 0.99
    batch = {"input_ids": TOKENS[None], "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
    found, expected = (eager.open_session(each, task, 2).run(batch)["logits"] for each in (tmp_path / "out", source))
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


def test_a_pooler_that_was_never_trained_is_not_missed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_checkpoint(dtype="float16"), source)
    trained = {name: each for name, each in load_file(source / SINGLE).items() if "pooler" not in name}
    save_file(trained, source / SINGLE, metadata={"format": "pt"})
    facts = run(QuantizeBitsandbytes(), source, tmp_path / "out", "feature-extraction")
    assert (facts["quantized"], facts["eligible"], facts["left"]) == (12, 12, [])
    model = load_model(tmp_path / "out", "feature-extraction")
    assert sum(type(each).__module__.startswith("bitsandbytes") for each in model.modules()) == 12


def test_layers_that_are_stored_transposed_are_quantized(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_language_model("GPT2LMHeadModel")
    facts = run(QuantizeBitsandbytes(mode="nf4"), source, tmp_path / "out")
    assert facts["left"] == ["lm_head"] and facts["quantized"] == 8
    session, before = (eager.open_session(folder, TASK, 2) for folder in (tmp_path / "out", source))
    assert isinstance(session, eager.EagerGenerator) and isinstance(before, eager.EagerGenerator)
    found, expected = (torch.from_numpy(each.logits(TOKENS, len(TOKENS))) for each in (session, before))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean() > 0.9


def test_what_cannot_be_quantized_is_said(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    narrow = Artifact(Kind.CHECKPOINT, make_language_model(hidden_size=48), "", "")
    experts = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}  # which are no linear layers
    mixed = Artifact(Kind.CHECKPOINT, make_language_model("Qwen3MoeForCausalLM", **experts), "", "")
    for source in (narrow, mixed):
        with pytest.raises(ValueError, match="are linear ones that bitsandbytes, by blocks of 32 x 64, can quantize"):
            QuantizeBitsandbytes(mode="nf4").run(source, Context(TASK, probe()), tmp_path)
    with pytest.raises(ValueError, match=r"put cast-dtype\{dtype=float16\} before"):
        QuantizeBitsandbytes().run(narrow, Context(TASK, probe()), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="nothing was quantized"):
        QuantizeBitsandbytes().ensures(tmp_path)
