"""Attention of our own in the place of torch's, in transformers' models.

Source: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TORCHS = "sdpa"  # transformers' name for it


def attend_by(
    model: Any, name: str, *, attention: Callable[..., Any] | None = None, mask: Callable[..., Any] | None = None
) -> None:
    """Have a model that attends by torch's SDPA do so by these functions under that name, which are as transformers'
    are; by its own for SDPA, where there is none. One that attends in another way stays as it is.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != TORCHS:
        return
    ALL_ATTENTION_FUNCTIONS.register(name, attention or ALL_ATTENTION_FUNCTIONS[TORCHS])
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask or ALL_MASK_ATTENTION_FUNCTIONS[TORCHS])
    model.set_attn_implementation(name)
