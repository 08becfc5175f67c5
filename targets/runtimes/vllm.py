"""Language models served by vLLM, in this process: what `vllm serve` would run behind its HTTP interface.

Prompts are answered together. What was asked before is computed again: a cache of prefixes would help a measurement.
Found of versions 0.24 and 0.32, and relied on here: in each step vLLM computes the logits of what comes next, and then
those of the prompt, where their probabilities were asked for.
Source: https://docs.vllm.ai
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams

from optimize.passes.serve_vllm import FACTS, SERVE
from optimize.pipeline.contract import Array, Placement
from optimize.pipeline.errors import HostError
from optimize.pipeline.sessions import Generation
from optimize.targets.runtimes.replicas import Replicas

FREE = 0.5  # of the GPU's memory that is free: what vLLM has to find where it starts; its cache has a size of its own
GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


class VllmSession:
    """A model in vLLM's engine."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, llm: Any) -> None:
        self._llm, self._numbers = llm, itertools.count()
        llm.apply_model(watch_logits)

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence of [sequence]: [keep, vocabulary]."""
        self._llm.apply_model(begin_logits)
        self._answer([tokens], SamplingParams(max_tokens=1, prompt_logprobs=1, **GREEDY))
        next_token, *prompt = next(found for found in self._llm.apply_model(take_logits) if found)
        if len(prompt) > 1:
            raise RuntimeError(f"vLLM computed a text of {len(tokens)} tokens in pieces: give it more tokens at once")
        rows = np.concatenate([*prompt, next_token])
        rows = np.concatenate([rows[: len(tokens) - 1], next_token])  # some give the prompt's last position twice
        if len(rows) != len(tokens):
            raise RuntimeError(f"vLLM computed logits of {len(rows)} positions of {len(tokens)}")
        return np.asarray(rows[-keep:], dtype=np.float32)

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        """`new` tokens after each prompt, int64 of [sequence], all at once."""
        rows, seconds = self._answer(prompts, SamplingParams(max_tokens=new, **GREEDY))
        if any(len(row) != new for row in rows):
            raise RuntimeError(f"vLLM generated {min(map(len, rows))} tokens of {new}")
        return Generation(np.array(rows, dtype=np.int64), tuple(seconds))

    def _answer(self, prompts: Sequence[Array], asked: SamplingParams) -> tuple[list[list[int]], list[float]]:
        """Each prompt's tokens, and the seconds until all had their first, second, ... one."""
        start = time.perf_counter()
        engine = self._llm.llm_engine
        rows = {str(next(self._numbers)): list[int]() for _ in prompts}
        for name, prompt in zip(rows, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt.tolist()}, asked)
        seconds: list[float] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                rows[output.request_id] = list(output.outputs[0].token_ids)
            now = time.perf_counter() - start
            seconds += [now] * (min(map(len, rows.values())) - len(seconds))
        return list(rows.values()), seconds


def watch_logits(model: Any) -> None:
    """Have a model of vLLM's remember the logits that it computes, from `begin_logits` to `take_logits`.

    The three run where the model is: they are sent there where that is another process.
    """
    compute = model.compute_logits

    def watched(*arguments: Any, **options: Any) -> Any:
        logits = compute(*arguments, **options)
        if model.optimize_logits is not None and logits is not None:
            model.optimize_logits.append(logits.float().cpu().numpy())
        return logits

    model.optimize_logits = None
    model.compute_logits = watched


def begin_logits(model: Any) -> None:
    """See `watch_logits`."""
    model.optimize_logits = []


def take_logits(model: Any) -> list[Array]:
    """What was computed since: arrays of [positions, vocabulary]; nothing where another GPU has them."""
    found, model.optimize_logits = model.optimize_logits, None
    return found or []


def open_session(path: Path, task: str, cores: int) -> VllmSession | Replicas:
    """Raises HostError where vLLM finds nothing to run on."""
    settings = json.loads((path / SERVE).read_text())
    place = Placement(settings.get("tensor-parallel-size", 1), settings.get("data-parallel-size", 1))
    if place.replicas == 1:
        return open_one(path, cores)
    return Replicas(partial(open_one, path, max(cores // place.replicas, 1)), place)


def open_one(path: Path, cores: int) -> VllmSession:
    """One copy of the model."""
    path = path.absolute()
    os.chdir(tempfile.gettempdir())
    os.environ["VLLM_RPC_BASE_PATH"] = "."  # of sockets, whose whole path may have no more than 107 characters
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else its engine is a process that pausing ours does not pause
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of the functions that we send to its processes, no others
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # by the one token behind a prompt that is scored: see `logits`
    facts, settings = (json.loads((path / name).read_text()) for name in (FACTS, SERVE))
    settings.pop("data-parallel-size", None)
    options = {name.replace("-", "_"): value for name, value in settings.items()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = FREE * free / total
    else:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(max(cores // options.get("tensor_parallel_size", 1), 1))
    try:
        llm = LLM(
            model=str(path), skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
            max_model_len=facts["limits"]["sequence"] + 1, max_num_seqs=facts["limits"]["batch"],
            kv_cache_memory_bytes=facts["cache_bytes"], **options,
        )  # fmt: skip
    except RuntimeError as error:
        if "Failed to infer device type" in str(error):
            raise HostError("vLLM finds no GPU here, and is not its build for processors") from error
        raise
    return VllmSession(llm)
