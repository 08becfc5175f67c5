"""Continuations against the reference's: what a first difference costs, what is not compared, what rejects."""

import math
from typing import Any

import numpy as np
import pytest

from optimize.pipeline.contract import Gates, Kind
from optimize.pipeline.errors import OutputError
from optimize.pipeline.language import IDS, LOGS, TOKENS
from optimize.pipeline.manifest import adapter
from optimize.pipeline.tokens import (
    LOGPROBS,
    PLACES,
    TEXT_ENDS,
    UNTOLD,
    TokenAccuracy,
    compare_tokens,
    why_tokens_rejected,
)
from optimize.pipeline.verdict import Candidate, Status

END, OTHER_END = 8, 9
SCORES = np.log(np.array([0.5, 0.3, 0.15, 0.04]))  # of four kept tokens; the rest have 0.01


def reference(*tokens: int) -> dict[str, Any]:
    """At each place the token itself is likeliest, and the three after it follow."""
    ids = np.array([[token, token + 1, token + 2, token + 3] for token in tokens], dtype=np.int32)
    logs = np.tile(SCORES, (len(tokens), 1)).astype(np.float32)
    return {TOKENS: np.array(tokens), IDS: ids[:, ::-1], LOGS: logs[:, ::-1]}


def candidate(*tokens: int, told: float = math.nan) -> dict[str, Any]:
    return {TOKENS: np.array(tokens), LOGPROBS: np.full(len(tokens), told), TEXT_ENDS: np.array([END, OTHER_END])}


SAME = (reference(1, 2, 3, 4), candidate(1, 2, 3, 4))


def compared(theirs: dict[str, Any], ours: dict[str, Any]) -> TokenAccuracy:
    """One prompt beside one that agrees throughout."""
    return compare_tokens([], [], [theirs, SAME[0]], [ours, SAME[1]])


def test_the_same_tokens_lose_nothing() -> None:
    found = compared(*SAME)
    assert (found.drop.low, found.drop.value, found.drop.high, found.regret) == (0, 0, 0, 0)
    assert (found.agreement, found.top1, found.examples, found.positions) == (1, 1, 2, 8)
    assert found.logprob_error is None
    assert why_tokens_rejected(found, Gates(max_drop=1e-9)) is None


def test_a_first_difference_costs_what_the_reference_says_and_ends_the_comparison() -> None:
    found = compared(reference(1, 2, 3, 4), candidate(1, 3, 77, 77))
    assert found.positions == 2 + 4
    assert found.regret == pytest.approx(math.log(0.5 / 0.3) / 6, rel=1e-6)
    assert found.drop.value == pytest.approx(math.expm1(found.regret))
    assert found.worst_drop == pytest.approx(math.expm1(math.log(0.5 / 0.3) / 2), rel=1e-6)
    assert (found.agreement, found.top1) == (5 / 8, 5 / 6)
    assert "above the gate of 1.00%" in str(why_tokens_rejected(found, Gates(max_drop=0.01)))


def test_a_token_that_was_not_kept_costs_at_least_what_the_last_that_was_does() -> None:
    found = compared(reference(1, 2, 3, 4), candidate(99, 2, 3, 4))
    assert found.regret == pytest.approx(math.log(0.5 / 0.04) / 5, rel=1e-6)


def test_guesses_in_held_text_count_by_their_places() -> None:
    guessed = candidate(3, 3, 9, UNTOLD) | {PLACES: np.array([0, 2, 3, 1])}  # likeliest there are 1, 3, 4 and 2
    found = compare_tokens([reference(1, 2, 3, 4)], [guessed], [SAME[0]], [SAME[1]])
    lost = math.log(0.5 / 0.15) + 0 + math.log(0.5 / 0.04)
    assert found.regret == pytest.approx(lost / (3 + 4), rel=1e-6)
    assert (found.top1, found.agreement, found.examples, found.positions) == (5 / 7, 1, 2, 7)


def test_one_end_of_a_text_is_as_good_as_another() -> None:
    assert compared(reference(1, OTHER_END, 3, 4), candidate(1, END, 3, 4)).regret == 0
    ended = compared(reference(1, 7, 3, 4), candidate(1, OTHER_END, 3, 4))  # 8, the other end, is the second likeliest
    assert ended.regret == pytest.approx(math.log(0.5 / 0.3) / 6, rel=1e-6)


def test_what_was_not_told_is_not_compared_but_something_must_be() -> None:
    found = compared(reference(1, 2, 3, 4), candidate(1, 2, UNTOLD, UNTOLD))
    assert (found.regret, found.positions, found.agreement) == (0, 6, 6 / 8)
    silent = candidate(UNTOLD, UNTOLD, UNTOLD, UNTOLD)
    with pytest.raises(OutputError, match="told no tokens"):
        compare_tokens([], [], [SAME[0]] * 2, [silent] * 2)
    with pytest.raises(OutputError, match="tokens has shape"):
        compared(reference(1, 2), candidate(1, 2, 3))


def test_log_probabilities_are_held_against_the_references() -> None:
    found = compared(reference(1, 2), candidate(1, 3, told=math.log(0.4)))
    expected = (math.log(0.5 / 0.4) + math.log(0.4 / 0.3)) / 2
    assert found.logprob_error == pytest.approx(expected, rel=1e-6)


def test_readers_of_the_json_are_told_how_it_was_judged() -> None:
    found = compared(*SAME)
    types = adapter(Candidate)
    made = types.validate_json(types.dump_json(Candidate("n", "r", Kind.OLLAMA, Status.PASSED, accuracy=found)))
    assert made.accuracy == found and made.accuracy.judged_by == "tokens"
    assert str(found).startswith("judged by tokens: 100.0% before the first difference")
