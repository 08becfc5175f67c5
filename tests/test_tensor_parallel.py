"""A model in parts, in processes that compute it together: here two on a processor, as GPUs would be."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from optimize.models.checkpoint import resolve
from optimize.passes.shard_tensors import ShardTensors
from optimize.pipeline.batches import NEW, save_batches
from optimize.pipeline.contract import Artifact, Context, Kind, Target
from optimize.pipeline.errors import RequestError, WorkerError
from optimize.pipeline.recipe import parse
from optimize.pipeline.workers import WorkerProcess
from optimize.targets import cpu, multi_gpu
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.generating import generate
from optimize.targets.runtimes.ranks import who_died
from tests.conftest import QUICK_TEXT, Cli, MakeCheckpoint

TASK = "text-generation"
PROMPTS = [np.arange(3, 3 + length) for length in (4, 9, 6)]
H100S = Target("multi-gpu", "H100", "9.0", (), ("float32", "bfloat16"), 16, 1 << 40, 2, 80 << 30, "580.1", "NVLink")


@pytest.fixture(scope="module")
def model(make_language_model: MakeCheckpoint) -> Path:
    return make_language_model()


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What shard-tensors makes of it, for two ranks."""
    out = tmp_path_factory.mktemp("sharded")
    ShardTensors().run(Artifact(Kind.CHECKPOINT, model, "", ""), Context(TASK, cpu.probe()), out)
    ShardTensors().ensures(out)
    return out


def started_by(pid: int) -> list[psutil.Process]:
    """The ranks among what a process started."""
    alive = (each for each in psutil.Process(pid).children() if each.status() != psutil.STATUS_ZOMBIE)
    return [each for each in alive if "optimize.targets.runtimes.rank" in each.cmdline()]


def test_ranks_answer_as_one_process_does_and_one_that_hangs_is_named(
    model: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: Any = open_session(Kind.CHECKPOINT, model, TASK, 1)
    two: Any = open_session(Kind.TENSOR_PARALLEL, sharded, TASK, 2)
    processes = started_by(os.getpid())
    assert len(processes) == 2
    np.testing.assert_allclose(two.logits(PROMPTS[1], 3), one.logits(PROMPTS[1], 3), atol=1e-4)
    found, expected = generate(two, PROMPTS, 6), generate(one, PROMPTS, 6)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(found.seconds) == 6 and list(found.seconds) == sorted(found.seconds) and found.seconds[0] > 0
    np.testing.assert_allclose(two.prefill(PROMPTS, 2), one.prefill(PROMPTS, 2), atol=1e-4)
    tokens = found.tokens[:, 0]
    np.testing.assert_allclose(two.step(tokens), one.step(tokens), atol=1e-4)
    processes[1].suspend()
    monkeypatch.setattr(two._ranks, "_limit", 1.0)
    with pytest.raises(RuntimeError, match="generate took longer than its limit of 1 s") as failed:
        two.generate(PROMPTS, 6)
    said = str(failed.value)
    assert f"rank 1 of 2 (process {processes[1].pid}) is stopped" in said
    assert f"rank 0 of 2 (process {processes[0].pid}) waits for others in " in said
    assert not any(each.is_running() for each in processes)
    with pytest.raises(RuntimeError, match="its processes have ended: generate took longer"):
        two.logits(PROMPTS[0], 1)


def opening(sharded: Path, folder: Path) -> dict[str, Any]:
    """What a worker is asked, to open it with one cell of three prompts."""
    ids = np.stack([np.arange(3, 11)] * 3)
    cell = {"input_ids": ids, "attention_mask": np.ones_like(ids), NEW: np.array(4)}
    save_batches(folder / "cells.npz", [cell])
    return {"kind": Kind.TENSOR_PARALLEL, "path": str(sharded), "task": TASK, "cores": 2,
            "cells": str(folder / "cells.npz"), "tokenizer": str(sharded)}  # fmt: skip


def test_ranks_pause_with_their_worker_and_one_that_dies_is_named(sharded: Path, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "worker.log") as worker:
        worker.ask("open", limit=120, **opening(sharded, tmp_path))
        processes = started_by(worker.pid)
        worker.pause()
        deadline = time.monotonic() + 10
        while any(each.status() != psutil.STATUS_STOPPED for each in processes):
            assert time.monotonic() < deadline
        worker.resume()
        assert len(worker.ask("time", limit=60, cell=0, seconds=0.0, least=1)) == 3
        processes[1].kill()
        named = rf"rank 1 of 2 \(process {processes[1].pid}\) was killed by SIGKILL .* during generate"
        with pytest.raises(WorkerError, match=named):
            worker.ask("time", limit=60, cell=0, seconds=0.0, least=1)
        assert started_by(worker.pid) == [] and worker.alive


def test_the_rank_that_was_killed_is_named_and_not_those_that_failed_after_it() -> None:
    assert who_died({0: 1, 1: -9}, closed=1) == who_died({0: 1, 1: -9}, closed=0) == who_died({1: -9}, None) == 1
    assert who_died({0: 1, 1: 3}, closed=1) == 1
    assert who_died({0: 1}, closed=None) is who_died({0: 1}, closed=1) is None


def test_ranks_die_with_their_worker(sharded: Path, tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "worker.log") as worker:
        arguments = opening(sharded, tmp_path)

        def ask() -> None:
            with suppress(WorkerError):  # it is killed meanwhile
                worker.ask("open", limit=120, **arguments)

        asked = threading.Thread(target=ask)
        asked.start()
        deadline = time.monotonic() + 60
        while len(processes := started_by(worker.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(worker.pid, signal.SIGKILL)
        asked.join()
        assert not psutil.wait_procs(processes, timeout=10)[1]


def test_it_is_judged_and_timed_against_one_process(model: Path, some_text: Path, cli: Cli, tmp_path: Path) -> None:
    asked = (*QUICK_TEXT, "--workload", "3x16+4", "--min-speedup", "50")
    outcome = cli(model, "--recipe", "shard-tensors", "--data", some_text, *asked, "--out", tmp_path / "out")
    assert outcome.code == 5, outcome.output
    assert outcome.report is not None
    (found,) = outcome.report["candidates"]
    assert found["kind"] == "tensor-parallel" and found["accuracy"]["divergence"] < 1e-6
    assert found["accuracy"]["agreement"] == 1 and found["accuracy"]["regret"] < 1e-3
    assert found["speed"]["cells"][0]["first"]["seconds"] < found["speed"]["cells"][0]["seconds"]


def test_what_has_no_equal_parts_is_left_out_in_words(model: Path, make_language_model: MakeCheckpoint) -> None:
    checkpoint, host = resolve(str(model)), cpu.probe()
    assert ShardTensors().requires(checkpoint, host) is None and ShardTensors().requires(checkpoint, H100S) is None
    assert ShardTensors(3).requires(checkpoint, host) == "its 4 attention heads do not divide by 3"
    assert ShardTensors(4).requires(checkpoint, host) == "its 2 heads of keys and values do not divide by 4"
    assert ShardTensors(4).requires(checkpoint, H100S) == "it is for 4 GPUs, and here are 2"
    assert "language models" in str(ShardTensors().requires(replace(checkpoint, task="fill-mask"), host))
    gpt2 = resolve(str(make_language_model("GPT2LMHeadModel")))
    assert ShardTensors().requires(gpt2, host) == "transformers has no tensor parallel plan for GPT2LMHeadModel"
    with pytest.raises(RequestError, match="is not at least 2"):
        parse("shard-tensors{gpus=1}")
    offered = {each.name: each for each in multi_gpu.recipes(checkpoint, replace(H100S, gpus=4))}
    assert offered["eager-bf16-tp2"].default and offered["eager-bf16-tp4"].placement.shards == 4
    assert not {each.produces for each in cpu.recipes(checkpoint, host)} & {Kind.TENSOR_PARALLEL}


def test_quantized_weights_are_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="torchao quantized are not shared out"):
        ShardTensors().run(Artifact(Kind.CHECKPOINT, tmp_path, "", ""), Context(TASK, cpu.probe()), tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="here are no two GPUs")
def test_two_gpus_answer_as_one_does(model: Path, sharded: Path, some_text: Path, cli: Cli, tmp_path: Path) -> None:
    one: Any = open_session(Kind.CHECKPOINT, model, TASK, 1, device="cuda")
    two: Any = open_session(Kind.TENSOR_PARALLEL, sharded, TASK, 2, device="cuda")
    np.testing.assert_allclose(two.logits(PROMPTS[1], 3), one.logits(PROMPTS[1], 3), atol=1e-3)
    np.testing.assert_array_equal(generate(two, PROMPTS, 6).tokens, generate(one, PROMPTS, 6).tokens)
    started_by(os.getpid())[1].kill()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 .* was killed by SIGKILL"):
        two.generate(PROMPTS, 6)
    asked = ("--target", "multi-gpu", "--recipe", "eager-bf16-tp2", "--data", some_text, *QUICK_TEXT)
    outcome = cli(model, *asked, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.output
