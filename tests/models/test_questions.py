"""Questions to tokens: exactly lm-evaluation-harness' own, and what is written to an answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from optimize.models.questions import ANSWER, answer_text, encode_pair, encode_questions, is_over
from optimize.pipeline.batches import FIRST, NEW
from optimize.pipeline.errors import RequestError
from optimize.pipeline.questions import CHARACTERS, ENDS, sequences

PIECES = ("<s>", "a", "b", "Ġ", "Ġa", "Ġb", "ab", "Ċ", "</s>")
A, B, SPACE, SPACE_A, SPACE_B, AB, LINE, END = range(1, 9)


def tokenizer(*, begins: bool = True) -> Any:
    """Of nine tokens, which puts <s> before a text or does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b")]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(PIECES)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


# what lm_eval 0.4.13's TemplateLM._encode_pair gave, run beside ours on the same tokenizers
@pytest.mark.parametrize(
    ("question", "choice", "before", "after"),
    [
        ("a", " b", [A], [SPACE_B]),
        ("a ", " b", [A], [SPACE, SPACE_B]),  # the question's last space goes over to the choice
        ("a\n", " b", [A], [LINE, SPACE_B]),
        ("a b  ", " ab", [A, SPACE_B], [SPACE, SPACE, SPACE_A, B]),
        ("ab", " a b", [AB], [SPACE_A, SPACE_B]),
        ("a", "bb", [A], [B]),  # together "ab", "b": as many tokens as the question has by itself are left out
    ],
)
@pytest.mark.parametrize("begins", [True, False])
def test_pairs_are_encoded_as_lm_eval_does(
    begins: bool, question: str, choice: str, before: list[int], after: list[int]
) -> None:
    assert encode_pair(tokenizer(begins=begins), question, choice) == ([0] * begins + before, after)


@pytest.mark.parametrize("begins", [True, False])
def test_a_question_that_begins_with_a_special_token_gets_no_other(begins: bool) -> None:
    assert encode_pair(tokenizer(begins=begins), "<s>a", " b") == ([0, A], [SPACE_B])


def test_choices_stand_behind_their_question(folder: Path) -> None:
    (batch,) = encode_questions(folder, [{"query": "ab", "choices": ["a", "b a", "b"]}], 64)
    found = [(tokens.tolist(), first) for tokens, first in sequences(batch)]
    assert found == [([0, AB, SPACE_A], 2), ([0, AB, SPACE_B, SPACE_A], 2), ([0, AB, SPACE_B], 2)]
    assert batch[CHARACTERS].tolist() == [1, 3, 1]


def test_what_is_too_long_loses_its_beginning(folder: Path) -> None:
    """lm-eval keeps one token more than the model takes, since the last is scored and not read."""
    (batch,) = encode_questions(folder, [{"query": "a b b b", "choices": ["a", "a a"]}], 4)
    found = [(tokens.tolist(), first) for tokens, first in sequences(batch)]
    assert found == [([A, SPACE_B, SPACE_B, SPACE_B, SPACE_A], 4), ([SPACE_B] * 3 + [SPACE_A] * 2, 3)]
    with pytest.raises(RequestError, match="choice 'a a a a a' has 5"):
        encode_questions(folder, [{"query": "a", "choices": ["a", "a a a a a"]}], 4)


def test_questions_without_choices_are_prompts(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [LINE, END]}))
    batches = encode_questions(folder, [{"query": "a" + " b" * index} for index in range(9)], 512)
    assert [batch["input_ids"].shape for batch in batches] == [(8, 9), (1, 10)]
    assert batches[0]["input_ids"][1].tolist() == [0] * 6 + [0, A, SPACE_B], "padded on the left"
    assert batches[0]["attention_mask"][1].tolist() == [0] * 6 + [1] * 3
    assert int(batches[0][NEW]) == ANSWER and batches[0][ENDS].tolist() == [LINE, END]
    assert FIRST not in batches[0]
    (cut,) = encode_questions(folder, [{"query": "a" + " b" * 50}], 40)  # with room for what is written
    assert cut["input_ids"].shape == (1, 20) and int(cut[NEW]) == 20


@pytest.mark.parametrize(
    ("written", "over", "text"),
    [
        ([SPACE_A, B], False, " ab"),
        ([SPACE_A, LINE], True, " a"),
        ([LINE], True, ""),
        ([SPACE_A, END], True, " a"),
        ([END], True, ""),
        ([SPACE_A, END, B], False, " a"),
    ],
)
def test_an_answer_ends_with_its_line_or_its_text(written: list[int], over: bool, text: str) -> None:
    assert is_over(tokenizer(), written, [END]) is over
    assert answer_text(tokenizer(), written, [END]) == text


def test_no_questions_are_no_batches(folder: Path) -> None:
    assert encode_questions(folder, [], 64) == []
