"""What llama.cpp calls the architectures that convert-gguf writes, and where its graphs want weights otherwise.

Every entry is a claim that the gate tests: a wrong one gives other outputs than the reference.
Source: https://github.com/ggml-org/llama.cpp (docs/development/HOWTO-add-model.md), the GGUF specification
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF."""

    name: str
    paired_rope: bool = False  # rotates neighbours, where transformers rotates halves: rows of q and k are reordered
    norm_offset: float = 0.0  # added to the weights of norms, which transformers adds when it runs
    conv1d: tuple[str, ...] = ()  # endings of weights that are stored transposed
    check: Callable[[Config], str | None] = lambda config: None  # why a config cannot be written


def _gemma3(config: Config) -> str | None:
    pattern = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention"
               for index in range(config["num_hidden_layers"])]  # fmt: skip
    if config.get("layer_types", pattern) != pattern:
        return "its full-attention layers are not every sixth, which llama.cpp takes for granted"
    if config.get("query_pre_attn_scalar", config["head_dim"]) != config["head_dim"]:
        return "query_pre_attn_scalar is not head_dim, which llama.cpp takes for granted"
    return None


def _qwen3_moe(config: Config) -> str | None:
    if not config.get("norm_topk_prob"):
        return "norm_topk_prob is off, and llama.cpp always normalizes"
    return "dense layers among the experts" if config.get("mlp_only_layers") else None


FAMILIES = {
    "LlamaForCausalLM": Family("llama", paired_rope=True),
    "MistralForCausalLM": Family("llama", paired_rope=True),
    "MixtralForCausalLM": Family("llama", paired_rope=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe", check=_qwen3_moe),
    "Gemma3ForCausalLM": Family("gemma3", norm_offset=1.0, check=_gemma3),
    "Phi3ForCausalLM": Family("phi3"),
    "GPT2LMHeadModel": Family("gpt2", conv1d=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}


def rope(config: Config) -> Config:
    """The rotary parameters of the layers with full attention, as transformers 5 writes them and as 4 did."""
    found: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found)
    return {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)} | {
        key: value for key, value in found.items() if value is not None
    }


def why_not(architecture: str, config: Config) -> str | None:
    """Why a checkpoint of that architecture and config cannot be written, or None."""
    family = FAMILIES.get(architecture)
    if family is None:
        return f"{architecture} is none of those that it knows: {', '.join(FAMILIES)}"
    kind = rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        return f"rotary positions of type {kind} are not written yet"
    if config.get("attention_bias") and family.paired_rope:
        return "biases of rotated attention are not written yet"
    return family.check(config)
