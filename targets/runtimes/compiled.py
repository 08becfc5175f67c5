"""A language model whose steps after the prompt run compiled, over a KV cache of fixed length: compile-generate's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config as shapes
from transformers import CompileConfig, StaticCache

from optimize.passes.compile_generate import COMPILING
from optimize.pipeline.contract import Array
from optimize.pipeline.sessions import Generation
from optimize.targets.runtimes.eager import EagerGenerator, padded
from optimize.targets.runtimes.tensors import to_numpy


class CompiledGenerator(EagerGenerator):
    """Whole texts are scored as they are in an eager model; prompts too run uncompiled, as in transformers' `generate`.

    The cache is as long as each call needs, which costs no compilation: its length is dynamic, and stays so where it
    happens to be that of a head, which torch would take for the same number for ever (duck shapes).
    """

    def __init__(self, model: Any, path: Path) -> None:
        super().__init__(model)
        model.generation_config.cache_implementation = None  # the cache is given
        self._config = CompileConfig(**json.loads((path / COMPILING).read_text(encoding="utf-8")))
        self._config._compile_all_devices = True  # else transformers compiles for accelerators alone

    def generation_options(self, length: int) -> dict[str, Any]:
        return {"past_key_values": self._new_cache(length), "compile_config": self._config}

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        with shapes.patch(use_duck_shape=False):
            return super().generate(prompts, new)

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        ids, mask = padded(prompts)
        self._lengths = mask.sum(dim=1, keepdim=True)
        self._mask = torch.nn.functional.pad(mask, (0, room), value=1)  # of all that may come: its shape stays
        self._cache = self._new_cache(self._mask.shape[1])
        return self._call(self.model, ids, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def step(self, tokens: Array) -> Array:
        self._lengths = self._lengths + 1
        compiled = self.model.get_compiled_call(self._config)
        with shapes.patch(use_duck_shape=False):
            return self._call(compiled, torch.from_numpy(tokens)[:, None], self._lengths - 1)

    def _call(self, model: Any, ids: torch.Tensor, positions: torch.Tensor) -> Array:
        with torch.inference_mode():
            outputs = model(
                ids, attention_mask=self._mask, past_key_values=self._cache, position_ids=positions, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        return to_numpy(outputs.logits[:, -1].clone())

    def _new_cache(self, length: int) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=length)
