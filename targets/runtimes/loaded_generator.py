"""`optimize.load` of a language model: transformers' own `generate`, over the artifact's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimize.pipeline.manifest import Manifest
from optimize.targets.runtimes import open_session


class LoadedGenerator(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]
    """A model without weights of its own. The runtime keeps the cache: a call that goes on from the last one costs one
    step, any other begins anew.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        checkpoint = manifest.report.checkpoint
        super().__init__(
            transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
        self.manifest = manifest
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)  # where `generate` looks for the device
        has_own = (folder / "generation_config.json").is_file()
        self.generation_config = (
            transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
            if has_own
            else transformers.GenerationConfig.from_model_config(self.config)
        )
        self.generation_config.use_cache = False  # of transformers: the runtime has its own
        self.generation_config.cache_implementation = None
        self._session: Any = open_session(manifest.kind, folder, checkpoint.task, manifest.report.host.target.cores)
        self._seen: torch.Tensor | None = None  # what the runtime has read, [batch, sequence]
        self._mask: torch.Tensor | None = None  # of its prompts
        self._room = 0

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """As transformers' `generate`, greedy or sampled: token ids of [batch, prompt + new]."""
        given = inputs if inputs is not None else options.pop("input_ids", None)
        if given is None:
            raise ValueError("input_ids is missing")
        ids = torch.as_tensor(given)
        if options.get("attention_mask") is not None:
            options["attention_mask"] = torch.as_tensor(options["attention_mask"])
        config = options.get("generation_config") or self.generation_config
        new = options.get("max_new_tokens") or config.max_new_tokens
        longest = options.get("max_length") or config.max_length or 20
        self._room = int(new or max(longest - ids.shape[1], 1))
        self._seen = None
        with torch.inference_mode():
            return super().generate(ids, use_cache=False, **options)

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """All that was read and written so far: `forward` sees what of it is new."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Logits of what comes after the last token, [batch, 1, vocabulary]."""
        ids = torch.as_tensor(input_ids)
        if self._seen is not None and ids.shape[1] == self._seen.shape[1] + 1 and torch.equal(ids[:, :-1], self._seen):
            logits = self._session.step(ids[:, -1].numpy())
        else:
            mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
            prompts = [row[keep != 0].numpy().astype(np.int64) for row, keep in zip(ids, mask, strict=True)]
            logits = self._session.prefill(prompts, self._room)
        self._seen = ids.clone()
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.ascontiguousarray(logits))[:, None])
