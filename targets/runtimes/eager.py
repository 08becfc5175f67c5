"""Transformers' eager model: the baseline, the reference, and what cast-dtype makes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.models.loading import load_model
from optimize.pipeline.contract import Array, Batch


class EagerSession:
    """A model as `from_pretrained` gives it, under inference mode."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.inputs = tuple(inspect.signature(model.forward).parameters)

    def run(self, batch: Batch) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = self._model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        return {name: to_numpy(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def open_session(path: Path, task: str, cores: int) -> EagerSession:
    torch.set_num_threads(cores)
    return EagerSession(load_model(path, task))


def to_numpy(tensor: torch.Tensor) -> Array:
    """A float32 array (numpy has no bfloat16); integers stay what they are."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array if array.dtype != np.float64 else array.astype(np.float32)
