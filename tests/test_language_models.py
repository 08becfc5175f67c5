"""Language models end to end: a tiny one is lowered, judged, timed, emitted, loaded, and answers as eager does."""

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from optimize.models.examples import SHIPPED
from optimize.pipeline.batches import NEW, load_batches, save_batches
from optimize.pipeline.contract import Kind
from optimize.pipeline.errors import RequestError
from optimize.pipeline.language import REGRET
from optimize.pipeline.manifest import read_manifest
from optimize.pipeline.questions import ANSWERS
from optimize.pipeline.use import _chat
from optimize.pipeline.worker import Worker
from optimize.targets.runtimes import open_session
from tests.conftest import QUICK, Cli, MakeCheckpoint, Outcome, run_optimize

KINDS = ("convert-openvino", "gguf-q8_0", "genai")
SHORT = ("--workload", "1x8+3,2x16+3", *QUICK[2:])


@pytest.fixture(scope="module")
def language_model(make_language_model: MakeCheckpoint) -> Path:
    return make_language_model("LlamaForCausalLM", max_position_embeddings=8448)


@pytest.fixture(scope="module")
def some_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions with three choices, cut from the shipped text."""
    words = [
        word for line in SHIPPED.read_text(encoding="utf-8").splitlines() for word in json.loads(line)["text"].split()
    ]
    rows = [
        {"question": " ".join(words[start : start + 8]) + " " * (start % 2), "answer": start // 60 % 3,
         "choices": [" ".join(words[start + begin : start + begin + 2 + begin % 3]) for begin in (8, 12, 30)]}
        for start in range(0, 1800, 60)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def emitted(
    language_model: Path, some_text: Path, some_questions: Path, shared_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Outcome]]:  # fmt: skip
    """A folder of each kind, one judged on text of the user's, the other on questions and the shipped text."""
    found = {}
    for recipe, data in zip(KINDS, (some_text, some_questions, some_text), strict=True):
        folder = tmp_path_factory.mktemp("emitted")
        outcome = run_optimize(
            folder, shared_cache, language_model, "--recipe", recipe, "--data", data, *SHORT,
            "--max-drop", "0.05", "--out", folder / "out",
        )  # fmt: skip
        assert outcome.code == 0, outcome.output
        found[recipe] = (folder / "out", outcome)
    return found


@pytest.mark.parametrize("recipe", KINDS)
def test_a_language_model_is_judged_by_perplexity_and_timed_by_phase(
    recipe: str, emitted: dict[str, tuple[Path, Outcome]]
) -> None:
    out, outcome = emitted[recipe]
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    assert abs(candidate["accuracy"]["drop"]["value"]) < 0.01
    assert candidate["accuracy"]["top1"] > 0.9
    assert candidate["accuracy"]["regret"] < 0.01
    assert all(cell["first"] and cell["rest"] for cell in candidate["speed"]["cells"])
    samples = json.loads((out / "evidence" / "samples.json").read_text())[candidate["name"]]
    for block in (block for quad in samples for block in quad):
        for column in range(0, len(block), 3):
            whole, first, rest = map(np.array, block[column : column + 3])
            assert (first > 0).all() and (rest > 0).all() and (whole >= 0.999 * (first + rest)).all()


@pytest.mark.parametrize("recipe", KINDS)
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
    if recipe != "gguf-q8_0":
        assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", KINDS)
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


@pytest.mark.parametrize("recipe", KINDS)
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
    out, _ = emitted["genai"]
    assert cli("run", out, "Hello", "--max-new-tokens", "3").code == 0
    refused = cli("serve", out)
    assert refused.code == 2 and "onnxruntime-genai has no server of its own here" in refused.output


def test_the_server_of_a_gguf_answers_and_ends_when_told(
    emitted: dict[str, tuple[Path, Outcome]], tmp_path: Path
) -> None:
    out, _ = emitted["gguf-q8_0"]
    command = [sys.executable, "-m", "optimize.pipeline.cli", "serve"]
    server = subprocess.Popen(
        [*command, out, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        address = next(line.strip() for line in server.stdout or () if line.startswith("http"))
        asked = json.dumps({"prompt": "The harbour", "max_tokens": 3, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/completions", asked, headers)) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        port = urllib.parse.urlsplit(address).port
        busy = subprocess.run([*command, out, "--port", str(port)], capture_output=True, text=True, timeout=120)
        assert busy.returncode == 2 and f"cannot listen at 127.0.0.1:{port}" in busy.stderr
        server.terminate()
        assert server.wait(60) == 130
    finally:
        server.kill()
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    with (damaged / "model.gguf").open("ab") as file:
        file.write(b"?")
    refused = subprocess.run([*command, damaged, "--port", "0"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "model.gguf is changed" in refused.stderr


def test_run_takes_what_the_model_has_positions_for(emitted: dict[str, tuple[Path, Outcome]], cli: Cli) -> None:
    out, _ = emitted["gguf-q8_0"]
    refused = cli("run", out, "0" * 9000, "--raw")
    assert refused.code == 2 and "and the model 8448 positions" in refused.output
    assert cli("run", out, "0" * 8440, "--raw", "--max-new-tokens", "999999").code == 0


def test_run_says_that_the_template_fails() -> None:
    tokenizer = Mock()
    tokenizer.apply_chat_template.side_effect = TypeError("roles must alternate")
    with pytest.raises(RequestError, match="the chat template fails: TypeError: roles must alternate") as raised:
        _chat(tokenizer, "Hello")
    assert "--raw" in str(raised.value.hint)


@pytest.mark.parametrize("recipe", ["convert-openvino", "gguf-q8_0"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_ids": [[20, 99999]]}, "outside of 0 to 511"),
        ({"input_ids": [[20, -5]]}, "outside of 0 to 511"),
        ({"input_ids": [[20.5, 21.0]]}, "whole numbers"),
        ({"input_ids": [20, 21]}, r"\[batch, sequence\]"),
        ({"input_ids": [[]]}, "whole numbers|empty"),
        ({"input_ids": [[20, 21]], "attention_mask": [[0, 0]]}, "empty"),
        ({"input_ids": [[20, 21]], "attention_mask": [[1, 1, 1]]}, "attention_mask has shape"),
        ({"input_ids": [[20] * 8448]}, "more than the model's limit of 8448"),
        ({"input_ids": [[20] * 9000]}, "longer than the model's limit of 8448"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_ids_that_no_runtime_should_see_are_refused(
    recipe: str, given: dict[str, Any], words: str, emitted: dict[str, tuple[Path, Outcome]]
) -> None:
    import optimize

    model = optimize.load(emitted[recipe][0])
    with pytest.raises(ValueError, match=words):
        model.generate(**given, max_new_tokens=3, use_cache=True)


def test_too_little_text_is_not_blamed_on_the_tokenizer(language_model: Path, tmp_path: Path, cli: Cli) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"a{number}"}) for number in range(20)))
    refused = cli(language_model, "--recipe", "gguf-q8_0", "--data", text, "--out", tmp_path / "out")
    assert refused.code == 2 and "tokens are too few" in refused.output
    assert "tokenizer" not in refused.output and refused.output.count("give more text") == 1


def test_a_gguf_has_a_modelfile_and_is_verified(emitted: dict[str, tuple[Path, Outcome]], cli: Cli) -> None:
    out, _ = emitted["gguf-q8_0"]
    assert "FROM ./model.gguf" in (out / "Modelfile").read_text()
    verified = cli("verify", out, "--budget", "1s")
    assert verified.code == 0, verified.output
    assert "perplexity" in verified.output and "acc_norm" in verified.output


def test_questions_are_judged_beside_the_shipped_text(
    emitted: dict[str, tuple[Path, Outcome]], language_model: Path, some_questions: Path
) -> None:
    out, outcome = emitted["gguf-q8_0"]
    assert outcome.report is not None
    evaluation, accuracy = outcome.report["evaluation"], outcome.report["candidates"][0]["accuracy"]
    assert evaluation["source"].startswith("shipped text") and evaluation["questions"] == str(some_questions)
    assert evaluation["labelling"]["kind"] == "choice"
    acc, norm = accuracy["metrics"]
    rows = [json.loads(line) for line in some_questions.read_text().splitlines()]
    likelihoods = Likelihoods(language_model)
    expected = [likelihoods(row["question"], row["choices"]) for row in rows]
    right = [np.argmax(each) == row["answer"] for each, row in zip(expected, rows, strict=True)]
    lengths = [[len(choice) for choice in row["choices"]] for row in rows]
    by_character = [
        np.argmax(np.array(each) / length) == row["answer"]
        for each, length, row in zip(expected, lengths, rows, strict=True)
    ]
    assert (acc["name"], acc["examples"], acc["reference"]) == ("acc", 30, pytest.approx(np.mean(right)))
    assert (norm["name"], norm["reference"], norm["gates"]) == ("acc_norm", pytest.approx(np.mean(by_character)), False)
    assert 0 < np.mean(right) < 1 and right != by_character
    card = (out / "README.md").read_text()
    assert re.search(r"- acc 0.* on 30 questions of .*questions.jsonl", card) and "examples\n  of shipped text" in card
    assert "acc on 30 labelled questions cannot show a drop below" in outcome.output
    assert "questions.jsonl; perplexity and KL divergence: shipped text" in outcome.output


class Likelihoods:
    """The logarithm of each choice's likelihood behind a question, by transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder)

    def __call__(self, question: str, choices: list[str]) -> list[float]:
        import torch

        before, found = self._tokenizer.encode(question.rstrip()), []
        for choice in choices:
            after = self._tokenizer.encode(question + " " + choice)[len(before) :]
            with torch.inference_mode():
                logs = self._model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            found.append(sum(float(logs[len(before) - 1 + index, token]) for index, token in enumerate(after)))
        return found


@pytest.mark.parametrize("ends_at", [None, 3])
def test_open_questions_are_answered_as_transformers_does(
    ends_at: int | None, language_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(language_model, tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    questions = [f"Rain fell on the old stones for {index} days, and" for index in range(9)]

    def continued(question: str, **options: Any) -> list[int]:
        given = tokenizer(question, return_tensors="pt")["input_ids"]
        written: list[int] = model.generate(given, do_sample=False, max_new_tokens=32, **options)[0].tolist()
        return written[given.shape[1] :]

    ends = [2]
    if ends_at is not None:  # a token that it writes ends its text from now on
        ends.append(continued(questions[0])[ends_at])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    expected = []
    for question in questions:
        tokens = continued(question, eos_token_id=ends)
        kept = tokens[: next((index for index, token in enumerate(tokens) if token in ends), None)]
        expected.append(tokenizer.decode(kept, skip_special_tokens=True).split("\n")[0])
    worker = Worker()
    worker.prepare(
        str(folder), [{"text": "Rain fell. " * 300}], [], [(1, 8, 3)], 256, str(tmp_path), "text-generation",
        questions=[{"query": question} for question in questions],
    )  # fmt: skip
    worker.open("checkpoint", str(folder), "text-generation", 1, str(tmp_path / "cells.npz"), str(folder))
    worker.score(str(tmp_path / "evaluation.npz"), None, str(tmp_path / "out.npz"), str(folder))
    answers = [
        text for each in load_batches(tmp_path / "out.npz") if ANSWERS in each for text in each[ANSWERS].tolist()
    ]
    assert answers == expected and any(expected)
    if ends_at is not None:
        assert len(tokenizer.encode(answers[0])) <= ends_at + 1


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
    assert "openvino-int8-weights " in planned.output and "openvino-bf16 " not in planned.output
    assert "openvino-bf16 " in cli(language_model, "--recipe", "openvino-bf16", *SHORT, "--dry-run").output
    assert planned.code == 0 and "1x8+3" in planned.output and "gguf-q4_1" in planned.output


def test_a_tokenizer_of_its_own_is_refused(language_model: Path, some_text: Path, cli: Cli, tmp_path: Path) -> None:
    folder = shutil.copytree(language_model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}  # which llama.cpp does not do
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = cli(folder, "--data", some_text, "--recipe", "gguf-q8_0", *SHORT, "--out", tmp_path / "out")
    assert outcome.code == 4, outcome.output
    assert "its tokenizer makes" in outcome.output


@pytest.mark.parametrize("recipe", KINDS)
def test_what_the_card_says_runs(recipe: str, emitted: dict[str, tuple[Path, Outcome]]) -> None:
    out, _ = emitted[recipe]
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=True, timeout=60)
    assert len(ran.stdout) > len("The harbour was\n")


def test_openvino_genai_keeps_nothing_of_a_prompt_that_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it does, and the first token of a timed prompt is there in no time."""
    import openvino_genai

    from optimize.targets.runtimes.openvino_generator import OpenvinoGenerator

    opened = Mock(side_effect=[RuntimeError("no paged attention for bf16"), InterruptedError])
    monkeypatch.setattr(openvino_genai, "LLMPipeline", opened)
    with pytest.raises(InterruptedError):
        OpenvinoGenerator(Path("model"), {}).generate([np.array([5, 6])], 2)
    paged, plain = (call.kwargs for call in opened.call_args_list)
    assert not paged["scheduler_config"].enable_prefix_caching
    assert plain == {"ATTENTION_BACKEND": "SDPA"}
