"""How often answers to questions are right: known answers by hand, and what rejects a candidate."""

from typing import Any

import numpy as np
import pytest

from optimize.pipeline.contract import LabelKind, Labelling
from optimize.pipeline.questions import ANSWERS, CHARACTERS, LIKELIHOODS, is_match, question_metrics

WINDOW = {"loss": np.zeros(3)}  # text is scored before the questions
Side = list[dict[str, Any]]


def asked(*lengths: list[int]) -> Side:
    return [{"input_ids": np.zeros(3)}, *({CHARACTERS: np.array(each)} for each in lengths)]


def scored(*questions: list[float]) -> Side:
    return [WINDOW, *({LIKELIHOODS: np.array(each)} for each in questions)]


def choice(*labels: Any) -> Labelling:
    return Labelling(LabelKind.CHOICE, labels)


def targets(*labels: Any) -> Labelling:
    return Labelling(LabelKind.TARGETS, labels)


def test_acc_and_acc_norm_by_hand() -> None:
    lengths = [[1, 4], [2, 2], [5, 1], [3, 3]]
    before = scored([-1, -2], [-3, -1], [-4, -1], [-1, -9])  # takes 0, 1, 1, 0; by character 1, 1, 0, 0
    after = scored([-3, -2], [-3, -1], [-4, -1], [-9, -1])  # takes 1, 1, 1, 1; by character 1, 1, 0, 1
    acc, norm = question_metrics(choice(0, 1, 0, 0), asked(*lengths), before, after)
    assert (acc.name, acc.reference, acc.candidate) == ("acc", 0.75, 0.25)
    assert (norm.name, norm.reference, norm.candidate) == ("acc_norm", 0.75, 0.5)
    assert (acc.drop.value, acc.p_value, acc.examples, acc.unit) == (0.5, 0.5, 4, "questions")


def test_acc_rejects_and_acc_norm_does_not() -> None:
    before, after = scored([-1, -2]), scored([-3, -2])
    acc, norm = question_metrics(choice(0), asked([1, 1]), before, after)
    assert acc.drop.value == norm.drop.value == 1
    assert "acc drops by 1.0000" in str(acc.why_rejected(0.1))
    assert norm.why_rejected(0.1) is None
    assert "on 1 labelled questions" in str(acc.what_it_leaves_open(0.1)) and norm.what_it_leaves_open(0.1) is None


def test_exact_match_by_hand() -> None:
    before = [WINDOW, {ANSWERS: np.array([" Paris", "two"])}, {ANSWERS: np.array(["no"])}]
    after = [WINDOW, {ANSWERS: np.array(["paris", "2"])}, {ANSWERS: np.array([""])}]
    labels = targets(("Paris",), ("2", "two"), ("yes",))
    (metric,) = question_metrics(labels, asked(), before, after)
    assert (metric.name, metric.reference, metric.candidate) == ("exact_match", pytest.approx(2 / 3), 1 / 3)
    assert metric.drop.value == pytest.approx(1 / 3) and metric.gates


@pytest.mark.parametrize(
    ("text", "right"),
    [("Paris", True), (" Paris\t", True), ("paris", False), ("Paris.", False), ("Par is", False), ("", False)],
)
def test_only_white_space_around_an_answer_is_left_out(text: str, right: bool) -> None:
    assert is_match(text, ["Rome", "Paris "]) is right


@pytest.mark.parametrize(
    ("labelling", "lengths", "before", "after"),
    [
        (choice(0, 1), [[1, 1]], [[-1, -2]], [[-1, -2]]),  # two labels for one question
        (choice(0), [[1, 1]], [[-1, -2]], []),
        (choice(0), [[1, 1]], [[-1, -2]], [[-1, -2, -3]]),
        (choice(2), [[1, 1]], [[-1, -2]], [[-1, -2]]),
        (choice(-1), [[1, 1]], [[-1, -2]], [[-1, -2]]),
        (choice(0.5), [[1, 1]], [[-1, -2]], [[-1, -2]]),
        (targets(("a",)), [[1, 1]], [[-1, -2]], [[-1, -2]]),
        (targets(1), [], [], []),
        (choice(), [], [], []),
    ],
)
def test_what_does_not_fit_the_labels_is_refused(
    labelling: Labelling, lengths: list[list[int]], before: list[list[float]], after: list[list[float]]
) -> None:
    with pytest.raises(ValueError):
        question_metrics(labelling, asked(*lengths), scored(*before), scored(*after))
