"""What torch gives, as numpy."""

from __future__ import annotations

import numpy as np
import torch

from optimize.pipeline.contract import Array


def to_numpy(tensor: torch.Tensor) -> Array:
    """A float32 array (numpy has no bfloat16); integers stay what they are."""
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return array if array.dtype != np.float64 else array.astype(np.float32)
