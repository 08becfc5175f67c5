"""A language model's next-token probabilities against the float32 reference's, on the same held text. numpy alone.

What a window of text gives is small, whatever the vocabulary: each token's loss, and the probabilities of the tokens
that the reference finds likeliest. So a worker computes it beside the logits, and evidence can hold it.
See docs/measuring.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import Example
from optimize.pipeline.contract import Gates
from optimize.pipeline.errors import OutputError
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval, ratio_of_sums_interval

ROWS = 32  # positions that are scored at a time: a vocabulary's worth of logits has several copies meanwhile
KEPT = 64  # of the reference's likeliest tokens at each position; the others are one more
LOSS, IDS, LOGS, TOP = "loss", "ids", "logs", "top"  # what scoring a window gives
TOKENS, REGRET = "tokens", "regret"  # what continuing a prompt gives
TAIL = 10  # times the gate: what the divergence may reach
REGRETTED = 0.1  # nats by which a token that was generated may lie below the likeliest, on average


@dataclass(frozen=True)
class LanguageAccuracy:
    """What was found. `drop` is the rise of perplexity, as a share of the reference's."""

    drop: Interval
    worst_drop: float  # of one window
    divergence: float  # mean of KL(reference || candidate) in nats, over KEPT tokens and the rest as one
    perplexity: float
    reference_perplexity: float
    top1: float  # share of positions whose likeliest token is the reference's
    top5: float  # share of the reference's five likeliest tokens that are among the candidate's
    agreement: float  # share of greedily generated tokens before the first that is not the reference's
    regret: float  # nats by which generated tokens lie below the likeliest by the artifact's own scoring, on average
    examples: int  # windows
    positions: int  # that were scored
    metrics: tuple[Metric, ...] = ()

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} ({self.drop.value:+.2%}, at most {self.drop.high:+.2%}), "
            f"KL {self.divergence:.2g}, top-1 {self.top1:.1%}"
        )


def score(logits: NDArray[Any], tokens: NDArray[Any], ids: NDArray[Any] | None = None) -> dict[str, Any]:
    """What is judged of a stretch of text: the logits before each of its tokens, [scored, vocabulary], and int64 tokens
    of [scored].

    `ids` are the reference's likeliest at each position, [scored, KEPT]; without them, these logits' own are taken.
    """
    parts = []
    for begin in range(0, len(tokens), ROWS):
        rows = slice(begin, begin + ROWS)
        parts.append(_score_rows(logits[rows], tokens[rows], None if ids is None else ids[rows]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _score_rows(logits: NDArray[Any], tokens: NDArray[Any], ids: NDArray[Any] | None) -> dict[str, Any]:
    rows = logits - logits.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    kept = min(KEPT, rows.shape[-1] - 1)
    if ids is None:
        ids = np.argpartition(-rows, kept, axis=-1)[:, :kept]
    five = np.argpartition(-rows, 5, axis=-1)[:, :5]
    five = np.take_along_axis(five, np.argsort(-np.take_along_axis(rows, five, axis=-1), axis=-1), axis=-1)
    return {
        LOSS: -np.take_along_axis(rows, tokens[:, None], axis=-1)[:, 0],
        IDS: ids.astype(np.int32),
        LOGS: np.take_along_axis(rows, ids.astype(np.int64), axis=-1),
        TOP: five.astype(np.int32),
    }


def regrets(logits: NDArray[Any], tokens: NDArray[Any]) -> NDArray[np.float32]:
    """How far, in nats, each token lies below the likeliest: logits of [new, vocabulary] for tokens of [new]."""
    found = logits.max(axis=-1) - np.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return np.asarray(found, dtype=np.float32)


def compare_language(
    reference: Sequence[Example], candidate: Sequence[Example],
    written: Sequence[Example], continued: Sequence[Example],
) -> LanguageAccuracy:  # fmt: skip
    """Compare windows and continued prompts pairwise, whatever else was scored beside the windows.

    Raises OutputError when their shapes differ.
    """
    reference, candidate = ([each for each in side if LOSS in each] for side in (reference, candidate))
    for ours, theirs in zip([*candidate, *continued], [*reference, *written], strict=True):
        for name in theirs.keys() & {LOSS, TOKENS}:
            if ours[name].shape != theirs[name].shape:
                shapes = f"{list(ours[name].shape)}, the reference {list(theirs[name].shape)}"
                raise OutputError(f"{name} has shape {shapes}")
    counts = [len(each[LOSS]) for each in reference]
    expected, found = (_sums(side) for side in (reference, candidate))
    rises = [ours - theirs for ours, theirs in zip(found, expected, strict=True)]
    rise = ratio_of_sums_interval(rises, counts, 0.95)
    pairs = list(zip(reference, candidate, strict=True))
    same = [_leading(ours[TOKENS], theirs[TOKENS]) for theirs, ours in zip(written, continued, strict=True)]
    return LanguageAccuracy(
        drop=Interval(*(_expm1(end) for end in (rise.value, rise.low, rise.high))),
        worst_drop=_expm1(max(rise / count for rise, count in zip(rises, counts, strict=True))),
        divergence=float(np.concatenate([_divergence(theirs[LOGS], ours[LOGS]) for theirs, ours in pairs]).mean()),
        perplexity=_exp(math.fsum(found) / sum(counts)),
        reference_perplexity=_exp(math.fsum(expected) / sum(counts)),
        top1=float(np.concatenate([theirs[TOP][:, 0] == ours[TOP][:, 0] for theirs, ours in pairs]).mean()),
        top5=float(np.concatenate([_overlap(theirs[TOP], ours[TOP]) for theirs, ours in pairs]).mean()),
        agreement=float(np.mean(same)),
        regret=float(np.concatenate([each[REGRET] for each in continued]).mean()),
        examples=len(counts),
        positions=sum(counts),
    )  # fmt: skip


def why_language_rejected(accuracy: LanguageAccuracy, gates: Gates) -> str | None:
    """Why a candidate is not accurate enough, or None. Each rule is explained in docs/measuring.md."""
    allowed = gates.max_drop
    if not accuracy.drop.high <= allowed:
        risen = f"{accuracy.drop.value:+.2%} (at most {accuracy.drop.high:+.2%})"
        return f"perplexity {risen} is above the gate of {allowed:+.2%}"
    if not accuracy.divergence <= TAIL * math.log1p(allowed):
        return f"KL divergence {accuracy.divergence:.2g} nats is above {TAIL} times what the gate allows of loss"
    if not accuracy.regret <= REGRETTED:
        return (
            f"what it generates is not what it finds likeliest: {accuracy.regret:.2g} nats below on average, "
            f"above {REGRETTED:g}"
        )
    return next(filter(None, (metric.why_rejected(allowed) for metric in accuracy.metrics)), None)


def _sums(windows: Sequence[Mapping[str, NDArray[Any]]]) -> list[float]:
    return [float(each[LOSS].sum(dtype=np.float64)) for each in windows]


def _divergence(expected: NDArray[Any], found: NDArray[Any]) -> NDArray[np.float64]:
    """KL at each position, the tokens that are not kept being one: it can only be smaller than over all of them."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    inside = (np.exp(expected) * (expected - found)).sum(axis=-1)
    rests = [np.log(np.maximum(1 - np.exp(logs).sum(axis=-1), 1e-9)) for logs in (expected, found)]
    return np.asarray(inside + np.exp(rests[0]) * (rests[0] - rests[1]))


def _overlap(expected: NDArray[Any], found: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray((expected[:, :, None] == found[:, None, :]).any(axis=-1).mean(axis=-1))


def _leading(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The share of tokens before the first that differs."""
    differ = np.flatnonzero(found != expected)
    return float(differ[0] / len(expected)) if len(differ) else 1.0


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf
