"""Language models of TensorRT-LLM: engines, or checkpoints that it serves, run by its LLM interface.

Prompts are answered together; each token's time is when every sequence of the call had it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from optimize.passes._tensorrt_llm import context_logits, open_llm, stream
from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation


class TensorrtLlmSession:
    """A model in the processes of its GPUs."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, path: Path) -> None:
        self._llm = open_llm(path)

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence of [sequence]: [keep, vocabulary]."""
        return np.asarray(context_logits(self._llm, tokens.tolist())[-keep:].numpy(), dtype=np.float32)

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        """`new` tokens after each prompt, int64 of [sequence], all at once."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            rows = list(pool.map(lambda prompt: self._write_on(prompt, new, start), prompts))
        tokens = np.array([row[0] for row in rows], dtype=np.int64)
        return Generation(tokens, tuple(np.array([row[1] for row in rows]).max(axis=0).tolist()))

    def close(self) -> None:
        """End its processes."""
        self._llm.shutdown()

    def _write_on(self, prompt: Array, new: int, start: float) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        seconds: list[float] = []
        for so_far in stream(self._llm, prompt.tolist(), new):
            tokens = list(so_far)
            seconds += [time.perf_counter() - start] * (len(tokens) - len(seconds))
        if len(tokens) != new:
            raise RuntimeError(f"TensorRT-LLM generated {len(tokens)} tokens of {new}")
        return tokens, seconds


def open_session(path: Path, task: str, cores: int) -> TensorrtLlmSession:
    return TensorrtLlmSession(path)
