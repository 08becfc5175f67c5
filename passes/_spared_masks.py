"""No mask where nothing is masked, in transformers' attention.

Up to 5.17, transformers makes a mask of ones wherever a model is traced or captured. Its last axis is one value that
is repeated, which none of torch's fast kernels for attention takes: what is left computes in float32, step by step.
"""

from __future__ import annotations

from typing import Any

SPARED = "spared"  # the name of our attention for transformers


def spare_masks(model: Any) -> None:
    """Have attention to all of the sequence take no mask, in a model that is given none and attends by torch's SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(SPARED, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SPARED, _mask)
    model.set_attn_implementation(SPARED)


def _mask(*, attention_mask: Any = None, local_size: int | None = None, **options: Any) -> Any:
    """As transformers' mask functions; `allow_is_bidirectional_skip` is said of what attends to all, both ways."""
    from transformers.masking_utils import sdpa_mask

    if options.get("allow_is_bidirectional_skip") and attention_mask is None and local_size is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **options)
