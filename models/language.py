"""Text to what a language model is judged on: windows that are scored, prompts that are continued. Only a worker
does this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.encoding import Row, load_tokenizer, pad_prompts
from optimize.models.encoding import encode_sample as encode_sample  # a prompt is traced as any text
from optimize.models.questions import encode_questions
from optimize.models.tasks import Examples
from optimize.pipeline.batches import FIRST, UNTIMED, Encoded
from optimize.pipeline.contract import Cell
from optimize.pipeline.errors import RequestError

WINDOW = 512  # tokens that a model sees at once, at most
SCORED = 6144  # tokens that are judged, at most: half a minute of an eager model of 0.1 billion parameters
RAGGED = (5, 23, 48)  # tokens of the prompts of one batch whose lengths differ
RAGGED_NEW = 8
TRIED = 64  # places at which a prompt may begin


def encode_all(folder: Path, asked: Examples) -> dict[str, list[Encoded]]:
    """See tasks.Encoder."""
    questions = encode_questions(folder, asked.questions, asked.max_length)
    return {
        "evaluation": [*encode_windows(folder, asked.evaluation, asked.max_length), *questions],
        "calibration": encode_windows(folder, asked.calibration, asked.max_length) if asked.calibration else [],
        "cells": encode_prompts(folder, asked.evaluation, asked.cells),
    }


def encode_windows(folder: Path, rows: Sequence[Row], max_length: int) -> list[Encoded]:
    """Windows over all text, half of each being new: `input_ids` of [sequence], scored from index FIRST on.

    Each begins with what the tokenizer puts before a text. Raises RequestError for less text than one window takes.
    """
    tokens, prefix = _stream(load_tokenizer(folder), rows)
    size = min(WINDOW, max_length) - len(prefix)
    new = size // 2
    starts = list(range(0, len(tokens) - size + 1, new))
    if len(starts) < 2:
        raise RequestError(
            f"{len(tokens)} tokens are too few to judge a language model on: {size + new} are the least",
            hint="give more text, or leave --data out to use the text that ships with optimize",
        )
    step = -(-len(starts) * new // SCORED)  # evenly, where there is more than is judged
    first = len(prefix) + size - new
    return [
        {"input_ids": np.array([*prefix, *tokens[start : start + size]]), FIRST: np.array(first)}
        for start in starts[::step]
    ]


def encode_prompts(folder: Path, rows: Sequence[Row], cells: Iterable[Cell]) -> list[Encoded]:
    """A batch of prompts for each cell, cut from running text to exactly its length, and one of unlike lengths."""
    tokenizer: Any = load_tokenizer(folder)
    tokens, prefix = _stream(tokenizer, rows)

    def cut(index: int, length: int) -> list[int]:
        """From the first place on of which the tokenizer makes the same tokens again: some servers take text alone."""
        start, size = index * len(tokens) // 7 % len(tokens), length - len(prefix)
        around = [*tokens[start:], *tokens[:start]] * (1 + -(-(size + TRIED) // len(tokens)))
        found = (around[shift : shift + size] for shift in range(TRIED))
        return [*prefix, *next((part for part in found if _again(tokenizer, part) == part), around[:size])]

    batches = [pad_prompts([cut(index, cell.sequence) for index in range(cell.batch)], cell.new) for cell in cells]
    ragged = pad_prompts([cut(index, length) for index, length in enumerate(RAGGED)], RAGGED_NEW)
    return [*batches, ragged | {UNTIMED: np.array(True)}]


def _stream(tokenizer: Any, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """All text as one row of tokens, and the special tokens that the tokenizer puts before a text."""
    text = "\n\n".join(str(row["text"]) for row in rows)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens, special_prefix(tokenizer)


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    whole: list[int] = tokenizer("a")["input_ids"]
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(index for index in range(len(whole)) if whole[index : index + len(alone)] == alone)]


def _again(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """The tokens of the text of tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
