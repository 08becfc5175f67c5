"""From outputs to answers: words by their first tokens, spans of the context alone, and SQuAD's comparison."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.pipeline.answers import (
    CONTEXT,
    MAX_ELEMENTS,
    MAX_SPAN,
    OFFSETS,
    WORDS,
    exact_match,
    kept_positions,
    normalize_answer,
    similarities,
    span_answers,
    token_f1,
    word_answers,
)

Arrays = dict[str, NDArray[Any]]


def one_hot(*classes: int, width: int = 4) -> Arrays:
    return {"logits": np.eye(width, dtype=np.float32)[list(classes)]}


def words(mask: list[list[int]], of: list[list[int]]) -> list[Arrays]:
    return [{"attention_mask": np.array(mask), WORDS: np.array(of)}]


# Words


@pytest.mark.parametrize(
    ("mask", "of"),
    [([1, 1, 1, 1, 1, 0, 0], [-1, 0, 1, -1, -1, -1, -1]), ([0, 0, 1, 1, 1, 1, 1], [-1, -1, -1, 0, 1, -1, -1])],
    ids=["right", "left"],
)
def test_a_word_answers_with_its_first_token_on_whichever_side_the_padding_is(mask: list[int], of: list[int]) -> None:
    judged = one_hot(0, 1, 2, 3, 0)  # CLS, the first word, the second's two tokens, SEP: without padding
    assert word_answers(words([mask], [of]), [judged]) == [{0: 1, 1: 2}]


def test_batches_are_taken_in_their_order() -> None:
    batches = words([[1, 1], [1, 1]], [[-1, 0], [-1, 0]]) + words([[1, 1, 1]], [[-1, 0, 1]])
    found = word_answers(batches, [one_hot(0, 1), one_hot(0, 2), one_hot(0, 3, 1)])
    assert found == [{0: 1}, {0: 2}, {0: 3, 1: 1}]


def test_words_that_were_cut_off_have_no_answer() -> None:
    assert word_answers(words([[1, 1, 1]], [[-1, 0, -1]]), [one_hot(0, 3, 0)]) == [{0: 3}]


def test_of_a_large_output_the_words_at_judged_positions_answer() -> None:
    width = MAX_ELEMENTS // 5
    assert kept_positions(9, width).tolist() == [0, 2, 4, 6, 8]
    logits = np.zeros((5, width), dtype=np.float32)
    logits[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] = 1
    batches = words([[1] * 9], [[-1, 0, 1, 2, 3, 4, 5, 6, -1]])
    assert word_answers(batches, [{"logits": logits}]) == [{1: 6, 3: 7, 5: 8}]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [([one_hot(0, 1, 2)], "3 positions are judged where the batch has 2"), ([one_hot(0, 1)] * 2, "2 examples came")],
)
def test_outputs_of_other_batches_are_refused(outputs: list[Arrays], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        word_answers(words([[1, 1]], [[-1, 0]]), outputs)


# Spans

TEXT = "Rain fell on the harbour"  # [CLS] Where ? [SEP] Rain fell on the harbour [SEP]
RANGES = [(0, 0), (-1, -1), (-1, -1), (-1, -1), (0, 4), (5, 9), (10, 12), (13, 16), (17, 24), (-1, -1)]


def asked(left: int = 0) -> list[Arrays]:
    offsets = [(-1, -1)] * left + RANGES
    mask = [0] * left + [1] * len(RANGES)
    return [{"attention_mask": np.array([mask]), OFFSETS: np.array([offsets]), CONTEXT: np.array([TEXT])}]


def logits(start: dict[int, float], end: dict[int, float]) -> list[Arrays]:
    """One example's, zero but at these positions."""
    sides = {"start_logits": start, "end_logits": end}
    return [
        {name: np.array([[side.get(position, 0.0) for position in range(len(RANGES))]]) for name, side in sides.items()}
    ]


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize(
    ("start", "end", "answer"),
    [
        ({6: 5}, {8: 5}, "on the harbour"),
        ({8: 5}, {8: 5}, "harbour"),
        ({1: 99, 4: 1}, {2: 99, 5: 1}, "Rain fell"),  # a question is no answer
        ({3: 99, 5: 1}, {9: 99, 5: 1}, "fell"),  # nor are the marks between the texts
        ({7: 5}, {4: 5, 8: 1}, "the harbour"),  # nor what ends before it starts
        ({0: 99, 5: 1}, {0: 99, 5: 1}, "fell"),
    ],
)
def test_the_best_span_lies_in_the_context(
    left: int, start: dict[int, float], end: dict[int, float], answer: str
) -> None:
    assert span_answers(asked(left), logits(start, end), none_is_allowed=False) == [answer]


@pytest.mark.parametrize(("at_cls", "answer"), [(3, ""), (0.9, "fell")])
def test_no_answer_is_one_where_it_is_allowed_and_cls_is_best(at_cls: float, answer: str) -> None:
    outputs = logits({0: at_cls, 5: 1}, {0: at_cls, 5: 1})
    assert span_answers(asked(), outputs, none_is_allowed=True) == [answer]
    assert span_answers(asked(), outputs, none_is_allowed=False) == ["fell"]


def test_a_span_has_a_bounded_length() -> None:
    count = MAX_SPAN + 5
    offsets = np.array([[(index, index + 1) for index in range(count)]])
    batch = {"attention_mask": np.ones((1, count)), OFFSETS: offsets, CONTEXT: np.array(["x" * count])}
    start, end = np.zeros((1, count)), np.zeros((1, count))
    start[0, 0], end[0, MAX_SPAN - 1], end[0, MAX_SPAN] = 5, 5, 9
    (answer,) = span_answers([batch], [{"start_logits": start, "end_logits": end}], none_is_allowed=False)
    assert len(answer) == MAX_SPAN


def test_where_the_whole_context_was_cut_off_the_answer_is_empty() -> None:
    batch = asked()[0] | {OFFSETS: np.full((1, len(RANGES), 2), -1)}
    assert span_answers([batch], logits({4: 5}, {5: 5}), none_is_allowed=True) == [""]


# Similarity


def test_embeddings_are_compared_two_by_two() -> None:
    vectors = [[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, -1.0]]
    outputs = [{"last_hidden_state": np.array([vector])} for vector in vectors]
    assert similarities(outputs) == pytest.approx([0.5**0.5, -1.0])
    with pytest.raises(ValueError, match="3 examples are not pairs"):
        similarities(outputs[:3])


# SQuAD's comparison: expected values follow from its definition, by hand


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Harbour!", "harbour"), ("a theme, an area", "theme area"), ("U.S.A.", "usa"), ("the", ""), ("É", "é")],
)
def test_normalizes(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "f1"),
    [
        ("The harbour.", ["harbour"], True, 1.0),
        ("on the harbour", ["harbour"], False, 2 / 3),  # one of two words, and all of one
        ("old harbour wall", ["old wall", "the old harbour"], False, 0.8),  # the better of two
        ("rain rain", ["rain"], False, 2 / 3),  # a word counts as often as it is there
        ("rain", ["snow"], False, 0.0),
        ("", [], True, 1.0),
        ("rain", [], False, 0.0),
        ("", ["rain"], False, 0.0),
        ("", ["the"], True, 1.0),  # a truth of which nothing is left is none
    ],
)
def test_compares_answers(answer: str, truths: list[str], exact: bool, f1: float) -> None:
    assert exact_match(answer, truths) is exact
    assert token_f1(answer, truths) == pytest.approx(f1)
