"""Token ids from outside, checked first: of wrong ones some runtimes make nonsense, and some end the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from optimize.pipeline.contract import Array


def as_array(value: Any) -> Array:
    """A tensor, array or list as int64. Raises ValueError for what has no whole numbers."""
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "iub":
        raise ValueError(f"token ids are whole numbers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def check(batch: Mapping[str, Array], sizes: Mapping[str, int], longest: int) -> None:
    """Raise ValueError unless arrays are [batch, sequence] of one shape, at most `longest`, and below their size."""
    shape = batch["input_ids"].shape
    for name, size in sizes.items():
        if name in batch and batch[name].size and not 0 <= batch[name].min() <= batch[name].max() < size:
            raise ValueError(f"{name} has values outside of 0 to {size - 1}")
    if len(shape) == 2 and shape[1] > longest:
        raise ValueError(f"a sequence of {shape[1]} tokens is longer than the model's limit of {longest}")
    for name, array in batch.items():
        if array.ndim != 2 or array.shape != shape:
            raise ValueError(f"{name} has shape {list(array.shape)}, input_ids {list(shape)}: both [batch, sequence]")
