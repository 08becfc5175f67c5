"""Metrics on labelled data: known answers, exact intervals, and the gate where the data can resolve it or not."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from optimize.pipeline.answers import CONTEXT, OFFSETS, WORDS
from optimize.pipeline.contract import LabelKind, Labelling
from optimize.pipeline.metrics import (
    Metric,
    answering_metrics,
    classification_metrics,
    similarity_metrics,
    tagging_metrics,
    task_metrics,
)
from optimize.pipeline.statistics import Interval

TRUTH = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def answers(classes: list[int]) -> list[dict[str, NDArray[Any]]]:
    return [{"logits": np.eye(3, dtype=np.float32)[[index]]} for index in classes]


def test_accuracy_and_macro_f1_by_hand() -> None:
    before, after = TRUTH, [0, 0, 0, 1, 1, 1, 1, 2, 2, 1]  # two answers lost
    accuracy, macro = classification_metrics(answers(before), answers(after), TRUTH)
    assert (accuracy.name, accuracy.reference, accuracy.candidate) == ("accuracy", 1.0, 0.8)
    assert accuracy.drop.value == pytest.approx(0.2)
    assert (macro.name, macro.reference) == ("macro F1", 1.0)
    assert macro.candidate == pytest.approx((6 / 7 + 6 / 8 + 4 / 5) / 3)
    assert macro.drop.low <= macro.drop.value <= macro.drop.high


def test_accuracy_has_mcnemars_exact_test_and_an_exact_interval() -> None:
    before, after = TRUTH, [0, 0, 0, 1, 1, 1, 1, 2, 2, 1]
    accuracy, _ = classification_metrics(answers(before), answers(after), TRUTH)
    assert accuracy.p_value == pytest.approx(0.5)  # both of two differing answers on one side: 2 * (1/2)^2
    lost, gained = (stats.binomtest(count, 10).proportion_ci(0.975, method="exact") for count in (2, 0))
    assert (accuracy.drop.low, accuracy.drop.high) == pytest.approx((lost.low - gained.high, lost.high - gained.low))


def test_equal_answers_still_leave_a_drop_possible() -> None:
    accuracy, macro = classification_metrics(answers(TRUTH), answers(TRUTH), TRUTH)
    assert accuracy.p_value == 1.0
    assert accuracy.drop.value == macro.drop.value == 0.0
    assert accuracy.drop.high == accuracy.resolution == pytest.approx(1 - 0.0125**0.1)


def test_gained_answers_offset_lost_ones() -> None:
    before, after = [1, *TRUTH[1:]], [*TRUTH[:-1], 0]
    accuracy, _ = classification_metrics(answers(before), answers(after), TRUTH)
    assert (accuracy.drop.value, accuracy.p_value) == (0.0, 1.0)


def test_there_is_a_label_for_each_example() -> None:
    with pytest.raises(ValueError, match="10 and 10 examples for 9 labels"):
        classification_metrics(answers(TRUTH), answers(TRUTH), TRUTH[:-1])


@pytest.mark.parametrize(
    ("lost", "high", "resolution", "rejected"),
    [
        (0.0, 0.0009, 0.0009, False),
        (0.0002, 0.0021, 0.0009, True),  # the data can resolve the gate, and the bad end is beyond it
        (0.0002, 0.0021, 0.0015, False),  # they cannot: the estimate decides
        (0.0020, 0.0021, 0.0015, True),
        (-0.01, 0.0005, 0.0002, False),
        (float("nan"), float("nan"), 0.0015, True),
    ],
)
def test_the_gate_is_on_the_bad_end_where_the_data_can_resolve_it(
    lost: float, high: float, resolution: float, rejected: bool
) -> None:
    metric = Metric("accuracy", 0.9, 0.9 - lost, Interval(lost, -1.0, high), None, 4000, resolution)
    assert (metric.why_rejected(0.001) is not None) is rejected
    assert (metric.what_it_leaves_open(0.001) is None) is (resolution <= 0.001)


def test_it_says_how_many_examples_would_do() -> None:
    metric = classification_metrics(answers(TRUTH * 10), answers(TRUTH * 10), TRUTH * 10)[0]
    words = metric.what_it_leaves_open(0.001)
    assert words is not None
    needed = int(words.split("about ")[1].split()[0])
    assert stats.binomtest(0, needed).proportion_ci(0.975, method="exact").high == pytest.approx(0.001, rel=0.05)


def test_a_rare_class_makes_macro_f1_coarser() -> None:
    truth = [0] * 90 + [1] * 10
    accuracy, macro = classification_metrics(answers(truth), answers(truth), truth)
    assert macro.resolution == pytest.approx(5 * accuracy.resolution)  # 10 of 100 where a half would be 50


def test_macro_f1_has_an_interval_where_one_wrong_answer_becomes_another() -> None:
    before, after = [1, *TRUTH[1:]], [2, *TRUTH[1:]]
    accuracy, macro = classification_metrics(answers(before), answers(after), TRUTH)
    assert accuracy.drop.value == 0.0 and macro.drop.high > macro.drop.low


# Sentence similarity


def pairs(cosines: list[float]) -> list[dict[str, NDArray[Any]]]:
    """Embeddings whose cosines are these, two by two."""
    sides = [vector for cosine in cosines for vector in ([1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5])]
    return [{"last_hidden_state": np.array([vector], dtype=np.float64)} for vector in sides]


COSINES = [0.1, 0.3, 0.2, 0.6, 0.5, 0.4, 0.9, 0.8]


def test_correlations_by_hand() -> None:
    scores = [1.0, 3.0, 2.0, 6.0, 5.0, 4.0, 9.0, 8.0]  # ten times the cosines
    swapped = [*COSINES[:6], 0.8, 0.9]  # two neighbouring ranks: rho falls by 6 * 2 / (8 * 63)
    pearson, spearman = similarity_metrics(pairs(COSINES), pairs(swapped), scores)
    assert (pearson.name, spearman.name) == ("Pearson", "Spearman")
    assert pearson.reference == pytest.approx(1) and spearman.reference == pytest.approx(1)
    assert spearman.drop.value == pytest.approx(12 / 504)
    assert pearson.drop.value == pytest.approx(1 - np.corrcoef(swapped, scores)[0, 1])
    assert (pearson.examples, pearson.unit, pearson.p_value) == (8, "pairs", None)


def test_a_candidate_that_mixes_up_the_pairs_drops_beyond_doubt() -> None:
    cosines = np.random.default_rng(0).uniform(-0.5, 1, 200).tolist()
    shuffled = np.random.default_rng(1).permutation(cosines).tolist()
    for metric in similarity_metrics(pairs(cosines), pairs(shuffled), cosines):
        assert metric.drop.low > 0.5
        assert metric.why_rejected(0.01)


def test_cosines_that_hardly_move_resolve_a_small_drop() -> None:
    random = np.random.default_rng(0)
    cosines = random.uniform(-0.5, 0.9, 200)
    moved = cosines + random.normal(scale=1e-4, size=200)
    for metric in similarity_metrics(pairs(cosines.tolist()), pairs(moved.tolist()), cosines.tolist()):
        assert metric.drop.low <= metric.drop.value <= metric.drop.high
        assert metric.resolution == pytest.approx((metric.drop.high - metric.drop.low) / 2)
        assert metric.resolution < 0.001 and metric.why_rejected(0.001) is None


def test_embeddings_that_are_all_the_same_correlate_with_nothing() -> None:
    for metric in similarity_metrics(pairs(COSINES), pairs([0.5] * 8), COSINES):
        assert metric.candidate == 0.0 and metric.drop.value == pytest.approx(1)
        assert metric.why_rejected(0.1)


def test_a_half_width_shrinks_with_the_root_of_the_number() -> None:
    metric = Metric("Pearson", 0.9, 0.9, Interval(0.0, -0.02, 0.02), None, 100, 0.02, "pairs", 0.5)
    assert metric.needed(0.01) == 400
    assert "on 100 labelled pairs" in str(metric.what_it_leaves_open(0.01))


# Token classification

NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}


def sentence(length: int) -> dict[str, NDArray[Any]]:
    """A batch of one sentence whose words have one token each, between two marks."""
    return {"attention_mask": np.ones((1, length + 2)), WORDS: np.array([[-1, *range(length), -1]])}


def tagged(sentences: list[list[int]]) -> list[dict[str, NDArray[Any]]]:
    return [{"logits": np.eye(4, dtype=np.float32)[[0, *each, 0]]} for each in sentences]


def test_entities_and_words_by_hand() -> None:
    truth = [[1, 2, 0, 3], [1, 0], [0, 3]]  # four entities in eight words
    after = [[1, 0, 0, 3], [1, 0], [0, 0]]  # one cut short, one gone: two right of three found
    f1, accuracy = tagging_metrics([sentence(4), sentence(2), sentence(2)], tagged(truth), tagged(after), truth, NAMES)
    assert (f1.name, f1.reference, f1.examples, f1.unit) == ("entity F1", 1.0, 3, "sentences")
    assert f1.candidate == pytest.approx(2 * 2 / (3 + 4))
    assert f1.drop.low <= f1.drop.value <= f1.drop.high
    assert (accuracy.name, accuracy.reference, accuracy.candidate) == ("token accuracy", 1.0, 0.75)
    assert (accuracy.examples, accuracy.unit, accuracy.p_value) == (8, "words", pytest.approx(0.5))


@pytest.mark.parametrize("seed", range(5))
def test_entity_f1_is_seqevals(seed: int) -> None:
    from seqeval.metrics import f1_score

    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, 30)
    truth, before, after = ([random.integers(0, 4, n).tolist() for n in lengths] for _ in range(3))
    metric, _ = tagging_metrics([sentence(n) for n in lengths], tagged(before), tagged(after), truth, NAMES)
    named = [[[NAMES[tag] for tag in each] for each in side] for side in (truth, before, after)]
    assert metric.reference == pytest.approx(f1_score(named[0], named[1]))
    assert metric.candidate == pytest.approx(f1_score(named[0], named[2]))


def test_words_that_were_cut_off_count_on_neither_side() -> None:
    truth = [[0, 1, 3], [0, 3]]
    cut = {"attention_mask": np.ones((1, 4)), WORDS: np.array([[-1, 0, 1, -1]])}  # the third word is gone
    f1, accuracy = tagging_metrics([cut, sentence(2)], tagged([[0, 1], [0, 3]]), tagged([[0, 1], [0, 3]]), truth, NAMES)
    assert accuracy.examples == 4 and accuracy.reference == f1.reference == 1.0


@pytest.mark.parametrize("names", [{0: "NOUN", 1: "VERB", 2: "O", 3: "B-X"}, {0: "O"}])
def test_tags_that_mark_no_entities_have_an_accuracy_alone(names: dict[int, str]) -> None:
    (metric,) = tagging_metrics([sentence(2)], tagged([[0, 1]]), tagged([[0, 1]]), [[0, 1]], names)
    assert metric.name == "token accuracy"


def test_fewer_labels_than_words_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1 labels for a sentence with a word 2"):
        tagging_metrics([sentence(2)], tagged([[0, 1]]), tagged([[0, 1]]), [[0]], NAMES)


# Question answering


def spans(ends: list[tuple[int, int]]) -> list[dict[str, NDArray[Any]]]:
    """Outputs that answer with these tokens of "one two three four"; (-1, -1) is CLS."""
    answers = []
    for first, last in ends:
        start, end = np.zeros((1, 5)), np.zeros((1, 5))
        start[0, first + 1] = end[0, last + 1] = 1
        answers.append({"start_logits": start, "end_logits": end})
    return answers


def questions(count: int) -> list[dict[str, NDArray[Any]]]:
    offsets = np.array([[(0, 0), (0, 3), (4, 7), (8, 13), (14, 18)]] * count)
    context = np.array(["one two three four"] * count)
    return [{"attention_mask": np.ones((count, 5)), OFFSETS: offsets, CONTEXT: context}]


def test_exact_match_and_token_f1_by_hand() -> None:
    truths = [["one"], ["two three"], ["four", "three four"], ["one two"]]
    before = spans([(0, 0), (1, 2), (2, 3), (0, 1)])
    after = spans([(0, 0), (1, 3), (3, 3), (2, 3)])  # right, one word too many, right another way, wrong
    exact, f1 = answering_metrics(questions(4), before, after, truths)
    assert (exact.name, exact.reference, exact.candidate, exact.p_value) == ("exact match", 1.0, 0.5, 0.5)
    assert (f1.name, f1.reference) == ("token F1", 1.0)
    assert f1.candidate == pytest.approx((1 + 0.8 + 1 + 0) / 4)
    assert f1.drop.low <= f1.drop.value <= f1.drop.high


def test_no_answer_is_right_where_there_is_none() -> None:
    outputs = spans([(-1, -1), (-1, -1)])
    exact, f1 = answering_metrics(questions(2), outputs, outputs, [[], ["one"]])
    assert exact.reference == f1.reference == 0.5
    assert f1.resolution == exact.resolution > 0.5, "two examples show little"


# By task


def test_each_kind_of_label_has_its_metrics() -> None:
    def names(kind: LabelKind, labels: Any, *given: Any) -> list[str]:
        return [metric.name for metric in task_metrics(Labelling(kind, labels, NAMES), *given)]

    tags, asked = tagged([[0, 1]]), spans([(0, 0)])
    assert names(LabelKind.CLASS, TRUTH, [], answers(TRUTH), answers(TRUTH)) == ["accuracy", "macro F1"]
    assert names(LabelKind.SCORE, COSINES, [], pairs(COSINES), pairs(COSINES)) == ["Pearson", "Spearman"]
    assert names(LabelKind.TAGS, [(0, 1)], [sentence(2)], tags, tags) == ["entity F1", "token accuracy"]
    assert names(LabelKind.ANSWERS, [("one",)], questions(1), asked, asked) == ["exact match", "token F1"]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(LabelKind.CLASS, (0.5,)), (LabelKind.TAGS, (1, 2)), (LabelKind.ANSWERS, ((1,), (2,))),
     (LabelKind.SCORE, (("a",),))],
)  # fmt: skip
def test_labels_of_another_kind_are_refused(kind: LabelKind, labels: Any) -> None:
    with pytest.raises(ValueError, match=f"the labels are not all of kind {kind}"):
        task_metrics(Labelling(kind, labels), [], [], [])
