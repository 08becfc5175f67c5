"""What a worker times of an open artifact: one call of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from optimize.pipeline.batches import NEW

WARM = 8  # tokens of the prompt that warms up


class Call:
    """What is timed of one batch: a forward pass, or a generation."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        self.run: Callable[[], Any] = partial(session.run, batch)
        self.warm = self.tell = self.run  # untimed: with a few tokens; with what else is known of each token
        self.prompts: list[Any] = []

    def phases(self, outputs: Any) -> tuple[float, ...]:
        """Seconds of parts of a call, from what it returned."""
        return ()

    def renew(self) -> None:
        """Before each call, untimed: that a runtime has been asked the same before must not help it."""


class GenerationCall(Call):
    """Warmed up by a few tokens: a whole call takes seconds."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        from optimize.targets.runtimes.generating import generate

        self.batch, self._session = batch, session
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        self.prompts = [row[mask != 0] for row, mask in rows]
        self.run = partial(generate, session, self.prompts, int(batch[NEW]))
        self.tell = partial(generate, session, self.prompts, int(batch[NEW]), logprobs=True)
        self.warm = partial(generate, session, [self.prompts[0][:WARM]], 2)

    def phases(self, outputs: Any) -> tuple[float, ...]:
        first = outputs.seconds[0]
        return first, outputs.seconds[-1] - first

    def renew(self) -> None:
        if hasattr(self._session, "forget"):
            self._session.forget()


def call_of(session: Any, batch: Mapping[str, Any]) -> Call:
    """The call that a batch stands for; arrays that are no inputs of the session are left out."""
    if NEW in batch:
        return GenerationCall(session, batch)
    return Call(session, {name: batch[name] for name in session.inputs if name in batch})
