"""A runtime that gives tokens and no logits, against the float32 reference: greedy continuations of the same prompts.

Up to the first token that differs, both have read the same, and the reference's scores of that place say what the other
token costs. Behind it they read different texts, and nothing is compared. See docs/measuring.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import Example
from optimize.pipeline.contract import Gates
from optimize.pipeline.errors import OutputError
from optimize.pipeline.language import IDS, LOGS, TOKENS
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval, ratio_of_sums_interval

UNTOLD = -1  # in place of a token that the runtime did not tell: neither it nor what follows it is compared
LOGPROBS, ENDS = "logprobs", "ends"  # what else is known of a continuation: see contract.Generation, pieces.Pieces.ends


@dataclass(frozen=True)
class TokenAccuracy:
    """What was found. `drop` is the mean regret as if it were a rise of perplexity."""

    drop: Interval
    worst_drop: float  # of one prompt
    regret: float  # nats by which its tokens lie below the reference's likeliest, on average
    agreement: float  # share of all tokens that come before the first that is not the reference's
    top1: float  # share of the compared tokens that are the reference's
    logprob_error: float | None  # nats between its own log probability of a token and the reference's, on average
    examples: int  # prompts
    positions: int  # tokens that were compared
    judged_by: Literal["tokens"] = "tokens"
    metrics: tuple[Metric, ...] = ()

    def __str__(self) -> str:
        return (
            f"judged by tokens: {self.agreement:.1%} before the first difference, "
            f"regret {self.regret:.2g} nats (at most {math.log1p(self.drop.high):.2g})"
        )


def compare_tokens(written: Sequence[Example], continued: Sequence[Example]) -> TokenAccuracy:
    """Compare continued prompts with the reference's. Raises OutputError when their shapes differ."""
    regrets: list[float] = []
    counts: list[int] = []
    same: list[int] = []
    errors: list[float] = []
    for theirs, ours in zip(written, continued, strict=True):
        if ours[TOKENS].shape != theirs[TOKENS].shape:
            raise OutputError(f"tokens has shape {ours[TOKENS].shape}, the reference {theirs[TOKENS].shape}")
        told = _leading(ours[TOKENS] != UNTOLD)
        expected, found, ends = theirs[TOKENS][:told], ours[TOKENS][:told], ours[ENDS]
        agreed = _leading((found == expected) | (np.isin(found, ends) & np.isin(expected, ends)))
        if told == 0:
            continue
        counts.append(min(agreed + 1, told))
        same.append(agreed)
        regrets.append(_regret(theirs, found, agreed, ends) if agreed < told else 0.0)
        errors += _errors(theirs, ours, counts[-1])
    if len(counts) < 2:
        raise OutputError(f"of {len(continued)} prompts, the runtime told no tokens that can be compared")
    mean = ratio_of_sums_interval(regrets, counts, 0.95)
    return TokenAccuracy(
        drop=Interval(*(math.expm1(min(end, 700.0)) for end in (mean.value, mean.low, mean.high))),
        worst_drop=math.expm1(min(max(each / count for each, count in zip(regrets, counts, strict=True)), 700.0)),
        regret=mean.value,
        agreement=sum(same) / sum(len(each[TOKENS]) for each in written),
        top1=sum(same) / sum(counts),
        logprob_error=float(np.mean(errors)) if errors else None,
        examples=len(counts),
        positions=sum(counts),
    )


def why_tokens_rejected(accuracy: TokenAccuracy, gates: Gates) -> str | None:
    """Why a candidate is not accurate enough, or None."""
    if accuracy.drop.high <= gates.max_drop:
        return None
    lost = f"{accuracy.drop.value:.2%} (at most {accuracy.drop.high:.2%})"
    return f"what its tokens lose against the likeliest is {lost}, above the gate of {gates.max_drop:.2%}"


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(flags) if flags.all() else int(flags.argmin())


def _regret(theirs: Mapping[str, NDArray[Any]], found: NDArray[Any], place: int, ends: NDArray[Any]) -> float:
    """Nats at the first difference; of a token that is none of those that were kept, what it is at least."""
    kept, logs = theirs[IDS][place], theirs[LOGS][place].astype(np.float64)
    meant = np.isin(kept, ends if found[place] in ends else found[place])
    return float(logs.max() - (logs[meant].max() if meant.any() else logs.min()))


def _errors(theirs: Mapping[str, NDArray[Any]], ours: Mapping[str, NDArray[Any]], compared: int) -> list[float]:
    """How far both log probabilities of each compared token are apart, where both are known."""
    if LOGPROBS not in ours:
        return []
    found = []
    for place in range(compared):
        own, meant = float(ours[LOGPROBS][place]), theirs[IDS][place] == ours[TOKENS][place]
        if math.isfinite(own) and meant.any():
            found.append(abs(own - float(theirs[LOGS][place][meant][0])))
    return found
