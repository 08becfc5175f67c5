"""Whisper's kin in transformers' eager form: the baseline and the reference of speech, and what cast-dtype makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optimize.models.speech import FIRST, LATER, Decoding
from optimize.pipeline.batches import SOUND
from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.eager import EagerSession
from optimize.targets.runtimes.tensors import to_numpy, to_torch

CROSS = ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight")  # multiplied by once for each clip


class EagerTranscriber(EagerSession):
    """The encoder once for each batch of clips, then the decoder over its cache: see contract.Transcriber."""

    def __init__(self, model: Any, decoding: Decoding, device: str = "cpu") -> None:
        super().__init__(model, device)
        self.inputs = (SOUND,)
        self._decoding = decoding

    def logits(self, clip: Array, tokens: Array) -> Array:
        ids = np.array([[*self._decoding.prompt, *tokens[:-1]]])
        self._hear([clip])
        found = self._decode(ids, None)[0, len(self._decoding.prompt) - 1 :]
        return self._decoding.allowed(to_numpy(found), slice(1))

    def prefill(self, clips: Sequence[Array], room: int) -> Array:
        self._hear(clips)
        found = self._decode(np.array([self._decoding.prompt] * len(clips)), None)[:, -1]
        return self._decoding.allowed(to_numpy(found), FIRST)

    def step(self, tokens: Array) -> Array:
        return self._decoding.allowed(to_numpy(self._decode(tokens[:, None], self._cache)[:, -1]), LATER)

    def _hear(self, clips: Sequence[Array]) -> None:
        sounds = to_torch(np.stack(clips), self.model.dtype).to(self.device)
        with torch.inference_mode():
            self._heard = self.model.get_encoder()(sounds)

    def _decode(self, ids: Array, cache: Any) -> Any:
        with torch.inference_mode():
            outputs = self.model(
                encoder_outputs=self._heard, decoder_input_ids=torch.from_numpy(ids).to(self.device),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        self._cache = outputs.past_key_values
        return outputs.logits

    def work(self, batch: Batch) -> dict[str, int]:
        """Of one step after the prompt, for each of its clips: see roofline.Work."""
        self.prefill(list(batch[SOUND]), 1)
        caches = (self._cache.self_attention_cache, self._cache.cross_attention_cache)
        read = sum(array.nbytes for cache in caches for layer in cache.layers for array in (layer.keys, layer.values))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.step(np.zeros(len(batch[SOUND]), dtype=np.int64))
        decoder = self.model.get_decoder()
        weights = {
            id(weight): weight.numel()
            for name, weight in decoder.named_parameters()
            if weight.dim() > 1 and "embed_positions" not in name and not name.endswith(CROSS)
        }
        return {"operations": counter.get_total_flops(), "weights": sum(weights.values()), "arrays": read}
