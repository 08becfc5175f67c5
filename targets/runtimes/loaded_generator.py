"""`optimize.load` of a language model: transformers' own `generate`, over the artifact's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimize.models.checkpoint import max_length, read_config
from optimize.pipeline.manifest import Manifest
from optimize.targets.runtimes import open_session, token_ids


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
        self.longest = max_length(folder, read_config(folder))  # tokens, prompt and new ones together
        self.place = torch.nn.Parameter(torch.zeros(0), requires_grad=False)  # where `generate` looks for the device
        has_own = (folder / "generation_config.json").is_file()
        self.generation_config = (
            transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
            if has_own
            else transformers.GenerationConfig.from_model_config(self.config)
        )
        self.generation_config.use_cache = False  # of transformers: the runtime has its own
        self.generation_config.cache_implementation = None
        target = manifest.report.host.target
        self._session: Any = open_session(
            manifest.kind, folder, checkpoint.task, target.cores, None, target.device_type
        )
        self._seen: torch.Tensor | None = None  # what the runtime has read, [batch, sequence]
        self._mask: torch.Tensor | None = None  # of its prompts
        self._room = 0

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """As transformers' `generate`, greedy or sampled: token ids of [batch, prompt + new].

        Raises ValueError for ids or a mask that do not fit the model, and for more tokens than it has positions.
        """
        given = inputs if inputs is not None else options.pop("input_ids", None)
        if given is None:
            raise ValueError("input_ids is missing")
        ids, mask = self._checked(given, options.pop("attention_mask", None))
        options.pop("use_cache", None)  # it is the runtime's
        config = options.get("generation_config") or self.generation_config
        new = options.get("max_new_tokens") or config.max_new_tokens
        longest = options.get("max_length") or config.max_length or 20
        self._room = int(new or max(longest - ids.shape[1], 1))
        if ids.shape[1] + self._room > self.longest:
            raise ValueError(
                f"{ids.shape[1]} tokens and {self._room} new ones are more than the model's limit of {self.longest}"
            )
        self._seen = None
        with torch.inference_mode():
            return super().generate(ids, attention_mask=mask, use_cache=False, **options)

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """All that was read and written so far: `forward` sees what of it is new."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Logits of what comes after the last token, [batch, 1, vocabulary]."""
        if options.get("labels") is not None:
            raise ValueError("labels: the artifact gives no loss")
        ids, mask = self._checked(input_ids, attention_mask)
        if self._seen is not None and ids.shape[1] == self._seen.shape[1] + 1 and torch.equal(ids[:, :-1], self._seen):
            logits = self._session.step(ids[:, -1].numpy())
        else:
            prompts = [row[keep != 0].numpy() for row, keep in zip(ids, mask, strict=True)]
            logits = self._session.prefill(prompts, self._room)
        self._seen = ids.clone()
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.ascontiguousarray(logits))[:, None])

    def _checked(self, input_ids: Any, attention_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of one shape, with a token in every row."""
        ids = token_ids.as_array(input_ids)
        batch = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if attention_mask is None else token_ids.as_array(attention_mask),
        }
        token_ids.check(batch, {"input_ids": self.config.get_text_config().vocab_size}, self.longest)
        if not ids.size or not batch["attention_mask"].any(axis=1).all():
            raise ValueError("a prompt is empty")
        return torch.from_numpy(ids), torch.from_numpy(batch["attention_mask"])
