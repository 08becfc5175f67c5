"""The task's own metrics on labelled data: reference and candidate on the same examples. See docs/measuring.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import (
    Batches,
    Example,
    class_answers,
    exact_match,
    similarities,
    span_answers,
    token_f1,
    word_answers,
)
from optimize.pipeline.contract import LabelKind, Labelling
from optimize.pipeline.statistics import Interval

CONFIDENCE = 0.95
UPPER = (1 + CONFIDENCE) / 2  # the quantile at an interval's upper end
RESAMPLES = 500
IOB = ("B-", "I-", "E-", "S-")  # how names of tags begin of which entities can be read


@dataclass(frozen=True)
class Metric:
    """One metric of both sides. All are shares or correlations; higher is better."""

    name: str
    reference: float
    candidate: float
    drop: Interval  # reference - candidate, 95%
    p_value: float | None  # of McNemar's exact test, that both err equally often; None for metrics that have none
    examples: int
    resolution: float  # the smallest drop that so many can show: see docs/measuring.md for how each metric has it
    unit: str = "examples"  # what is counted
    power: float = 1.0  # the resolution shrinks as their number to this power grows
    gates: bool = True  # whether a drop of it rejects

    def __str__(self) -> str:
        test = "" if self.p_value is None else f", McNemar p {self.p_value:.2g}"
        ends = f"95% [{self.drop.low:.4f}, {self.drop.high:.4f}]{test}"
        return f"{self.name} {self.candidate:.4f}, reference {self.reference:.4f}: drop {self.drop.value:.4f}, {ends}"

    def why_rejected(self, allowed: float) -> str | None:
        """By the interval's upper end where the data can resolve the gate, by the estimate where they cannot."""
        if not self.gates:
            return None
        words, gate = f"{self.name} drops by {self.drop.value:.4f}", f"above the gate of {allowed:g}"
        if self.resolution <= allowed < self.drop.high:
            return f"{words} (at most {self.drop.high:.4f}), {gate}"
        if self.resolution > allowed and not self.drop.value <= allowed * (1 + 1e-9):
            return f"{words}, {gate}"
        return None

    def what_it_leaves_open(self, allowed: float) -> str | None:
        """That the labelled data are too few for the gate, and how many it would take; None when they suffice."""
        if self.resolution <= allowed or not self.gates:
            return None
        return (
            f"{self.name} on {self.examples} labelled {self.unit} cannot show a drop below {self.resolution:.4f}: "
            f"about {self.needed(allowed)} would resolve the gate of {allowed:g}"
        )

    def needed(self, allowed: float) -> int:
        """How many it would take to show a drop of `allowed`."""
        return int(np.ceil(self.examples * (self.resolution / allowed) ** (1 / self.power)))


def task_metrics(
    labelling: Labelling, batches: Batches, reference: Sequence[Example], candidate: Sequence[Example]
) -> tuple[Metric, ...]:
    """The metrics that such labels have.

    `batches` are what the examples were encoded to, with what turns outputs into answers; `reference` and `candidate`
    the judged outputs of each example. Raises KeyError or ValueError where these and the labels do not fit each other.
    """
    kind, labels = labelling.kind, labelling.labels
    check_labels(labelling)
    if kind == LabelKind.CLASS:
        return classification_metrics(reference, candidate, cast(Sequence[int], labels))
    if kind == LabelKind.SCORE:
        return similarity_metrics(reference, candidate, cast(Sequence[float], labels))
    if kind == LabelKind.TAGS:
        tags = cast(Sequence[Sequence[int]], labels)
        return tagging_metrics(batches, reference, candidate, tags, labelling.classes or {})
    return answering_metrics(batches, reference, candidate, cast(Sequence[Sequence[str]], labels))


def classification_metrics(
    reference: Sequence[Example], candidate: Sequence[Example], labels: Sequence[int]
) -> tuple[Metric, ...]:
    """Accuracy with McNemar's exact test, and macro F1 with a paired bootstrap.

    Raises ValueError for unlike numbers of examples.
    """
    from sklearn.metrics import f1_score

    truth = np.asarray(labels)
    before, after = class_answers(reference), class_answers(candidate)
    _check_numbers(before, after, truth)

    def macro(answers: NDArray[Any], rows: NDArray[Any]) -> float:
        return float(f1_score(truth[rows], answers[rows], average="macro", zero_division=0))

    accuracy = share_of_right("accuracy", before == truth, after == truth)
    # an answer that was wrong and still is can be another one, which macro F1 sees too
    changed = int((before != after).sum())
    _, sizes = np.unique(truth, return_counts=True)
    rarest = len(truth) / (len(sizes) * int(sizes.min()))
    return accuracy, bootstrapped("macro F1", macro, before, after, changed, weight=rarest)


def similarity_metrics(
    reference: Sequence[Example], candidate: Sequence[Example], scores: Sequence[float]
) -> tuple[Metric, ...]:
    """Pearson's and Spearman's correlation of the cosine of two embeddings with what people said, by bootstrap.

    Every cosine moves a little, so the bootstrap has a width whatever happens: its half is the resolution.
    Raises ValueError for unlike numbers of pairs.
    """
    from scipy import stats

    truth = np.asarray(scores, dtype=np.float64)
    before, after = similarities(reference), similarities(candidate)
    _check_numbers(before, after, truth)

    def correlation(test: Callable[..., Any]) -> Callable[[NDArray[Any], NDArray[Any]], float]:
        def of(cosines: NDArray[Any], rows: NDArray[Any]) -> float:
            found = float(test(cosines[rows], truth[rows]).statistic)
            return found if np.isfinite(found) else 0.0  # of what is all the same: it tells nothing about the other

        return of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return tuple(
            bootstrapped(name, correlation(test), before, after, len(truth), "pairs", by_width=True)
            for name, test in (("Pearson", stats.pearsonr), ("Spearman", stats.spearmanr))
        )


def tagging_metrics(
    batches: Batches,
    reference: Sequence[Example],
    candidate: Sequence[Example],
    tags: Sequence[Sequence[int]],
    classes: Mapping[int, str],
) -> tuple[Metric, ...]:
    """Token accuracy with McNemar's exact test; where tags mark entities, their F1 with a bootstrap over sentences.

    A word answers with its first token. Words that were cut off count on neither side. Entities are seqeval's, as
    conlleval reads them; their F1 is the micro average. Raises ValueError where labels and words do not fit.
    """
    ours, theirs = word_answers(batches, candidate), word_answers(batches, reference)
    _check_numbers(theirs, ours, tags)
    sentences = []
    for labels, words, others in zip(tags, theirs, ours, strict=True):
        if words and max(words) >= len(labels):
            raise ValueError(f"{len(labels)} labels for a sentence with a word {max(words) + 1}")
        if words:
            sentences.append([(labels[word], words[word], others[word]) for word in words])
    answered = np.array([word for sentence in sentences for word in sentence]).reshape(-1, 3)
    truth, before, after = answered.T
    accuracy = share_of_right("token accuracy", before == truth, after == truth, "words")
    names = [name for name in classes.values() if name != "O"]
    if not names or not all(name.startswith(IOB) for name in names):
        return (accuracy,)
    # found and right, found, true: their sums over sentences give F1, so the bootstrap need not read entities again
    counts = np.array([_entities(sentence, classes) for sentence in sentences])

    def entity_f1(side: NDArray[Any], rows: NDArray[Any]) -> float:
        right, found, expected = side[rows].sum(axis=0)
        return float(2 * right / (found + expected)) if found + expected else 0.0

    changed = int((counts[:, 0] != counts[:, 1]).any(axis=1).sum())
    having = max(int(counts.any(axis=(1, 2)).sum()), 1)  # sentences without an entity on any side say nothing
    before, after, weight = counts[:, 0], counts[:, 1], len(counts) / having
    return bootstrapped("entity F1", entity_f1, before, after, changed, "sentences", weight=weight), accuracy


def answering_metrics(
    batches: Batches, reference: Sequence[Example], candidate: Sequence[Example], truths: Sequence[Sequence[str]]
) -> tuple[Metric, ...]:
    """Exact match with McNemar's exact test, and the F1 of words with a paired bootstrap, both as SQuAD has them.

    No answer is an answer where the labels have one such: SQuAD 2's evaluation, and else SQuAD 1's. Raises ValueError
    for unlike numbers of examples.
    """
    unanswerable = not all(truths)
    before, after = (span_answers(batches, side, none_is_allowed=unanswerable) for side in (reference, candidate))
    _check_numbers(before, after, truths)

    def each(score: Callable[[str, Sequence[str]], float], answers: Sequence[str]) -> NDArray[Any]:
        return np.array([score(*pair) for pair in zip(answers, truths, strict=True)])

    def mean(side: NDArray[Any], rows: NDArray[Any]) -> float:
        return float(side[rows].mean())

    scores = each(token_f1, before), each(token_f1, after)
    changed = int((scores[0] != scores[1]).sum())
    return (
        share_of_right("exact match", each(exact_match, before), each(exact_match, after)),
        bootstrapped("token F1", mean, *scores, changed),
    )


def share_of_right(name: str, before: NDArray[np.bool_], after: NDArray[np.bool_], unit: str = "examples") -> Metric:
    """The share of right answers. `before` and `after` say which the reference and the candidate got right.

    The interval is exact too: Clopper and Pearson's for the answers lost and for those gained, each at half of the 5%,
    so that it has a width even where no answer differs. Raises ValueError where there are none.
    """
    from scipy.stats import binomtest

    count = len(before)
    if not count:
        raise ValueError(f"no labelled {unit} are left to answer")
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    gone, come = (binomtest(each, count).proportion_ci(UPPER, method="exact") for each in (lost, gained))
    return Metric(
        name, float(before.mean()), float(after.mean()),
        Interval((lost - gained) / count, float(gone.low - come.high), float(gone.high - come.low)),
        float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0, count, _resolution(count), unit,
    )  # fmt: skip


def bootstrapped(
    name: str,
    statistic: Callable[[NDArray[Any], NDArray[Any]], float],
    before: NDArray[Any],
    after: NDArray[Any],
    changed: int,
    unit: str = "examples",
    *,
    by_width: bool = False,
    weight: float = 1.0,
) -> Metric:
    """A metric whose interval comes from drawing examples anew, the same ones for both sides (percentiles).

    `statistic` takes one side and the rows that were drawn; where nothing `changed` there is nothing to draw. With
    `by_width` the resolution is the interval's half width, else what no changed answer among so many leaves possible,
    where the answer that counts most has `weight` times the mean one's.
    """
    count = len(before)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES if changed else 0, count))
    drops = [statistic(before, rows) - statistic(after, rows) for rows in draws]
    low, high = np.quantile(drops, [1 - UPPER, UPPER]) if drops else (0.0, 0.0)
    everything = np.arange(count)
    reference, found = statistic(before, everything), statistic(after, everything)
    drop = Interval(reference - found, float(low), float(high))
    if by_width:
        return Metric(name, reference, found, drop, None, count, (drop.high - drop.low) / 2, unit, power=0.5)
    return Metric(name, reference, found, drop, None, count, min(weight * _resolution(count), 1.0), unit)


def _entities(sentence: Sequence[tuple[int, int, int]], classes: Mapping[int, str]) -> list[tuple[int, int, int]]:
    """Of one sentence's (truth, reference, candidate): right, found and true entities of either side."""
    from seqeval.metrics.sequence_labeling import get_entities

    columns = zip(*sentence, strict=True)
    truth, *sides = (set(get_entities([classes.get(index, "O") for index in column])) for column in columns)
    return [(len(side & truth), len(side), len(truth)) for side in sides]


def check_labels(labelling: Labelling) -> None:
    """Raise ValueError unless all labels are of the kind that they are said to be."""
    if not all(_is_label(each, labelling.kind) for each in labelling.labels):
        raise ValueError(f"the labels are not all of kind {labelling.kind}")


def _is_label(label: object, kind: LabelKind) -> bool:
    if kind in (LabelKind.CLASS, LabelKind.CHOICE):
        return isinstance(label, int)
    if kind == LabelKind.SCORE:
        return isinstance(label, int | float)
    inner = int if kind == LabelKind.TAGS else str
    return isinstance(label, tuple | list) and all(isinstance(each, inner) for each in label)


def _check_numbers(before: Any, after: Any, labels: Any) -> None:
    if not len(labels) == len(before) == len(after):
        raise ValueError(f"{len(before)} and {len(after)} examples for {len(labels)} labels")


def _resolution(count: int) -> float:
    """The largest share of answers that can change where none of `count` did (Clopper and Pearson)."""
    from scipy.stats import binomtest

    return float(binomtest(0, count).proportion_ci(UPPER, method="exact").high)
