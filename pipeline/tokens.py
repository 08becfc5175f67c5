"""A runtime that gives tokens and no logits, against the float32 reference's scores of the same places.

Two kinds of places are compared. At some of the held text, the runtime is asked for one token after what stands before.
And it continues prompts greedily, as the reference did: up to the first token that differs, both have read the same;
behind it they read different texts, and nothing is compared. See docs/measuring.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
GUESSES = 256  # places of the held text at which a token is asked for, in all windows together
PLACES = "places"  # of guesses in a window: the indices of its scored tokens that they stand for
LOGPROBS, TEXT_ENDS = "logprobs", "ends"  # of a continuation: see contract.Generation, pieces.Pieces.ends


@dataclass(frozen=True)
class TokenAccuracy:
    """What was found. `drop` is the mean regret as a rise of perplexity by as many nats."""

    drop: Interval
    worst_drop: float  # of one window or prompt
    regret: float  # nats by which its tokens lie below the reference's likeliest, on average
    agreement: float  # of continued prompts: share of all tokens that come before the first that is not the reference's
    top1: float  # share of the compared tokens that are the reference's
    logprob_error: float | None  # nats between its own log probability of a token and the reference's, on average
    examples: int  # windows and prompts
    positions: int  # tokens that were compared
    judged_by: Literal["tokens"] = "tokens"
    metrics: tuple[Metric, ...] = ()

    def __str__(self) -> str:
        return (
            f"judged by tokens: {self.agreement:.1%} before the first difference, "
            f"regret {self.regret:.2g} nats (at most {math.log1p(self.drop.high):.2g})"
        )


def compare_tokens(
    windows: Sequence[Example], guessed: Sequence[Example],
    written: Sequence[Example], continued: Sequence[Example],
) -> TokenAccuracy:  # fmt: skip
    """Compare guesses in windows, and continued prompts, with the reference's. Raises OutputError where they do not
    fit, or nothing was told.
    """
    found = [_compare_window(theirs, ours) for theirs, ours in zip(windows, guessed, strict=True)]
    continuations = [_compare_continuation(theirs, ours) for theirs, ours in zip(written, continued, strict=True)]
    groups = [each for each in (*found, *continuations) if each.count]
    if len(groups) < 2 or not any(each.count for each in continuations):
        raise OutputError(f"after {len(continued)} prompts, the runtime told no tokens that can be compared")
    mean = ratio_of_sums_interval([each.regret for each in groups], [each.count for each in groups], 0.95)
    errors = [error for each in groups for error in each.errors]
    count = sum(each.count for each in groups)
    return TokenAccuracy(
        drop=Interval(*(_expm1(end) for end in (mean.value, mean.low, mean.high))),
        worst_drop=max(_expm1(each.regret / each.count) for each in groups),
        regret=mean.value,
        agreement=sum(each.same for each in continuations) / sum(len(each[TOKENS]) for each in written),
        top1=sum(each.same for each in groups) / count,
        logprob_error=float(np.mean(errors)) if errors else None,
        examples=len(groups),
        positions=count,
    )


@dataclass(frozen=True)
class _Compared:
    """One window or prompt: the tokens that were compared, those that are the reference's, and what is lost in all."""

    count: int
    same: int
    regret: float
    errors: Sequence[float] = ()


def _compare_window(theirs: Example, ours: Example) -> _Compared:
    regrets = [
        _regret(theirs, token, place, ours[TEXT_ENDS])
        for token, place in zip(ours[TOKENS], ours[PLACES], strict=True)
        if token != UNTOLD
    ]
    return _Compared(len(regrets), regrets.count(0.0), math.fsum(regrets))


def _compare_continuation(theirs: Example, ours: Example) -> _Compared:
    if ours[TOKENS].shape != theirs[TOKENS].shape:
        raise OutputError(f"tokens has shape {ours[TOKENS].shape}, the reference {theirs[TOKENS].shape}")
    told = _leading(ours[TOKENS] != UNTOLD)
    expected, found, ends = theirs[TOKENS][:told], ours[TOKENS][:told], ours[TEXT_ENDS]
    agreed = _leading((found == expected) | (np.isin(found, ends) & np.isin(expected, ends)))
    count = min(agreed + 1, told)
    regret = _regret(theirs, found[agreed], agreed, ends) if agreed < told else 0.0
    return _Compared(count, agreed, regret, _errors(theirs, ours, count))


def why_tokens_rejected(accuracy: TokenAccuracy, gates: Gates) -> str | None:
    """Why a candidate is not accurate enough, or None."""
    if accuracy.drop.high <= gates.max_drop:
        return None
    lost = f"{accuracy.drop.value:.2%} (at most {accuracy.drop.high:.2%})"
    return f"what its tokens lose against the likeliest is {lost}, above the gate of {gates.max_drop:.2%}"


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(flags) if flags.all() else int(flags.argmin())


def _regret(theirs: Example, token: Any, place: int, ends: NDArray[Any]) -> float:
    """Nats by which a token lies below the likeliest; of one that is none of those that were kept, what it is at least.

    One end of a text is as good as another: a server does not tell which it was.
    """
    kept, logs = theirs[IDS][place], theirs[LOGS][place].astype(np.float64)
    meant = np.isin(kept, ends if token in ends else token)
    return float(logs.max() - (logs[meant].max() if meant.any() else logs.min()))


def _errors(theirs: Example, ours: Example, compared: int) -> list[float]:
    """How far both log probabilities of each compared token are apart, where both are known."""
    if LOGPROBS not in ours:
        return []
    found = []
    for place in range(compared):
        own, meant = float(ours[LOGPROBS][place]), theirs[IDS][place] == ours[TOKENS][place]
        if math.isfinite(own) and meant.any():
            found.append(abs(own - float(theirs[LOGS][place][meant][0])))
    return found


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))
