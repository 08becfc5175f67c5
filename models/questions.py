"""Questions to what a language model reads, and what it writes to an answer. Only a worker does this.

As EleutherAI's lm-evaluation-harness 0.4.13 does it, so that figures compare: a question is all that is read, without a
chat template; a choice follows it after one space; white space at the question's end goes over to the choice; what the
two are tokenized to together, less as many tokens as the question has by itself, is the choice. Special tokens are the
tokenizer's own, unless the question begins with one. What is too long loses its beginning.
Source: https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/api/model.py, TemplateLM._encode_pair;
lm_eval/models/huggingface.py, HFLM.tok_encode, _loglikelihood_tokens and generate_until)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.encoding import Row, load_tokenizer, pad_prompts
from optimize.models.tasks import read_json
from optimize.pipeline.batches import FIRST, Encoded
from optimize.pipeline.errors import RequestError
from optimize.pipeline.questions import CHARACTERS, ENDS

DELIMITER = " "  # between a question and a choice
ANSWER = 32  # tokens that are written, at most
TOGETHER = 8  # questions that are written on in one batch
STOP = "\n"


def encode_questions(folder: Path, rows: Sequence[Row], max_length: int) -> list[Encoded]:
    """With choices, one batch for each question: `input_ids` and `attention_mask` of [choices, longest], padded on the
    right, and for each choice the index of its first token and its characters. Without, prompts of TOGETHER each.

    Raises RequestError for a choice that is longer than the model takes, or of which no token is left.
    """
    tokenizer: Any = load_tokenizer(folder)
    if not rows or "choices" in rows[0]:
        return [_encode_choices(tokenizer, row, max_length) for row in rows]
    new = min(ANSWER, max_length // 2)
    prompts = [_tokens(tokenizer, row["query"])[new - max_length :] for row in rows]
    ends = np.array(_ends(tokenizer, folder), dtype=np.int64)
    return [
        pad_prompts(prompts[start : start + TOGETHER], new) | {ENDS: ends}
        for start in range(0, len(prompts), TOGETHER)
    ]  # fmt: skip


def encode_pair(tokenizer: Any, question: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of a question, and of what follows it: of `choice` with the space before it."""
    kept = question.rstrip()
    before = _tokens(tokenizer, kept)
    return before, _tokens(tokenizer, question + choice)[len(before) :]


def is_over(tokenizer: Any, written: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether an answer has come to its end: a token that ends a text, or a new line."""
    return written[-1] in ends or STOP in tokenizer.decode(written)


def answer_text(tokenizer: Any, written: Sequence[int], ends: Sequence[int]) -> str:
    """The first line of what was written before the text's end."""
    end = next((index for index, token in enumerate(written) if token in ends), len(written))
    text: str = tokenizer.decode(written[:end], skip_special_tokens=True)
    return text.split(STOP)[0]


def _encode_choices(tokenizer: Any, row: Row, max_length: int) -> Encoded:
    pairs = [encode_pair(tokenizer, row["query"], DELIMITER + choice) for choice in row["choices"]]
    for choice, (before, after) in zip(row["choices"], pairs, strict=True):
        if not before or not 0 < len(after) <= max_length:
            raise RequestError(
                f"question {row['query']!r:.40} has {len(before)} tokens and choice {choice!r:.40} has {len(after)}: "
                f"each needs one at least, and the model takes {max_length}"
            )
    # the last token is scored, not read: one more than the model takes
    texts = [(before + after)[-max_length - 1 :] for before, after in pairs]
    longest = max(map(len, texts))
    return {
        "input_ids": np.array([text + [0] * (longest - len(text)) for text in texts]),
        "attention_mask": np.array([[1] * len(text) + [0] * (longest - len(text)) for text in texts]),
        FIRST: np.array([len(text) - len(after) for text, (_, after) in zip(texts, pairs, strict=True)]),
        CHARACTERS: np.array([len(choice) for choice in row["choices"]]),
    }


def _tokens(tokenizer: Any, text: str) -> list[int]:
    begins = tokenizer.bos_token or tokenizer.eos_token
    own = {"add_special_tokens": False} if begins and text.startswith(begins) else {}
    tokens: list[int] = tokenizer.encode(text, **own)
    return tokens


def _ends(tokenizer: Any, folder: Path) -> list[int]:
    """The tokens that end a text: the tokenizer's own, and those of generation_config.json."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    several = found if isinstance(found, list) else [found]
    return sorted({token for token in (*several, tokenizer.eos_token_id) if isinstance(token, int)})
