"""A language or speech model whose prompt and steps are captured into CUDA graphs, over a KV cache of fixed length.

Each shape that is listed, [batch, prompt, new], has two graphs. That of the prompt fills the cache; that of a step
appends the token in its buffer to each sequence, and puts the likeliest next one there: greedy generation is replays
alone. On a processor the same work is done as it is, which is how it is tested there.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (CUDA graphs), https://huggingface.co/docs/transformers
(static KV cache)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimize.models.checkpoint import max_length, read_config
from optimize.models.speech import NEVER, WRITTEN, Decoding, read_decoding
from optimize.passes._cuda_graphs import Shape, attending, captured, fitting, prepared, read_settings
from optimize.passes._grouped_heads import GROUPED, group_heads
from optimize.pipeline.contract import Cell


class CapturedSteps:
    """One shape: buffers of what goes in and comes out, a cache, and the two graphs over them."""

    logits: Any = None  # of what comes next, [batch, vocabulary]; of the last replay

    def __init__(self, model: Any, call: Any, shape: Shape) -> None:
        """`call` is what computes: the model, or what was compiled of it."""
        import torch

        self.batch, self.prompt, self.new = shape
        self.length = self.prompt + self.new
        self.model, self._call, self._room = model, call, 0
        self._zeros: Any = lambda *sizes, dtype=torch.int64: torch.zeros(sizes, dtype=dtype, device=model.device)
        self.tokens = self._zeros(self.batch, 1)
        self._slot = self._zeros(1)  # of the cache, that the next tokens take from there on
        self._seen = self._zeros(self.batch, self.length, dtype=torch.bool)  # slots of it that are attended to
        self._cache = self.new_cache()

    def capture(self, pool: Any) -> None:
        """Into graphs whose memory is the pool's: no two of its graphs ever run at once."""
        import torch

        call, self._call = self._call, self.model
        with torch.inference_mode():
            self._take_prompt()  # makes the cache's tensors, which what is compiled then finds there
        self._call = call
        self._replay_prompt, self._replay_step = captured([self._take_prompt, self._take_step], pool, self.model.device)

    def begin(self, *inputs: Any) -> None:
        """Replay the prompt, on the host's tensors of [rows, ...] and no more rows than the shape has."""
        self.fill(*inputs)
        self._replay_prompt()
        self._room = self.new - 1

    def next(self, tokens: Any = None) -> None:
        """Replay a step, on those tokens of [rows], or on the likeliest. Raises ValueError where the cache is full."""
        if not self._room:
            raise ValueError(f"{self.new} tokens are written, and there is room for no more")
        if tokens is not None:
            self.tokens[: len(tokens), 0].copy_(tokens)
        self._replay_step()
        self._room -= 1

    def new_cache(self) -> Any:
        """Empty: its tensors are made at the first call. It is reset before a prompt is read."""
        cache = slotted(self.model.config, self.length, self._slot)
        window = min((layer.max_cache_len for layer in cache.layers), default=self.length)
        if window < self.length:
            raise ValueError(
                f"a cell of {self.length} tokens is longer than the {window} that some layers attend to: a captured "
                "cache keeps all"
            )
        return cache

    def fill(self, *inputs: Any) -> None:
        """Copy inputs into the buffers."""
        raise NotImplementedError

    def read(self) -> Any:
        """Logits behind the prompt, [batch, vocabulary], which the cache takes from its start."""
        raise NotImplementedError

    def append(self, mask: Any) -> Any:
        """Logits behind `tokens`, which attend to what a mask of [batch, 1, 1, length] has."""
        raise NotImplementedError

    def _as_taken(self, mask: Any) -> Any:
        """A mask of what is attended to as the model's attention takes it: any but torch's adds it."""
        import torch

        if self.model.config._attn_implementation == GROUPED:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _take_prompt(self) -> None:
        self._seen.zero_()
        self._slot.zero_()
        self._keep(self.read())
        self._slot.fill_(self.prompt)

    def _take_step(self) -> None:
        self._seen.index_fill_(1, self._slot, True)
        self._keep(self.append(self._as_taken(self._seen[:, None, None])))
        self._slot.add_(1)

    def _keep(self, logits: Any) -> None:
        if self.logits is None:
            self.logits = logits.clone()
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(dim=-1, keepdim=True))


class LanguageSteps(CapturedSteps):
    """Prompts are padded on the left."""

    def __init__(self, model: Any, call: Any, shape: Shape) -> None:
        super().__init__(model, call, shape)
        self._ids, self._mask = self._zeros(self.batch, self.prompt), self._zeros(self.batch, self.prompt)
        self._positions = self._zeros(self.batch, 1)  # of the next token in its text

    def fill(self, ids: Any, mask: Any) -> None:
        from torch.nn.functional import pad

        rows, tokens = ids.shape
        left, more = self.prompt - tokens, self.batch - rows
        self._ids.copy_(pad(ids, (left, 0, 0, more)))
        self._mask.copy_(pad(pad(mask, (left, 0)), (0, 0, 0, more), value=1))

    def read(self) -> Any:
        import torch

        self._cache.reset()
        self._seen[:, : self.prompt] = self._mask
        places = torch.arange(self.length, device=self._ids.device)
        earlier, own = (compare(places, places[: self.prompt, None]) for compare in (torch.le, torch.eq))
        mask = (self._seen[:, None] & earlier) | own  # padding sees itself: of nothing at all there is no average
        self._positions.copy_(self._mask.sum(dim=1, keepdim=True))
        return self._call(
            input_ids=self._ids, attention_mask=self._as_taken(mask[:, None]), past_key_values=self._cache,
            use_cache=True, logits_to_keep=1, position_ids=(self._mask.cumsum(dim=1) - 1).clamp(min=0),
        ).logits[:, -1]  # fmt: skip

    def append(self, mask: Any) -> Any:
        outputs = self._call(
            input_ids=self.tokens, attention_mask=mask, past_key_values=self._cache, position_ids=self._positions,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self._positions.add_(1)
        return outputs.logits[:, -1]


class SpeechSteps(CapturedSteps):
    """Clips, each with the tokens that every transcription begins with, and what is never written out of reach."""

    def __init__(self, model: Any, call: Any, shape: Shape, decoding: Decoding) -> None:
        import torch

        super().__init__(model, call, shape)
        self._sounds = _silence(model, self.batch)
        self._begins = torch.tensor([decoding.prompt] * self.batch, device=model.device)
        self._never, self._never_first = (
            torch.tensor(tokens, dtype=torch.int64, device=model.device)
            for tokens in (decoding.never, decoding.never + decoding.never_first)
        )

    def new_cache(self) -> Any:
        from transformers import EncoderDecoderCache

        config = self.model.config
        return EncoderDecoderCache(super().new_cache(), slotted(config, config.max_source_positions, self._zeros(1)))

    def fill(self, sounds: Any) -> None:
        self._sounds.zero_()
        self._sounds[: len(sounds)].copy_(sounds)

    def read(self) -> Any:
        import torch

        self._cache.reset()
        self._seen[:, : self.prompt] = True
        places = torch.arange(self.length, device=self._seen.device)
        mask = (places <= places[: self.prompt, None]).expand(self.batch, 1, self.prompt, self.length)
        outputs = self._call(
            input_features=self._sounds, decoder_input_ids=self._begins, decoder_attention_mask=self._as_taken(mask),
            past_key_values=self._cache, use_cache=True,
            decoder_position_ids=places[None, : self.prompt].expand(self.batch, -1),
        )  # fmt: skip
        self._encoded = outputs.encoder_last_hidden_state
        return outputs.logits[:, -1].index_fill(-1, self._never_first, float(NEVER))

    def append(self, mask: Any) -> Any:
        self._cache.is_updated = dict.fromkeys(self._cache.is_updated, True)
        outputs = self._call(
            encoder_outputs=(self._encoded,), decoder_input_ids=self.tokens, decoder_attention_mask=mask,
            past_key_values=self._cache, use_cache=True, decoder_position_ids=self._slot[None].expand(self.batch, -1),
        )  # fmt: skip
        return outputs.logits[:, -1].index_fill(-1, self._never, float(NEVER))


class CapturedGeneration:
    """A model with its shapes, each captured when it is opened."""

    def __init__(self, path: Path, model: Any) -> None:
        import torch

        settings = read_settings(path)
        group_heads(model)
        steps: Callable[..., CapturedSteps] = LanguageSteps
        inputs = {"input_ids": torch.ones((1, 2), dtype=torch.int64, device=model.device)}
        if hasattr(model, "get_encoder") and model.config.is_encoder_decoder:
            steps = partial(SpeechSteps, decoding=read_decoding(path))
            inputs = {"decoder_input_ids": inputs["input_ids"], "input_features": _silence(model, 1)}
        self.call = prepared(path, settings, model, inputs)
        pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._steps: dict[Shape, CapturedSteps] = {}
        with attending(settings):
            for shape in map(tuple, settings["shapes"]):
                self._steps[shape] = steps(model, self.call, shape)
                self._steps[shape].capture(pool)

    def fitting(self, batch: int, prompt: int, new: int) -> CapturedSteps | None:
        """Those of the smallest shape that takes so many, or None."""
        shape = fitting(self._steps, (batch, prompt, new))
        return None if shape is None else self._steps[shape]


def slotted(config: Any, length: int, slot: Any) -> Any:
    """A static cache of transformers' in which layers that have keys and values alone write from a slot on, of [1],
    which they have in common: each would count its own, by a kernel in every step.
    """
    import torch
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    class SlotLayer(StaticLayer):  # type: ignore[misc]
        def __init__(self, length: int) -> None:
            super().__init__(max_cache_len=length)
            self.slot = slot

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            places = self.slot + torch.arange(keys.shape[2], device=keys.device)
            self.keys.index_copy_(2, places, keys)
            self.values.index_copy_(2, places, values)
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            return self.slot[0] if self.is_initialized else 0

        def reset(self) -> None:
            """What is in it is overwritten, or not attended to."""

    cache, plain = StaticCache(config=config, max_cache_len=length), (StaticLayer, StaticSlidingWindowLayer)
    cache.layers = [SlotLayer(each.max_cache_len) if type(each) in plain else each for each in cache.layers]
    return cache


def language_shapes(workload: Sequence[Cell]) -> list[Shape]:
    """Those of the cells."""
    return list(dict.fromkeys((cell.batch, cell.sequence, cell.new) for cell in workload))


def speech_shapes(workload: Sequence[Cell], folder: Path) -> list[Shape]:
    """Those of the cells, and one clip transcribed to its end: it is what is judged."""
    prompt = len(read_decoding(folder).prompt)
    longest = min(WRITTEN, max_length(folder, read_config(folder)) - prompt)
    return list(dict.fromkeys([*((cell.batch, prompt, cell.new) for cell in workload), (1, prompt, longest)]))


def _silence(model: Any, batch: int) -> Any:
    """Features of so many clips."""
    import torch

    sizes = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return torch.zeros(sizes, dtype=model.dtype, device=model.device)
