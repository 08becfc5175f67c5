"""Ollama: left out where it is not, and otherwise asked over HTTP. Here a stand-in answers (see ollama_double.py)."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

import optimize
from optimize.models.language import encode_prompts, encode_windows
from optimize.models.pieces import Pieces
from optimize.passes import _ollama
from optimize.passes.convert_gguf import ConvertGguf
from optimize.passes.create_ollama import CreateOllama
from optimize.pipeline import judging
from optimize.pipeline.batches import FIRST, NEW, UNTIMED, load_batches, save_batches
from optimize.pipeline.calls import call_of
from optimize.pipeline.contract import Artifact, Cell, Context, Gates, Kind
from optimize.pipeline.errors import RequestError
from optimize.pipeline.resident import _peak_of, peak_memory
from optimize.pipeline.tokens import compare_tokens, why_tokens_rejected
from optimize.pipeline.worker import Worker
from optimize.targets.cpu import probe
from optimize.targets.runtimes import llamacpp
from optimize.targets.runtimes.eager import open_session as open_eager
from optimize.targets.runtimes.ollama import OllamaSession
from tests.conftest import QUICK, Cli, MakeCheckpoint, language_tokenizer, run_optimize

DOUBLE = Path(__file__).parent / "ollama_double.py"
LEFT_OUT = "left out: ollama-q8_0: create-ollama: ollama is not on this host (not run here): the GGUF is emitted"


@pytest.fixture(scope="module")
def language_model(make_language_model: MakeCheckpoint) -> Path:
    """One that writes whole characters, as trained ones do."""
    folder, tokenizer = make_language_model("LlamaForCausalLM"), language_tokenizer()
    weights = load_file(folder / "model.safetensors")
    texts = [tokenizer.decode([token]) for token in range(512)]
    whole = [text != "" and "\ufffd" not in text and text.strip("<|>") == text for text in texts]
    weights["lm_head.weight"][~np.array(whole)] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """$PATH with a stand-in for ollama on it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "ollama").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{DOUBLE}" "$@"\n')
    (folder / "ollama").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def gguf(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("gguf")
    source = Artifact(Kind.CHECKPOINT, language_model, "", "")
    ConvertGguf("f32").run(source, Context("text-generation", probe()), out)
    return Artifact(Kind.GGUF, out, "", "")


@pytest.fixture(scope="module")
def reference(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the eager model writes."""
    return written(open_eager(language_model, "text-generation", 2), tmp_path_factory.mktemp("reference"))[0]


@pytest.fixture
def with_ollama(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", path)


@pytest.fixture
def session(with_ollama: None, gguf: Artifact, language_model: Path) -> Iterator[OllamaSession]:
    found = OllamaSession(gguf.path, 2, language_model)
    yield found
    found.close()


def prompts(folder: Path) -> Path:
    """Two batches: one prompt, and two whose lengths differ."""
    text = language_tokenizer()("The harbour was quiet, and rain fell on the old stones.")["input_ids"]
    batches = []
    for lengths in ((9,), (5, 12)):
        rows = [[0] * (12 - length) + text[:length] for length in lengths]
        mask = [[0] * (12 - length) + [1] * length for length in lengths]
        batches.append({"input_ids": np.array(rows), "attention_mask": np.array(mask), NEW: np.array(6)})
    save_batches(folder / "prompts.npz", [*batches[:1], batches[1] | {UNTIMED: np.array(True)}])
    return folder / "prompts.npz"


def written(session: Any, folder: Path) -> tuple[list[Any], Worker]:
    worker = Worker()
    worker._session = session
    answer = worker.write_on(str(prompts(folder)), str(folder / "out.npz"))
    assert answer == {"problems": [], "repeat_error": 0.0}
    return load_batches(folder / "out.npz"), worker


def test_without_ollama_the_recipe_is_left_out(language_model: Path, cli: Cli) -> None:
    planned = cli(language_model, "--dry-run", env={"PATH": "/nonexistent"})
    assert planned.code == 0, planned.output
    assert LEFT_OUT in planned.output
    assert "gguf-q8_0" in planned.output


def test_a_model_in_ollama_is_judged_by_tokens_emitted_and_verified(
    language_model: Path, some_text: Path, path: str, shared_cache: Path, tmp_path: Path
) -> None:
    out, env = tmp_path / "out", {"PATH": path}
    made = run_optimize(
        tmp_path, shared_cache, language_model, "--recipe", "ollama-q8_0", "--data", some_text, *QUICK[2:],
        "--workload", "1x8+3,2x16+3", "--max-drop", "0.9", "--out", out, env=env,
    )  # fmt: skip
    assert made.code == 0, made.output
    assert made.report is not None
    (candidate,) = made.report["candidates"]
    assert candidate["accuracy"]["judged_by"] == "tokens"
    assert candidate["accuracy"]["logprob_error"] < 0.1
    assert "perplexity" not in candidate["accuracy"]
    assert candidate["steps"][-1]["facts"]["parameters"] == 'stop "<|im_end|>"'
    assert "judged by tokens" in (out / "README.md").read_text()
    assert sorted(each.name for each in out.iterdir() if "ollama" in each.name or each.suffix == ".gguf") == [
        "model.gguf"
    ]
    with pytest.raises(RequestError, match="no logits"):
        optimize.load(out)
    verified = run_optimize(tmp_path, shared_cache, "verify", out, "--budget", "1s", "--max-load", "1", env=env)
    assert verified.code == 0, verified.output
    assert "judged by tokens" in verified.output
    command = [sys.executable, "-m", "optimize.pipeline.cli", "serve", str(out), "--port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env, start_new_session=True)
    assert serving.stdout is not None
    address = serving.stdout.readline().split("/v1 ")[0]
    assert json.loads(urllib.request.urlopen(f"{address}/api/version").read()) == {"version": "0.0.1-double"}
    (server,) = servers(serving.pid)
    serving.kill()
    serving.communicate()
    assert psutil.wait_procs([server], timeout=10)[1] == []


def test_it_writes_what_llama_cpp_writes(
    session: OllamaSession, gguf: Artifact, language_model: Path, reference: list[Any], tmp_path: Path
) -> None:
    found, worker = written(session, tmp_path)
    own = llamacpp.open_session(gguf.path, "text-generation", 2)
    expected, _ = written(own, tmp_path)
    assert [each["tokens"].tolist() for each in found] == [each["tokens"].tolist() for each in expected]
    assert worker.spell(str(language_model)) == []
    accuracy = compare_tokens([], [], reference, found)
    assert (accuracy.agreement, accuracy.drop.high, accuracy.examples, accuracy.positions) == (1, 0, 3, 18)
    assert accuracy.logprob_error is not None and accuracy.logprob_error < 0.01
    made = session.generate([np.arange(10, 18)] * 3, 4)
    assert len(made.seconds) == 4 and list(made.seconds) == sorted(made.seconds)
    assert peak_memory() > _peak_of(os.getpid()) + (10 << 20)  # the server's, which has the model


def test_wrong_answers_are_rejected(
    with_ollama: None, gguf: Artifact, language_model: Path, reference: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DOUBLE_FAULT", "reversed")
    session = OllamaSession(gguf.path, 2, language_model)
    accuracy = compare_tokens([], [], reference, written(session, tmp_path)[0])
    session.close()
    assert "above the gate" in str(why_tokens_rejected(accuracy, Gates(max_drop=0.1)))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refuses", "ollama create refused the folder: Error: unsupported architecture"),
        ("ends", "ollama serve ended with exit code 3"),
        ("silent", "did not answer on 127.0.0.1"),
    ],
)
def test_what_ollama_says_against_a_model_fails_the_pass(
    fault: str, words: str, with_ollama: None, gguf: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_FAULT", fault)
    monkeypatch.setattr(_ollama, "STARTING", 1.0 if fault == "silent" else 60.0)
    with pytest.raises(RuntimeError, match=words):
        CreateOllama().run(gguf, Context("text-generation", probe()), tmp_path / "out")
    assert not servers()


def test_a_server_that_dies_in_the_middle_is_named(
    with_ollama: None, gguf: Artifact, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_FAULT", "dies")
    session = OllamaSession(gguf.path, 2, language_model)
    with pytest.raises(RuntimeError, match="ollama serve ended with exit code 7 during /api/generate"):
        session.generate([np.arange(10, 18)], 4)
    session.close()


def test_no_server_outlives_its_parent(with_ollama: None, gguf: Artifact, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from optimize.passes._ollama import OllamaServer
        server = OllamaServer(Path({str(tmp_path)!r}))
        server.start()
        print("up", flush=True)
        time.sleep(60)
    """)
    for session in (False, True):  # a worker leads a session of its own; a user's Python does not
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=session)
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        (server,) = servers(parent.pid)
        if session:
            os.killpg(parent.pid, signal.SIGSTOP)  # as what is not being timed
        parent.kill()
        parent.communicate(timeout=30)
        assert psutil.wait_procs([server], timeout=10)[1] == []


def test_each_timed_call_finds_a_server_that_reads_something_else(session: OllamaSession, tmp_path: Path) -> None:
    """Else the time to the first token would be that of a prompt which is in its cache."""
    asked: list[str] = []
    stream = session._server.stream

    def note(method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        assert body is not None
        asked.append(body["prompt"])
        return stream(method, path, body)

    worker = Worker()
    worker._cells = [call_of(session, load_batches(prompts(tmp_path))[0])]
    session._server.stream = note  # type: ignore[method-assign]
    worker.time(0, seconds=0, least=3)
    timed = [index for index, text in enumerate(asked) if text == max(asked, key=asked.count)]
    assert len(timed) == 3
    between = [asked[index - 1] for index in timed]
    assert len(set(between)) == 3  # unlike each other too, or they would be in the cache themselves
    assert all(len(session._pieces.tokens_of(text)) > 10 for text in between)


def test_guesses_are_the_likeliest_tokens_of_held_text(
    session: OllamaSession, gguf: Artifact, language_model: Path, some_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(judging, "GUESSES", 12)
    rows = [json.loads(line) for line in some_text.read_text(encoding="utf-8").splitlines()]
    windows = encode_windows(language_model, rows, 64)[:3]
    save_batches(tmp_path / "windows.npz", windows)
    worker = Worker()
    worker._session = session
    worker.guess(str(tmp_path / "windows.npz"), str(tmp_path / "out.npz"))
    own = llamacpp.open_session(gguf.path, "text-generation", 2)
    for window, found in zip(windows, load_batches(tmp_path / "out.npz"), strict=True):
        scored = len(window["input_ids"]) - int(window[FIRST])
        likeliest = own.logits(window["input_ids"][:-1], scored).argmax(axis=-1)
        assert len(found["places"]) == 4
        assert found["tokens"].tolist() == likeliest[found["places"]].tolist()


def test_prompts_that_text_cannot_say_are_known(language_model: Path) -> None:
    pieces = Pieces(language_model)
    ids = language_tokenizer()("The harbour 12 👍")["input_ids"]
    assert pieces.text_of(np.array(ids)) == ("The harbour 12 👍", True)
    assert pieces.text_of(np.array(ids[:-1]))[1] is False  # half of a character
    assert [pieces.tokens_of(piece) for piece in ("👍", " harbour")] == [
        ids[-len(language_tokenizer()("👍")["input_ids"]) :],
        language_tokenizer()(" harbour")["input_ids"],
    ]


def test_prompts_of_the_workload_can_be_said_in_text(language_model: Path, some_text: Path) -> None:
    rows = [json.loads(line) for line in some_text.read_text(encoding="utf-8").splitlines()]
    pieces = Pieces(language_model)
    for batch in encode_prompts(language_model, rows, [Cell(8, 16, 4), Cell(3, 65, 4)]):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert pieces.text_of(ids[mask != 0])[1]


def servers(parent: int | None = None) -> list[psutil.Process]:
    """The stand-in's processes that live under one of ours."""
    family = psutil.Process(parent).children(recursive=True)
    return [each for each in family if str(DOUBLE) in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE]
