"""Whisper's kin as two OpenVINO graphs: see passes/_openvino_speech.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from optimize.models.speech import FIRST, LATER, read_decoding
from optimize.passes._openvino_speech import CROSS, ENCODER
from optimize.passes.convert_openvino import IR
from optimize.pipeline.batches import SOUND
from optimize.pipeline.contract import Array


class OpenvinoTranscriber:
    """The encoder fills the decoder's states once for each batch of clips: see contract.Transcriber."""

    inputs: tuple[str, ...] = (SOUND,)

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        core = openvino.Core()
        self._encoder, self._decoder = (
            core.compile_model(path / name, "CPU", options).create_infer_request() for name in (ENCODER, IR)
        )
        self._decoding = read_decoding(path)

    def logits(self, clip: Array, tokens: Array) -> Array:
        steps = [self._begin([clip]), *(self._next(np.array([token])) for token in tokens[:-1])]
        return self._decoding.allowed(np.concatenate(steps), slice(1))

    def prefill(self, clips: Sequence[Array], room: int) -> Array:
        return self._decoding.allowed(self._begin(clips), FIRST)

    def step(self, tokens: Array) -> Array:
        return self._decoding.allowed(self._next(tokens), LATER)

    def _begin(self, clips: Sequence[Array]) -> Array:
        self._encoder.infer({0: np.stack(clips)}, share_inputs=True)
        self._decoder.reset_state()
        crossed = sorted((each for each in self._decoder.query_state() if CROSS in each.name), key=_place)
        for index, state in enumerate(crossed):
            state.state = self._encoder.get_output_tensor(index)
        for token in self._decoding.prompt:
            found = self._next(np.full(len(clips), token))
        return found

    def _next(self, tokens: Array) -> Array:
        rows = np.arange(len(tokens), dtype=np.int32)
        self._decoder.infer({"decoder_input_ids": tokens[:, None].astype(np.int64), "beam_idx": rows})
        return np.array(self._decoder.get_output_tensor(0).data[:, -1], dtype=np.float32)


def _place(state: Any) -> tuple[int, bool]:
    """A state's layer, keys before values, by its name (`...layers.3.values`): as the encoder gives them."""
    layer, what = state.name.rsplit("layers.", 1)[1].split(".", 1)
    return int(layer), what == "values"
