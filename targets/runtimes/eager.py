"""Transformers' eager model: the baseline, the reference, and what cast-dtype makes."""

from __future__ import annotations

import contextlib
import inspect
import io
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria

from optimize.models.loading import load_model, quantized_by
from optimize.models.tasks import TASKS
from optimize.passes.compile_generate import COMPILING
from optimize.pipeline.contract import SPREAD, Array, Batch, Form
from optimize.pipeline.sessions import Generation, Layers
from optimize.targets.runtimes import weights_key
from optimize.targets.runtimes.packing import pack_int4
from optimize.targets.runtimes.tensors import to_numpy, to_torch

FRAMES = 3  # modules that are shown of an overflow: the one that overflows, and those before it


class EagerSession:
    """A model as `from_pretrained` gives it, under inference mode."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self.model = model
        self.device = device
        self.inputs = tuple(inspect.signature(model.forward).parameters)

    def run(self, batch: Batch) -> dict[str, Array]:
        with torch.inference_mode():
            inputs = {name: to_torch(array, self.model.dtype).to(self.device) for name, array in batch.items()}
            outputs = self.model(**inputs)
        return {name: to_numpy(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def work(self, batch: Batch) -> dict[str, int]:
        """What one call cannot do without: see roofline.Work. Attention is spelt out, so that it is counted too."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            outputs = self.run(batch)
        weights = {
            id(weight): weight.numel()
            for module in self.model.modules()
            if not isinstance(module, torch.nn.Embedding)  # which is looked up in, not multiplied by
            for weight in module.parameters(recurse=False)
            if weight.dim() > 1
        }
        arrays = sum(array.nbytes for array in (*batch.values(), *outputs.values()))
        return {"operations": counter.get_total_flops(), "weights": sum(weights.values()), "arrays": arrays}


class EagerGenerator(EagerSession):
    """A language model with its KV cache; `generate` is transformers' own, which is what a user has."""

    def logits(self, tokens: Array, keep: int) -> Array:
        with torch.inference_mode():
            ids = torch.from_numpy(tokens)[None].to(self.device)
            return to_numpy(self.model(ids, logits_to_keep=keep, use_cache=False).logits[0])

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        ids, self._mask = (each.to(self.device) for each in padded(prompts))
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            outputs = self.model(ids, attention_mask=self._mask, position_ids=positions, use_cache=True)
        self._cache = outputs.past_key_values
        return to_numpy(outputs.logits[:, -1])

    def step(self, tokens: Array) -> Array:
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        ids = torch.from_numpy(tokens)[:, None].to(self.device)
        with torch.inference_mode():
            outputs = self.model(
                ids, attention_mask=self._mask, past_key_values=self._cache,
                position_ids=self._mask.sum(-1, keepdim=True) - 1, use_cache=True,
            )  # fmt: skip
        self._cache = outputs.past_key_values
        return to_numpy(outputs.logits[:, -1])

    def generation_options(self, length: int) -> dict[str, Any]:
        """What `generate` is given besides, for sequences of at most `length` tokens."""
        return {}

    def generate(self, prompts: Sequence[Array], new: int) -> Generation:
        clock = _Clock()
        ids, mask = (each.to(self.device) for each in padded(prompts))
        with torch.inference_mode():
            tokens = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, stopping_criteria=[clock],
                **self.generation_options(ids.shape[1] + new),
            )  # fmt: skip
        return Generation(tokens[:, ids.shape[1] :].cpu().numpy(), tuple(clock.seconds))

    def work(self, batch: Batch) -> dict[str, int]:
        """Of one step after the prompt, for each of its rows: see roofline.Work."""
        prompts = [row[mask != 0] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        self.prefill(prompts, 1)
        cache = sum(array.nbytes for layer in self._cache.layers for array in (layer.keys, layer.values))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.step(np.zeros(len(prompts), dtype=np.int64))
        looked_up = {id(self.model.get_input_embeddings().weight)} - {id(self.model.get_output_embeddings().weight)}
        weights = {
            id(weight): weight.numel()
            for weight in self.model.parameters()
            if weight.dim() > 1 and id(weight) not in looked_up
        }
        return {"operations": counter.get_total_flops(), "weights": sum(weights.values()), "arrays": cache}


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was known; stops nothing."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def padded(prompts: Sequence[Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of any lengths as ids and mask of [batch, longest], padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def end_nowhere(model: Any) -> None:
    """Have `generate` go on past what ends a text: one that ends early would be timed as a fast one."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


def open_session(path: Path, task: str, cores: int, device: str = "cpu", dtype: str | None = None) -> EagerSession:
    torch.set_num_threads(cores)
    model = load_model(path, task, dtype, device)
    device = "cuda" if device == SPREAD else device  # where inputs go: the first of them
    if device != "cpu" and not TASKS[task].generates:
        from optimize.targets.runtimes.cuda import CudaSession

        return CudaSession(model, device)
    if device == "cpu" and quantized_by(path) == "torchao":
        pack_int4(model)
    if not TASKS[task].generates:
        return EagerSession(model)
    if TASKS[task].form is Form.CLIPS:
        from optimize.models.speech import read_decoding
        from optimize.targets.runtimes.transcribing import EagerTranscriber

        return EagerTranscriber(model, read_decoding(path), device)
    end_nowhere(model)
    if (path / COMPILING).is_file():
        from optimize.targets.runtimes.compiled import CompiledGenerator

        return CompiledGenerator(model, path)
    return EagerGenerator(model, device)


def layers(path: Path, task: str, batches: Sequence[Batch]) -> Layers:
    """The output of every module that has no module inside; one that is called again has #2 after its name."""
    session = open_session(path, task, torch.get_num_threads())
    products: dict[str, str] = {}
    outputs: list[dict[str, Array]] = []

    def record(name: str, module: Any, _: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return
        turn = sum(each.partition("#")[0] == name for each in outputs[-1])
        key = name if not turn else f"{name}#{turn + 1}"
        outputs[-1][key] = to_numpy(output)
        weight: Any = getattr(module, "weight", None)
        plain = type(weight) is torch.nn.Parameter  # torchao's are of types of their own
        if plain and weight.dim() >= 2 and not isinstance(module, torch.nn.Embedding):
            products[key] = weights_key(to_numpy(weight.detach()))

    leaves = [(name, module) for name, module in session.model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(partial(record, name)) for name, module in leaves]
    for batch in batches:
        outputs.append({})
        session.run({name: batch[name] for name in session.inputs if name in batch})
    for hook in hooks:
        hook.remove()
    finite = all(np.isfinite(array).all() for output in outputs for array in output.values())
    return Layers(tuple(outputs), products, "" if finite else _overflow(session, batches))


def _overflow(session: EagerSession, batches: Sequence[Batch]) -> str:
    """What transformers says of the first module that overflows: the largest numbers before it, and in it."""
    from transformers.debug_utils import DebugUnderflowOverflow

    printed = io.StringIO()
    DebugUnderflowOverflow(session.model, max_frames_to_save=FRAMES)
    with contextlib.redirect_stdout(printed), contextlib.suppress(ValueError):  # which it raises at the first one
        for batch in batches:
            session.run({name: batch[name] for name in session.inputs if name in batch})
    return printed.getvalue().strip()
