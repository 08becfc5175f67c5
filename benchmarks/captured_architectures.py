"""Which architectures of language models answer as eager does when they are captured, as `compile-cuda` captures them.

    python benchmarks/captured_architectures.py [--json benchmarks/results/captured-architectures.json] [NAME ...]

Each is made tiny from a seed, and computes on a processor in float32, where what is captured on a GPU is done as it is:
two prompts of unlike lengths, then three steps of given tokens. Told is the largest error, of the largest logit.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from optimize.passes._captured_generation import CapturedGeneration
from optimize.passes._cuda_graphs import GRAPHS
from optimize.passes.compile_cuda import ALIBI
from optimize.targets.runtimes.captured import CapturedGenerator
from optimize.targets.runtimes.eager import EagerGenerator

# what configurations call their sizes; each takes those that it has
SIZES: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rotary_dim": 8, "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
MOST = 30_000_000  # parameters of what is tiny
PROMPTS, TOKENS = (7, 5), (9, 17, 31)


def tiny(cls: Any) -> Any:
    """A seeded model. Raises ValueError where its configuration has sizes of other names."""
    plain = cls.config_class()
    sizes = {name: size for name, size in SIZES.items() if hasattr(plain, name)}
    if "qk_rope_head_dim" in sizes:  # keys are made of one latent vector, for each head
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    if getattr(plain, "layer_types", None):
        kinds = plain.layer_types
        sizes["layer_types"] = ["full_attention" if "full_attention" in kinds else kinds[0]] * 2
    with torch.device("meta"):
        parameters = sum(each.numel() for each in cls(cls.config_class(**sizes)).parameters())
    if parameters > MOST:
        raise ValueError(f"{parameters:,} parameters")
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # else attention is almost uniform, and a wrong mask does not show
    return model


def answers(session: Any) -> Any:
    """Logits of the prompts and of each step."""
    draw = np.random.default_rng(0)
    found = [session.prefill([draw.integers(3, 120, length) for length in PROMPTS], len(TOKENS) + 1)]
    return np.stack(found + [session.step(np.full(len(PROMPTS), token)) for token in TOKENS])


def tried(name: str) -> dict[str, Any]:
    cls = getattr(transformers, name)
    if not getattr(cls, "_can_compile_fullgraph", False):
        return {"left_out": "transformers has none that keeps to a cache of fixed length"}
    if cls.config_class.model_type in ALIBI:
        return {"left_out": "ALiBi"}
    try:
        model = tiny(cls)
        expected = answers(EagerGenerator(model, "cpu"))
    except Exception as error:  # whatever its configuration wants
        return {"not_made": f"{type(error).__name__}: {error}".splitlines()[0]}
    settings = {"shapes": [(2, max(PROMPTS), len(TOKENS) + 1)], "compile": False, "autotune": False, "fill": 0}
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / GRAPHS).write_text(json.dumps(settings))
            found = answers(CapturedGenerator(model, CapturedGeneration(Path(folder), model), "cpu"))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"error": float(np.abs(found - expected).max() / np.abs(expected).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "captured-architectures.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/captured_architectures.py", *sys.argv[1:]]),
        "torch": torch.__version__, "transformers": transformers.__version__, "architectures": {},
    }  # fmt: skip
    for name in arguments.names:
        found["architectures"][name] = tried(name)
        print(name, found["architectures"][name], flush=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
