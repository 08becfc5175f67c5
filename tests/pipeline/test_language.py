"""Perplexity, divergence and continuations: what is computed of them, and what rejects them."""

import math
from typing import Any

import numpy as np
import pytest

from optimize.pipeline.contract import Gates
from optimize.pipeline.errors import OutputError
from optimize.pipeline.language import (
    LOSS,
    REGRET,
    TOKENS,
    LanguageAccuracy,
    compare_language,
    regrets,
    score,
    why_language_rejected,
)
from optimize.pipeline.statistics import mean_interval, ratio_of_sums_interval

VOCABULARY, SCORED, WINDOWS = 500, 40, 6
Windows = list[dict[str, Any]]


def logits(seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(SCORED, VOCABULARY))).astype(np.float32)


def text(seed: int) -> np.ndarray:
    return np.random.default_rng(100 + seed).integers(0, VOCABULARY, SCORED)


def both(noise: float) -> tuple[Windows, Windows]:
    """Scored windows of a reference and of a candidate whose logits are noisier."""
    reference = [score(logits(seed), text(seed)) for seed in range(WINDOWS)]
    random = np.random.default_rng(7)
    candidate = [
        score(
            logits(seed) + noise * random.normal(size=(SCORED, VOCABULARY)).astype(np.float32), text(seed), own["ids"]
        )
        for seed, own in enumerate(reference)
    ]
    return reference, candidate


def written(tokens: list[int], regret: float = 0.0) -> Windows:
    return [{TOKENS: np.array(tokens), REGRET: np.full(len(tokens), regret, dtype=np.float32)}]


def compared(noise: float, regret: float = 0.0) -> LanguageAccuracy:
    return compare_language(*both(noise), written([1, 2, 3, 4]), written([1, 2, 9, 4], regret))


def test_losses_are_those_of_softmax() -> None:
    found = score(logits(0), text(0))[LOSS]
    rows = logits(0).astype(np.float64)
    expected = [math.log(np.exp(row).sum()) - row[token] for row, token in zip(rows, text(0), strict=True)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_same_logits_lose_nothing() -> None:
    found = compared(0.0)
    assert found.drop.low == found.drop.value == found.drop.high == 0
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert (found.top1, found.top5) == (1, 1)
    assert found.perplexity == found.reference_perplexity
    assert (found.examples, found.positions) == (WINDOWS, WINDOWS * SCORED)


def test_divergence_is_near_to_that_over_the_whole_vocabulary() -> None:
    found, whole = compared(0.3).divergence, []
    random = np.random.default_rng(7)
    for seed in range(WINDOWS):
        first = logits(seed).astype(np.float64)
        second = first + 0.3 * random.normal(size=(SCORED, VOCABULARY)).astype(np.float32)
        p, q = (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)) for rows in (first, second))
        whole.append((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert 0.6 * np.mean(whole) < found <= np.mean(whole)


def test_agreement_ends_at_the_first_difference() -> None:
    assert compared(0.0).agreement == 0.5


def test_more_noise_loses_more() -> None:
    little, much = compared(0.05), compared(0.5)
    assert little.divergence < much.divergence
    assert little.top1 > much.top1 and little.top5 > much.top5
    assert little.drop.high - little.drop.low < much.drop.high - much.drop.low


@pytest.mark.parametrize(
    ("noise", "regret", "words"),
    [
        (0.0, 0.0, None),
        (0.0, 0.2, "not what it finds likeliest"),
        (1.0, 0.0, "perplexity"),
        (0.0, math.nan, "likeliest"),
    ],
)
def test_what_is_rejected(noise: float, regret: float, words: str | None) -> None:
    found = why_language_rejected(compared(noise, regret), Gates(max_drop=0.01))
    assert (found is None) if words is None else (found is not None and words in found)


def test_other_tokens_at_the_same_perplexity_are_seen_by_the_divergence() -> None:
    reference, _ = both(0.0)
    moved = [each | {"logs": each["logs"][:, ::-1].copy()} for each in reference]
    found = compare_language(reference, moved, written([1]), written([1]))
    assert found.drop.value == 0
    assert "KL divergence" in str(why_language_rejected(found, Gates(max_drop=0.01)))


def test_what_has_other_shapes_is_no_answer() -> None:
    with pytest.raises(OutputError, match="tokens has shape"):
        compare_language(*both(0.0), written([1, 2]), written([1]))


def test_a_token_that_was_not_the_likeliest_is_regretted() -> None:
    rows = np.array([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]], dtype=np.float32)
    assert regrets(rows, np.array([1, 1])).tolist() == [0.0, 5.0]


def test_groups_of_one_size_have_the_interval_of_their_means() -> None:
    sums, count = [3.0, 5.0, 4.0, 8.0], 4
    ratio = ratio_of_sums_interval(sums, [count] * 4, 0.95)
    mean = mean_interval([each / count for each in sums], 0.95)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((mean.value, mean.low, mean.high))
    with pytest.raises(ValueError, match="1 groups"):
        ratio_of_sums_interval([1.0], [2], 0.95)
