"""A language model whose layers are shared out over a group of processes: transformers' eager model, in parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from optimize.passes.shard_tensors import FACTS
from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation
from optimize.targets.runtimes.ranks import Ranks


class TensorParallelSession:
    """What each rank is asked, all are asked: each has a part of every layer, and finds all of the answer."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence of [sequence]: [keep, vocabulary]."""
        found: Array = self._ranks.ask("logits", tokens, keep)
        return found

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        """Begin anew: the logits of what comes next, [batch, vocabulary]."""
        found: Array = self._ranks.ask("prefill", prompts, room)
        return found

    def step(self, tokens: Array) -> Array:
        """Append one token to each sequence, [batch]: the logits of what comes next, [batch, vocabulary]."""
        found: Array = self._ranks.ask("step", tokens)
        return found

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        """`new` tokens after each prompt by transformers' own `generate`, timed in the first rank."""
        found: Generation = self._ranks.ask("generate", prompts, new)
        return found


def open_session(path: Path, task: str, cores: int, device: str = "cpu") -> TensorParallelSession:
    """Raises HostError where there are fewer GPUs than ranks, and RuntimeError where one of them does not open."""
    count = json.loads((path / FACTS).read_text())["ranks"]
    return TensorParallelSession(Ranks(count, path.absolute(), task, max(cores // count, 1), device))
