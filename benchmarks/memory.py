"""Peak memory as the plan predicts it and as it is measured, on language models of about 0.1, 0.5 and 2 GB.

    python benchmarks/memory.py [--json benchmarks/results/memory.json] [--models 0.1,0.5,2] [--recipes NAME,...]

The models are made here, from a config and a seed, with a tokenizer trained on the text that ships with optimize. The
largest is in bfloat16, in shards, the others in float32. The workload is the least that shows a peak; times mean
nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optimize.models.examples import SHIPPED
from optimize.pipeline.manifest import host_of
from optimize.targets.cpu import probe

RECIPES = ("eager-bf16", "openvino-int8-weights", "openvino-int8-weights-smooth", "gguf-q8_0", "genai-int8",
           "compiled-bf16")  # fmt: skip
SLOW = {"2": ("openvino-int8-weights-smooth", "compiled-bf16")}  # over three minutes to build, or to compile
SIZES = {
    "0.1": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_key_value_heads": 1},
    "0.5": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_key_value_heads": 3},
    "2": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 15, "num_key_value_heads": 8},
}
QUICK = ("--workload", "1x32+4", "--budget", "1s", "--max-drop", "1", "--min-speedup", "0.0001", "--max-load", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    arguments = parser.parse_args()
    results = []
    for name in arguments.models.split(","):
        recipes = [recipe for recipe in arguments.recipes.split(",") if recipe not in SLOW.get(name, ())]
        with tempfile.TemporaryDirectory() as scratch:
            results.append({"gigabytes": name, "skipped": SLOW.get(name, ())} | measure(Path(scratch), name, recipes))
        for what, predicted, measured in rows(results[-1]):
            print(
                f"{name:>4} GB  {what:<60} {predicted >> 20:6} MiB predicted, {measured >> 20:6} measured", flush=True
            )
        if arguments.json:  # after each: the largest takes long
            write(arguments.json, results)


def write(path: Path, results: list[dict[str, Any]]) -> None:
    host = host_of(probe())
    found = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "host": {"device": host.target.device, "cores": host.target.cores, "memory": host.target.memory,
                 "system": host.system, "python": host.python, "packages": host.packages},
        "models": results,
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n")


def measure(scratch: Path, name: str, recipes: list[str]) -> dict[str, Any]:
    """Make one model, run `optimize` on it, and read what it reports."""
    model, text = scratch / "model", scratch / "text.jsonl"
    make(model, name)
    text.write_text("\n".join(SHIPPED.read_text(encoding="utf-8").splitlines()[::4]), encoding="utf-8")
    words = [model, "--data", text, "--cache", scratch / "cache", "--out", scratch / "out", *QUICK]
    words += ["--json", scratch / "report", *(word for recipe in recipes for word in ("--recipe", recipe))]
    subprocess.run([sys.executable, "-m", "optimize.pipeline.cli", *words], check=False)  # its code is about speed
    report = json.loads((scratch / "report").read_text())
    weights = sorted(path.stat().st_size for path in model.glob("*.safetensors"))
    step = ("text", "predicted_memory", "peak_memory")
    candidates = [
        {
            "recipe": each["recipe"],
            "status": each["status"],
            "reason": each["reason"],
            "artifact_bytes": each["size"],
            "steps": [{key: made[key] for key in step} for made in each["steps"]],
            "predicted_memory": each["predicted_memory"],
            "opened_memory": each["peak_memory"],
            "peak_memory": each["judged_memory"],
        }
        for each in report["candidates"]
    ]
    return {
        "parameters": report["checkpoint"]["parameters"], "dtype": report["checkpoint"]["dtype"],
        "shard_bytes": weights, "exit_code": report["exit_code"],
        "reference": report["reference"],
        "baseline": {key: report["baseline"][key] for key in ("predicted_memory", "peak_memory")},
        "left_out": report["left_out"], "candidates": candidates,
    }  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, int, int]]:
    """What was predicted and measured, once each: recipes share steps."""
    found = {"reference": result["reference"], "baseline": result["baseline"]}
    for each in result["candidates"]:
        found |= {f"build {step['text']}": step for step in each["steps"]}
        if each["peak_memory"]:
            found[f"run {each['recipe']}"] = each
    return [(what, each["predicted_memory"], each["peak_memory"]) for what, each in found.items()]


def make(folder: Path, name: str) -> None:
    """A Llama of seeded weights: bfloat16 in shards of 0.7 GB where it is large."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    dtype = torch.bfloat16 if name == "2" else torch.float32
    sizes = SIZES[name]
    config = LlamaConfig(
        vocab_size=49152, tie_word_embeddings=True, head_dim=64, num_attention_heads=sizes["hidden_size"] // 64,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="700MB")
    torch.set_default_dtype(torch.float32)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>", "<pad>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([SHIPPED.read_text(encoding="utf-8")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
