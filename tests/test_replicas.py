"""Copies of a model in processes of their own: the eager model stands for any."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.pipeline.contract import Array, Kind, Placement
from optimize.pipeline.sessions import Generation
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.generating import generate
from optimize.targets.runtimes.replicas import Replicas
from tests.conftest import MakeCheckpoint

PROMPTS = [np.arange(3, 3 + length) for length in (4, 9, 6)]


class Copy:
    """An eager model with a loop of its own, and a few ways to fail."""

    def __init__(self, path: Path) -> None:
        self._model: Any = open_session(Kind.CHECKPOINT, path, "text-generation", 1)

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        """See Generator; of a prompt of one token it dies, of none it fails."""
        if not len(prompts[0]):
            raise ValueError("a prompt is empty")
        if len(prompts[0]) == 1:
            os._exit(9)
        return generate(self._model, prompts, new)

    def logits(self, tokens: Array, keep: int) -> Array:
        """See Generator; then where it runs."""
        if keep == 0:
            return np.array([os.getpid(), int(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0])])
        found: Array = self._model.logits(tokens, keep)
        return found


def test_prompts_are_divided_and_the_answers_are_the_same(make_language_model: MakeCheckpoint) -> None:
    model = make_language_model()
    copies = Replicas(partial(Copy, model), Placement(shards=2, replicas=2))
    one = Copy(model)
    found = copies.generate(PROMPTS, 5)
    for row, prompt in zip(found.tokens, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, one.generate([prompt], 5).tokens[0])
    assert len(found.seconds) == 5 and list(found.seconds) == sorted(found.seconds) and found.seconds[0] > 0
    assert copies.generate(PROMPTS[:1], 2).tokens.shape == (1, 2)  # fewer prompts than copies
    np.testing.assert_allclose(copies.logits(PROMPTS[1], 3), one.logits(PROMPTS[1], 3), atol=1e-5)
    process, device = copies.logits(PROMPTS[0], 0)
    assert process != os.getpid() and device == 0
    with pytest.raises(ValueError, match="a prompt is empty"):
        copies.generate([PROMPTS[0], np.array([], np.int64)], 2)
    with pytest.raises(RuntimeError, match="a replica died"):
        copies.generate([np.array([1]), PROMPTS[0]], 2)
