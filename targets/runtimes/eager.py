"""Transformers' eager model: the baseline, the reference, and what cast-dtype makes."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.models.loading import load_model
from optimize.pipeline.contract import Array, Batch, Layers
from optimize.targets.runtimes import weights_key

FRAMES = 3  # modules that are shown of an overflow: the one that overflows, and those before it


class EagerSession:
    """A model as `from_pretrained` gives it, under inference mode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inputs = tuple(inspect.signature(model.forward).parameters)

    def run(self, batch: Batch) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = self.model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        return {name: to_numpy(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def work(self, batch: Batch) -> dict[str, int]:
        """What one call cannot do without: see roofline.Work. Attention is spelt out, so that it is counted too."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

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


def open_session(path: Path, task: str, cores: int) -> EagerSession:
    torch.set_num_threads(cores)
    return EagerSession(load_model(path, task))


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
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding):
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


def to_numpy(tensor: torch.Tensor) -> Array:
    """A float32 array (numpy has no bfloat16); integers stay what they are."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array if array.dtype != np.float64 else array.astype(np.float32)
