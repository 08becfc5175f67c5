"""What a language model answers to questions, or a speech model writes of a clip, and how often that is right.

Questions travel behind the windows of text in evaluation.npz; so `verify` finds them in the evidence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import Batches, Example
from optimize.pipeline.batches import FIRST
from optimize.pipeline.contract import LabelKind, Labelling
from optimize.pipeline.metrics import Metric, bootstrapped, check_labels, share_of_right

# of what is encoded, under names that no model's input can have
CHARACTERS = "questions.characters"  # [choices]: how long each is
ENDS = "questions.ends"  # the tokens that end a text: prompts and clips that have them are answered
TRUTH = "questions.truth"  # of a clip: the words that are said in it, normalized
# of what comes back
LIKELIHOODS = "questions.likelihoods"  # [choices]: the logarithm of each one's, behind its question
ANSWERS = "questions.answers"  # [questions]: text; of a clip, normalized
SPOKEN = "questions.spoken"  # [tokens]: what the reference writes of a clip


def sequences(batch: Mapping[str, NDArray[Any]]) -> Iterator[tuple[NDArray[Any], int]]:
    """The token sequences of a window, or of a question's choices, with the index of the first that is scored."""
    if CHARACTERS not in batch:
        yield batch["input_ids"], int(batch[FIRST])
        return
    for tokens, mask, first in zip(batch["input_ids"], batch["attention_mask"], batch[FIRST], strict=True):
        yield tokens[mask != 0], int(first)


def question_metrics(
    labelling: Labelling, batches: Batches, reference: Sequence[Example], candidate: Sequence[Example]
) -> tuple[Metric, ...]:
    """The share of right answers of both sides: with choices `acc` and `acc_norm`, of clips the share of right words,
    else `exact_match`.

    `batches` are what the text and the questions were encoded to, `reference` and `candidate` what came back of each.
    Raises KeyError or ValueError where these and the labels do not fit each other.
    """
    check_labels(labelling)
    if labelling.kind == LabelKind.CHOICE:
        lengths = [each[CHARACTERS] for each in batches if CHARACTERS in each]
        return _choice_metrics(lengths, _kept(reference, LIKELIHOODS), _kept(candidate, LIKELIHOODS), labelling.labels)
    if labelling.kind == LabelKind.TRANSCRIPT:
        truths = [str(text) for text in _kept(batches, TRUTH)]
        before, after = (
            [str(text) for each in _kept(side, ANSWERS) for text in each] for side in (reference, candidate)
        )
        return word_accuracy(truths, before, after)
    targets = cast(Sequence[Sequence[str]], labelling.labels)

    def right(side: Sequence[Example]) -> NDArray[np.bool_]:
        texts = [str(text) for each in _kept(side, ANSWERS) for text in each]
        return np.array([is_match(text, accepted) for text, accepted in zip(texts, targets, strict=True)])

    return (share_of_right("exact_match", right(reference), right(candidate), "questions"),)


def word_accuracy(truths: Sequence[str], before: Sequence[str], after: Sequence[str]) -> tuple[Metric, ...]:
    """1 - WER over all clips: words that are wrong, missing or too many, by those that were said.

    Raises ValueError for unlike numbers of texts.
    """
    from jiwer import process_words

    def errors(found: str, truth: str) -> int:
        if not truth:  # which jiwer refuses
            return len(found.split())
        counted = process_words(truth, found)
        return int(counted.substitutions + counted.deletions + counted.insertions)

    words = np.array([len(truth.split()) for truth in truths])
    sides = [
        np.stack([[errors(*pair) for pair in zip(side, truths, strict=True)], words], axis=1)
        for side in (before, after)
    ]  # fmt: skip

    def share(side: NDArray[Any], rows: NDArray[Any]) -> float:
        wrong, said = side[rows].sum(axis=0)
        return float(1 - wrong / max(said, 1))

    changed = sum(one != other for one, other in zip(before, after, strict=True))
    return (bootstrapped("word accuracy (1 - WER)", share, sides[0], sides[1], changed, "clips"),)


def is_match(text: str, accepted: Sequence[str]) -> bool:
    """lm-evaluation-harness' `exact_match` behind its filter `remove_whitespace`: what is around it is left out, case
    and punctuation count.
    """
    return text.strip() in [target.strip() for target in accepted]


def _choice_metrics(
    lengths: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]], labels: Any
) -> tuple[Metric, ...]:
    """`acc` takes the likeliest choice; `acc_norm`, which rejects nothing, the likeliest by character."""
    for label, *sides in zip(labels, lengths, reference, candidate, strict=True):
        if any(each.shape != (len(sides[0]),) or not 0 <= label < len(each) for each in sides):
            raise ValueError(f"choice {label} is right of {[len(each) for each in sides]} choices")

    def right(side: Sequence[NDArray[Any]], by: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        chosen = [int((each / length).argmax()) for each, length in zip(side, by, strict=True)]
        return np.array([choice == label for choice, label in zip(chosen, labels, strict=True)])

    whole = [np.ones(len(each)) for each in lengths]
    acc, norm = (
        share_of_right(name, right(reference, by), right(candidate, by), "questions")
        for name, by in (("acc", whole), ("acc_norm", lengths))
    )
    return acc, dataclasses.replace(norm, gates=False)


def _kept(side: Sequence[Example], name: str) -> list[NDArray[Any]]:
    return [each[name] for each in side if name in each]
