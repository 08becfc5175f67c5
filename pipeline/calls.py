"""What a worker times of an open artifact: one call of each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from optimize.pipeline.batches import NEW, SOUND

WARM = 8  # tokens of the prompt that warms up


class Call:
    """What is timed of one batch: a forward pass, or a generation."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        self.run: Callable[[], Any] = partial(session.run, batch)
        self.warm = self.tell = self.run  # untimed: with a few tokens; with what else is known of each token
        self.prompts: list[Any] = []

    def timed(self) -> tuple[float, ...]:
        """Seconds of one call: all of it, then its parts."""
        start = time.perf_counter()
        outputs = self.run()
        total = time.perf_counter() - start
        return (total, *self.phases(outputs))

    def phases(self, outputs: Any) -> tuple[float, ...]:
        """Seconds of parts of a call, from what it returned."""
        return ()

    def renew(self) -> None:
        """Before each call, untimed: that a runtime has been asked the same before must not help it."""


class DeviceCall(Call):
    """Of a session that computes on a GPU: its inputs lie there before it is timed, its outputs stay there. Its seconds
    are the session's to tell: those between two events of the device, where it has them.
    """

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        self.batch, self.prompts = batch, []
        self.run = self.warm = self.tell = session.prepare(batch)
        self._seconds = session.seconds

    def timed(self) -> tuple[float, ...]:
        return (self._seconds(self.run),)


class GenerationCall(Call):
    """Warmed up by a few tokens: a whole call takes seconds."""

    def __init__(self, session: Any, batch: Mapping[str, Any]) -> None:
        from optimize.targets.runtimes.generating import generate

        self.batch, self._session = batch, session
        if SOUND in batch:
            self.prompts = list(batch[SOUND])
        else:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            self.prompts = [row[mask != 0] for row, mask in rows]
        self.run = partial(generate, session, self.prompts, int(batch[NEW]))
        self.tell = partial(generate, session, self.prompts, int(batch[NEW]), logprobs=True)
        self.warm = partial(generate, session, [self.prompts[0] if SOUND in batch else self.prompts[0][:WARM]], 2)

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
    taken = {name: batch[name] for name in session.inputs if name in batch}
    return DeviceCall(session, taken) if hasattr(session, "prepare") else Call(session, taken)
