"""What a server of language models is made for: the most sequences, and the longest, that are measured and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimize.models.language import RAGGED, WINDOW
from optimize.pipeline.contract import Cell

LONGEST = 4096  # tokens of a sequence, where no cell is longer: questions may be


@dataclass(frozen=True)
class Limits:
    """The most that it is built for."""

    batch: int
    prompt: int  # tokens
    sequence: int  # tokens of the prompt and after it
    tokens: int  # that are computed at once


JUDGED = Limits(batch=len(RAGGED), prompt=WINDOW, sequence=LONGEST, tokens=LONGEST)


def limits_of(cells: Sequence[Cell], longest: int, least: Limits = JUDGED) -> Limits:
    """What the cells of a workload take, and what judging takes (`least`): of a model that takes `longest` tokens."""
    prompt = max(least.prompt, *(cell.sequence for cell in cells))
    sequence = max(least.sequence, prompt + 1, *(cell.sequence + cell.new for cell in cells))
    batch = max(least.batch, *(cell.batch for cell in cells))
    tokens = max(least.tokens, *(cell.batch * cell.sequence for cell in cells))
    return Limits(batch, min(prompt, longest), min(sequence, longest), max(tokens, min(sequence, longest)))
