"""A real toolchain: optimum-onnx with transformers 4, beside ours with transformers 5."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from optimize.models.encoding import load_tokenizer
from optimize.pipeline.installing import install
from optimize.pipeline.toolchains import Environment, Toolchains, worker_environment
from tests.conftest import QUICK, Cli, MakeCheckpoint

READ = """
import sys
from pathlib import Path
import numpy, torch, transformers
from optimize.models.translating import readable_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out = map(Path, sys.argv[1:])
translate = transformers.__version__.startswith("4.")
with readable_checkpoint(source) as folder:
    assert (folder != source) == translate
    ids = AutoTokenizer.from_pretrained(folder)("The harbour was quiet; 42 boats.", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
numpy.savez(out, ids=ids.numpy(), logits=logits.numpy())
"""
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 300.0}  # fmt: skip


@pytest.fixture(scope="module")
def environment(shared_cache: Path) -> Environment:
    """optimum-onnx as its lock has it: from the registry, once for all."""
    return install(Toolchains(shared_cache), "optimum-onnx")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("LlamaForCausalLM", {"rope_parameters": SCALING}),
        ("PhiForCausalLM", {"rope_parameters": {
            "rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}}),
        ("Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    ],
    ids=["theta", "scaled", "partial", "by layer"],
)  # fmt: skip
def test_transformers_4_reads_what_5_wrote(
    architecture: str, options: dict[str, object], environment: Environment, make_language_model: MakeCheckpoint,
    tmp_path: Path,
) -> None:  # fmt: skip
    import torch

    from optimize.models.loading import load_model

    folder = make_language_model(architecture, **options)
    assert environment.packages["transformers"].startswith("4.")
    words = [environment.python, "-c", READ, folder, tmp_path / "out.npz"]
    subprocess.run(words, env=worker_environment(environment, tmp_path), check=True)
    found = np.load(tmp_path / "out.npz")
    ids = load_tokenizer(folder)("The harbour was quiet; 42 boats.", return_tensors="pt").input_ids
    np.testing.assert_array_equal(found["ids"], ids.numpy())
    with torch.inference_mode():
        expected = load_model(folder, "text-generation")(ids).logits.numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-3 * np.abs(expected).max())


def test_a_graph_that_optimum_exports_is_judged_and_emitted(
    environment: Environment, tiny: Path, some_text: Path, cli: Cli, tmp_path: Path
) -> None:
    asked = ("--recipe", "optimum-onnx-O3", "--recipe", "optimum-onnx-int8", "--data", some_text, *QUICK)
    outcome = cli(tiny, *asked, "--out", tmp_path / "emitted")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    optimized, quantized = outcome.report["candidates"]
    assert optimized["accuracy"]["worst_drop"] < 1e-5
    assert quantized["steps"][0]["facts"]["nodes"] > optimized["steps"][0]["facts"]["nodes"]  # fused, and not
    facts = outcome.report["host"]["toolchains"]["optimum-onnx"]
    assert facts["digest"] == environment.digest and facts["packages"]["optimum-onnx"] == "0.1.0"
    manifest = json.loads((tmp_path / "emitted" / "optimize.json").read_text())
    assert manifest["kind"] == "onnx"
