"""Greedy generation over a session's `prefill` and `step`, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation


def generate(session: Any, prompts: Sequence[Array], new: int, *, logprobs: bool = False) -> Generation:
    """`new` tokens for each prompt, by the session's own loop where it has one; `logprobs` only of that."""
    if hasattr(session, "generate"):
        found: Generation = session.generate(prompts, new, **({"logprobs": True} if logprobs else {}))
        return found
    return stepwise(session, prompts, new)


def stepwise(session: Any, prompts: Sequence[Array], new: int) -> Generation:
    """The same by `prefill` and `step`."""
    start = time.perf_counter()
    tokens = session.prefill(prompts, new).argmax(axis=-1)
    steps, seconds = [tokens], [time.perf_counter() - start]
    for _ in range(new - 1):
        tokens = session.step(tokens).argmax(axis=-1)
        steps.append(tokens)
        seconds.append(time.perf_counter() - start)
    return Generation(np.stack(steps, axis=1).astype(np.int64), tuple(seconds))


def logits_of(session: Any, prompt: Array, tokens: Array) -> Array:
    """Of the positions before each of `tokens` behind a prompt, or of a clip's transcription: [tokens, vocabulary]."""
    if prompt.ndim > 1:
        found: Array = session.logits(prompt, tokens)
        return found
    found = session.logits(np.concatenate([prompt, tokens[:-1]]), len(tokens))
    return found


def write_until(
    session: Any, prompts: Sequence[Array], new: int, is_over: Callable[[list[int]], bool]
) -> list[list[int]]:
    """What is written behind each prompt until it `is_over`, or `new` tokens long."""
    if not hasattr(session, "prefill"):
        whole = session.generate(prompts, new).tokens.tolist()
        return [next((row[:end] for end in range(1, new) if is_over(row[:end])), row) for row in whole]
    written: list[list[int]] = [[] for _ in prompts]
    over = [False] * len(prompts)
    logits = session.prefill(prompts, new)
    while True:
        tokens = logits.argmax(axis=-1)
        for row, token in enumerate(tokens.tolist()):
            if not over[row]:
                written[row].append(token)
                over[row] = len(written[row]) == new or is_over(written[row])
        if all(over):
            return written
        logits = session.step(tokens)
