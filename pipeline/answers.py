"""What a model's judged outputs say of each example, in the words that people labelled it in. numpy alone.

What an answer needs beside outputs (which position is which word, where a token lies in its text) travels with the
batches of evaluation.npz, as arrays whose names no model's input can have; so `verify` finds it in the evidence.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Example = Mapping[str, NDArray[Any]]  # output name -> [positions, features]
Batches = Sequence[Mapping[str, NDArray[Any]]]

WORDS = "answers.words"  # [batch, sequence]: the index of the word whose first token stands there, else -1
OFFSETS = "answers.offsets"  # [batch, sequence, 2]: from and to which character of the context; else -1, CLS has (0, 0)
CONTEXT = "answers.context"  # [batch]: the text that answers are cut from
MAX_ELEMENTS = 1 << 20  # kept of one output of one example: 4 MiB in float32
MAX_SPAN = 30  # tokens of an answer, as in SQuAD's own evaluation of BERT


def kept_positions(positions: int, features: int) -> NDArray[np.int_]:
    """Which of an output's positions are judged: all, or of a very large output evenly spaced ones."""
    keep = max(1, min(positions, MAX_ELEMENTS // max(1, features)))
    return np.asarray(np.linspace(0, positions - 1, keep).round().astype(int))


def class_answers(outputs: Sequence[Example]) -> NDArray[np.int_]:
    """The class of each example: [examples]."""
    return np.array([int(each["logits"].argmax()) for each in outputs])


def similarities(outputs: Sequence[Example]) -> NDArray[np.float64]:
    """The cosine of examples 2i and 2i + 1, for every i: [pairs]. Raises ValueError for an odd number of examples."""
    if len(outputs) % 2:
        raise ValueError(f"{len(outputs)} examples are not pairs")
    embeddings = np.array([next(iter(each.values()))[0] for each in outputs], dtype=np.float64)
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return np.asarray((embeddings[::2] * embeddings[1::2]).sum(axis=1))


def word_answers(batches: Batches, outputs: Sequence[Example]) -> list[dict[int, int]]:
    """For each example, word index -> class, by the word's first token.

    Words that were cut off, or whose first token is not among the judged positions, are not there. Raises KeyError for
    batches without words, ValueError for outputs of other batches.
    """
    answers = []
    for row, output in _pairs(batches, outputs):
        logits, words = output["logits"], row[WORDS][row["attention_mask"] != 0]
        words = words[kept_positions(len(words), logits.shape[-1])]
        if len(words) != len(logits):
            raise ValueError(f"{len(logits)} positions are judged where the batch has {len(words)}")
        classes = logits.argmax(axis=-1)
        answers.append({int(words[index]): int(classes[index]) for index in np.flatnonzero(words >= 0)})
    return answers


def span_answers(batches: Batches, outputs: Sequence[Example], *, none_is_allowed: bool) -> list[str]:
    """For each example, the best span of its context, cut out by its characters.

    The best has the largest sum of start and end logit, ends where it starts or up to MAX_SPAN - 1 tokens later, and
    lies in the context. Where `none_is_allowed` and CLS has a larger sum, the answer is "": so does SQuAD 2. It is ""
    too where nothing of the context was left. Raises KeyError for batches without a context, ValueError for outputs of
    other batches.
    """
    answers = []
    for row, output in _pairs(batches, outputs):
        offsets = row[OFFSETS][row["attention_mask"] != 0]
        start, end = (output[name].reshape(-1).astype(np.float64) for name in ("start_logits", "end_logits"))
        if not len(offsets) == len(start) == len(end):
            raise ValueError(f"{len(start)} positions are judged where the batch has {len(offsets)}")
        inside = offsets[:, 1] > offsets[:, 0]
        best, answer = -np.inf, ""
        for tokens in range(min(MAX_SPAN, len(start))):  # between the first and the last of the span
            ends = len(start) - tokens
            scores = np.where(inside[:ends] & inside[tokens:], start[:ends] + end[tokens:], -np.inf)
            first = int(scores.argmax())
            if scores[first] > best:
                best = float(scores[first])
                answer = str(row[CONTEXT])[offsets[first, 0] : offsets[first + tokens, 1]]
        cls = (offsets == 0).all(axis=1)
        if none_is_allowed and cls.any() and float((start + end)[cls].max()) > best:
            answer = ""
        answers.append(answer)
    return answers


def _pairs(batches: Batches, outputs: Sequence[Example]) -> Iterator[tuple[dict[str, NDArray[Any]], Example]]:
    """Each example's row of its batch, with its outputs. Raises ValueError for unlike numbers."""
    rows = [
        {name: array[index] for name, array in batch.items()}
        for batch in batches
        for index in range(len(batch["attention_mask"]))
    ]
    if len(rows) != len(outputs):
        raise ValueError(f"{len(outputs)} examples came back, not {len(rows)}")
    return zip(rows, outputs, strict=True)


# SQuAD's own comparison of answers. The copy that transformers had is gone, torchmetrics' comes with torch, and
# `evaluate` downloads its code: https://rajpurkar.github.io/SQuAD-explorer (evaluate-v2.0.py)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus white space."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether the answer is one of `truths`; of none, whether it is empty."""
    return normalize_answer(answer) in [normalize_answer(truth) for truth in _accepted(truths)]


def token_f1(answer: str, truths: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the answer's words, with the truth that it fits best."""
    return max(_f1(normalize_answer(answer).split(), normalize_answer(truth).split()) for truth in _accepted(truths))


def _accepted(truths: Sequence[str]) -> Sequence[str]:
    """Truths of which something is left; where none is, no answer is right."""
    return [truth for truth in truths if normalize_answer(truth)] or [""]


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    return 2 * (Counter(found) & Counter(expected)).total() / (len(found) + len(expected))
