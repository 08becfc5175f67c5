"""What a live model in a worker process does: the interfaces of targets/runtimes, and what their calls give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from optimize.pipeline.contract import Array, Batch


class Session(Protocol):
    """A live model in a worker process. It never returns a view of a buffer that the next call overwrites."""

    inputs: tuple[str, ...]

    def run(self, batch: Batch) -> dict[str, Array]:
        """One forward pass. Inputs are int64 arrays of [batch, sequence]; images float32 of [batch, channels, height,
        width]. Outputs are float32, by field name.
        """


class Generator(Protocol):
    """A live language model in a worker process: `prefill` begins, `step` goes on. Tokens are int64, logits float32.

    A runtime that gives no logits has `generate` in their place, and is judged by the tokens (see tokens.py).
    """

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence of [sequence]: [keep, vocabulary]."""

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        """Begin anew with prompts of [sequence] each, of any lengths, with room for that many tokens after each.

        Returns the logits of what comes next: [batch, vocabulary].
        """

    def step(self, tokens: Array) -> Array:
        """Append one token to each sequence, [batch]: the logits of what comes next, [batch, vocabulary]."""


class Transcriber(Protocol):
    """A live speech model in a worker process: a Generator whose prompts are clips, float32 of [mels, frames] each.

    What a transcription begins with is the checkpoint's own; what it never writes is far below all else in the logits.
    """

    def logits(self, clip: Array, tokens: Array) -> Array:
        """Of the positions before each of `tokens` of a transcription, [sequence]: [sequence, vocabulary]."""

    def prefill(self, clips: Sequence[Array], room: int) -> Array:
        """Begin anew: the logits of each transcription's first token, [batch, vocabulary]."""

    def step(self, tokens: Array) -> Array:
        """As a Generator's."""


@dataclass(frozen=True)
class Generation:
    """What was generated greedily, past any token that ends a text."""

    tokens: Array  # int64 of [batch, new]
    seconds: tuple[float, ...]  # from the call until each of a sequence's tokens was known
    logprobs: Array | None = None  # float32 of [batch, new], where a server tells them; NaN where it does not


@dataclass(frozen=True)
class Layers:
    """What an artifact computes on the way, for `optimize explain`: its layers' outputs in the order of execution."""

    outputs: tuple[Mapping[str, Array], ...]  # by batch, then by the layer's name
    products: Mapping[str, str]  # name of a product by weights -> what tells its weights from others in every kind
    overflow: str = ""  # transformers' report of the first module whose output is not finite
