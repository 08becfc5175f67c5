"""GGUF with a Modelfile, run by Ollama through its HTTP API in a private server: text goes in, and comes out as it is
written. No logits.

Source: https://docs.ollama.com/api (generate, streaming)
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.pieces import Pieces
from optimize.passes._ollama import NAME, OllamaServer
from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation
from optimize.pipeline.tokens import UNTOLD

GENERATE = "/api/generate"
MOST = 32  # requests that are answered at once: each has a context of its own. More of them wait
ROUND = 256  # contexts are made that much longer at a time, since each length loads the model anew
FILLER = 16  # words of an unwanted prompt: of ten, the first token that all share would make it a known one
# the likeliest token always, whatever the Modelfile says, and no end but the model's own
GREEDY = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0,
          "repeat_last_n": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 0, "stop": [],
          "num_gpu": 0}  # fmt: skip


@dataclass
class Written:
    """What was generated after one prompt so far."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # from the call until each was known
    logprobs: list[float] = field(default_factory=list)

    def append(self, tokens: Sequence[int], seconds: float, logprob: float) -> None:
        self.tokens += tokens
        self.seconds += [seconds] * len(tokens)
        self.logprobs += [logprob if len(tokens) == 1 else np.nan] * len(tokens)


class OllamaSession:
    """A server with the model in it, which begins anew where a call has more prompts than it answers at once."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, path: Path, cores: int, tokenizer: Path) -> None:
        self._pieces, self._cores, self._context = Pieces(tokenizer), cores, ROUND
        self.ends = self._pieces.ends  # tokens that end a text: the server does not tell which it was
        self.miscounted: list[str] = []  # prompts of which it makes another number of tokens than the tokenizer
        self._texts: dict[bytes, tuple[str, bool]] = {}
        self._fillers = map(random.Random, itertools.count())
        self._folder = tempfile.TemporaryDirectory(prefix="ollama-")
        self._server = OllamaServer(Path(self._folder.name))
        self._server.start()
        self._server.create(path)

    def generate(self, prompts: Sequence[Array], new: int, *, logprobs: bool = False) -> Generation:
        """`new` tokens after each prompt, int64 of [sequence], all at once; what ends a text is a token like others.

        Raises RuntimeError when the server ends, answers with an error, or writes nothing.
        """
        self._make_room(len(prompts), max(map(len, prompts)) + new)
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            rows = list(pool.map(lambda prompt: self._write_on(prompt, new, start, logprobs), prompts))
        known = np.array([row.seconds[:new] for row in rows]).max(axis=0)
        told = np.array([row.logprobs[:new] for row in rows], dtype=np.float32) if logprobs else None
        return Generation(np.array([row.tokens[:new] for row in rows], dtype=np.int64), tuple(known.tolist()), told)

    def says(self, prompt: Array) -> bool:
        """Whether a prompt can be sent: its text has the same tokens again."""
        return self._text_of(prompt)[1]

    def forget(self) -> None:
        """Have it read something else in every context: it goes on from what it has read, where a prompt begins so."""
        for _ in range(self._server.parallel):
            figures = next(self._fillers)
            prompt = " ".join(str(figures.randrange(10)) for _ in range(FILLER))
            self._server.last(GENERATE, self._request(prompt, 1))

    def close(self) -> None:
        """End the server."""
        self._server.close()
        self._folder.cleanup()

    def _make_room(self, prompts: int, tokens: int) -> None:
        self._context = max(self._context, -(-(tokens + 1) // ROUND) * ROUND)
        if min(prompts, MOST) > self._server.parallel:
            self._server.close()
            self._server.parallel = min(prompts, MOST)
            self._server.start()

    def _write_on(self, prompt: Array, new: int, start: float, logprobs: bool) -> Written:
        text, exact = self._text_of(prompt)
        written, done = Written(), dict[str, Any]()
        while (before := len(written.tokens)) < new:
            for done in self._server.stream("POST", GENERATE, self._request(text, new - before, logprobs)):
                seconds, piece = time.perf_counter() - start, done.get("response", "")
                if piece:
                    told = done.get("logprobs") or [{}]
                    logprob = told[0].get("logprob", np.nan) if len(told) == 1 else np.nan
                    written.append(self._pieces.tokens_of(piece), seconds, logprob)
                    text += piece
            if done.get("done") and before == 0 and exact:
                self._count(done.get("prompt_eval_count"), prompt)
            if done.get("done_reason") == "stop":  # the model's own end; it is asked to go on all the same
                token, end = self._pieces.end()
                written.append([token], seconds, np.nan)
                text += end
            elif done.get("done_reason") == "length":  # some tokens may have no text, or half a character's
                written.append([UNTOLD] * (new - len(written.tokens)), seconds, np.nan)
            elif len(written.tokens) == before:  # Ollama breaks off after 30 like pieces in a row, but not at once
                raise RuntimeError(f"Ollama wrote nothing after {text[-40:]!r}: {done}")
        return written

    def _text_of(self, prompt: Array) -> tuple[str, bool]:
        key = prompt.tobytes()
        if key not in self._texts:
            self._texts[key] = self._pieces.text_of(prompt)
        return self._texts[key]

    def _count(self, counted: Any, prompt: Array) -> None:
        if counted != len(prompt):
            self.miscounted.append(f"it makes {counted} tokens of a prompt that has {len(prompt)} by the tokenizer")

    def _request(self, text: str, new: int, logprobs: bool = False) -> dict[str, Any]:
        options = GREEDY | {"num_predict": new, "num_ctx": self._context, "num_thread": self._cores}
        return {
            "model": NAME, "prompt": text, "raw": True, "stream": True, "think": False, "shift": False,
            "truncate": False, "logprobs": logprobs, "options": options,
        }  # fmt: skip


def open_session(path: Path, task: str, cores: int, tokenizer: Path) -> OllamaSession:
    """`tokenizer` is a folder that has the checkpoint's."""
    return OllamaSession(path, cores, tokenizer)


def serve(path: Path, host: str, port: int, cores: int) -> None:
    """Ollama's own server with this one model in it, until interrupted."""
    with (
        tempfile.TemporaryDirectory(prefix="ollama-") as folder,
        OllamaServer(Path(folder), host=host, port=port) as server,
    ):
        server.create(path)
        print(f"http://{server.address}/v1 (model {NAME})", flush=True)
        server.wait()
