"""Text to the arrays that a model is fed, with the checkpoint's tokenizer: only a worker does this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.tasks import Examples
from optimize.pipeline.answers import CONTEXT, OFFSETS, WORDS
from optimize.pipeline.batches import NEW, Encoded
from optimize.pipeline.errors import RequestError

LONGEST = 512  # tokens of evaluation text that shapes are made for, where no cell of the workload is longer
BATCH_SIZES = (1, 2, 8)  # evaluation batches, in turn: none is the batch that exporters trace with padding alone

Row = Mapping[str, Any]


def encode_all(folder: Path, asked: Examples) -> dict[str, list[Encoded]]:
    """See tasks.Encoder. Text that calibrates is in batches of one."""
    return {
        "evaluation": encode(folder, asked.evaluation, asked.max_length, BATCH_SIZES, labelled=asked.labelled),
        "calibration": encode(folder, asked.calibration, asked.max_length, (1,)),
        "cells": encode_cells(folder, asked.evaluation, [(cell.batch, cell.sequence) for cell in asked.cells]),
    }


def encode_sample(folder: Path) -> Encoded:
    """See tasks.Encoder."""
    rows = [
        {"text": "A batch of one is traced as a constant."},
        {"text": "So there are two of them, unlike in length, padded."},
    ]
    return encode(folder, rows, max_length=64, sizes=(2,))[0]


def encode(
    folder: Path, rows: Sequence[Row], max_length: int, sizes: Iterable[int], *, labelled: bool = False
) -> list[Encoded]:
    """Batches of [batch, sequence] int64 arrays by input name; each batch is padded to its own longest row.

    `sizes` is repeated until the rows are used up. Rows are cut at `max_length` tokens. With `labelled`, batches also
    have what turns outputs into answers (see answers.py), which is no input of a model. Raises RequestError for a
    tokenizer that cannot tell it.
    """
    split = bool(rows) and "tokens" in rows[0]
    tokenizer = load_tokenizer(folder)
    spans = labelled and bool(rows) and "context" in rows[0]
    if (split or spans) and not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} cannot tell which token belongs to which word",
            hint="save the checkpoint with a tokenizer.json, or give text without labels",
        )
    if split:
        _begin_words_as_after_a_space(tokenizer)
    turns = tuple(sizes)
    batches: list[Encoded] = []
    start = 0
    while start < len(rows):
        chunk = rows[start : start + turns[len(batches) % len(turns)]]
        start += len(chunk)
        first = [row.get("question", row.get("tokens", row.get("text"))) for row in chunk]
        second = [row.get("context", row.get("text_pair")) for row in chunk]
        encoded = tokenizer(
            first, second if second[0] is not None else None, is_split_into_words=split,
            padding=True, truncation=True, max_length=max_length, return_tensors="np",
        )  # fmt: skip
        batch = {name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()}
        if labelled and split:
            batch[WORDS] = _first_tokens(encoded)
        if spans:
            batch[OFFSETS] = _context_offsets(encoded, tokenizer.cls_token_id)
            batch[CONTEXT] = np.array(second, dtype=np.str_)
        batches.append(batch)
    return batches


def _first_tokens(encoded: Any) -> Any:
    """For each position of [batch, sequence] the index of the word that begins there, -1 where none does."""
    found = np.full(encoded["input_ids"].shape, -1, dtype=np.int64)
    for row in range(len(found)):
        previous = None
        for position, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != previous:
                found[row, position] = word
            previous = word
    return found


def _context_offsets(encoded: Any, cls: int | None) -> Any:
    """For each position of [batch, sequence] its characters' range in the context; CLS has (0, 0), others (-1, -1)."""
    found = np.full((*encoded["input_ids"].shape, 2), -1, dtype=np.int64)
    for row, tokens in enumerate(encoded["input_ids"].tolist()):
        for position, (sequence, ends) in enumerate(
            zip(encoded.sequence_ids(row), encoded.encodings[row].offsets, strict=True)
        ):
            if sequence == 1 and ends[0] < ends[1]:
                found[row, position] = ends
        if cls in tokens:
            found[row, tokens.index(cls)] = 0
    return found


def encode_cells(folder: Path, rows: Sequence[Row], cells: Iterable[tuple[int, int]]) -> list[Encoded]:
    """One batch for each cell (batch, sequence): running text, cut to exactly that length, with no padding."""
    tokenizer = load_tokenizer(folder)
    texts = [value if isinstance(value, str) else " ".join(value) for row in rows for value in row.values()]
    batches = []
    for batch, sequence in cells:
        lines = []
        for index in range(batch):
            turned = texts[index * 7 % len(texts) :] + texts[: index * 7 % len(texts)]
            words = " ".join(turned)[: 32 * sequence]  # more than any tokenizer makes that many tokens of
            lines.append(" ".join([words] * max(1, math.ceil(4 * sequence / max(1, len(words.split()))))))
        encoded = tokenizer(lines, truncation=True, max_length=sequence, padding="max_length", return_tensors="np")
        batches.append({name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()})
    return batches


def pad_prompts(prompts: Sequence[Sequence[int]], new: int) -> Encoded:
    """One batch of prompts that `new` tokens follow, padded on the left, as `generate` takes it."""
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask, NEW: np.array(new)}


def load_tokenizer(folder: Path) -> Any:
    """A checkpoint's own; its code is never run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _begin_words_as_after_a_space(tokenizer: Any) -> None:
    """Have each word of a list tokenized as in running text. `add_prefix_space` does it for some tokenizers only."""
    from tokenizers import pre_tokenizers

    first: Any = tokenizer.backend_tokenizer.pre_tokenizer
    several = isinstance(first, pre_tokenizers.Sequence)
    for each in first if several else (first,):
        if isinstance(each, pre_tokenizers.ByteLevel):
            each.add_prefix_space = True
        elif isinstance(each, pre_tokenizers.Metaspace):
            each.prepend_scheme = "always"
