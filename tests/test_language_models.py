"""Language models end to end: a tiny one is lowered, judged, timed, emitted, loaded, and answers as eager does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.pipeline.batches import NEW, load_batches, save_batches
from optimize.pipeline.contract import Kind
from optimize.pipeline.language import REGRET
from optimize.pipeline.manifest import read_manifest
from optimize.pipeline.worker import Worker
from optimize.targets.runtimes import open_session
from tests.conftest import QUICK, Cli, MakeCheckpoint, Outcome, run_optimize

RECIPES = ("convert-openvino", "gguf-q8_0", "gguf-bf16")
SHORT = ("--workload", "1x8+3,2x16+3", *QUICK[2:])


@pytest.fixture(scope="module")
def language_model(make_language_model: MakeCheckpoint) -> Path:
    return make_language_model("LlamaForCausalLM", max_position_embeddings=8448)


@pytest.fixture(scope="module")
def emitted(
    language_model: Path, some_text: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Outcome]]:
    """A folder of each kind, by what `--objective` makes of one set of recipes."""
    found = {}
    for recipe in ("convert-openvino", "gguf-q8_0"):
        folder = tmp_path_factory.mktemp("emitted")
        outcome = run_optimize(
            folder, shared_cache, language_model, "--recipe", recipe, "--data", some_text, *SHORT,
            "--max-drop", "0.05", "--out", folder / "out",
        )  # fmt: skip
        assert outcome.code == 0, outcome.output
        found[recipe] = (folder / "out", outcome)
    return found


@pytest.mark.parametrize("recipe", ["convert-openvino", "gguf-q8_0"])
def test_a_language_model_is_judged_by_perplexity_and_timed_by_phase(
    recipe: str, emitted: dict[str, tuple[Path, Outcome]]
) -> None:
    out, outcome = emitted[recipe]
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    assert abs(candidate["accuracy"]["drop"]["value"]) < 0.01
    assert candidate["accuracy"]["top1"] > 0.9
    assert candidate["accuracy"]["regret"] < 0.01
    for cell in candidate["speed"]["cells"]:
        whole = cell["first"]["seconds"] + cell["rest"]["seconds"]
        assert whole == pytest.approx(cell["seconds"], rel=0.5)
    assert (out / "optimize.json").is_file()


@pytest.mark.parametrize("recipe", ["convert-openvino", "gguf-q8_0"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 4}, {"num_beams": 2}], ids=str)
def test_generate_is_transformers_own(
    recipe: str, options: dict[str, Any], emitted: dict[str, tuple[Path, Outcome]], language_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    import optimize

    out, _ = emitted[recipe]
    tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left")
    inputs = tokenizer(["The harbour", "Rain fell on the old stones for days"], return_tensors="pt", padding=True)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"max_new_tokens": 6} | options
    set_seed(0)
    found = optimize.load(out).generate(**given)
    set_seed(0)
    expected = AutoModelForCausalLM.from_pretrained(language_model).generate(**given)
    assert found.shape == expected.shape
    if recipe == "convert-openvino":
        assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", ["convert-openvino", "gguf-q8_0"])
def test_padding_on_either_side_changes_nothing(recipe: str, emitted: dict[str, tuple[Path, Outcome]]) -> None:
    import optimize

    model = optimize.load(emitted[recipe][0])
    prompts = [list(range(20, 27)), list(range(40, 52)), list(range(60, 63))]
    alone = [model.generate([prompt], max_new_tokens=5)[0, -5:].tolist() for prompt in prompts]
    left, right = 1, 4  # of the longest prompt; the others have more on the left, on the right, or on both sides
    ids, mask = np.zeros((2, 3, 12 + left + right), dtype=np.int64)
    for row, (prompt, start) in enumerate(zip(prompts, (10, left, 7), strict=True)):
        ids[row, start : start + len(prompt)], mask[row, start : start + len(prompt)] = prompt, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5)[:, -5:].tolist()
    assert together == alone and len(set(map(tuple, alone))) == 3


@pytest.mark.parametrize("recipe", ["convert-openvino", "gguf-q8_0"])
@pytest.mark.parametrize("length", [2048, 8192])
def test_long_prompts(recipe: str, length: int, emitted: dict[str, tuple[Path, Outcome]], language_model: Path) -> None:
    out, _ = emitted[recipe]
    manifest = read_manifest(out)
    session: Any = open_session(manifest.kind, out, "text-generation", 2)
    reference: Any = open_session(Kind.CHECKPOINT, language_model, "text-generation", 2)
    long = np.random.default_rng(length).integers(5, 500, length)
    prompts, written = [long, long[:7]], np.array([31, 37])
    for each in ("prefill", "step"):
        found, expected = (
            side.prefill(prompts, 8) if each == "prefill" else side.step(written) for side in (session, reference)
        )
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max(), each


def test_run_prints_what_comes_and_serve_says_what_has_no_server(
    emitted: dict[str, tuple[Path, Outcome]], cli: Cli
) -> None:
    out, _ = emitted["convert-openvino"]
    assert cli("run", out, "Hello", "--max-new-tokens", "3").code == 0
    refused = cli("serve", out)
    assert refused.code == 2 and "has no server of its own here" in refused.output


def test_a_gguf_has_a_modelfile_and_is_verified(emitted: dict[str, tuple[Path, Outcome]], cli: Cli) -> None:
    out, _ = emitted["gguf-q8_0"]
    assert "FROM ./model.gguf" in (out / "Modelfile").read_text()
    verified = cli("verify", out, "--budget", "1s")
    assert verified.code == 0, verified.output
    assert "perplexity" in verified.output


class Forgetful:
    """Scores as a model that prefers to repeat what came before, but forgets it after the first step."""

    inputs = ("input_ids",)

    def __init__(self, *, forgets: bool) -> None:
        self._forgets, self._last = forgets, np.zeros(0, dtype=np.int64)

    def logits(self, tokens: np.ndarray, keep: int) -> np.ndarray:
        return 5 * np.eye(16, dtype=np.float32)[(tokens[-keep:] + 1) % 16]

    def prefill(self, prompts: list[np.ndarray], room: int) -> np.ndarray:
        return np.stack([self.logits(prompt, 1)[0] for prompt in prompts])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.logits(np.zeros_like(tokens) if self._forgets else tokens, len(tokens))


@pytest.mark.parametrize("forgets", [False, True])
def test_steps_that_forget_are_seen(forgets: bool, tmp_path: Path) -> None:
    prompts = {"input_ids": np.array([[1, 2, 3], [7, 8, 9]]), "attention_mask": np.ones((2, 3)), NEW: np.array(6)}
    save_batches(tmp_path / "prompts.npz", [prompts])
    worker = Worker()
    worker._session = Forgetful(forgets=forgets)
    assert worker.write_on(str(tmp_path / "prompts.npz"), str(tmp_path / "out.npz"))["problems"] == []
    regret = np.mean([each[REGRET].mean() for each in load_batches(tmp_path / "out.npz")])
    assert bool(regret > 1) is forgets


def test_a_workload_of_the_wrong_kind_is_refused(language_model: Path, tiny: Path, cli: Cli) -> None:
    assert "is not BATCHxPROMPT+NEW" in cli(language_model, "--workload", "1x8", "--dry-run").output
    assert "is not BATCHxTOKENS" in cli(tiny, "--workload", "1x8+3", "--dry-run").output
    planned = cli(language_model, "--workload", "1x8+3", "--dry-run")
    assert planned.code == 0 and "1x8+3" in planned.output and "gguf-q4_1" in planned.output


def test_a_tokenizer_of_its_own_is_refused(language_model: Path, cli: Cli, tmp_path: Path) -> None:
    folder = shutil.copytree(language_model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}  # which llama.cpp does not do
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = cli(folder, "--recipe", "gguf-q8_0", *SHORT, "--out", tmp_path / "out")
    assert outcome.code == 4, outcome.output
    assert "its tokenizer makes" in outcome.output
