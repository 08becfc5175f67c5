"""Tokens to the text that a server is sent, and the text that it streams back to tokens. Only a worker does this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.encoding import load_tokenizer
from optimize.models.language import special_prefix
from optimize.models.tasks import read_json
from optimize.pipeline.contract import Array

ANCHOR = "a"  # what stands before a token when its text is asked for: some tokenizers drop a text's first space
BROKEN = "\ufffd"  # what bytes that are no whole character are read as
# names of the tokens at which llama.cpp ends a text, beside those of the checkpoint.
# Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
ENDS = ("<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|return|>",
        "<end_of_turn>", "<end_of_utterance>", "<EOT>", "<eos>", "</s>")  # fmt: skip


class Pieces:
    """The checkpoint's tokenizer, for a server that takes and gives text alone."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = load_tokenizer(folder)
        self._prefix = special_prefix(self._tokenizer)
        self._anchor: list[int] = self._tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
        texts = self._tokenizer.batch_decode(
            [[*self._anchor, token] for token in range(len(self._tokenizer))],
            skip_special_tokens=False, clean_up_tokenization_spaces=False,
        )  # fmt: skip
        pieces = {text[len(ANCHOR) :]: token for token, text in reversed(list(enumerate(texts)))}
        self._tokens = {piece: token for piece, token in pieces.items() if piece and BROKEN not in piece}
        settings = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
        named = settings.get("eos_token_id") or []
        vocabulary = self._tokenizer.get_vocab()
        found = [self._tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        found += [vocabulary.get(name) for name in ENDS]
        self.ends = tuple(dict.fromkeys(int(token) for token in found if token is not None))

    def text_of(self, tokens: Array) -> tuple[str, bool]:
        """What to send for a prompt, int64 of [sequence], and whether the tokenizer makes those tokens of it again.

        What the tokenizer itself puts before a text is left out: the server does so too.
        """
        ids = [int(token) for token in tokens]
        if ids[: len(self._prefix)] == self._prefix:
            ids = ids[len(self._prefix) :]
        text = self._spell(ids)
        return text, bool(np.array_equal(self._tokenizer(text)["input_ids"], tokens))

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a piece of what is generated: one, or those of a character that several make."""
        if text in self._tokens:
            return [self._tokens[text]]
        ids: list[int] = self._tokenizer(ANCHOR + text, add_special_tokens=False)["input_ids"]
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def end(self) -> tuple[int, str]:
        """The token that ends a text, and its text. Raises ValueError where there is none."""
        if not self.ends:
            raise ValueError("the server ended a text, and the tokenizer has no token for that")
        return self.ends[0], self._spell([self.ends[0]])

    def _spell(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
