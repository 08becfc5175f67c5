"""Language models as ONNX Runtime GenAI's folders, run by onnxruntime-genai.

What was found of version 0.18, and is relied on here: `get_logits` gives the last position of a prompt alone;
`get_output` gives the graph's whole output, all positions of it. Batches are padded on the right, with the pad token:
leading ones are taken for text, and trailing ones are stripped even from a prompt by itself that happens to end with
that token. So padding is -1, which no text has, and which ONNX looks up as the last embedding. After the prompt, a
batch takes no token from outside; it takes logits, though, and picks theirs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from optimize.passes.build_genai import SETTINGS
from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation

PAD = -1
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


class GenaiSession:
    """A model and one generator, which is made anew for each call but `step`."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, path: Path, cores: int) -> None:
        self._path = path
        settings = json.loads((path / SETTINGS).read_text())["model"]
        self._context: int = settings["context_length"]
        config = onnxruntime_genai.Config(str(path))
        threads = {"session_options": {"intra_op_num_threads": cores}}
        # with an end that hardly a text has, or it would be timed as a fast one; one number, since a list is appended
        ends = {"eos_token_id": settings["vocab_size"] - 1, "pad_token_id": PAD}
        config.overlay(json.dumps({"model": ends | {"decoder": threads}}))
        self._model = onnxruntime_genai.Model(config)
        self._tokenizer: Any = None
        self._generator: Any = None

    def logits(self, tokens: Array, keep: int) -> Array:
        generator = self._begin([tokens], 0)
        return np.array(generator.get_output("logits")[0, -keep:], dtype=np.float32)

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        self._generator = self._begin(prompts, room)
        return self._next()

    def step(self, tokens: Array) -> Array:
        chosen = np.zeros_like(self._generator.get_logits())
        chosen[np.arange(len(tokens)), 0, tokens] = 1
        self._generator.set_logits(chosen)
        self._generator.generate_next_token()
        return self._next()

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        start = time.perf_counter()
        generator = self._begin(prompts, new)
        steps, seconds = [], []
        for _ in range(new):
            generator.generate_next_token()
            steps.append(np.array(generator.get_next_tokens()))
            seconds.append(time.perf_counter() - start)
        if any((tokens == PAD).any() for tokens in steps):
            raise RuntimeError("it generated the vocabulary's last token, at which onnxruntime-genai was told to end")
        return Generation(np.stack(steps, axis=1).astype(np.int64), tuple(seconds))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """As onnxruntime-genai does it; nothing is put around it."""
        return [int(token) for token in self._text().encode(text)]

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens, special ones spelt out."""
        found: str = self._text().decode(np.array(tokens, dtype=np.int32))
        return found.encode()

    def chat_template(self) -> str | None:
        """As it stands in the folder, which onnxruntime-genai does not tell."""
        path = self._path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found: str | None = json.loads((self._path / "tokenizer_config.json").read_text()).get("chat_template")
        return found

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as onnxruntime-genai spells it, up to where an answer begins."""
        found: str = self._text().apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return found

    def _text(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
            self._tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")
        return self._tokenizer

    def _begin(self, prompts: Sequence[Array], room: int) -> Any:
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), PAD, dtype=np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        params = onnxruntime_genai.GeneratorParams(self._model)
        most = min(longest + room, self._context)
        params.set_search_options(batch_size=len(prompts), max_length=most, **GREEDY)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(ids)
        return generator

    def _next(self) -> Array:
        return np.array(self._generator.get_logits()[:, -1], dtype=np.float32)


def open_session(path: Path, task: str, cores: int) -> GenaiSession:
    return GenaiSession(path, cores)
