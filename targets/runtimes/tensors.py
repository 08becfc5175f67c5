"""What torch takes and gives, from and as numpy."""

from __future__ import annotations

import numpy as np
import torch

from optimize.pipeline.contract import Array


def to_torch(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """As a tensor; floats (of images) in the dtype that the model computes in, as they must be given to it."""
    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def to_numpy(tensor: torch.Tensor) -> Array:
    """A float32 array (numpy has no bfloat16); integers stay what they are."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array if array.dtype != np.float64 else array.astype(np.float32)
