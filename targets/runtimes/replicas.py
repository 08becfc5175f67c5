"""Copies of one language model, each in a process of its own with GPUs of its own: prompts are divided among them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from optimize.pipeline.contract import Array, Placement
from optimize.pipeline.sessions import Generation

Open = Callable[[], Any]  # a session; must be importable, since it is called in another process


class Replicas:
    """A session over several. Their processes end with this one."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, opened: Open, placement: Placement) -> None:
        spawn = multiprocessing.get_context("spawn")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(placement.gpus)))).split(",")
        self._copies: list[Connection] = []
        for index in range(placement.replicas):
            own = ",".join(visible[index * placement.shards : (index + 1) * placement.shards])
            ours, theirs = spawn.Pipe()
            spawn.Process(target=_serve, args=(theirs, own, opened)).start()
            theirs.close()
            self._copies.append(ours)
        for each in self._copies:
            _answer(each)

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence of [sequence]: [keep, vocabulary]. They are the same copies."""
        self._copies[0].send(("logits", (tokens, keep)))
        found: Array = _answer(self._copies[0])[1]
        return found

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        """`new` tokens after each prompt, int64 of [sequence], as many prompts by each copy."""
        count = min(len(self._copies), len(prompts))
        start = time.perf_counter()
        for index, each in enumerate(self._copies[:count]):
            each.send(("generate", (prompts[index::count], new)))
        found: list[tuple[float, Generation]] = [_answer(each) for each in self._copies[:count]]
        tokens = np.empty((len(prompts), new), dtype=np.int64)
        for index, (_, made) in enumerate(found):
            tokens[index::count] = made.tokens
        until = [[begun - start + seconds for seconds in made.seconds] for begun, made in found]
        return Generation(tokens, tuple(max(each) for each in zip(*until, strict=True)))


def _serve(asked: Connection, devices: str, opened: Open) -> None:
    """Open a copy on some GPUs, and answer with when that was begun (of a clock that all processes share) and what was
    found, until whoever asks is gone.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        session = opened()
        asked.send((0.0, None))
        while True:
            name, arguments = asked.recv()
            begun = time.perf_counter()
            asked.send((begun, getattr(session, name)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        asked.send(error)
        raise


def _answer(copy: Connection) -> Any:
    """What a copy says. Raises what went wrong there, and RuntimeError where it died."""
    try:
        found = copy.recv()
    except EOFError:
        raise RuntimeError("a replica died: the log says more") from None
    if isinstance(found, Exception):
        raise found
    return found
