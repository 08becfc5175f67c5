"""Greedy generation over a session's `prefill` and `step`, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimize.pipeline.contract import Array, Generation


def generate(session: Any, prompts: Sequence[Array], new: int) -> Generation:
    """`new` tokens for each prompt, by the session's own loop where it has one."""
    if hasattr(session, "generate"):
        found: Generation = session.generate(prompts, new)
        return found
    start = time.perf_counter()
    tokens = session.prefill(prompts, new).argmax(axis=-1)
    steps, seconds = [tokens], [time.perf_counter() - start]
    for _ in range(new - 1):
        tokens = session.step(tokens).argmax(axis=-1)
        steps.append(tokens)
        seconds.append(time.perf_counter() - start)
    return Generation(np.stack(steps, axis=1).astype(np.int64), tuple(seconds))
