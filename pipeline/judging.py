"""What a worker asks of an open language model, for its judges: scores, answers, tokens. Arrays travel in .npz."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optimize.pipeline.batches import FIRST, NEW, SOUND, load_batches, save_batches
from optimize.pipeline.calls import call_of
from optimize.pipeline.language import IDS, LOSS, REGRET, TOKENS, regrets, score
from optimize.pipeline.questions import ANSWERS, CHARACTERS, ENDS, LIKELIHOODS, SPOKEN, sequences
from optimize.pipeline.tokens import GUESSES, LOGPROBS, PLACES, TEXT_ENDS


def score_windows(session: Any, windows: str, reference: str | None, out: str, folder: str) -> dict[str, Any]:
    """Score every window of an .npz (see language.score), at the tokens that the reference's scores name; and
    answer every question behind them, with the tokenizer in a checkpoint's `folder`.
    """
    batches = load_batches(Path(windows))
    named = load_batches(Path(reference)) if reference else [{} for _ in batches]
    found = []
    for batch, theirs in zip(batches, named, strict=True):
        ids = theirs.get(IDS)
        if SOUND in batch:
            heard, problems = _transcribed(session, batch, theirs, Path(folder))
            if problems:
                return {"problems": problems, "repeat_error": 0.0}
            found.append(heard)
            continue
        if ENDS in batch:
            found.append({ANSWERS: np.array(_answers(session, batch, Path(folder)), dtype=np.str_)})
            continue
        scores = []
        for tokens, first in sequences(batch):
            scored = tokens[first:]
            logits = session.logits(tokens[:-1], len(scored))
            if problems := _wrong(logits, len(scored)):
                return {"problems": problems, "repeat_error": 0.0}
            scores.append(score(logits, scored, ids))
            del logits  # before there are the next
        likelihoods = np.array([-each[LOSS].sum(dtype=np.float64) for each in scores])
        found.append({LIKELIHOODS: likelihoods} if CHARACTERS in batch else scores[0])
    save_batches(Path(out), found)
    again = (batches[0][SOUND], found[0][SPOKEN]) if SOUND in batches[0] else (batches[0]["input_ids"], 1)
    repeat = float(np.abs(session.logits(*again) - session.logits(*again)).max())
    return {"problems": [], "repeat_error": repeat}


def _transcribed(
    session: Any, batch: Mapping[str, Any], reference: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """A clip's transcription to its end, as text, and what the session finds of the reference's, token by token; and
    what is wrong with that by itself.
    """
    from optimize.models.speech import text_reader
    from optimize.targets.runtimes.generating import write_until

    ends = batch[ENDS].tolist()
    (written,) = write_until(session, [batch[SOUND]], int(batch[NEW]), lambda tokens: tokens[-1] in ends)
    spoken = reference.get(SPOKEN, np.array(written, dtype=np.int64))
    logits = session.logits(batch[SOUND], spoken)
    if problems := _wrong(logits, len(spoken)):
        return {}, problems
    text = np.array([text_reader(folder)(written)], dtype=np.str_)
    return score(logits, spoken, reference.get(IDS)) | {SPOKEN: spoken, ANSWERS: text}, []


def _answers(session: Any, batch: Mapping[str, Any], folder: Path) -> list[str]:
    """What the session writes behind each prompt of a batch, to the end of the line."""
    from optimize.models.encoding import load_tokenizer
    from optimize.models.questions import answer_text, is_over
    from optimize.targets.runtimes.generating import write_until

    tokenizer, ends = load_tokenizer(folder), batch[ENDS].tolist()
    prompts = call_of(session, batch).prompts
    written = write_until(session, prompts, int(batch[NEW]), lambda tokens: is_over(tokenizer, tokens, ends))
    return [answer_text(tokenizer, tokens, ends) for tokens in written]


def guess_tokens(session: Any, windows: str, out: str) -> dict[str, Any]:
    """Of a session that gives no logits, in place of score_windows: its next token at places all over every window."""
    found = []
    batches = [each for each in load_batches(Path(windows)) if FIRST in each and each[FIRST].ndim == 0]  # the text
    for batch in batches:
        tokens, first, places = batch["input_ids"], int(batch[FIRST]), list[int]()
        scored = len(tokens) - first
        wanted = np.linspace(0, scored, max(GUESSES // len(batches), 1), endpoint=False, dtype=int)
        for start, end in zip(wanted, [*wanted[1:], scored], strict=True):
            says = (place for place in range(start, end) if session.says(tokens[: first + place]))
            places += [place for place in [next(says, None)] if place is not None]
        guesses = [session.generate([tokens[: first + place]], 1).tokens[0, 0] for place in places]
        ends = np.array(session.ends, dtype=np.int64)
        found.append({TOKENS: np.array(guesses, np.int64), PLACES: np.array(places, np.int64), TEXT_ENDS: ends})
    save_batches(Path(out), found)
    return {"problems": [], "repeat_error": 0.0}


def write_on(session: Any, prompts: str, out: str, *, scores: bool) -> dict[str, Any]:
    """Continue every prompt of an .npz greedily, and hold each token against the session's own scoring, if it `scores`.
    Else `repeat_error` is the share of the first prompts' tokens that differ the second time.
    """
    from optimize.targets.runtimes.generating import logits_of

    found: list[dict[str, Any]] = []
    calls = [call_of(session, batch) for batch in load_batches(Path(prompts))]
    # all of them first: some runtimes have one model to generate and another to score, and hold one at a time
    written = [call.run() if scores else call.tell() for call in calls]
    for call, made in zip(calls, written, strict=True):
        expected = (len(call.prompts), int(call.batch[NEW]))
        if made.tokens.shape != expected:
            return {"problems": [f"tokens of {made.tokens.shape} for {expected}"], "repeat_error": 0.0}
        for index, (prompt, tokens) in enumerate(zip(call.prompts, made.tokens, strict=True)):
            if scores:
                logits = logits_of(session, prompt, tokens)
                found.append(score(logits, tokens) | {TOKENS: tokens, REGRET: regrets(logits, tokens)})
            else:
                ends = np.array(session.ends, dtype=np.int64)
                found.append({TOKENS: tokens, LOGPROBS: made.logprobs[index], TEXT_ENDS: ends})
    save_batches(Path(out), found)
    if scores:
        return {"problems": [], "repeat_error": 0.0}
    calls[0].renew()
    first = np.stack([each[TOKENS] for each in found[: len(calls[0].prompts)]])
    return {"problems": [], "repeat_error": float((calls[0].run().tokens != first).mean())}


def _wrong(logits: Any, tokens: int) -> list[str]:
    """What is wrong with the logits of one sequence by themselves."""
    if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != tokens:
        return [f"logits are {logits.dtype} of {list(logits.shape)} for {tokens} tokens"]
    bad = int((~np.isfinite(logits)).sum())
    return [f"logits has {bad} values that are NaN or infinite"] if bad else []
